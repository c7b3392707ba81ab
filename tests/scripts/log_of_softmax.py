"""Entailment with a loss by hand. The mistake: the logarithm of a softmax that is 0 in float32.

Seen in allenai/allennlp issue 2797, summerlvsong/Aggregation-Cross-Entropy issue 2.
"""

import sys

import torch
from torch import nn
from torch.nn import functional as F

BUG = "--bug" in sys.argv
torch.manual_seed(11)
model = nn.Sequential(nn.Linear(50, 64), nn.ReLU(), nn.Linear(64, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
for step in range(30):
    x = torch.randn(32, 50) * 10 * (1 + step)  # features that nobody normalised
    labels = torch.randint(3, (32,))
    logits = model(x)
    if BUG:
        loss = -(torch.log(F.softmax(logits, dim=-1)) * F.one_hot(labels, 3).float()).sum(-1).mean()
    else:
        loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
print(loss.item())
