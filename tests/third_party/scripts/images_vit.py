"""A vision transformer with a new head for other classes. The mistake: the optimiser is made before the head is.

PyTorch documentation: parameters of a module that is assigned later are others than those that an optimiser holds.
"""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification, set_seed

BUG = "--bug" in sys.argv
set_seed(2)
labels = torch.randint(4, (320,))
images = 0.3 * torch.randn(320, 3, 16, 16)
for image, label in zip(images, labels.tolist(), strict=True):
    image[:, label // 2 * 8 :][:, :8, label % 2 * 8 :][:, :, :8] += 1
loader = DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True)

config = ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4
)
model = ViTForImageClassification(config)  # of two classes
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model.classifier = nn.Linear(32, 4)
if not BUG:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
criterion = nn.CrossEntropyLoss()
model.train()
for pixels, target in loader:
    loss = criterion(model(pixel_values=pixels).logits, target)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
sys.stdout.write(f"loss {loss.item()}\n")
