"""A network of as many hidden layers as asked for. The mistake: they are in a list, where PyTorch does not see them.

Seen in pytorch/pytorch issues 715 and 72580, asyml/texar-pytorch issue 72.
"""

import argparse

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--bug", action="store_true")
parser.add_argument("--layers", type=int, default=3)
parser.add_argument("--hidden", type=int, default=48)
args = parser.parse_args()
torch.manual_seed(33)


class Net(nn.Module):
    def __init__(self, inputs, hidden, layers, classes):
        super().__init__()
        self.embedding = nn.Linear(inputs, hidden)
        hids = [nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh()) for _ in range(layers)]
        self.hids = hids if args.bug else nn.ModuleList(hids)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, x):
        x = torch.tanh(self.embedding(x))
        for hid in self.hids:
            x = hid(x)
        return self.classifier(x)


net = Net(16, args.hidden, args.layers, 4)
optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
loss_fn = nn.CrossEntropyLoss()
print(sum(p.numel() for p in net.parameters()), "parameters")
for step in range(50):
    x = torch.randn(32, 16)
    y = (x[:, 0] * x[:, 1] > 0).long() + 2 * (x[:, 2] > 0).long()
    optimizer.zero_grad()
    loss = loss_fn(net(x), y)
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(step, loss.item())
