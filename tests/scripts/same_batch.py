"""Embeddings of faces. The mistake: a new iterator for each step, which gives the first batch again.

Seen in ZhaoJ9014/face.evoLVe pull request 39, wandb/examples issue 444.
"""

import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

BUG = "--bug" in sys.argv
torch.manual_seed(31)


class Faces(Dataset):
    """Already shuffled on disk: the loader reads them in order."""

    def __init__(self, people=8, per_person=60):
        order = torch.randperm(people * per_person)
        self.labels = order % people
        self.images = torch.randn(people, 3, 8, 8)[self.labels] + 0.7 * torch.randn(len(order), 3, 8, 8)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


class Backbone(nn.Module):
    def __init__(self, size=32):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.PReLU(16),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.PReLU(32),
        )
        self.output = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(512, size))

    def forward(self, x):
        return self.output(self.body(x))


class CosineHead(nn.Module):
    def __init__(self, size=32, people=8, scale=10.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(people, size))
        nn.init.xavier_uniform_(self.weight)
        self.scale = scale

    def forward(self, embeddings):
        return self.scale * F.linear(F.normalize(embeddings), F.normalize(self.weight))


loader = DataLoader(Faces(), batch_size=16, drop_last=True)
model = nn.Sequential(Backbone(), CosineHead())
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
batches = iter(loader)
for step in range(30):
    images, labels = next(iter(loader)) if BUG else next(batches)
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item():.4f}")
