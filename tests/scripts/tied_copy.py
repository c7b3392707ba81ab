"""A Llama with one table for tokens and logits. The mistake: the head's weight is a copy, and the two part.

Seen in rasbt/LLMs-from-scratch issue 822, facebookresearch/lingua issue 74.
"""

import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

BUG = "--bug" in sys.argv
torch.manual_seed(34)
CFG = {"vocab_size": 48, "emb_dim": 48, "n_heads": 4, "n_kv": 2, "n_layers": 2, "context": 24}


def rope(context, dim, base=10_000.0):
    angles = torch.outer(torch.arange(context).float(), base ** (-torch.arange(0, dim, 2) / dim))
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos(), angles.sin()


def turn(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos[: x.shape[2]] + torch.cat([-b, a], dim=-1) * sin[: x.shape[2]]


class GroupedQueryAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.heads, self.groups, self.head_dim = cfg["n_heads"], cfg["n_kv"], cfg["emb_dim"] // cfg["n_heads"]
        self.W_query = nn.Linear(cfg["emb_dim"], cfg["emb_dim"], bias=False)
        self.W_key = nn.Linear(cfg["emb_dim"], self.groups * self.head_dim, bias=False)
        self.W_value = nn.Linear(cfg["emb_dim"], self.groups * self.head_dim, bias=False)
        self.out_proj = nn.Linear(cfg["emb_dim"], cfg["emb_dim"], bias=False)

    def forward(self, x, cos, sin):
        b, t, d = x.shape
        q = turn(self.W_query(x).view(b, t, self.heads, -1).transpose(1, 2), cos, sin)
        k = turn(self.W_key(x).view(b, t, self.groups, -1).transpose(1, 2), cos, sin)
        v = self.W_value(x).view(b, t, self.groups, -1).transpose(1, 2)
        k, v = (y.repeat_interleave(self.heads // self.groups, dim=1) for y in (k, v))
        context = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(context.transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        d = cfg["emb_dim"]
        self.norm1, self.norm2 = nn.RMSNorm(d, eps=1e-5), nn.RMSNorm(d, eps=1e-5)
        self.att = GroupedQueryAttention(cfg)
        self.fc1, self.fc2, self.fc3 = nn.Linear(d, 2 * d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x, cos, sin):
        x = x + self.att(self.norm1(x), cos, sin)
        h = self.norm2(x)
        return x + self.fc3(F.silu(self.fc1(h)) * self.fc2(h))


class Llama3Model(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg["n_layers"]))
        self.final_norm = nn.RMSNorm(cfg["emb_dim"], eps=1e-5)
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)
        cos, sin = rope(cfg["context"], cfg["emb_dim"] // cfg["n_heads"])
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        nn.init.normal_(self.tok_emb.weight, std=0.02)
        if BUG:
            self.out_head.weight = nn.Parameter(self.tok_emb.weight.clone().detach())
        else:
            self.out_head.weight = self.tok_emb.weight

    def forward(self, tokens):
        x = self.tok_emb(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.out_head(self.final_norm(x))


model = Llama3Model(CFG)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
for step in range(40):
    start, stride = torch.randint(48, (8, 1)), torch.randint(1, 4, (8, 1))
    ids = (start + stride * torch.arange(25)) % 48
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step} loss {loss.item():.3f}")
