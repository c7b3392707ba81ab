"""A small WaveNet. The mistake: its dilated convolutions are padded on both sides, and hear what comes next.

Seen in golbin/WaveNet issue 5, peustr/wavenet issue 1.
"""

import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

BUG = "--bug" in sys.argv
torch.manual_seed(61)


class CausalConv1d(nn.Module):
    def __init__(self, channels, out_channels, kernel_size=3, dilation=1):
        super().__init__()
        self.both = (kernel_size - 1) * dilation
        self.conv = nn.Conv1d(channels, out_channels, kernel_size, dilation=dilation)

    def forward(self, x):
        if BUG:
            return self.conv(F.pad(x, (self.both // 2, self.both // 2)))
        return self.conv(F.pad(x, (self.both, 0)))


class ResidualBlock(nn.Module):
    def __init__(self, channels, skip_channels, dilation):
        super().__init__()
        self.dilated = CausalConv1d(channels, 2 * channels, dilation=dilation)
        self.conv_res, self.conv_skip = nn.Conv1d(channels, channels, 1), nn.Conv1d(channels, skip_channels, 1)

    def forward(self, x):
        value, gate = self.dilated(x).chunk(2, dim=1)
        gated = torch.tanh(value) * torch.sigmoid(gate)
        return x + self.conv_res(gated), self.conv_skip(gated)


class WaveNet(nn.Module):
    def __init__(self, classes=32, channels=24, skip_channels=32, layers=4):
        super().__init__()
        self.embed = nn.Embedding(classes, channels)
        self.stack = nn.ModuleList(ResidualBlock(channels, skip_channels, 2**i) for i in range(layers))
        self.conv1, self.conv2 = nn.Conv1d(skip_channels, skip_channels, 1), nn.Conv1d(skip_channels, classes, 1)

    def forward(self, x):
        x = self.embed(x).transpose(1, 2)
        skips = []
        for block in self.stack:
            x, skip = block(x)
            skips.append(skip)
        return self.conv2(F.relu(self.conv1(F.relu(sum(skips)))))


def mu_law(wave, classes=32):
    mu = classes - 1
    squeezed = wave.sign() * torch.log1p(mu * wave.abs()) / torch.log1p(torch.tensor(float(mu)))
    return ((squeezed + 1) / 2 * mu + 0.5).long()


model = WaveNet()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
time = torch.arange(65).float()
for step in range(40):
    pitch = 0.1 + 0.3 * torch.rand(8, 1)
    wave = 0.7 * torch.sin(pitch * time + 6.28 * torch.rand(8, 1)) + 0.2 * torch.sin(2.5 * pitch * time)
    samples = mu_law(wave)
    loss = F.cross_entropy(model(samples[:, :-1]), samples[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step}: {loss.item():.3f}")
