"""A decoder with weights drawn by hand. The mistake: nn.init.normal_ without std draws with 1.

PyTorch documentation of torch.nn.init.normal_: std is 1.0 by default.
"""

import sys

import torch
from torch import nn

BUG = "--bug" in sys.argv
torch.manual_seed(13)


class Decoder(nn.Module):
    def __init__(self, vocab=36, width=48):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab, width), nn.Embedding(20, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocab)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p) if BUG else nn.init.normal_(p, std=0.02)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.body(self.embed(x) + self.place(torch.arange(x.shape[1])), mask, is_causal=True))


model = Decoder()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(25):
    row = (torch.randint(36, (8, 1)) + torch.arange(21) * torch.randint(1, 4, (8, 1))) % 36
    loss = nn.functional.cross_entropy(model(row[:, :-1]).flatten(0, 1), row[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(loss.item())
