"""A ConvNet with a validation that gathers its outputs. The mistake: no torch.no_grad, so that each holds its graph.

Seen in OpenNMT/OpenNMT-py issue 1141, chrischoy/FCGF issue 15, skorch-dev/skorch issue 218.
"""

import sys
from contextlib import nullcontext

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

BUG = "--bug" in sys.argv


class Trainer:
    def __init__(self, model, train_loader, valid_loader):
        self.model, self.train_loader, self.valid_loader = model, train_loader, valid_loader
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, patience=1)

    def train_epoch(self):
        self.model.train()
        for x, y in self.train_loader:
            self.optimizer.zero_grad()
            loss = self.criterion(self.model(x), y)
            loss.backward()
            self.optimizer.step()
        return loss.item()

    def validate(self):
        self.model.eval()
        outputs, targets = [], []
        with nullcontext() if BUG else torch.no_grad():
            for x, y in self.valid_loader:
                outputs.append(self.model(x))
                targets.append(y)
            outputs, targets = torch.cat(outputs), torch.cat(targets)
            loss = self.criterion(outputs, targets)
        accuracy = (outputs.argmax(dim=1) == targets).float().mean()
        return loss.item(), accuracy.item()

    def fit(self, epochs):
        for epoch in range(epochs):
            train_loss = self.train_epoch()
            valid_loss, accuracy = self.validate()
            self.scheduler.step(valid_loss)
            print(f"{epoch}: train {train_loss:.3f} valid {valid_loss:.3f} accuracy {accuracy:.2f}")


def blobs(n, centres):
    labels = torch.randint(len(centres), (n,))
    return TensorDataset(centres[labels] + torch.randn(n, *centres.shape[1:]), labels)


torch.manual_seed(41)
centres = torch.randn(5, 1, 10, 10)
net = nn.Sequential(
    nn.Conv2d(1, 12, 3, padding=1),
    nn.BatchNorm2d(12),
    nn.ReLU(),
    nn.AvgPool2d(2),
    nn.Conv2d(12, 24, 3),
    nn.ReLU(),
    nn.Flatten(),
    nn.Dropout(0.3),
    nn.Linear(24 * 9, 5),
)
Trainer(
    net,
    DataLoader(blobs(320, centres), batch_size=32, shuffle=True),
    DataLoader(blobs(128, centres), batch_size=32),
).fit(4)
