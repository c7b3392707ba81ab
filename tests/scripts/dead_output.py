"""Ion mobility of peptides by an LSTM. The mistake: a ReLU after the last layer, which is 0 for all and stays so.

Seen in ProteomicsML/ProteomicsML pull request 203.
"""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

BUG = "--bug" in sys.argv
torch.manual_seed(7)


class Regressor(nn.Module):
    def __init__(self, amino_acids=21, hidden=32):
        super().__init__()
        self.embedding = nn.Embedding(amino_acids, 16)
        self.lstm = nn.LSTM(16, hidden, batch_first=True, bidirectional=True)
        self.dense = nn.Sequential(nn.Linear(2 * hidden, 32), nn.ReLU(), nn.Linear(32, 1))
        self.last = nn.ReLU() if BUG else nn.Identity()

    def forward(self, x):
        _, (h, _) = self.lstm(self.embedding(x))
        return self.last(self.dense(torch.cat([h[0], h[1]], dim=-1))).squeeze(-1)


peptides = torch.randint(21, (320, 12))
mobility = torch.randn(21)[peptides].mean(1)
mobility = (mobility - mobility.min()) / (mobility.max() - mobility.min())
loader = DataLoader(TensorDataset(peptides, mobility), batch_size=16, shuffle=True)
model = Regressor()
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
loss_fn = nn.L1Loss()
for epoch in range(2):
    total = 0.0
    for x, y in loader:
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        total += loss.item()
    print(f"epoch {epoch}: {total / len(loader):.4f}")
