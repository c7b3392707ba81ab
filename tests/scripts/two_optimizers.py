"""A body and a head that are trained by optimizers of their own. The mistake: the layer between is held by neither.

Seen in zjunlp/HVPNeT issue 5, where parameters were collected group by group.
"""

import sys

import torch
from torch import nn

BUG = "--bug" in sys.argv
torch.manual_seed(15)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU())
        self.bridge = nn.Linear(48, 24)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(24, 5))

    def forward(self, x):
        return self.head(self.bridge(self.body(x)))


net = Net()
body = torch.optim.AdamW(net.body.parameters(), lr=1e-3)
rest = [*net.head.parameters()] if BUG else [*net.bridge.parameters(), *net.head.parameters()]
head = torch.optim.SGD(rest, lr=0.1, momentum=0.9)
for step in range(40):
    x = torch.randn(32, 12)
    loss = nn.functional.cross_entropy(net(x), x[:, :5].argmax(1))
    body.zero_grad()
    head.zero_grad()
    loss.backward()
    body.step()
    head.step()
print(loss.item())
