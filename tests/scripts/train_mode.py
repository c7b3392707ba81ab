"""Character model with a validation after each epoch. The mistake: nobody calls model.train() afterwards.

Seen in tk-rusch/coRNN issue 1, shubhamagarwal92/mmd issue 14, wkentaro/pytorch-fcn pull request 56.
"""

import sys

import torch
import torch.nn as nn

BUG = "--bug" in sys.argv
torch.manual_seed(1)
text = "the quick brown fox jumps over the lazy dog. pack my box with five dozen liquor jugs. " * 40
chars = sorted(set(text))
data = torch.tensor([chars.index(c) for c in text])


class CharRNN(nn.Module):
    def __init__(self, vocab, hidden=48):
        super().__init__()
        self.emb = nn.Embedding(vocab, hidden)
        self.rnn = nn.GRU(hidden, hidden, batch_first=True)
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(hidden, vocab)

    def forward(self, x):
        h, _ = self.rnn(self.emb(x))
        return self.out(self.drop(h))


def get_batch(n=12, t=32):
    idx = torch.randint(0, len(data) - t - 1, (n,))
    return torch.stack([data[i : i + t] for i in idx]), torch.stack([data[i + 1 : i + t + 1] for i in idx])


def evaluate(model):
    model.eval()
    with torch.no_grad():
        x, y = get_batch()
        loss = nn.functional.cross_entropy(model(x).transpose(1, 2), y)
    return loss.item()


model = CharRNN(len(chars))
opt = torch.optim.Adam(model.parameters(), 2e-3)
model.train()
for epoch in range(5):
    if not BUG:
        model.train()
    for _ in range(8):
        x, y = get_batch()
        loss = nn.functional.cross_entropy(model(x).transpose(1, 2), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    print("epoch", epoch, "train", loss.item(), "val", evaluate(model))
