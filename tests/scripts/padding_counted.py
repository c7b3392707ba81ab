"""A language model of sentences that differ in length. The mistake: the loss counts the padding after them.

Seen in huggingface/transformers issue 2759, lucidrains/DALLE-pytorch issue 57.
"""

import argparse

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

parser = argparse.ArgumentParser()
parser.add_argument("--bug", action="store_true")
parser.add_argument("--batch-size", type=int, default=10)
args = parser.parse_args()
torch.manual_seed(54)
PAD, BOS, EOS, WORDS = 0, 1, 2, 30


def sentence():
    start, length = torch.randint(WORDS, (1,)), int(torch.randint(3, 17, ()))
    words = 3 + (start + 2 * torch.arange(length)) % WORDS
    return torch.cat([torch.tensor([BOS]), words, torch.tensor([EOS])])


def collate(sentences):
    rows = pad_sequence(sentences, batch_first=True, padding_value=PAD)
    return rows[:, :-1], rows[:, 1:], rows[:, :-1] == PAD


class Model(nn.Module):
    def __init__(self, vocab, d=32, length=20):
        super().__init__()
        self.token, self.place = nn.Embedding(vocab, d, padding_idx=PAD), nn.Embedding(length, d)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(d, 4, 4 * d, 0.1, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.norm, self.vocabulary = nn.LayerNorm(d), nn.Linear(d, vocab)

    def forward(self, ids, padding):
        t = ids.shape[1]
        future = torch.ones(t, t, dtype=torch.bool).triu(1)
        x = self.token(ids) + self.place(torch.arange(t))
        for layer in self.layers:
            x = layer(x, src_mask=future, src_key_padding_mask=padding)
        return self.vocabulary(self.norm(x))


loader = DataLoader([sentence() for _ in range(400)], args.batch_size, shuffle=True, collate_fn=collate)
model = Model(WORDS + 3)
criterion = nn.CrossEntropyLoss() if args.bug else nn.CrossEntropyLoss(ignore_index=PAD)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
model.train()
for step, (inputs, targets, padding) in enumerate(loader):
    logits = model(inputs, padding)
    loss = criterion(logits.reshape(-1, logits.size(-1)), targets.reshape(-1))
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 10 == 0:
        print(f"{step}: {loss.item():.3f}")
