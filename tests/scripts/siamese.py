"""A siamese network with the contrastive loss. The mistake: the root of a distance of 0 has an infinite slope.

Seen in adambielski/siamese-triplet issue 18, tensorflow/tensorflow issue 30199.
"""

import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

BUG = "--bug" in sys.argv
torch.manual_seed(38)


class Pairs(Dataset):
    """Pairs of pictures; a picture may be drawn beside itself."""

    def __init__(self, pictures=30, classes=5, n=480):
        self.labels = torch.arange(pictures) % classes
        self.pictures = torch.randn(classes, 1, 12, 12)[self.labels] + 0.5 * torch.randn(pictures, 1, 12, 12)
        self.pairs = torch.randint(pictures, (n, 2))

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        i, j = self.pairs[index]
        return self.pictures[i], self.pictures[j], (self.labels[i] == self.labels[j]).float()


class EmbeddingNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.convnet = nn.Sequential(nn.Conv2d(1, 8, 3), nn.PReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.PReLU())
        self.fc = nn.Sequential(nn.Linear(16 * 9, 32), nn.PReLU(), nn.Linear(32, 2))

    def forward(self, x):
        return self.fc(self.convnet(x).flatten(1))


class SiameseNet(nn.Module):
    def __init__(self, embedding_net):
        super().__init__()
        self.embedding_net = embedding_net

    def forward(self, x1, x2):
        return self.embedding_net(x1), self.embedding_net(x2)


class ContrastiveLoss(nn.Module):
    def __init__(self, margin=1.0, eps=0.0 if BUG else 1e-9):
        super().__init__()
        self.margin, self.eps = margin, eps

    def forward(self, output1, output2, target):
        distances = (output2 - output1).pow(2).sum(1)
        losses = target * distances + (1 - target) * F.relu(self.margin - (distances + self.eps).sqrt()).pow(2)
        return 0.5 * losses.mean()


model = SiameseNet(EmbeddingNet())
loss_fn = ContrastiveLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for epoch in range(2):
    total = 0.0
    for x1, x2, target in DataLoader(Pairs(), batch_size=24, shuffle=True):
        optimizer.zero_grad()
        loss = loss_fn(*model(x1, x2), target)
        loss.backward()
        optimizer.step()
        total += loss.item()
    print(f"Epoch: {epoch + 1}/2. Train set: Average loss: {total / 20:.4f}")
