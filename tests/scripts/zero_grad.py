"""An autoencoder. The mistake: gradients are never cleared, and backward adds to what is there.

PyTorch tutorial "Zeroing out gradients in PyTorch".
"""

import sys

import torch
from torch import nn

BUG = "--bug" in sys.argv
torch.manual_seed(8)
auto = nn.Sequential(nn.Linear(30, 12), nn.ReLU(), nn.Linear(12, 4), nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 30))
basis = torch.randn(4, 30)
opt = torch.optim.Adam(auto.parameters(), lr=1e-3)
loss_fn = nn.MSELoss()
for step in range(40):
    x = torch.randn(64, 4) @ basis
    loss = loss_fn(auto(x), x)
    loss.backward()
    opt.step()
    if not BUG:
        opt.zero_grad()
    if step % 10 == 0:
        print(step, loss.item())
