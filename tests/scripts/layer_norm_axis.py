"""A Transformer with a layer norm of one's own. The mistake: its mean and deviation are taken over the time axis.

Seen in jadore801120/attention-is-all-you-need-pytorch pull request 17.
"""

import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

BUG = "--bug" in sys.argv
torch.manual_seed(51)


class LayerNormalization(nn.Module):
    def __init__(self, d_hid, eps=1e-3):
        super().__init__()
        self.eps = eps
        self.a_2, self.b_2 = nn.Parameter(torch.ones(d_hid)), nn.Parameter(torch.zeros(d_hid))

    def forward(self, z):  # [B, T, D]
        dim = 1 if BUG else -1
        mu = torch.mean(z, dim=dim, keepdim=True)
        sigma = torch.std(z, dim=dim, keepdim=True)
        return (z - mu) / (sigma + self.eps) * self.a_2 + self.b_2


class MultiHeadAttention(nn.Module):
    def __init__(self, n_head, d_model):
        super().__init__()
        self.n_head = n_head
        self.w_qs, self.w_ks, self.w_vs = (nn.Linear(d_model, d_model) for _ in range(3))
        self.proj = nn.Linear(d_model, d_model)
        self.layer_norm = LayerNormalization(d_model)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (w(x).view(b, t, self.n_head, -1).transpose(1, 2) for w in (self.w_qs, self.w_ks, self.w_vs))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d)
        return self.layer_norm(self.proj(y) + x)


class PositionwiseFeedForward(nn.Module):
    def __init__(self, d_hid, d_inner):
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(d_hid, d_inner), nn.Linear(d_inner, d_hid)
        self.layer_norm = LayerNormalization(d_hid)

    def forward(self, x):
        return self.layer_norm(self.w_2(F.relu(self.w_1(x))) + x)


class EncoderLayer(nn.Module):
    def __init__(self, d_model, d_inner, n_head):
        super().__init__()
        self.slf_attn = MultiHeadAttention(n_head, d_model)
        self.pos_ffn = PositionwiseFeedForward(d_model, d_inner)

    def forward(self, x):
        return self.pos_ffn(self.slf_attn(x))


class Encoder(nn.Module):
    def __init__(self, n_src_vocab=40, n_tags=4, len_max=16, n_layers=2, d_model=32):
        super().__init__()
        self.src_word_emb, self.position_enc = nn.Embedding(n_src_vocab, d_model), nn.Embedding(len_max, d_model)
        self.layer_stack = nn.ModuleList(EncoderLayer(d_model, 64, 4) for _ in range(n_layers))
        self.tgt_word_proj = nn.Linear(d_model, n_tags)

    def forward(self, src_seq):
        x = self.src_word_emb(src_seq) + self.position_enc(torch.arange(src_seq.size(1)))
        for layer in self.layer_stack:
            x = layer(x)
        return self.tgt_word_proj(x)


model = Encoder()
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.9, 0.98), eps=1e-9)
crit = nn.CrossEntropyLoss()
for step in range(40):
    src = torch.randint(40, (16, 16))
    gold = (src % 2) + 2 * (src.roll(1, dims=1) % 2)
    optimizer.zero_grad()
    loss = crit(model(src).view(-1, 4), gold.view(-1))
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"{step}: {loss.item():.3f}")
