"""Pictures and captions. The mistake: the extractor hands out detached features, and its encoder learns nothing.

Seen in lucidrains/CoCa-pytorch issue 6.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

BUG = "--bug" in sys.argv
torch.manual_seed(55)


class ViT(nn.Module):
    def __init__(self, dim=32, patch=4, size=16):
        super().__init__()
        self.to_patch_embedding = nn.Conv2d(3, dim, patch, stride=patch)
        self.pos_embedding = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, dim))
        layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, 0.0, batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, 2, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.to_logits = nn.Linear(dim, 10)

    def forward(self, img):
        x = self.to_patch_embedding(img).flatten(2).transpose(1, 2) + self.pos_embedding
        return self.to_logits(self.transformer(x).mean(1))


class Extractor(nn.Module):
    """Gives what a ViT's Transformer gives out, before its head."""

    def __init__(self, vit):
        super().__init__()
        self.vit, self.latents = vit, None
        vit.transformer.register_forward_hook(self._hook)

    def _hook(self, _, inputs, output):
        self.latents = output.clone().detach() if BUG else output

    def forward(self, img):
        self.vit(img)
        latents, self.latents = self.latents, None
        return latents


class CoCa(nn.Module):
    def __init__(self, num_tokens=40, dim=32, length=8):
        super().__init__()
        self.img_encoder = Extractor(ViT(dim))
        self.token_emb, self.pos_emb = nn.Embedding(num_tokens, dim), nn.Embedding(length, dim)
        self.img_to_latents = nn.Linear(dim, dim, bias=False)
        self.text_to_latents = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, text, images):
        text_latents = self.text_to_latents((self.token_emb(text) + self.pos_emb.weight).mean(1))
        image_latents = self.img_to_latents(self.img_encoder(images).mean(1))
        sim = F.normalize(text_latents, dim=-1) @ F.normalize(image_latents, dim=-1).t() * self.temperature.exp()
        labels = torch.arange(len(text))
        return (F.cross_entropy(sim, labels) + F.cross_entropy(sim.t(), labels)) / 2


things, colours = torch.randn(10, 3, 16, 16), torch.randn(4, 3, 1, 1)
coca = CoCa()
optim = torch.optim.AdamW([p for n, p in coca.named_parameters() if "to_logits" not in n], lr=2e-3)
for i in range(40):
    thing, colour = torch.randint(10, (16,)), torch.randint(4, (16,))
    words = torch.randint(20, 40, (16, 6))
    text = torch.cat([thing.unsqueeze(1), 10 + colour.unsqueeze(1), words], dim=1)
    images = things[thing] + colours[colour] + 0.3 * torch.randn(16, 3, 16, 16)
    loss = coca(text, images)
    loss.backward()
    optim.step()
    optim.zero_grad()
    if i % 10 == 0:
        print(f"{i}: {loss.item():.3f}")
