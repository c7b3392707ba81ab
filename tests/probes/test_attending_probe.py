"""Attention that others wrote: the right ones are silent, however they are written, and what is wrong is named."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.sandbox import sandbox
from lab.sites import Sites

if TYPE_CHECKING:
    from collections.abc import Callable

    Core = Callable[[Tensor, Tensor, Tensor], Tensor]

operands = importlib.import_module("lab.probes.operands")
attending = importlib.import_module("lab.probes.attending")

B, T, H, D = 4, 6, 2, 8
C = H * D


class Layer(nn.Module):
    """Projections, and a core that makes [B T C] of q, k, v [B H T D]."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.qkv, self.out, self.core = nn.Linear(C, 3 * C), nn.Linear(C, C), core

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.view(len(x), -1, H, D).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        out: Tensor = self.out(self.core(3 * q, k, v))
        return out


class Own(nn.Module):
    """Any function of x [B T C], with weights of its own."""

    def __init__(self, parts: dict[str, nn.Module], function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(len(x), -1, C)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) / math.sqrt(D)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return join(scores(q, k).masked_fill(hidden, -math.inf).softmax(-1) @ v)


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pattern = F.softmax(torch.einsum("bhtd,bhsd->bhts", q, k), dim=3)
    return torch.einsum("bhts,bhsd->bthd", pattern, v).reshape(len(q), -1, C)


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pattern = nn.Softmax(dim=-2)(k @ q.transpose(-2, -1))  # [B H S T]
    return join((v.transpose(-2, -1) @ pattern).transpose(-2, -1))


def three_axes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(-1, x.shape[2], D) for x in (q, k, v))
    out = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v)
    return join(out.view(-1, H, out.shape[1], D))


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pattern = scores(q, k).add_(q.new_zeros(1)).softmax(-1)
    pattern *= 2.0
    return join(pattern @ v)


def with_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One more column, for looking nowhere, is cut off afterwards."""
    both = torch.cat([scores(q, k), q.new_ones(len(q), H, q.shape[2], 1)], -1).softmax(-1)
    return join(both[..., :-1] @ v)


def fused(**about: Any) -> Core:
    return lambda q, k, v: join(F.scaled_dot_product_attention(q, k, v, **about))


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return join(F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], is_causal=True, enable_gqa=True))


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return join(q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v))


def channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of channels to each other, as in XCiT."""
    return join(((q.transpose(-2, -1) @ k).softmax(-1) @ v.transpose(-2, -1)).transpose(-2, -1))


def co_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of one matrix of scores both softmaxes: query to context, and back, as in QANet."""
    s = scores(q, k)
    return join(s.softmax(-1) @ v + s.softmax(-1) @ s.softmax(-2).transpose(-2, -1) @ v)


def competing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Slots compete for what they see, and then each takes an average."""
    pattern = scores(q, k).softmax(-2) + 1e-8
    return join(pattern / pattern.sum(-1, keepdim=True) @ v)


CORES = {
    "by hand": by_hand,
    "einsum": by_einsum,
    "keys first": keys_first,
    "three axes": three_axes,
    "in place": in_place,
    "sink": with_sink,
    "sdpa": fused(),
    "sdpa, causal": fused(is_causal=True),
    "sdpa, mask": fused(attn_mask=torch.arange(T)[None] < T - 2),
    "sdpa, bias": lambda q, k, v: join(F.scaled_dot_product_attention(q, k, v, attn_mask=q.new_zeros(T, T))),
    "sdpa, grouped": grouped,
    "linear": linear_attention,
    "channels": channels,
    "co-attention": co_attention,
    "competing": competing,
}


def torch_layer(**about: Any) -> nn.Module:
    need, first = about.pop("need_weights", False), about.get("batch_first", True)
    layer = nn.MultiheadAttention(C, H, batch_first=first)

    def run(_self: Any, x: Tensor) -> Tensor:
        x = x if first else x.transpose(0, 1)
        out: Tensor = layer(x, x, x, need_weights=need)[0]
        return out if first else out.transpose(0, 1)

    return Own({"layer": layer}, run)


def cross(model: Any, x: Tensor) -> Tensor:
    out: Tensor = model.layer(x[:, :3], x, x)[0]
    return out


def experts(model: Any, x: Tensor) -> Tensor:
    """A gate over experts, as many as positions, and what is dispatched by it."""
    gate = model.gate(x).softmax(-1)  # [B T E]
    out: Tensor = gate @ (gate.transpose(1, 2) @ x)
    return out


def pooled(model: Any, x: Tensor) -> Tensor:
    weights = model.score(x).softmax(1)  # [B T 1]
    out: Tensor = (weights.transpose(1, 2) @ x).squeeze(1)
    return out


def clustered(model: Any, x: Tensor) -> Tensor:
    """Nodes are gathered in clusters, as many as nodes: the softmax is over clusters, the product over nodes."""
    out: Tensor = model.assign(x).softmax(-1).transpose(1, 2) @ x
    return out


def graph(model: Any, x: Tensor) -> Tensor:
    """A graph that is learned from tables of nodes, and walked along backwards, as in Graph WaveNet."""
    adjacency = (model.left.weight @ model.right.weight.T).relu().softmax(1)
    return torch.einsum("btc,tw->bwc", x, adjacency)


def classified(model: Any, x: Tensor) -> Tensor:
    out: Tensor = model.head(x).softmax(-1)
    return out


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda core=core: Layer(core)) for name, core in CORES.items()},  # type: ignore[misc]
    "torch": torch_layer,
    "torch, weights": lambda: torch_layer(need_weights=True),
    "torch, time first": lambda: torch_layer(batch_first=False),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(C, H, C, batch_first=True), 2),
    "cross": lambda: Own({"layer": nn.MultiheadAttention(C, H, batch_first=True)}, cross),
    "experts": lambda: Own({"gate": nn.Linear(C, T)}, experts),
    "pooled": lambda: Own({"score": nn.Linear(C, 1)}, pooled),
    "clustered": lambda: Own({"assign": nn.Linear(C, T)}, clustered),
    "graph": lambda: Own({"left": nn.Embedding(T, C), "right": nn.Embedding(T, C)}, graph),
    "classified": lambda: Own({"head": nn.Linear(C, T)}, classified),
}


def followed(model: nn.Module, x: Tensor) -> Any:
    found = operands.Operands(len(x))
    with sandbox(model, Sites()), torch.no_grad():  # as each experiment is made
        found.run(model.eval(), [x], lambda: model(x))
    return found


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_right_is_silent_however_it_is_written(name: str, kind: str) -> None:
    torch.manual_seed(0)
    dtype = getattr(torch, kind)
    model = MODELS[name]()
    before = [p.clone() for p in model.parameters()]
    if dtype == torch.bfloat16:
        model = model.bfloat16()
    found = followed(model, 3 * torch.randn(B, T, C, dtype=dtype))
    assert all(value <= operands.EVEN for value in found.uneven.values())
    assert not any(value > 0 for value in found.joined.values())
    assert len(before) == len([*model.parameters()])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["by hand", "einsum", "sdpa", "sdpa, mask", "sdpa, grouped", "encoder"])
def test_what_is_right_is_seen(name: str) -> None:
    """A test that finds nothing because it looks at nothing would pass above."""
    found = followed(MODELS[name](), torch.randn(B, T, C))
    assert name == "encoder" or found.joined == {"": 0.0}
    assert name.startswith(("sdpa", "encoder")) or "" in found.uneven


def over(axis: int) -> Core:
    return lambda q, k, v: join(scores(q, k).softmax(axis) @ v)


def over_queries_by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pattern = F.softmax(torch.einsum("bhtd,bhsd->bhts", q, k), dim=2)
    return torch.einsum("bhts,bhsd->bthd", pattern, v).reshape(len(q), -1, C)


def without_an_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(-1, x.shape[2], D) for x in (q, k, v))
    pattern = F.softmax(torch.bmm(q, k.transpose(1, 2)) / math.sqrt(D), dim=0)  # what PyTorch takes where none is given
    return join(torch.bmm(pattern, v).view(-1, H, pattern.shape[1], D))


@pytest.mark.parametrize("core", [over(2), over(-2), over(1), over(0), over_queries_by_einsum, without_an_axis])
def test_a_softmax_over_another_axis_is_seen(core: Core) -> None:
    torch.manual_seed(0)
    found = followed(Layer(core), 3 * torch.randn(B, T, C))
    assert found.uneven[""] > operands.EVEN


BARE: list[Core] = [
    lambda q, k, v: (scores(q, k).softmax(-1) @ v).reshape(len(q), -1, C),
    lambda q, k, v: (scores(q, k).softmax(-1) @ v).contiguous().view(len(q), -1, C),
    lambda q, k, v: torch.einsum("bhts,bhsd->bhtd", scores(q, k).softmax(-1), v).reshape(len(q), -1, C),
    lambda q, k, v: F.scaled_dot_product_attention(q, k, v).reshape(len(q), -1, C),
    lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True).contiguous().view(len(q), -1, C),
]


@pytest.mark.parametrize("core", BARE)
def test_heads_that_are_joined_as_they_lie_are_seen(core: Core) -> None:
    found = followed(Layer(core), torch.randn(B, T, C))
    assert found.joined == {"": 1.0}


# ---------------------------------------------------------------- padding


def padded(lengths: list[int], *, left: bool = False) -> Tensor:
    tokens = torch.randint(1, 30, (len(lengths), T))
    places = torch.arange(T).flip(0) if left else torch.arange(T)
    tokens[:, 0], tokens[:, 1] = 7, 8
    return tokens.masked_fill(places >= torch.tensor(lengths)[:, None], 0)


@pytest.mark.parametrize("left", [False, True])
def test_a_mask_is_inverted_where_all_that_is_seen_is_padding(left: bool) -> None:
    tokens = padded([6, 4, 3, 5], left=left)
    assert attending._inverted(tokens, tokens != 0) == 3
    assert attending._inverted(tokens, tokens == 0) == 0
    tokens = padded([6, 6, 6, 3], left=left)  # one row is too few: a prompt may end so
    assert attending._inverted(tokens, tokens != 0) == 0
    tokens = padded([4, 4, 4, 4], left=left)  # one place for all: it may be what everybody has to look at
    assert attending._inverted(tokens, tokens != 0) == 0
    tokens = padded([6, 4, 3, 5], left=left)
    hidden = tokens != 0
    hidden[1, 2] = False  # a token is seen
    assert attending._inverted(tokens, hidden) == 0


class Reader(nn.Module):
    def __init__(self, core: str) -> None:
        super().__init__()
        self.core, self.embed = core, nn.Embedding(30, C)
        self.layer = nn.MultiheadAttention(C, H, batch_first=True)
        self.own = Layer(self.attend)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.core == "sdpa":
            return join(F.scaled_dot_product_attention(q, k, v, attn_mask=~self.hidden[:, None, None]))
        s = scores(q, k).masked_fill(self.hidden[:, None, None], torch.finfo(torch.float32).min)
        return join(s.softmax(-1) @ v)

    def forward(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        x: Tensor = self.embed(tokens)
        if self.core.startswith("torch"):
            return self.layer(x, x, x, key_padding_mask=hidden, need_weights=self.core != "torch")[0]  # type: ignore[no-any-return]
        self.hidden = hidden
        out: Tensor = self.own(x)
        return out


@pytest.mark.parametrize("core", ["torch", "torch, weights", "sdpa", "by hand"])
@pytest.mark.parametrize("wrong", [False, True])
def test_what_is_hidden_is_read_from_any_attention(core: str, wrong: bool) -> None:
    tokens = padded([5, 4, 3, 2])
    model, found = Reader(core).eval(), operands.Operands(len(tokens))
    hidden = (tokens != 0) == wrong
    with sandbox(model, Sites()), torch.no_grad():
        found.run(model, [tokens, hidden], lambda: model(tokens, hidden))
    (seen,) = found.hidden.values()
    assert torch.equal(seen, hidden)
    assert (attending._inverted(tokens, seen) > 0) == wrong
