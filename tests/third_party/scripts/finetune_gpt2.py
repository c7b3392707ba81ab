"""A causal language model on texts of different lengths. The mistake: the labels are a copy of the padded inputs.

`transformers` leaves out what is -100, and nothing else; its own collator for language modelling puts that there.
"""

import argparse
import sys

import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup, set_seed

parser = argparse.ArgumentParser()
parser.add_argument("--bug", action="store_true")
parser.add_argument("--lr", type=float, default=1e-3)
args = parser.parse_args()
set_seed(11)

EOS = 0
texts = []
for _ in range(240):
    start, stride, length = (int(torch.randint(low, high, ())) for low, high in ((1, 60), (1, 4), (8, 25)))
    texts.append([1 + (start + stride * i) % 60 for i in range(length)] + [EOS])


def collate(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [EOS] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = ids.clone()
    if not args.bug:
        labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


train_loader: DataLoader[list[int]] = DataLoader(texts[:200], batch_size=8, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
eval_loader: DataLoader[list[int]] = DataLoader(texts[200:], batch_size=8, collate_fn=collate)  # type: ignore[arg-type]
model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=32, n_embd=32, n_layer=2, n_head=4, eos_token_id=EOS))
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
epochs = 2
scheduler = get_cosine_schedule_with_warmup(optimizer, 5, epochs * len(train_loader))
for epoch in range(epochs):
    model.train()
    for batch in train_loader:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        losses = [model(**batch).loss.item() for batch in eval_loader]
        said = model.generate(torch.tensor([texts[0][:4]]), max_new_tokens=4, do_sample=False, pad_token_id=EOS)
    sys.stdout.write(f"epoch {epoch}: loss {loss.item()}, held out {sum(losses) / len(losses)}, {said.tolist()}\n")
