"""Language models as people write them, each right: a model, its loss and an optimiser."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

    Loss = Callable[[], Tensor]
    Training = tuple[nn.Module, Loss, torch.optim.Optimizer]

V, T, C = 40, 24, 32  # tokens, positions, width


def text(rows: int = 8, length: int = T + 1) -> Tensor:
    """Rows of which the next token can be told from the two before: two strides, from anywhere."""
    starts, strides = torch.randint(V, (rows, 1)), torch.randint(1, 3, (rows, 1))
    return (starts + torch.arange(length) * strides) % V


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Llama(nn.Module):
    """A decoder with RMS norm, rotary positions, grouped queries, a gated feed-forward layer and a tied head."""

    def __init__(self, layers: int = 2, heads: int = 4, kv: int = 2) -> None:
        super().__init__()
        self.heads, self.kv, self.size = heads, kv, C // heads
        self.embed = nn.Embedding(V, C)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.ModuleList()
        for _ in range(layers):
            block = nn.ModuleDict()
            block["norm1"], block["norm2"] = Norm(C), Norm(C)
            block["q"], block["o"] = nn.Linear(C, C, bias=False), nn.Linear(C, C, bias=False)
            block["k"], block["v"] = (nn.Linear(C, kv * self.size, bias=False) for _ in range(2))
            block["gate"], block["up"] = (nn.Linear(C, 3 * C, bias=False) for _ in range(2))
            block["down"] = nn.Linear(3 * C, C, bias=False)
            self.blocks.append(block)
        self.norm = Norm(C)

    def turn(self, x: Tensor) -> Tensor:  # [B H T D]
        half = x.shape[-1] // 2
        angles = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        rows, length = tokens.shape
        for block in self.blocks:
            h = block["norm1"](x)  # type: ignore[index]
            q, k, v = (
                block[name](h).view(rows, length, -1, self.size).transpose(1, 2)  # type: ignore[index]
                for name in ("q", "k", "v")
            )
            q, k = self.turn(q), self.turn(k)
            k, v = (y.repeat_interleave(self.heads // self.kv, dim=1) for y in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["o"](y.transpose(1, 2).reshape(rows, length, C))  # type: ignore[index]
            h = block["norm2"](x)  # type: ignore[index]
            x = x + block["down"](F.silu(block["gate"](h)) * block["up"](h))  # type: ignore[index]
        return F.linear(self.norm(x), self.embed.weight)


class Encoder(nn.Module):
    """PyTorch's own encoder: causal for language, not causal for classes."""

    def __init__(self, classes: int, *, causal: bool, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(V, C), nn.Embedding(T + 1, C)
        layer = nn.TransformerEncoderLayer(C, 4, 2 * C, dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head, self.causal = nn.Linear(C, classes), causal

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.embed(tokens) + self.places(torch.arange(tokens.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1]) if self.causal else None
        x = self.encoder(x, mask=mask, src_key_padding_mask=padding, is_causal=self.causal)
        return self.head(x)  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(V, C), nn.LSTM(C, C, 2, dropout=0.1)
        self.head = nn.Linear(C, V)

    def forward(self, tokens: Tensor) -> Tensor:  # [B T] -> [B T V]; inside, time comes first
        out, _ = self.rnn(self.embed(tokens).transpose(0, 1))
        return self.head(out.transpose(0, 1))  # type: ignore[no-any-return]


def language(model: nn.Module, **about: float) -> Loss:
    def loss() -> Tensor:
        tokens = text()
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), **about)  # type: ignore[arg-type]

    return loss


def llama() -> Training:
    model = Llama()
    return model, language(model), torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)


def torch_encoder() -> Training:
    model = Encoder(V, causal=True)
    return model, language(model, label_smoothing=0.1), torch.optim.AdamW(model.parameters(), lr=1e-3)


def half_precision() -> Training:
    model = Llama()
    inner = language(model)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return inner()

    return model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3)


def recurrent() -> Training:
    model = Recurrent()
    return model, language(model), torch.optim.RMSprop(model.parameters(), lr=2e-3)


def padded_classes() -> Training:
    model = Encoder(V, causal=False)

    def loss() -> Tensor:
        tokens, lengths = text(), torch.randint(8, T + 1, (8,))
        padding = torch.arange(T)[None] >= lengths[:, None]
        inputs = tokens[:, :T].masked_fill(padding, 0)
        out = model(inputs, padding)
        mean = (out * ~padding[..., None]).sum(1) / lengths[:, None]
        return F.cross_entropy(mean, (tokens[:, 1] - tokens[:, 0]) % V)

    return model, loss, torch.optim.Adam(model.parameters(), lr=1e-3)


def masked_language() -> Training:
    model = Encoder(V, causal=False)

    def loss() -> Tensor:
        tokens = text()[:, :T]
        hidden = torch.rand(tokens.shape) < 0.15
        hidden[:, 0] = True
        targets = tokens.masked_fill(~hidden, -100)
        return F.cross_entropy(model(tokens.masked_fill(hidden, 0)).flatten(0, 1), targets.flatten())

    return model, loss, torch.optim.AdamW(model.parameters(), lr=1e-3)


def frozen_body() -> Training:
    model = Encoder(V, causal=True, dropout=0.0)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("head"))
    return model, language(model), torch.optim.AdamW(model.head.parameters(), lr=1e-2)


class Packed(nn.Module):
    """nn.MultiheadAttention, documents of different lengths side by side, a head tied to the table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(V, C), nn.Parameter(torch.zeros(T, C))
        nn.init.normal_(self.embed.weight, std=0.05)
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(5))
        self.attention = nn.ModuleList(nn.MultiheadAttention(C, 4, batch_first=True) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C), nn.Dropout(0.1)) for _ in range(2)
        )
        self.head = nn.Linear(C, V, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, documents: Tensor) -> Tensor:
        x = self.embed(tokens) + self.places
        later = torch.ones(T, T, dtype=torch.bool).triu(1)
        hidden = (documents[:, :, None] != documents[:, None]) | later
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlps, strict=True)):
            h = self.norms[2 * i](x)
            x = x + attention(h, h, h, attn_mask=hidden.repeat_interleave(4, 0), need_weights=False)[0]
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(self.norms[4](x))  # type: ignore[no-any-return]


def packed() -> Training:
    model = Packed()

    def loss() -> Tensor:
        tokens, ends = text(), torch.randint(6, T - 6, (8, 1))
        tokens = torch.where(torch.arange(T + 1) <= ends, tokens, text())
        documents = (torch.arange(T) > ends).long()
        targets = tokens[:, 1:].masked_fill(torch.arange(T) == ends, -100)  # no document tells how another begins
        return F.cross_entropy(model(tokens[:, :-1], documents).transpose(1, 2), targets)

    return model, loss, torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98))


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(V + 1, C), nn.Embedding(T, C)
        self.transformer = nn.Transformer(C, 4, 1, 1, 2 * C, 0.0, batch_first=True)
        self.head = nn.Linear(C, V)

    def forward(self, source: Tensor, target: Tensor, padding: Tensor) -> Tensor:
        here, there = (self.embed(x) + self.places(torch.arange(x.shape[1])) for x in (source, target))
        mask = self.transformer.generate_square_subsequent_mask(target.shape[1])
        out = self.transformer(
            here, there, tgt_mask=mask, src_key_padding_mask=padding, memory_key_padding_mask=padding
        )
        return self.head(out)  # type: ignore[no-any-return]


def translator() -> Training:
    model = Translator()

    def loss() -> Tensor:
        source, lengths = text()[:, :12], torch.randint(6, 13, (8, 1))
        padding = torch.arange(12) >= lengths
        target = source.flip(1).masked_fill(padding.flip(1), -100)
        told = torch.cat([torch.full((8, 1), V), target[:, :-1].clamp_min(0)], 1)
        return F.cross_entropy(model(source.masked_fill(padding, 0), told, padding).flatten(0, 1), target.flatten())

    return model, loss, torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-9)


def checkpointed() -> Training:
    model = Encoder(V, causal=True, dropout=0.0)
    layers = model.encoder.layers

    def forward(tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        x = model.embed(tokens) + model.places(torch.arange(tokens.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        for layer in layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, mask, use_reentrant=False)
        return model.head(x)  # type: ignore[no-any-return]

    model.forward = forward  # type: ignore[method-assign]
    return model, language(model), torch.optim.AdamW(model.parameters(), lr=1e-3)


class Experts(nn.Module):
    """A router sends each token to one of four experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(V, C), nn.LayerNorm(C), nn.Linear(C, V)
        self.router = nn.Linear(C, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, C)) for _ in range(4))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(tokens)
        h = self.norm(x)
        odds = self.router(h).softmax(-1)
        best, chosen = odds.max(-1)
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            where = chosen == i
            out[where] = expert(h[where])
        shares = torch.stack([(chosen == i).float().mean() for i in range(4)])
        return self.head(x + best[..., None] * out), 4 * (shares * odds.mean((0, 1))).sum()


def experts() -> Training:
    model = Experts()

    def loss() -> Tensor:
        tokens = text()
        logits, uneven = model(tokens[:, :-1])
        told: Tensor = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + 0.01 * uneven
        return told

    return model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3)


def stepwise() -> Training:
    """A gated cell that is called token by token."""
    model = nn.ModuleDict({"embed": nn.Embedding(V, C), "cell": nn.GRUCell(C, C), "head": nn.Linear(C, V)})

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, tokens: Tensor) -> Tensor:
            state, out = torch.zeros(len(tokens), C), []
            for x in self.parts["embed"](tokens).unbind(1):
                state = self.parts["cell"](x, state)
                out.append(self.parts["head"](state))
            return torch.stack(out, 1)

    loop = Loop()
    return loop, language(loop), torch.optim.Adam(loop.parameters(), lr=3e-3)


def distilled() -> Training:
    student, teacher = Llama(1), Llama(2)

    def loss() -> Tensor:
        tokens = text()
        with torch.no_grad():
            told = teacher(tokens[:, :-1]).log_softmax(-1)
        said = student(tokens[:, :-1])
        hard = F.cross_entropy(said.flatten(0, 1), tokens[:, 1:].flatten())
        return 0.5 * hard + 0.5 * F.kl_div(said.log_softmax(-1), told, log_target=True, reduction="batchmean") / T

    return student, loss, torch.optim.AdamW(student.parameters(), lr=2e-3)


LANGUAGE = (
    llama,
    torch_encoder,
    half_precision,
    recurrent,
    padded_classes,
    masked_language,
    frozen_body,
    packed,
    translator,
    checkpointed,
    experts,
    stepwise,
    distilled,
)
