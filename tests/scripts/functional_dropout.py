"""Text matching with F.dropout in the attention. The mistake: it is not told the mode, so that it never ends.

Seen in rixwew/pytorch-fm issue 21, Coderx7/SimpleNet issue 2; pytorch/pytorch issue 26338.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn, optim

BUG = "--bug" in sys.argv
torch.manual_seed(2)


class AttentionPool(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.score = nn.Linear(dim, 1)

    def forward(self, h):
        w = torch.softmax(self.score(h), dim=1)
        w = F.dropout(w, p=0.1) if BUG else F.dropout(w, p=0.1, training=self.training)
        return (w * h).sum(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 24)
        self.mlp = nn.Sequential(nn.Linear(24, 24), nn.ReLU())
        self.pool = AttentionPool(24)
        self.head = nn.Linear(24, 4)

    def forward(self, tokens):
        return self.head(self.pool(self.mlp(self.embed(tokens))))


def main():
    net = Net()
    optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(40):
        tokens = torch.randint(60, (32, 10))
        labels = tokens.max(dim=1).values // 15
        optimizer.zero_grad()
        loss = F.cross_entropy(net(tokens), labels)
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(step, loss.item())


if __name__ == "__main__":
    main()
