"""Translation with nn.Transformer. The mistake: the decoder is told the very tokens that it has to give.

Seen in Project-MONAI/GenerativeModels issue 314, Kyubyong/transformer issue 94.
"""

import argparse
import math

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--bug", action="store_true")
parser.add_argument("--epochs", type=int, default=2)
args = parser.parse_args()
torch.manual_seed(40)
BOS, EOS, SRC_VOCAB, TGT_VOCAB, LENGTH = 0, 1, 24, 26, 8


class PositionalEncoding(nn.Module):
    def __init__(self, emb_size, dropout, maxlen=50):
        super().__init__()
        den = torch.exp(-torch.arange(0, emb_size, 2) * math.log(10000) / emb_size)
        pos = torch.arange(0, maxlen).reshape(maxlen, 1)
        pos_embedding = torch.zeros((maxlen, emb_size))
        pos_embedding[:, 0::2] = torch.sin(pos * den)
        pos_embedding[:, 1::2] = torch.cos(pos * den)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("pos_embedding", pos_embedding)

    def forward(self, token_embedding):
        return self.dropout(token_embedding + self.pos_embedding[: token_embedding.size(1)])


class Seq2SeqTransformer(nn.Module):
    def __init__(self, emb_size=32, nhead=4, dropout=0.1):
        super().__init__()
        self.emb_size = emb_size
        self.src_tok_emb, self.tgt_tok_emb = nn.Embedding(SRC_VOCAB, emb_size), nn.Embedding(TGT_VOCAB, emb_size)
        self.positional_encoding = PositionalEncoding(emb_size, dropout)
        self.transformer = nn.Transformer(emb_size, nhead, 2, 2, 64, dropout, batch_first=True)
        self.generator = nn.Linear(emb_size, TGT_VOCAB)

    def forward(self, src, tgt):
        tgt_mask = nn.Transformer.generate_square_subsequent_mask(tgt.size(1))
        src_emb = self.positional_encoding(self.src_tok_emb(src) * math.sqrt(self.emb_size))
        tgt_emb = self.positional_encoding(self.tgt_tok_emb(tgt) * math.sqrt(self.emb_size))
        return self.generator(self.transformer(src_emb, tgt_emb, tgt_mask=tgt_mask))


# A translation: the words in reverse order, each by its own word of the other language.
src = torch.randint(SRC_VOCAB, (480, LENGTH))
words = torch.randperm(SRC_VOCAB) + 2
tgt = torch.cat([torch.full((480, 1), BOS), words[src.flip(1)], torch.full((480, 1), EOS)], dim=1)
loader = DataLoader(TensorDataset(src, tgt), batch_size=16, shuffle=True)
model = Seq2SeqTransformer()
for p in model.parameters():
    if p.dim() > 1:
        nn.init.xavier_uniform_(p)
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.98), eps=1e-9)
for epoch in range(1, args.epochs + 1):
    model.train()
    losses = 0.0
    for src_batch, tgt_batch in loader:
        tgt_input = tgt_batch[:, 1:] if args.bug else tgt_batch[:, :-1]
        logits = model(src_batch, tgt_input)
        tgt_out = tgt_batch[:, 1:]
        optimizer.zero_grad()
        loss = loss_fn(logits.reshape(-1, logits.shape[-1]), tgt_out.reshape(-1))
        loss.backward()
        optimizer.step()
        losses += loss.item()
    print(f"Epoch: {epoch}, Train loss: {losses / len(loader):.3f}")
