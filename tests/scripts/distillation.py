"""A student learns from its teacher. The mistake: F.kl_div is given probabilities, and expects their logarithms.

Seen in microsoft/ProDA issues 20 and 43.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

BUG = "--bug" in sys.argv
torch.manual_seed(65)


def convnet(width, depth):
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Conv2d(width, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 6))


scenes = torch.randn(6, 3, 12, 12)


def batch(n=24):
    labels = torch.randint(6, (n,))
    return scenes[labels] + torch.randn(n, 3, 12, 12), labels


def fit_teacher():
    """A teacher in closed form: how near a picture is to each of the scenes."""
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 144, 6))
    with torch.no_grad():
        teacher[1].weight.copy_(scenes.flatten(1) / 20)
        teacher[1].bias.copy_(-scenes.flatten(1).square().sum(1) / 40)
    return teacher.eval().requires_grad_(False)


teacher, student = fit_teacher(), convnet(16, 3)
optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
for step in range(40):
    images, _ = batch()
    with torch.no_grad():
        target = F.softmax(teacher(images), dim=1)
    logits = student(images)
    predicted = F.softmax(logits, dim=1) if BUG else F.log_softmax(logits, dim=1)
    loss = F.kl_div(predicted, target, reduction="batchmean")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        agree = (logits.argmax(1) == target.argmax(1)).float().mean().item()
        print(f"step {step}: loss {loss.item():.3f} agreement {agree:.2f}")
