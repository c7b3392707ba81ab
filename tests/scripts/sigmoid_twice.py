"""Lanes in pictures: which of them are there. The mistake: a sigmoid in the head, and another in BCEWithLogitsLoss.

Seen in Turoad/lanedet issue 32, argusswift/YOLOv4-pytorch issue 89, avBuffer/UNet3plus_pth issue 23.
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--bug", action="store_true")
parser.add_argument("--epochs", type=int, default=3)
args = parser.parse_args()
torch.manual_seed(62)


class ExistHead(nn.Module):
    def __init__(self, channels, lanes=4):
        super().__init__()
        self.dropout = nn.Dropout2d(0.1)
        self.conv8 = nn.Conv2d(channels, 8, 1)
        self.avgpool = nn.AvgPool2d(2)
        self.fc9, self.fc10 = nn.Linear(8 * 16, 32), nn.Linear(32, lanes)

    def forward(self, x):
        x = self.avgpool(torch.relu(self.conv8(self.dropout(x)))).flatten(1)
        x = self.fc10(torch.relu(self.fc9(x)))
        return torch.sigmoid(x) if args.bug else x


class LaneNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        )
        self.exist = ExistHead(16)

    def forward(self, images):
        return self.exist(self.backbone(images))


def roads(n):
    there = torch.randint(2, (n, 4)).float()
    images = 0.4 * torch.randn(n, 1, 16, 16)
    for lane, column in enumerate((2, 6, 10, 14)):
        images[:, 0, :, column] += 1.5 * there[:, lane : lane + 1]
    return TensorDataset(images, there)


loader = DataLoader(roads(320), batch_size=16, shuffle=True)
model = LaneNet()
criterion = nn.BCEWithLogitsLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
model.train()
for epoch in range(args.epochs):
    total = 0.0
    for images, there in loader:
        optimizer.zero_grad()
        loss = criterion(model(images), there)
        loss.backward()
        optimizer.step()
        total += loss.item()
    print(f"epoch {epoch}: loss {total / len(loader):.4f}")
