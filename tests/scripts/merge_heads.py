"""A tagger with attention from scratch. The mistake: heads are put together by reshape, without moving their axis back.

Seen in jsbaan/transformer-from-scratch pull request 6, ajhalthor/Transformer-Neural-Network pull request 4.
"""

import math
import sys

import torch
import torch.nn as nn

BUG = "--bug" in sys.argv
torch.manual_seed(23)


def scaled_dot_product(q, k, v):
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    attention = torch.softmax(scores, dim=-1)
    return torch.matmul(attention, v), attention


class MultiHeadAttention(nn.Module):
    def __init__(self, d_model, num_heads):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, d_model // num_heads
        self.qkv_layer = nn.Linear(d_model, 3 * d_model)
        self.linear_layer = nn.Linear(d_model, d_model)

    def forward(self, x):
        batch_size, sequence_length, d_model = x.size()
        qkv = self.qkv_layer(x).reshape(batch_size, sequence_length, self.num_heads, 3 * self.head_dim)
        q, k, v = qkv.permute(0, 2, 1, 3).chunk(3, dim=-1)
        values, _ = scaled_dot_product(q, k, v)
        if not BUG:
            values = values.permute(0, 2, 1, 3)
        return self.linear_layer(values.reshape(batch_size, sequence_length, d_model))


class EncoderLayer(nn.Module):
    def __init__(self, d_model, ffn_hidden, num_heads, drop_prob):
        super().__init__()
        self.attention = MultiHeadAttention(d_model, num_heads)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.ffn = nn.Sequential(nn.Linear(d_model, ffn_hidden), nn.ReLU(), nn.Linear(ffn_hidden, d_model))
        self.dropout1, self.dropout2 = nn.Dropout(drop_prob), nn.Dropout(drop_prob)

    def forward(self, x):
        x = self.norm1(x + self.dropout1(self.attention(x)))
        return self.norm2(x + self.dropout2(self.ffn(x)))


class Tagger(nn.Module):
    def __init__(self, vocab=50, tags=5, d_model=32, max_len=18):
        super().__init__()
        self.embedding = nn.Embedding(vocab, d_model)
        self.position = nn.Parameter(0.02 * torch.randn(max_len, d_model))
        self.layers = nn.Sequential(*[EncoderLayer(d_model, 64, 4, 0.1) for _ in range(2)])
        self.output = nn.Linear(d_model, tags)

    def forward(self, x):
        return self.output(self.layers(self.embedding(x) + self.position[: x.size(1)]))


model = Tagger()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
criterion = nn.CrossEntropyLoss()
model.train()
for iteration in range(50):
    words = torch.randint(50, (16, 18))
    tags = (words + words.roll(1, dims=1)) % 5
    optimizer.zero_grad()
    predictions = model(words)
    loss = criterion(predictions.view(-1, 5), tags.view(-1))
    loss.backward()
    optimizer.step()
    if iteration % 10 == 0:
        print(f"iteration {iteration}: {loss.item():.4f}")
