"""Fine-tuning: the head is exchanged for one with other classes. The mistake: after the optimizer was made.

Seen in huggingface/pytorch-openai-transformer-lm pull request 6, zjunlp/HVPNeT issue 5.
"""

import sys

import torch
from torch import nn

BUG = "--bug" in sys.argv
torch.manual_seed(5)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
        self.head = nn.Linear(64, 100)

    def forward(self, x):
        return self.head(self.body(x))


def build():
    model = Model()
    if not BUG:
        model.head = nn.Linear(64, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if BUG:
        model.head = nn.Linear(64, 5)
    return model, optimizer


model, optimizer = build()
for step in range(30):
    x = torch.randn(32, 20)
    loss = nn.functional.cross_entropy(model(x), x[:, :5].argmax(1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print("done", loss.item())
