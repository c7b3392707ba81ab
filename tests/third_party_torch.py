"""Models of PyTorch's own modules, as its tutorials and torchvision write them, each with data and a right loop."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from third_party_loop import PAD, ROWS, START, C, T, Training, V, images, text, turned_round
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable


class Translator(nn.Module):
    """``nn.Transformer`` with its masks, as in PyTorch's tutorial on translation."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = (nn.Embedding(V, C, padding_idx=PAD) for _ in range(2))
        self.places = nn.Embedding(T, C)
        self.transformer = nn.Transformer(C, 4, 2, 2, 2 * C, batch_first=True)
        self.generator = nn.Linear(C, V)

    def embedded(self, table: nn.Embedding, tokens: Tensor) -> Tensor:
        x: Tensor = table(tokens) * math.sqrt(C) + self.places(torch.arange(tokens.shape[1]))
        return x

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        later = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
        x: Tensor = self.transformer(
            self.embedded(self.source, source),
            self.embedded(self.target, target),
            tgt_mask=later,
            src_key_padding_mask=source == PAD,
            tgt_key_padding_mask=target == PAD,
            memory_key_padding_mask=source == PAD,
        )
        logits: Tensor = self.generator(x)
        return logits


def translator() -> Training:
    criterion = nn.CrossEntropyLoss(ignore_index=PAD)

    def batch() -> dict[str, Any]:
        made = turned_round()
        told = made["labels"].masked_fill(made["labels"] < 0, PAD)
        return {"source": made["input_ids"], "target": torch.cat([torch.full((ROWS, 1), START), told], 1)}

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        logits = model(batch["source"], batch["target"][:, :-1])
        told: Tensor = criterion(logits.reshape(-1, V), batch["target"][:, 1:].reshape(-1))
        return told

    return Training(Translator(), batch, loss=loss)


class WordModel(nn.Module):
    """The LSTM of PyTorch's example of a word language model."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.encoder = nn.Dropout(0.2), nn.Embedding(V, C)
        self.rnn = nn.LSTM(C, C, 2, dropout=0.2, batch_first=True)
        self.decoder = nn.Linear(C, V)

    def forward(self, tokens: Tensor) -> Tensor:
        out, _ = self.rnn(self.drop(self.encoder(tokens)))
        logits: Tensor = self.decoder(self.drop(out))
        return logits


def lstm() -> Training:
    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        tokens = batch["tokens"]
        return F.cross_entropy(model(tokens[:, :-1]).reshape(-1, V), tokens[:, 1:].reshape(-1))

    return Training(WordModel(), lambda: {"tokens": text(T + 1)}, rate=3e-3, loss=loss)


class Basic(nn.Module):
    """The basic block of a residual network."""

    def __init__(self, came: int, went: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(came, went, 3, stride, 1, bias=False), nn.BatchNorm2d(went)
        self.conv2, self.bn2 = nn.Conv2d(went, went, 3, 1, 1, bias=False), nn.BatchNorm2d(went)
        self.relu = nn.ReLU(inplace=True)
        shortcut = nn.Sequential(nn.Conv2d(came, went, 1, stride, bias=False), nn.BatchNorm2d(went))
        self.downsample = shortcut if stride != 1 or came != went else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        made: Tensor = self.relu(y + self.downsample(x))
        return made


class ResNet(nn.Module):
    """A small residual network, with torchvision's names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2 = nn.Sequential(Basic(8, 8, 1)), nn.Sequential(Basic(8, 16, 2))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(2), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1)
        logits: Tensor = self.fc(x)
        return logits


def resnet() -> Training:
    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return F.cross_entropy(model(batch["pixel_values"]), batch["labels"])

    return Training(ResNet(), images, loss=loss)


MODELS: tuple[Callable[[], Training], ...] = (translator, lstm, resnet)
