"""Trainings of other models than those of language, each right: a model, its loss and an optimiser."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from trainings_language import C, T, V, text

if TYPE_CHECKING:
    from trainings_language import Training


def images() -> Training:
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2)]
    model = nn.Sequential(*layers, nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))

    def loss() -> Tensor:
        classes = torch.randint(4, (16,))
        x = torch.randn(16, 1, 8, 8) + classes.view(-1, 1, 1, 1)
        return F.cross_entropy(model(x), classes)

    return model, loss, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)


def regression() -> Training:
    model = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def loss() -> Tensor:
        x = torch.randn(32, 6)
        return F.mse_loss(model(x), x.prod(-1, keepdim=True).tanh())

    return model, loss, torch.optim.SGD(model.parameters(), lr=0.05)


def denoiser() -> Training:
    model = nn.Sequential(nn.Linear(17, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 16))

    def loss() -> Tensor:
        x, noise, time = torch.randn(32, 1) * torch.ones(16), torch.randn(32, 16), torch.rand(32, 1)
        noisy = (1 - time).sqrt() * x + time.sqrt() * noise
        return F.mse_loss(model(torch.cat([noisy, time], -1)), noise)

    return model, loss, torch.optim.AdamW(model.parameters(), lr=2e-3)


class Variational(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(16, 8), nn.Linear(4, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log = self.encode(x).chunk(2, -1)
        return self.decode(mean + (log / 2).exp() * torch.randn_like(mean)), mean, log


def variational() -> Training:
    model = Variational()

    def loss() -> Tensor:
        x = (torch.randn(32, 1) + torch.arange(16) / 8 > 0.5).float()
        out, mean, log = model(x)
        spread = -0.5 * (1 + log - mean.square() - log.exp()).sum(-1).mean()
        told: Tensor = F.binary_cross_entropy_with_logits(out, x, reduction="none").sum(-1).mean() + spread
        return told

    return model, loss, torch.optim.Adam(model.parameters(), lr=3e-3)


def contrastive() -> Training:
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 8))

    def loss() -> Tensor:
        x = torch.randn(32, 16)
        a, b = (F.normalize(model(x + 0.1 * torch.randn_like(x)), dim=-1) for _ in range(2))
        return F.cross_entropy(a @ b.T / 0.2, torch.arange(32))

    return model, loss, torch.optim.Adam(model.parameters(), lr=2e-3)


def sparse_table() -> Training:
    model = nn.Sequential(nn.EmbeddingBag(V, C, sparse=True, mode="mean"), nn.Linear(C, 2))
    table, head = model[0].parameters(), model[1].parameters()

    def loss() -> Tensor:
        tokens = text()[:, :T]
        return F.cross_entropy(model(tokens), ((tokens[:, 1] - tokens[:, 0]) % V) - 1)

    return model, loss, torch.optim.SGD([{"params": [*table]}, {"params": [*head]}], lr=0.1)


def policy() -> Training:
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3))

    def loss() -> Tensor:
        state = torch.randn(64, 4)
        odds = torch.distributions.Categorical(logits=model(state))
        action = odds.sample()  # type: ignore[no-untyped-call]
        reward = (action == state[:, :3].argmax(-1)).float()
        won: Tensor = -(odds.log_prob(action) * (reward - reward.mean())).mean()  # type: ignore[no-untyped-call]
        return won - 0.01 * odds.entropy().mean()  # type: ignore[no-any-return, no-untyped-call]

    return model, loss, torch.optim.Adam(model.parameters(), lr=3e-3)


def weight_norm() -> Training:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 64)),
        nn.ReLU(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(64, 3)),
    )

    def loss() -> Tensor:
        x = torch.randn(32, 6)
        return F.cross_entropy(3 * model(x), x[:, :3].argmax(-1))

    return model, loss, torch.optim.Adam(model.parameters(), lr=3e-3)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 8, 3, padding=1, bias=False),
                nn.BatchNorm2d(8),
                nn.ReLU(inplace=True),
                nn.Conv2d(8, 8, 3, padding=1, bias=False),
                nn.BatchNorm2d(8),
            )
            for _ in range(2)
        )
        for block in self.blocks:
            nn.init.zeros_(block[4].weight)  # type: ignore[index]
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x), inplace=True)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def residual() -> Training:
    model = Residual()

    def loss() -> Tensor:
        classes = torch.randint(4, (16,))
        x = torch.randn(16, 1, 8, 8)
        x[:, 0, :2] += classes.view(-1, 1, 1).float()
        return F.cross_entropy(model(x), classes, label_smoothing=0.1)

    return model, loss, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


class Patches(nn.Module):
    """A vision transformer with a token for the class."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(1, 32, 2, stride=2)
        self.token, self.places = nn.Parameter(torch.zeros(1, 1, 32)), nn.Parameter(0.02 * torch.randn(1, 17, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cut(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.encoder(x)[:, 0])  # type: ignore[no-any-return]


def patches() -> Training:
    model = Patches()

    def loss() -> Tensor:
        classes = torch.randint(4, (16,))
        x = torch.randn(16, 1, 8, 8) + torch.eye(4)[classes].repeat(1, 2).view(-1, 1, 8, 1)
        return F.cross_entropy(model(x), classes)

    return model, loss, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)


def forecaster() -> Training:
    """Numbers, not tokens: each value of a series from those before it."""
    model = nn.ModuleDict({"rnn": nn.GRU(1, 24, batch_first=True), "head": nn.Linear(24, 1)})

    class Forecast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["head"](self.parts["rnn"](x)[0])  # type: ignore[no-any-return]

    forecast = Forecast()

    def loss() -> Tensor:
        x = torch.sin(torch.rand(8, 1, 1) * 6 + torch.arange(25)[:, None] / 3) + 0.05 * torch.randn(8, 25, 1)
        return F.smooth_l1_loss(forecast(x[:, :-1]), x[:, 1:])

    return forecast, loss, torch.optim.NAdam(forecast.parameters(), lr=3e-3)


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv1d(1, 8, 3, 2, 1), nn.Conv1d(8, 8, 3, padding=1)
        self.up, self.out = nn.ConvTranspose1d(8, 8, 2, 2), nn.Conv1d(9, 1, 1)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        deep = F.leaky_relu(self.norm(self.deep(F.leaky_relu(self.down(x), 0.1))), 0.1)
        return self.out(torch.cat([x, self.up(deep)], 1))  # type: ignore[no-any-return]


def segmentation() -> Training:
    model = Pyramid()

    def loss() -> Tensor:
        clean = (torch.rand(16, 1, 4) > 0.5).float().repeat_interleave(4, -1)
        out = model(clean + 0.5 * torch.randn_like(clean)).sigmoid()
        overlap = 1 - (2 * (out * clean).sum() + 1) / (out.sum() + clean.sum() + 1)
        told: Tensor = overlap + F.binary_cross_entropy(out, clean)
        return told

    return model, loss, torch.optim.RAdam(model.parameters(), lr=3e-3)


def factorised() -> Training:
    """Who likes what: two tables and a product."""
    model = nn.ModuleDict({"who": nn.Embedding(30, 8), "what": nn.Embedding(20, 8)})

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = model

        def forward(self, who: Tensor, what: Tensor) -> Tensor:
            return (self.tables["who"](who) * self.tables["what"](what)).sum(-1)  # type: ignore[no-any-return]

    product = Product()

    def loss() -> Tensor:
        who, what = torch.randint(30, (64,)), torch.randint(20, (64,))
        return F.mse_loss(product(who, what), ((who + what) % 5).float())

    return product, loss, torch.optim.Adagrad(product.parameters(), lr=0.05)


def ranked() -> Training:
    model = nn.Sequential(nn.Linear(8, 32), nn.ELU(), nn.Linear(32, 4))

    def loss() -> Tensor:
        centres = torch.randn(16, 8)
        a, b, c = (model(x + 0.1 * torch.randn(16, 8)) for x in (centres, centres, centres.roll(1, 0)))
        return F.triplet_margin_loss(a, b, c)

    return model, loss, torch.optim.Adamax(model.parameters(), lr=2e-3)


BESIDE = (
    images,
    regression,
    denoiser,
    variational,
    contrastive,
    sparse_table,
    policy,
    weight_norm,
    residual,
    patches,
    forecaster,
    segmentation,
    factorised,
    ranked,
)
