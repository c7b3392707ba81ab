"""A small GPT whose loss compares each logit with the token that it was given. The mistake: no shift anywhere.

Asked in huggingface/transformers issue 35066 and loubnabnl/santacoder-finetuning issue 14.
"""

import sys

import torch
import torch.nn as nn
from torch.nn import functional as F

BUG = "--bug" in sys.argv
torch.manual_seed(10)


class Block(nn.Module):
    def __init__(self, c, heads):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.qkv, self.proj = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.mlp = nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))
        self.heads = heads

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(self.ln1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    def __init__(self, vocab=32, c=32, t=24):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, c), nn.Embedding(t, c)
        self.blocks = nn.Sequential(Block(c, 4), Block(c, 4))
        self.norm, self.head = nn.LayerNorm(c), nn.Linear(c, vocab, bias=False)
        self.apply(self._init)

    def _init(self, m):
        if isinstance(m, (nn.Linear, nn.Embedding)):
            nn.init.normal_(m.weight, std=0.02)

    def forward(self, idx):
        x = self.tok(idx) + self.pos(torch.arange(idx.shape[1], device=idx.device))
        return self.head(self.norm(self.blocks(x)))


def main():
    model = GPT()
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    for it in range(40):
        start = torch.randint(32, (12, 1))
        rows = (start + torch.arange(25) * torch.randint(1, 4, (12, 1))) % 32
        x, y = rows[:, :-1], (rows[:, :-1] if BUG else rows[:, 1:])
        logits = model(x)
        loss = F.cross_entropy(logits.view(-1, 32), y.reshape(-1))
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        if it % 10 == 0:
            print(it, loss.item())


main()
