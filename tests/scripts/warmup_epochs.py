"""Fine-tuning with a linear warmup. The mistake: it is stepped by epoch, and the first one has a rate of 0 throughout.

Seen in huggingface/transformers issue 20916, Project-MONAI/tutorials issue 630.
"""

import argparse

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset


def get_linear_schedule_with_warmup(optimizer, num_warmup_steps, num_training_steps):
    def lr_lambda(step):
        if step < num_warmup_steps:
            return step / max(1, num_warmup_steps)
        return max(0.0, (num_training_steps - step) / max(1, num_training_steps - num_warmup_steps))

    return LambdaLR(optimizer, lr_lambda)


class MultilabelNet(nn.Module):
    def __init__(self, inputs=20, hidden=64, labels=6):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Dropout(0.1))
        self.mlp = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU())
        self.head = nn.Linear(hidden, labels)

    def forward(self, x):
        return self.head(self.mlp(self.backbone(x)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bug", action="store_true")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--warmup", type=float, default=0.25)
    args = parser.parse_args()
    torch.manual_seed(45)
    x = torch.randn(240, 20)
    y = ((x @ torch.randn(20, 6)) > 0).float()
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    model = MultilabelNet()
    decay = [p for name, p in model.named_parameters() if p.dim() > 1]
    no_decay = [p for name, p in model.named_parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": no_decay, "weight_decay": 0.0}], lr=3e-3
    )
    total = args.epochs if args.bug else args.epochs * len(loader)
    scheduler = get_linear_schedule_with_warmup(optimizer, int(args.warmup * total), total)
    loss_fn = nn.BCEWithLogitsLoss()
    for epoch in range(args.epochs):
        model.train()
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = loss_fn(model(inputs), labels)
            loss.backward()
            optimizer.step()
            if not args.bug:
                scheduler.step()
        print(f"epoch {epoch} loss {loss.item():.4f} lr {scheduler.get_last_lr()[0]:.2e}")
        if args.bug:
            scheduler.step()


if __name__ == "__main__":
    main()
