"""A BERT encoder with learned positions. The mistake: they are added by .data, outside of the graph.

Seen in d2l-ai/d2l-en pull request 2121.
"""

import sys

import torch
from torch import nn

BUG = "--bug" in sys.argv
torch.manual_seed(69)


class BERTEncoder(nn.Module):
    def __init__(self, vocab_size, num_hiddens, ffn_num_hiddens, num_heads, num_blks, dropout, max_len):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, num_hiddens)
        self.segment_embedding = nn.Embedding(2, num_hiddens)
        self.pos_embedding = nn.Parameter(0.02 * torch.randn(1, max_len, num_hiddens))
        self.blks = nn.Sequential(
            *[
                nn.TransformerEncoderLayer(num_hiddens, num_heads, ffn_num_hiddens, dropout, batch_first=True)
                for _ in range(num_blks)
            ]
        )

    def forward(self, tokens, segments):
        x = self.token_embedding(tokens) + self.segment_embedding(segments)
        positions = self.pos_embedding.data if BUG else self.pos_embedding
        return self.blks(x + positions[:, : x.shape[1]])


class BERTModel(nn.Module):
    def __init__(self, vocab_size=40, num_hiddens=32):
        super().__init__()
        self.encoder = BERTEncoder(vocab_size, num_hiddens, 64, 4, 2, 0.1, max_len=16)
        self.mlm = nn.Sequential(
            nn.Linear(num_hiddens, num_hiddens),
            nn.ReLU(),
            nn.LayerNorm(num_hiddens),
            nn.Linear(num_hiddens, vocab_size),
        )

    def forward(self, tokens, segments, pred_positions):
        encoded = self.encoder(tokens, segments)
        rows = torch.arange(len(tokens)).unsqueeze(1)
        return self.mlm(encoded[rows, pred_positions])


net = BERTModel()
trainer = torch.optim.Adam(net.parameters(), lr=2e-3)
loss_fn = nn.CrossEntropyLoss()
net.train()
for step in range(50):
    start = torch.randint(1, 40, (24, 1))
    tokens = (start + torch.arange(16)) % 39 + 1
    segments = (torch.arange(16) >= 8).long().expand(24, -1)
    pred_positions = torch.stack([torch.randperm(16)[:3] for _ in range(24)])
    labels = tokens.gather(1, pred_positions)
    masked = tokens.scatter(1, pred_positions, 0)
    trainer.zero_grad()
    loss = loss_fn(net(masked, segments, pred_positions).reshape(-1, 40), labels.reshape(-1))
    loss.backward()
    trainer.step()
    if step % 10 == 0:
        print(f"step {step}, MLM loss {loss.item():.3f}")
