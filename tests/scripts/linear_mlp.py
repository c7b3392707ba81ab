"""A table of numbers and categories, read by an MLP. The mistake: there is no activation between its layers.

Seen in somepago/saint issue 23, YujiaBao/ls issue 1, Nota-NetsPresso/netspresso-trainer issue 320.
"""

import sys

import torch
import torch.nn as nn
import torch.optim as optim

BUG = "--bug" in sys.argv
torch.manual_seed(48)


class MLP(nn.Module):
    def __init__(self, dims):
        super().__init__()
        layers = []
        for i, (dim_in, dim_out) in enumerate(zip(dims[:-1], dims[1:])):
            layers.append(nn.Linear(dim_in, dim_out))
            if not BUG and i < len(dims) - 2:
                layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


class TabularNet(nn.Module):
    def __init__(self, categories=(5, 7, 4), continuous=6, hidden=64, classes=2):
        super().__init__()
        self.embeds = nn.ModuleList(nn.Embedding(n, 8) for n in categories)
        self.norm = nn.BatchNorm1d(continuous)
        self.mlp = MLP([8 * len(categories) + continuous, hidden, hidden, classes])

    def forward(self, x_categ, x_cont):
        parts = [embed(x_categ[:, i]) for i, embed in enumerate(self.embeds)]
        return self.mlp(torch.cat([*parts, self.norm(x_cont)], dim=-1))


model = TabularNet()
criterion = nn.CrossEntropyLoss()
optimizer = optim.AdamW(model.parameters(), lr=5e-3)
for epoch in range(5):
    model.train()
    running_loss = 0.0
    for i in range(10):
        x_categ = torch.stack([torch.randint(n, (64,)) for n in (5, 7, 4)], dim=1)
        x_cont = torch.randn(64, 6)
        y = ((x_cont[:, 0] * x_cont[:, 1] > 0) ^ (x_categ[:, 0] == 2)).long()
        optimizer.zero_grad()
        loss = criterion(model(x_categ, x_cont), y)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
    print(f"epoch {epoch} loss {running_loss / 10:.4f}")
