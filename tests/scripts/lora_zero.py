"""LoRA by hand on a pretrained encoder. The mistake: both factors start at 0, and neither has a gradient.

Seen in circle-hit/SAPT issue 11, nvidia-cosmos/cosmos-predict2.5 pull request 15, Guitaricet/relora issue 18.
"""

import argparse
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

parser = argparse.ArgumentParser()
parser.add_argument("--bug", action="store_true")
parser.add_argument("--rank", type=int, default=4)
args = parser.parse_args()


class LoRALinear(nn.Module):
    def __init__(self, base, r, alpha=16):
        super().__init__()
        self.base, self.scaling = base, alpha / r
        self.lora_A = nn.Parameter(torch.zeros(r, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))
        if not args.bug:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        return self.base(x) + (x @ self.lora_A.T @ self.lora_B.T) * self.scaling


class SelfAttention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.heads = heads

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (w(x).view(b, t, self.heads, -1).transpose(1, 2) for w in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, d=32, heads=4):
        super().__init__()
        self.attention, self.ln_1, self.ln_2 = SelfAttention(d, heads), nn.LayerNorm(d), nn.LayerNorm(d)
        self.feed_forward = nn.Sequential(nn.Linear(d, 4 * d), nn.ReLU(), nn.Linear(4 * d, d))

    def forward(self, x):
        x = self.ln_1(x + self.attention(x))
        return self.ln_2(x + self.feed_forward(x))


class Encoder(nn.Module):
    def __init__(self, vocab=40, d=32):
        super().__init__()
        self.shared, self.position = nn.Embedding(vocab, d), nn.Embedding(12, d)
        self.layers = nn.Sequential(Block(d), Block(d))
        self.classifier = nn.Linear(d, 3)

    def forward(self, input_ids):
        x = self.shared(input_ids) + self.position(torch.arange(input_ids.shape[1]))
        return self.classifier(self.layers(x).mean(1))


def add_lora(model, r):
    model.requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, SelfAttention):
            module.q, module.v = LoRALinear(module.q, r), LoRALinear(module.v, r)
    model.classifier.requires_grad_(True)
    return model


torch.manual_seed(35)
model = add_lora(Encoder(), args.rank)
trainable = [p for p in model.parameters() if p.requires_grad]
print(f"trainable {sum(p.numel() for p in trainable)} of {sum(p.numel() for p in model.parameters())}")
optimizer = torch.optim.AdamW(trainable, lr=5e-3)
model.train()
for step in range(40):
    labels = torch.randint(3, (16,))
    topic = labels.unsqueeze(1) * 13 + torch.randint(13, (16, 12))
    input_ids = torch.where(torch.rand(16, 12) < 0.5, topic, torch.randint(40, (16, 12)))
    loss = F.cross_entropy(model(input_ids), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(step, loss.item())
