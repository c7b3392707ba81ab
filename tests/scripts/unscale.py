"""A small U-Net in mixed precision. The mistake: gradients are clipped while the GradScaler's factor is still in them.

Seen in milesial/Pytorch-UNet issue 468, pytorch/examples issue 1196, harubaru/waifu-diffusion issue 64.
"""

import argparse
import logging

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")


class DoubleConv(nn.Sequential):
    def __init__(self, i, o):
        super().__init__(
            nn.Conv2d(i, o, 3, padding=1, bias=False),
            nn.BatchNorm2d(o),
            nn.ReLU(inplace=True),
            nn.Conv2d(o, o, 3, padding=1, bias=False),
            nn.BatchNorm2d(o),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    def __init__(self, n_channels=1, n_classes=2, width=8):
        super().__init__()
        self.inc = DoubleConv(n_channels, width)
        self.down = nn.Sequential(nn.MaxPool2d(2), DoubleConv(width, 2 * width))
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.conv = DoubleConv(2 * width, width)
        self.outc = nn.Conv2d(width, n_classes, 1)

    def forward(self, x):
        skip = self.inc(x)
        return self.outc(self.conv(torch.cat([skip, self.up(self.down(skip))], dim=1)))


def dice_loss(probabilities, target, eps=1e-6):
    inter = 2 * (probabilities * target).sum((-1, -2))
    total = probabilities.sum((-1, -2)) + target.sum((-1, -2))
    return 1 - ((inter + eps) / (total + eps)).mean()


@torch.inference_mode()
def evaluate(net, loader, amp):
    net.eval()
    score = 0.0
    for image, mask_true in loader:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            mask_pred = net(image)
        one_hot = F.one_hot(mask_pred.argmax(dim=1), 2).permute(0, 3, 1, 2).float()
        score += 1 - dice_loss(one_hot[:, 1:], F.one_hot(mask_true, 2).permute(0, 3, 1, 2).float()[:, 1:]).item()
    net.train()
    return score / len(loader)


def squares(n):
    """Noisy images, and where in them there is a bright square."""
    images, masks = 0.5 * torch.randn(n, 1, 16, 16), torch.zeros(n, 16, 16, dtype=torch.long)
    for i, (row, column) in enumerate(torch.randint(1, 9, (n, 2)).tolist()):
        masks[i, row : row + 6, column : column + 6] = 1
    return TensorDataset(images + masks.unsqueeze(1), masks)


def train_model(args):
    torch.manual_seed(30)
    train_set, val_set = random_split(squares(176), [160, 16])
    train_loader, val_loader = DataLoader(train_set, batch_size=8, shuffle=True), DataLoader(val_set, batch_size=8)
    model = UNet()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, weight_decay=1e-8, momentum=0.9)
    grad_scaler = torch.amp.GradScaler("cpu", enabled=args.amp)
    criterion = nn.CrossEntropyLoss()
    for epoch in range(1, args.epochs + 1):
        model.train()
        for images, true_masks in train_loader:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.amp):
                masks_pred = model(images)
                loss = criterion(masks_pred, true_masks)
                one_hot = F.one_hot(true_masks, 2).permute(0, 3, 1, 2).float()
                loss = loss + dice_loss(F.softmax(masks_pred, dim=1).float(), one_hot)
            optimizer.zero_grad(set_to_none=True)
            grad_scaler.scale(loss).backward()
            if not args.bug:
                grad_scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            grad_scaler.step(optimizer)
            grad_scaler.update()
        logging.info(f"epoch {epoch} loss {loss.item():.3f} dice {evaluate(model, val_loader, args.amp):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--bug", action="store_true")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--no-amp", dest="amp", action="store_false")
    train_model(parser.parse_args())
