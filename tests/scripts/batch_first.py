"""A sentence classifier whose encoder is fed [batch, time, features] and expects [time, batch, features].

The mistake: Exorust/TorchLeet issue 5, IBM/TabFormer pull request 14.
"""

import sys

import torch
from torch import nn

BUG = "--bug" in sys.argv
torch.manual_seed(0)


class Classifier(nn.Module):
    def __init__(self, vocab=40, d_model=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab, d_model)
        self.position = nn.Parameter(torch.randn(1, 20, d_model) * 0.02)
        layer = nn.TransformerEncoderLayer(d_model, nhead=4, dim_feedforward=64, batch_first=not BUG)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.fc = nn.Linear(d_model, 3)

    def forward(self, x):
        x = self.embedding(x) + self.position
        x = self.encoder(x)
        return self.fc(x.mean(dim=1))


model = Classifier()
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for epoch in range(3):
    model.train()
    for i in range(10):
        x = torch.randint(0, 40, (16, 20))
        y = (x[:, 0] + x[:, 1]) % 3
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.4f}")
