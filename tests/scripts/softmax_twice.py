"""An image classifier. The mistake: its last layer is a softmax, and nn.CrossEntropyLoss has one of its own.

PyTorch documentation of nn.CrossEntropyLoss: "The input is expected to contain the unnormalized logits".
"""

import sys

import torch
import torch.nn as nn
import torch.optim as optim

BUG = "--bug" in sys.argv
torch.manual_seed(7)


class CNN(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(2),
        )
        self.classifier = nn.Linear(64, num_classes)

    def forward(self, x):
        x = torch.flatten(self.features(x), 1)
        x = self.classifier(x)
        if BUG:
            x = torch.softmax(x, dim=1)
        return x


model = CNN()
criterion = nn.CrossEntropyLoss()
optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
patterns = torch.randn(10, 1, 12, 12)
for epoch in range(4):
    running = 0.0
    for i in range(10):
        labels = torch.randint(10, (16,))
        images = patterns[labels] + 0.5 * torch.randn(16, 1, 12, 12)
        optimizer.zero_grad()
        outputs = model(images)
        loss = criterion(outputs, labels)
        loss.backward()
        optimizer.step()
        running += loss.item()
    scheduler.step()
    print(f"[{epoch}] loss {running / 10:.3f} lr {scheduler.get_last_lr()[0]:.4f}")
