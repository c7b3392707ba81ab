"""Regression with nn.MSELoss. The mistake: predictions are [N, 1], targets [N], and the loss compares each with all.

Seen in pytorch/pytorch issue 16045, jsboige/CoursIA pull request 926.
"""

import sys
import warnings

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

BUG = "--bug" in sys.argv
warnings.filterwarnings("ignore")
torch.manual_seed(50)


class PatchModel(nn.Module):
    """Forecasts the next value of a series from patches of it."""

    def __init__(self, length=24, patch=4, d=32):
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch, d)
        self.position = nn.Parameter(0.02 * torch.randn(length // patch, d))
        layer = nn.TransformerEncoderLayer(d, 4, 64, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(d * length // patch, 1)

    def forward(self, x):
        x = self.embed(x.unfold(1, self.patch, self.patch)) + self.position
        return self.head(self.encoder(x).flatten(1))


def train_epoch(model, dl, opt, loss_func):
    model.train()
    total = 0.0
    for xb, yb in dl:
        pred = model(xb)
        loss = loss_func(pred, yb if BUG else yb.view_as(pred))
        loss.backward()
        opt.step()
        opt.zero_grad()
        total += loss.item()
    return total / len(dl)


time = torch.arange(25)
series = torch.sin((0.3 + 0.4 * torch.rand(320, 1)) * time + 6.28 * torch.rand(320, 1)) * (0.5 + torch.rand(320, 1))
train_dl = DataLoader(TensorDataset(series[:, :-1], series[:, -1]), batch_size=16, shuffle=True)
model = PatchModel()
opt = torch.optim.Adam(model.parameters(), lr=1e-3)
for epoch in range(3):
    print(f"epoch {epoch}: {train_epoch(model, train_dl, opt, nn.MSELoss()):.4f}")
