"""A causal language model that shifts its labels itself, as Hugging Face's do. The mistake: the data set has too.

Seen in InternLM/InternLM issue 318; huggingface/transformers pull request 44642.
"""

import argparse

import torch
import torch.nn as nn
from torch.utils.data import DataLoader, Dataset

parser = argparse.ArgumentParser()
parser.add_argument("--bug", action="store_true")
parser.add_argument("--lr", type=float, default=1e-3)
args = parser.parse_args()
torch.manual_seed(3)


class Counting(Dataset):
    def __init__(self, n=400, length=24, vocab=30):
        start, stride = torch.randint(vocab, (n, 1)), torch.randint(1, 4, (n, 1))
        self.rows = (start + stride * torch.arange(length + 1)) % vocab

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        return {"input_ids": row[:-1], "labels": row[1:] if args.bug else row[:-1]}


class TinyGPT(nn.Module):
    def __init__(self, vocab=30, d=32, n_layer=2):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, d), nn.Embedding(24, d)
        self.h = nn.ModuleList(
            nn.TransformerEncoderLayer(d, 4, 4 * d, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(n_layer)
        )
        self.ln_f, self.lm_head = nn.LayerNorm(d), nn.Linear(d, vocab, bias=False)
        self.register_buffer("mask", torch.triu(torch.full((24, 24), float("-inf")), 1))

    def forward(self, input_ids, labels=None):
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1]))
        for block in self.h:
            x = block(x, src_mask=self.mask)
        logits = self.lm_head(self.ln_f(x))
        loss = None
        if labels is not None:
            shift_logits, shift_labels = logits[:, :-1].contiguous(), labels[:, 1:].contiguous()
            loss = nn.functional.cross_entropy(shift_logits.view(-1, shift_logits.size(-1)), shift_labels.view(-1))
        return {"loss": loss, "logits": logits}


loader = DataLoader(Counting(), batch_size=10, shuffle=True)
model = TinyGPT()
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
for step, batch in enumerate(loader):
    out = model(**batch)
    out["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step} loss {out['loss'].item():.3f}")
