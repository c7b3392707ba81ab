"""A review classifier of three encoder layers. The mistake: each is given the embedding, and only the last one counts.

Seen in Atcold/NYU-DLSP20 issue 270, simon-ging/coot-videotext issue 5, 17385/TreeBERT issue 5.
"""

import sys

import torch
from torch import nn
from torch.nn import functional as F

BUG = "--bug" in sys.argv
torch.manual_seed(66)


class MultiHeadAttention(nn.Module):
    def __init__(self, d_model, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.W_q, self.W_k, self.W_v = (nn.Linear(d_model, d_model, bias=False) for _ in range(3))
        self.W_h = nn.Linear(d_model, d_model)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (w(x).view(b, t, self.num_heads, -1).transpose(1, 2) for w in (self.W_q, self.W_k, self.W_v))
        h = F.scaled_dot_product_attention(q, k, v)
        return self.W_h(h.transpose(1, 2).contiguous().view(b, t, d))


class EncoderLayer(nn.Module):
    def __init__(self, d_model, num_heads, conv_hidden_dim, p=0.1):
        super().__init__()
        self.mha = MultiHeadAttention(d_model, num_heads)
        self.cnn = nn.Sequential(nn.Linear(d_model, conv_hidden_dim), nn.ReLU(), nn.Linear(conv_hidden_dim, d_model))
        self.layernorm1, self.layernorm2 = nn.LayerNorm(d_model, eps=1e-6), nn.LayerNorm(d_model, eps=1e-6)
        self.dropout = nn.Dropout(p)

    def forward(self, x):
        out = self.layernorm1(x + self.dropout(self.mha(x)))
        return self.layernorm2(out + self.dropout(self.cnn(out)))


class Encoder(nn.Module):
    def __init__(self, num_layers, d_model, num_heads, ff_hidden_dim, vocab_size, max_len):
        super().__init__()
        self.num_layers = num_layers
        self.word_embeddings = nn.Embedding(vocab_size, d_model)
        self.position_embeddings = nn.Embedding(max_len, d_model)
        self.enc_layers = nn.ModuleList(EncoderLayer(d_model, num_heads, ff_hidden_dim) for _ in range(num_layers))

    def forward(self, x):
        embedding = self.word_embeddings(x) + self.position_embeddings(torch.arange(x.size(1)))
        x = embedding
        for i in range(self.num_layers):
            x = self.enc_layers[i](embedding if BUG else x)
        return x


class TransformerClassifier(nn.Module):
    def __init__(self, num_answers=2):
        super().__init__()
        self.encoder = Encoder(3, 32, 4, 64, vocab_size=50, max_len=16)
        self.dense = nn.Linear(32, num_answers)

    def forward(self, x):
        return self.dense(self.encoder(x).max(dim=1).values)


model = TransformerClassifier()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for step in range(50):
    text = torch.randint(50, (32, 16))
    label = ((text < 10).sum(1) > (text > 39).sum(1)).long()
    loss = F.cross_entropy(model(text), label)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step}: {loss.item():.3f}")
