"""A recommender that attends to what was bought before. The mistake: a mask of ones and zeros is added to the scores.

Seen in pytorch/pytorch issue 21518.
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Purchases(Dataset):
    """Who has bought an item buys one of its two successors next."""

    def __init__(self, users=320, items=40, length=16):
        rows = [torch.randint(items, (users,))]
        for _ in range(length):
            rows.append((rows[-1] + torch.randint(1, 3, (users,))) % items)
        self.rows = torch.stack(rows, dim=1)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, user):
        return self.rows[user, :-1], self.rows[user, 1:]


class PointWiseFeedForward(nn.Module):
    def __init__(self, units, dropout):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(units, units, 1), nn.Conv1d(units, units, 1)
        self.dropout, self.relu = nn.Dropout(dropout), nn.ReLU()

    def forward(self, inputs):
        return inputs + self.dropout(self.conv2(self.relu(self.conv1(inputs.transpose(1, 2)))).transpose(1, 2))


class SASRec(nn.Module):
    def __init__(self, items, length, units=32, blocks=2, heads=2, dropout=0.1, wrong_mask=False):
        super().__init__()
        self.item_emb, self.pos_emb = nn.Embedding(items, units), nn.Embedding(length, units)
        self.emb_dropout = nn.Dropout(dropout)
        self.attention_layernorms = nn.ModuleList(nn.LayerNorm(units) for _ in range(blocks))
        self.attention_layers = nn.ModuleList(nn.MultiheadAttention(units, heads, dropout) for _ in range(blocks))
        self.forward_layernorms = nn.ModuleList(nn.LayerNorm(units) for _ in range(blocks))
        self.forward_layers = nn.ModuleList(PointWiseFeedForward(units, dropout) for _ in range(blocks))
        self.last_layernorm = nn.LayerNorm(units)
        seen = torch.tril(torch.ones(length, length))
        self.register_buffer("attention_mask", seen if wrong_mask else seen == 0)

    def forward(self, log_seqs):
        seqs = self.emb_dropout(self.item_emb(log_seqs) + self.pos_emb.weight)
        for i, attention in enumerate(self.attention_layers):
            x = seqs.transpose(0, 1)
            q = self.attention_layernorms[i](x)
            outputs, _ = attention(q, q, q, attn_mask=self.attention_mask)
            seqs = (x + outputs).transpose(0, 1)
            seqs = self.forward_layers[i](self.forward_layernorms[i](seqs))
        return self.last_layernorm(seqs) @ self.item_emb.weight.t()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bug", action="store_true")
    parser.add_argument("--num_epochs", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(52)
    model = SASRec(40, 16, wrong_mask=args.bug)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_normal_(parameter)
    adam_optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    criterion = nn.CrossEntropyLoss()
    for epoch in range(args.num_epochs):
        model.train()
        for seq, pos in DataLoader(Purchases(), batch_size=16, shuffle=True):
            loss = criterion(model(seq).transpose(1, 2), pos)
            adam_optimizer.zero_grad()
            loss.backward()
            adam_optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
