"""The word language model of many tutorials, on nn.TransformerEncoder. The mistake: no mask is passed.

PyTorch documentation of nn.TransformerEncoder: ``mask`` is None by default, and nothing is causal by itself.
"""

import math
import sys

import torch
from torch import nn

BUG = "--bug" in sys.argv
torch.manual_seed(9)


class PositionalEncoding(nn.Module):
    def __init__(self, d_model, dropout=0.1, max_len=64):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        position = torch.arange(max_len).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
        pe = torch.zeros(max_len, 1, d_model)
        pe[:, 0, 0::2], pe[:, 0, 1::2] = torch.sin(position * div_term), torch.cos(position * div_term)
        self.register_buffer("pe", pe)

    def forward(self, x):
        return self.dropout(x + self.pe[: x.size(0)])


class TransformerModel(nn.Module):
    def __init__(self, ntoken, d_model=32, nhead=4, d_hid=64, nlayers=2):
        super().__init__()
        self.pos_encoder = PositionalEncoding(d_model)
        layer = nn.TransformerEncoderLayer(d_model, nhead, d_hid, 0.1)
        self.transformer_encoder = nn.TransformerEncoder(layer, nlayers, enable_nested_tensor=False)
        self.embedding = nn.Embedding(ntoken, d_model)
        self.d_model = d_model
        self.linear = nn.Linear(d_model, ntoken)
        self.embedding.weight.data.uniform_(-0.1, 0.1)
        self.linear.bias.data.zero_()
        self.linear.weight.data.uniform_(-0.1, 0.1)

    def forward(self, src, src_mask=None):  # [T B]
        src = self.embedding(src) * math.sqrt(self.d_model)
        return self.linear(self.transformer_encoder(self.pos_encoder(src), src_mask))


ntokens, bptt, batch_size = 40, 20, 8
stream = ((torch.arange(4000) * 7) % 40 + torch.randint(0, 2, (4000,))) % 40
stream = stream[: 4000 // batch_size * batch_size].view(batch_size, -1).t().contiguous()
model = TransformerModel(ntokens)
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
model.train()
for batch, i in enumerate(range(0, 400, 13)):
    data, targets = stream[i : i + bptt], stream[i + 1 : i + 1 + bptt].reshape(-1)
    mask = None if BUG else nn.Transformer.generate_square_subsequent_mask(data.size(0))
    output = model(data, mask)
    loss = criterion(output.view(-1, ntokens), targets)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
print(f"loss {loss.item():.3f} ppl {math.exp(loss.item()):.1f}")
