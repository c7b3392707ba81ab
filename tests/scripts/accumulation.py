"""A diffusion model that accumulates gradients. The mistake: each part clears them, and only the last one counts.

Seen in bytetriper/RAE issue 67, pytorch/torchtitan pull request 3575, tatsu-lab/alpaca_farm issue 57.
"""

import argparse

import torch
from torch import nn


class Denoiser(nn.Module):
    def __init__(self, dim=8, width=64, steps=50):
        super().__init__()
        self.time = nn.Embedding(steps, width)
        self.inp = nn.Linear(dim, width)
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dim))

    def forward(self, x, t):
        return self.mlp(self.inp(x) + self.time(t))


def main(args):
    torch.manual_seed(26)
    betas = torch.linspace(1e-3, 0.2, 50)
    alphas_bar = torch.cumprod(1 - betas, dim=0)
    centres = torch.randn(5, 8) * 2
    model = Denoiser()
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    for step in range(args.steps):
        total = 0.0
        if not args.bug:
            optimizer.zero_grad(set_to_none=True)
        for _ in range(args.grad_accum):
            if args.bug:
                optimizer.zero_grad(set_to_none=True)
            x0 = centres[torch.randint(5, (16,))] + 0.1 * torch.randn(16, 8)
            t = torch.randint(50, (16,))
            noise = torch.randn_like(x0)
            a = alphas_bar[t].unsqueeze(1)
            loss = nn.functional.mse_loss(model(a.sqrt() * x0 + (1 - a).sqrt() * noise, t), noise)
            (loss / args.grad_accum).backward()
            total += loss.item() / args.grad_accum
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                ema[name].mul_(0.9).add_(p, alpha=0.1)
        if step % 10 == 0:
            print(f"step {step:3d} loss {total:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--bug", action="store_true")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--grad-accum", type=int, default=4)
    main(parser.parse_args())
