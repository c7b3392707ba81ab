"""Bird calls: training goes on from a file. The mistake: the optimizer's settings hold the weights of another network.

Seen in kitzeslab/opensoundscape issue 351.
"""

import io
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

BUG = "--bug" in sys.argv
torch.manual_seed(70)


def make_network():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 4),
    )


class CNN:
    """A network, and all that it takes to train it."""

    def __init__(self):
        self.network = make_network()
        self.optimizer_params = {"params": self.network.parameters(), "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}
        self.loss_fn = nn.CrossEntropyLoss()

    def save(self):
        file = io.BytesIO()
        torch.save(self.network.state_dict(), file)
        return file.getvalue()

    def load(self, saved):
        self.network = make_network()
        self.network.load_state_dict(torch.load(io.BytesIO(saved), weights_only=True))
        if not BUG:
            self.optimizer_params["params"] = self.network.parameters()

    def train(self, dataset, epochs):
        optimizer = torch.optim.SGD(**self.optimizer_params)
        self.network.train()
        for epoch in range(epochs):
            for spectrograms, labels in DataLoader(dataset, batch_size=16, shuffle=True):
                loss = self.loss_fn(self.network(spectrograms), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            print(f"epoch {epoch}: loss {loss.item():.3f}")


calls = torch.randn(4, 1, 12, 12)
species = torch.randint(4, (320,))
dataset = TensorDataset(calls[species] + torch.randn(320, 1, 12, 12), species)
shared = CNN().save()  # somebody's file
model = CNN()
model.load(shared)
model.train(dataset, epochs=2)
