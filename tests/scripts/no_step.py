"""A video model in a loop by hand. The mistake: schedule and gradients are seen to, and the optimizer is forgotten.

Seen in tedlasai/learn2refocus issue 5.
"""

import argparse
import math

import torch
from torch import nn


class TemporalConv(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(2, channels)
        self.conv = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x):
        return x + self.conv(nn.functional.silu(self.norm(x)))


class FocalModel(nn.Module):
    def __init__(self, channels=8, frames=5):
        super().__init__()
        self.into = nn.Conv3d(1, channels, (1, 3, 3), padding=(0, 1, 1))
        self.blocks = nn.ModuleList(TemporalConv(channels) for _ in range(2))
        self.out = nn.Conv3d(channels, 1, 1)

    def forward(self, x):
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def stack(n):
    """The same picture, less sharp with each frame; wanted is the sharp one in each."""
    sharp = torch.rand(n, 1, 1, 8, 8).round()
    weights = torch.linspace(1, 0.3, 5).view(1, 1, 5, 1, 1)
    return weights * sharp + 0.05 * torch.randn(n, 1, 5, 8, 8), sharp.expand(-1, -1, 5, -1, -1)


def main(args):
    torch.manual_seed(49)
    model = FocalModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(1, step / args.max_train_steps)))
    )
    for global_step in range(args.max_train_steps):
        frames, target = stack(8)
        loss = nn.functional.l1_loss(model(frames), target)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        if not args.bug:
            optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        if global_step % 10 == 0:
            print(f"step {global_step} loss {loss.item():.4f} lr {lr_scheduler.get_last_lr()[0]:.5f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--bug", action="store_true")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--max-train-steps", type=int, default=40)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    main(parser.parse_args())
