"""A text classifier that stacks its features. The mistake: torch.tensor copies numbers, and the graph is lost.

PyTorch documentation of torch.tensor: "When data is a tensor ... this is equivalent to x.detach().clone()".
"""

import sys
import warnings

import torch
from torch import nn

BUG = "--bug" in sys.argv
torch.manual_seed(12)
warnings.simplefilter("ignore")


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.word = nn.Sequential(nn.Linear(16, 32), nn.Tanh())
        self.out = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, tokens):
        words = self.word(self.embed(tokens)).mean(1)
        if BUG:
            words = torch.tensor(words)
        return self.out(words)


model = Reader()
opt = torch.optim.Adam(model.parameters(), lr=3e-3)
loss_fn = nn.CrossEntropyLoss()
for i in range(30):
    tokens = torch.randint(50, (24, 9))
    loss = loss_fn(model(tokens), tokens[:, 0] % 4)
    opt.zero_grad()
    loss.backward()
    opt.step()
print(loss.item())
