"""A recurrent model with a table of frequencies. The mistake: NumPy counts in float64, and float32 follows it.

PyTorch documentation of torch.from_numpy: the tensor has the array's dtype, which is float64 unless asked otherwise.
"""

import sys

import numpy as np
import torch
from torch import nn

BUG = "--bug" in sys.argv
torch.manual_seed(14)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        table = np.outer(np.arange(16), 1 / 10 ** np.linspace(0, 3, 24))
        self.register_buffer("angles", torch.from_numpy(table if BUG else table.astype(np.float32)))
        self.embed, self.mix = nn.Embedding(30, 24), nn.GRU(24, 24, batch_first=True)
        self.head = nn.Linear(24, 30)

    def forward(self, x):
        h = self.embed(x) * self.angles.cos()
        return self.head(self.mix(h.float())[0])


model = Model()
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for step in range(25):
    rows = (torch.randint(30, (8, 1)) + torch.arange(17) * 3) % 30
    logits = model(rows[:, :-1])
    loss = nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(loss.item())
