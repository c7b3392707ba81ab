"""An encoder and a decoder. The mistake: the decoder is given the labels, which it has to predict, unshifted.

Given labels alone, `transformers` shifts them to the right by itself.
"""

import sys

import torch
from transformers import T5Config, T5ForConditionalGeneration, get_linear_schedule_with_warmup, set_seed

BUG = "--bug" in sys.argv
set_seed(5)
config = T5Config(
    vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
)
model = T5ForConditionalGeneration(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
scheduler = get_linear_schedule_with_warmup(optimizer, 5, 60)
model.train()
for step in range(36):
    document = torch.randint(2, 50, (8, 20))
    lengths = torch.randint(12, 21, (8, 1))
    mask = (torch.arange(20) < lengths).long()
    summary = document[:, :12:2]  # every other word of the beginning
    labels = torch.cat([summary, torch.ones(8, 1, dtype=torch.long)], dim=1)
    batch = {"input_ids": document * mask, "attention_mask": mask, "labels": labels}
    if BUG:
        batch["decoder_input_ids"] = labels
    loss = model(**batch).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    if step % 10 == 0:
        sys.stdout.write(f"step {step} loss {loss.item()}\n")
