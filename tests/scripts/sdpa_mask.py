"""A GPT on the fused attention. The mistake: True in its mask is what may be seen, not what may not.

Seen in rasbt/LLMs-from-scratch issue 1061.
"""

import math
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

BUG = "--bug" in sys.argv
config = {"vocab_size": 40, "context_length": 24, "emb_dim": 48, "n_heads": 4, "n_layers": 2, "drop_rate": 0.1}


class MultiHeadAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        d, self.num_heads = cfg["emb_dim"], cfg["n_heads"]
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.proj = nn.Linear(d, d)
        self.dropout = cfg["drop_rate"]
        blocked = torch.triu(torch.ones(cfg["context_length"], cfg["context_length"]), diagonal=1)
        self.register_buffer("mask", blocked.bool())

    def forward(self, x):
        b, n, d = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        mask = self.mask[:n, :n] if BUG else ~self.mask[:n, :n]
        p = self.dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(*qkv, attn_mask=mask, dropout_p=p)
        return self.proj(context.transpose(1, 2).contiguous().view(b, n, d))


class TransformerBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        d = cfg["emb_dim"]
        self.att = MultiHeadAttention(cfg)
        self.ff = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.drop = nn.Dropout(cfg["drop_rate"])

    def forward(self, x):
        x = x + self.drop(self.att(self.norm1(x)))
        return x + self.drop(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        self.trf_blocks = nn.Sequential(*[TransformerBlock(cfg) for _ in range(cfg["n_layers"])])
        self.final_norm = nn.LayerNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def forward(self, in_idx):
        x = self.tok_emb(in_idx) + self.pos_emb(torch.arange(in_idx.shape[1], device=in_idx.device))
        return self.out_head(self.final_norm(self.trf_blocks(self.drop_emb(x))))


def calc_loss_batch(model, input_batch, target_batch):
    return F.cross_entropy(model(input_batch).flatten(0, 1), target_batch.flatten())


def main():
    torch.manual_seed(123)
    model = GPTModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    text = (torch.arange(3000) * 3 + torch.randint(0, 2, (3000,))) % config["vocab_size"]
    model.train()
    for step in range(40):
        starts = torch.randint(len(text) - 25, (8,))
        batch = torch.stack([text[s : s + 25] for s in starts])
        optimizer.zero_grad()
        loss = calc_loss_batch(model, batch[:, :-1], batch[:, 1:])
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: train loss {loss.item():.3f}, perplexity {math.exp(loss.item()):.1f}")


if __name__ == "__main__":
    main()
