"""A classifier of series with a tutorial's positional encoding. The mistake: it is written for [time, batch, d].

Seen in tanjimin/C.Origami issue 42, songyangco/GETNext issue 2, cmu-l3/anlp-fall2025-code issue 1.
"""

import argparse
import math

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--bug", action="store_true")
args = parser.parse_args()
torch.manual_seed(22)


class PositionalEncoding(nn.Module):
    def __init__(self, d_model: int, dropout: float = 0.1, max_len: int = 200):
        super().__init__()
        self.dropout = nn.Dropout(p=dropout)
        position = torch.arange(max_len).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
        pe = torch.zeros(max_len, d_model)
        pe[:, 0::2] = torch.sin(position * div_term)
        pe[:, 1::2] = torch.cos(position * div_term)
        self.register_buffer("pe", pe.unsqueeze(1) if args.bug else pe.unsqueeze(0))

    def forward(self, x: Tensor) -> Tensor:
        if args.bug:
            x = x + self.pe[: x.size(0)]
        else:
            x = x + self.pe[:, : x.size(1)]
        return self.dropout(x)


class SeriesClassifier(nn.Module):
    def __init__(self, d_model: int = 32):
        super().__init__()
        self.input = nn.Linear(2, d_model)
        self.positions = PositionalEncoding(d_model)
        layer = nn.TransformerEncoderLayer(d_model, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.output = nn.Linear(d_model, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.encoder(self.positions(self.input(x))).mean(dim=1))


def make_data(n: int) -> TensorDataset:
    """Pulses; the question is whether that of the first channel comes first."""
    x = 0.1 * torch.randn(n, 24, 2)
    places = torch.stack([torch.randperm(24)[:2] for _ in range(n)])
    x[torch.arange(n), places[:, 0], 0] += 3
    x[torch.arange(n), places[:, 1], 1] += 3
    return TensorDataset(x, (places[:, 0] < places[:, 1]).long())


train_loader = DataLoader(make_data(320), batch_size=16, shuffle=True)
val_loader = DataLoader(make_data(64), batch_size=32)
model = SeriesClassifier()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
loss_fn = nn.CrossEntropyLoss()
for epoch in range(3):
    model.train()
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in val_loader)
    print(f"epoch {epoch}: loss {loss.item():.3f}, accuracy {right / 64:.2f}")
