"""An LSTM language model with accumulation and warmup. The mistake: each part of a batch steps the schedule.

Seen in Lightning-AI/pytorch-lightning issue 1476, starVLA/starVLA pull request 210, h2oai/h2o-llmstudio issue 663.
"""

import math
import sys

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

BUG = "--bug" in sys.argv
torch.manual_seed(27)
text = "it was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "
text *= 30
vocab = {c: i for i, c in enumerate(sorted(set(text)))}
data = torch.tensor([vocab[c] for c in text])


class LSTMLanguageModel(nn.Module):
    def __init__(self, ntoken, ninp=32, nhid=64, nlayers=2, dropout=0.1):
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(ntoken, ninp)
        self.rnn = nn.LSTM(ninp, nhid, nlayers, dropout=dropout, batch_first=True)
        self.decoder = nn.Linear(nhid, ntoken)

    def forward(self, input):
        output, _ = self.rnn(self.drop(self.encoder(input)))
        return self.decoder(self.drop(output))


def warmup_cosine(optimizer, warmup, total):
    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (total - warmup))))

    return LambdaLR(optimizer, factor)


ACCUMULATE, UPDATES = 4, 30
model = LSTMLanguageModel(len(vocab))
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
scheduler = warmup_cosine(optimizer, warmup=4, total=UPDATES)
criterion = nn.CrossEntropyLoss()
model.train()
for i in range(UPDATES * ACCUMULATE):
    starts = torch.randint(len(data) - 33, (4,))
    x = torch.stack([data[s : s + 32] for s in starts])
    y = torch.stack([data[s + 1 : s + 33] for s in starts])
    loss = criterion(model(x).flatten(0, 1), y.flatten()) / ACCUMULATE
    loss.backward()
    if (i + 1) % ACCUMULATE == 0:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not BUG:
            scheduler.step()
    if BUG:
        scheduler.step()
    if (i + 1) % 40 == 0:
        print(f"update {(i + 1) // ACCUMULATE} loss {loss.item() * ACCUMULATE:.3f} lr {scheduler.get_last_lr()[0]:.5f}")
