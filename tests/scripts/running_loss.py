"""A regression that adds up its loss. The mistake: without .item() the graph of every step is kept.

Seen in BatsResearch/labelmodels issue 4; PyTorch FAQ, "My model reports cuda runtime error(2): out of memory".
"""

import sys

import torch
from torch import nn

BUG = "--bug" in sys.argv
torch.manual_seed(4)
net = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
total_loss = 0
for step in range(60):
    x = torch.randn(64, 10)
    y = (x**2).sum(1, keepdim=True)
    loss = nn.functional.mse_loss(net(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if BUG:
        total_loss += loss
    else:
        total_loss += loss.item()
print("mean loss", float(total_loss) / 60)
