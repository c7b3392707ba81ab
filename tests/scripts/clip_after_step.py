"""An LSTM tagger with clipped gradients. The mistake: they are clipped when the update is over.

Seen in VGraphRNN/VGRNN issue 4, awslabs/graphstorm issue 1366, jongwook/onsets-and-frames issue 24.
"""

import sys

import torch
from torch import nn

BUG = "--bug" in sys.argv
torch.manual_seed(6)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.lstm = nn.LSTM(32, 32, num_layers=2, batch_first=True, bidirectional=True)
        self.tag = nn.Linear(64, 6)

    def forward(self, words):
        return self.tag(self.lstm(self.embed(words))[0])


model = Tagger()
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
for step in range(40):
    words = torch.randint(50, (16, 12))
    tags = (words + words.roll(1, dims=1)) % 6
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(words).reshape(-1, 6), tags.reshape(-1))
    loss.backward()
    if not BUG:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()
    if BUG:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
print(loss.item())
