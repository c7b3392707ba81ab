"""What any fine-tuning must do: LoRA, freezing, targets without the prompt, a large batch in parts."""

from __future__ import annotations

import copy
import weakref
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lab.projects.decoder.component import Decoder
from lab.projects.linear.component import Linear
from lab.projects.positions.component import Embedding
from lab.sites import sites_of
from lab.spec import Built, equal, explicit_taps, floats, gradients, holds, near, normal, prop, seeds, tapped

if TYPE_CHECKING:
    from collections.abc import Callable

V, WIDTH, IGNORED = 11, 8, -100
kinds = st.sampled_from([Linear, nn.Linear])
widths, alphas = st.integers(1, 6), st.sampled_from([None, 1.0, 16.0])
IN_A_BLOCK = ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")
BLOCKS = [f"blocks.{i}.{name}" for i in range(2) for name in IN_A_BLOCK]
# Which layers of the decoder below a pattern chooses.
CHOSEN = {
    "**": [*BLOCKS, "head"],
    "blocks.**": BLOCKS,
    "blocks.*.attn.*": [name for name in BLOCKS if ".attn." in name],
    "blocks.1.mlp.up": ["blocks.1.mlp.up"],
    "head": ["head"],
}


def _fill(module: nn.Module, seed: int, scale: float = 1.0) -> Any:
    """Give every parameter normal numbers: zeros would hide what is missing."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(seed + i, *parameter.shape, scale=scale))
    return module


def _adapted(built: Built, seed: int, base: nn.Module, rank: int, alpha: float | None = None) -> Any:
    return _fill(built.LoRALinear(_fill(base, seed), rank, alpha=alpha), seed + 10)


def _dense(made: Any, rank: int, alpha: float | None) -> Tensor:
    """W + (alpha / rank) B A, one row of B at a time."""
    scale = (rank if alpha is None else alpha) / rank
    return torch.stack(
        [w + scale * b @ made.a.double() for w, b in zip(made.base.weight, made.b.double(), strict=True)]
    )


def _model(seed: int, *, tied: bool = False) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder(V, context=6, layers=2, width=WIDTH, heads=2, tied=tied).double()


def _trained(built: Built, seed: int, **choices: Any) -> Any:
    """A decoder with adapters that are not 0."""
    model = _model(seed)
    for i, name in enumerate(built.add_lora(model, 2, **choices)):
        layer = model.get_submodule(name)
        layer.a.data.copy_(normal(seed + i, *layer.a.shape))
        layer.b.data.copy_(normal(seed + i + 100, *layer.b.shape, scale=0.1))
    return model


def _tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def _refuses(what: str, call: Callable[..., object], *args: Any, **choices: Any) -> None:
    """Pass if it raises; but not because it is not written yet."""
    try:
        call(*args, **choices)
    except NotImplementedError:
        raise
    except Exception:  # noqa: BLE001 - any error that says so is a refusal
        return
    holds(condition=False, text=f"{what} is taken")


@prop(
    "The output is not that of one layer with W + (alpha / rank) B A: look at the scale, and at what is transposed.",
    seed=seeds,
    kind=kinds,
    inputs=widths,
    outputs=widths,
    rank=st.integers(1, 6),
    alpha=alphas,
    shape=st.sampled_from([(), (3,), (2, 3), (2, 0)]),
)
def equals_one_dense_layer(
    built: Built,
    seed: int,
    kind: Any,
    inputs: int,
    outputs: int,
    rank: int,
    alpha: float | None,
    shape: tuple[int, ...],
) -> None:
    rank = min(rank, inputs, outputs)
    made = _adapted(built, seed, kind(inputs, outputs).double(), rank, alpha)
    weight, x = _dense(made, rank, alpha), normal(seed + 20, *shape, inputs)
    expected = F.linear(x, weight, made.base.bias)
    equal(made(x), expected)
    equal(made.weight, weight, "the property weight")
    equal(made.bias, made.base.bias, "the property bias")
    if len(shape) == 2:  # memory order is no part of the values
        equal(made(x.transpose(0, 1)), expected.transpose(0, 1), "the output of a strided input")


@prop(
    "Before the first step the layer must answer as it did, to the last bit: B starts at 0, and 0 times inf is NaN.",
    seed=seeds,
    kind=kinds,
    dtype=floats,
    large=st.booleans(),
)
def at_the_start_nothing_changes(built: Built, seed: int, kind: Any, dtype: torch.dtype, large: bool) -> None:
    base = _fill(kind(8, 6), seed, 0.01).to(dtype)
    x = normal(seed + 9, 2, 3, 8)
    # As large as float16 holds. What A makes of it is larger at times: no number of float16.
    x = (6e4 * x.sign() if large else x).to(dtype)
    before = base(x)
    made = built.LoRALinear(base, 4)
    after = made(x)
    holds(after.dtype == dtype, f"the output is {after.dtype}, that of the layer {dtype}")
    holds(torch.equal(after, before), f"the largest change is {float((after - before).detach().abs().max()):.3g}")
    wide = torch.promote_types(dtype, torch.float32)
    holds(made.a.dtype == made.b.dtype == wide, f"A is {made.a.dtype} and B {made.b.dtype}, expected {wide}")
    holds((made.b == 0).all(), "B is not 0")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wider = built.LoRALinear(kind(256, 64), 32)
    spread = float(wider.a.detach().std()) * 256**0.5
    near(spread, 1.0, 5 / (2 * wider.a.numel()) ** 0.5, "the standard deviation of A, times the root of its inputs,")


@prop(
    "At the start the gradient of A is 0, since B is, and that of B is not: with both at 0, nothing ever learns.",
    seed=seeds,
    kind=kinds,
    alpha=alphas,
)
def at_the_start_b_learns_and_a_waits(built: Built, seed: int, kind: Any, alpha: float | None) -> None:
    made = built.LoRALinear(_fill(kind(5, 4).double(), seed), 3, alpha=alpha)
    x, sent = normal(seed + 5, 7, 5).requires_grad_(), normal(seed + 6, 7, 4)
    made(x).backward(sent)
    scale = (3 if alpha is None else alpha) / 3
    equal(made.a.grad, torch.zeros(3, 5, dtype=torch.float64), "the gradient of A")
    equal(made.b.grad, scale * sent.t() @ (x @ made.a.t()).detach(), "the gradient of B")
    holds(bool((made.b.grad != 0).any()), "the gradient of B is 0: A starts at 0, as B does")
    equal(x.grad, sent @ made.base.weight.detach(), "the gradient of the input")
    holds(all(p.grad is None for p in made.base.parameters()), "the frozen layer receives a gradient")


@prop(
    "Training must move A and B, r (in + out) numbers, and nothing else: weight decay too moves what is not frozen.",
    seed=seeds,
    kind=kinds,
    rank=st.integers(1, 4),
    examples=10,
)
def the_frozen_layer_never_moves(built: Built, seed: int, kind: Any, rank: int) -> None:
    base = _fill(kind(5, 4), seed)
    before = copy.deepcopy(base.state_dict())
    made = built.LoRALinear(base, rank)
    holds(built.trainable(made) == rank * 9, f"{built.trainable(made)} numbers are trained, expected {rank * 9}")
    start = {name: value.clone() for name, value in (("a", made.a.detach()), ("b", made.b.detach()))}
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.1, weight_decay=0.5)
    x = normal(seed + 5, 7, 5, dtype=torch.float32)
    for _ in range(3):
        optimizer.zero_grad()
        made(x).square().mean().backward()
        optimizer.step()
    for name, value in base.state_dict().items():
        holds(torch.equal(value, before[name]), f"the layer's {name} moved")
    for name, value in start.items():
        holds(not torch.equal(getattr(made, name), value), f"{name} did not move")


@prop("Backward disagrees with the values: A, B or the input is detached on the way.", seed=seeds, examples=5)
def gradients_are_those_of_finite_differences(built: Built, seed: int) -> None:
    made = _adapted(built, seed, nn.Linear(3, 4).double(), 2, 3.0)

    def call(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(made, {"a": a, "b": b}, (x,))
        return out

    gradients(call, normal(seed, 2, 3), made.a, made.b)


@prop("A rank, a layer, a pattern or lengths that cannot be meant must be refused, and the model left as it was.")
def refuses_what_cannot_be_meant(built: Built) -> None:
    for rank in (-1, 0, 4):
        _refuses(f"rank {rank} on a layer from 3 to 5", built.LoRALinear, nn.Linear(3, 5), rank)
    attention = nn.MultiheadAttention(4, 2)
    for other in (nn.LayerNorm(4), nn.Embedding(4, 4), Embedding(4, 4), nn.Conv1d(4, 4, 1), attention.out_proj):
        _refuses(f"a {type(other).__name__} in place of a linear layer", built.LoRALinear, other, 1)
    model = _model(0)
    for rank, where in ((2, "blocks.*.atn.*"), (2, "tokens"), (WIDTH + 1, "**"), (0, "**")):
        _refuses(f"add_lora of rank {rank} where {where}", built.add_lora, model, rank, where=where)
    _refuses("a pattern that no parameter matches", built.freeze, model, but="blocks.*.atn.**")
    holds(all(p.requires_grad for p in model.parameters()), "parameters were frozen before the refusal")
    holds(not any(isinstance(m, built.LoRALinear) for m in model.modules()), "layers were wrapped before the refusal")
    _refuses("one length of a prompt for three rows", built.mask_prompt, _tokens(0, 3, 4), torch.tensor([2]))
    _refuses("a batch of no parts", built.accumulate, lambda x, _: x.sum(), [])


@prop(
    "Exactly the layers that match get adapters, and only those are trained; a second call keeps those of the first.",
    seed=seeds,
    where=st.sampled_from(sorted(CHOSEN)),
    rank=st.integers(1, 4),
)
def adapts_the_layers_that_match(built: Built, seed: int, where: str, rank: int) -> None:
    model, tokens = _model(seed), _tokens(seed, 2, 6)
    before, shapes = model(tokens), {name: model.get_submodule(name).weight.shape for name in CHOSEN["**"]}
    names = built.add_lora(model, rank, where=where)
    holds(names == CHOSEN[where], f"the layers are {names}, expected {CHOSEN[where]}")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {f"{name}.{part}" for name in names for part in ("a", "b")}
    holds(trained == expected, f"what is trained is {sorted(trained)}, expected {sorted(expected)}")
    count = rank * sum(sum(shapes[name]) for name in names)
    holds(built.trainable(model) == count, f"{built.trainable(model)} numbers are trained, expected {count}")
    holds(torch.equal(model(tokens), before), "the logits changed")
    rest = [name for name in CHOSEN["**"] if name not in names]
    if not rest:
        _refuses("a second adapter on every layer", built.add_lora, model, rank)
        return
    holds(built.add_lora(model, rank) == rest, f"the layers left for a second call are not {rest}")
    count = rank * sum(sum(shape) for shape in shapes.values())
    holds(
        built.trainable(model) == count, f"after a second call {built.trainable(model)} are trained, expected {count}"
    )


@prop(
    "A table that is also the head must stay one, without an adapter: merged at one place it would change the other.",
    seed=seeds,
    examples=5,
)
def a_tied_weight_stays_tied(built: Built, seed: int) -> None:
    model = _model(seed, tied=True)
    names = built.add_lora(model, 2)
    holds(names == BLOCKS, f"the layers are {names}, expected {BLOCKS}")
    holds(model.head.weight is model.tokens.weight, "the head has a weight of its own now")
    holds(not model.tokens.weight.requires_grad, "the table is not frozen")
    built.merge_lora(model)
    holds(model.head.weight is model.tokens.weight, "the head has a weight of its own after merging")
    _refuses("the tied head", built.add_lora, model, 2, where="head")
    model.head = _fill(built.LoRALinear(model.head, 2), seed)
    table = model.tokens.weight.detach().clone()
    _refuses("merging an adapter beside a tied weight", built.merge_lora, model)
    holds(torch.equal(model.tokens.weight, table), "merging changed the table of the tokens")


@prop(
    "In torch's own layer an adapter must act when the layer is trained and when its weights are read, in evaluation.",
    seed=seeds,
    examples=5,
)
def acts_in_torchs_own_layer(built: Built, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        theirs = _fill(nn.TransformerEncoderLayer(WIDTH, 2, 12, 0.0, batch_first=True).double(), seed, 0.3)
    x = normal(seed, 2, 3, WIDTH)
    plain = theirs(x)
    names = built.add_lora(theirs, 2)
    # The output projection of its attention is read and never called.
    holds(names == ["linear1", "linear2"], f"the layers are {names}, expected linear1 and linear2")
    for name in names:
        theirs.get_submodule(name).b.data.copy_(normal(seed + 1, *theirs.get_submodule(name).b.shape))
    trained = theirs(x)
    holds(not torch.equal(trained, plain), "the adapters change nothing")
    with torch.no_grad():
        equal(theirs.eval()(x), trained.detach(), "the output in evaluation")
    holds(built.merge_lora(theirs) == 2, "not both adapters were merged")
    equal(theirs.train()(x), trained.detach(), "the output after merging")


@prop(
    "A merged model must answer as with its adapters, have the names it had before, and differ by a rank of at most r.",
    seed=seeds,
    where=st.sampled_from(sorted(CHOSEN)),
    alpha=alphas,
)
def merged_equals_unmerged(built: Built, seed: int, where: str, alpha: float | None) -> None:
    plain, model, tokens = _model(seed), _trained(built, seed, where=where, alpha=alpha), _tokens(seed, 2, 6)
    with torch.no_grad():
        expected = model(tokens)
        count = built.merge_lora(model)
        equal(model(tokens), expected, "the logits after merging")
    holds(count == len(CHOSEN[where]), f"{count} were merged, expected {len(CHOSEN[where])}")
    keys, before = list(model.state_dict()), plain.state_dict()
    holds(keys == list(before), f"the names in the state dict are {keys[:4]}..., expected {list(before)[:4]}...")
    for name, value in model.state_dict().items():
        if name.removesuffix(".weight") in CHOSEN[where]:
            rank = int(torch.linalg.matrix_rank(value - before[name], rtol=1e-9))
            holds(rank == 2, f"{name} changed by a matrix of rank {rank}, expected 2")
        else:
            holds(torch.equal(value, before[name]), f"{name} changed")
    holds(built.merge_lora(model) == 0, "a second merge found adapters")


@prop(
    "Merging into float16 or bfloat16 must round once, at the end: a product in the small dtype loses the update.",
    seed=seeds,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    cast=st.booleans(),
)
def merging_rounds_once(built: Built, seed: int, dtype: torch.dtype, cast: bool) -> None:
    model = nn.Sequential(_fill(nn.Linear(16, 12), seed).to(dtype))
    built.add_lora(model, 8, alpha=4.0)
    made: Any = model[0]
    made.a.data.copy_(normal(seed + 1, 8, 16))
    made.b.data.copy_(normal(seed + 2, 12, 8))
    if cast:  # adapters and all
        model.to(dtype)
    exact = made.base.weight.double() + 0.5 * made.b.double() @ made.a.double()
    x = normal(seed + 3, 5, 16).to(dtype)
    before = model(x)
    holds(before.dtype == dtype, f"the output is {before.dtype}, expected {dtype}")
    built.merge_lora(model)
    merged: Any = model[0]
    holds(merged.weight.dtype == dtype, f"the merged weight is {merged.weight.dtype}, expected {dtype}")
    eps = torch.finfo(dtype).eps
    # Half a step of the dtype, and a few roundings of float32 in sums of nine numbers up to about 8.
    equal(merged.weight.double(), exact, "the merged weight", rtol=0.501 * eps, atol=1e-5)
    equal(model(x).double(), before.double(), "the output", rtol=8 * eps, atol=64 * eps)


@prop(
    "What is saved of an adapted model is A and B alone, by name; put back or copied, the model answers the same.",
    seed=seeds,
    where=st.sampled_from(["**", "blocks.*.attn.*"]),
    examples=10,
)
def adapters_are_saved_put_back_and_copied(built: Built, seed: int, where: str) -> None:
    model, tokens = _trained(built, seed, where=where), _tokens(seed, 2, 6)
    expected, state = model(tokens), built.lora_state(model)
    names = [f"{name}.{part}" for name in CHOSEN[where] for part in ("a", "b")]
    holds(sorted(state) == sorted(names), f"saved is {sorted(state)}, expected {sorted(names)}")
    for name, value in state.items():
        equal(value, model.state_dict()[name], name)
    other = _model(seed)
    built.add_lora(other, 2, where=where)
    other.load_state_dict(state, strict=False)
    equal(other(tokens), expected, "the output with the adapters put back")
    other = _model(seed + 1)
    built.add_lora(other, 2, where=where)
    other.load_state_dict(model.state_dict())
    equal(other(tokens), expected, "the output with the whole state put back")
    twin = copy.deepcopy(model)
    built.merge_lora(twin)
    equal(twin(tokens), expected, "the output of a copy, merged,")
    equal(model(tokens), expected, "the output after a copy was merged")
    holds(built.lora_state(twin) == {}, "a merged model has adapters")


@prop(
    "Only the parameters that match stay trainable, whatever they were before; one that two layers share counts once.",
    seed=seeds,
    tied=st.booleans(),
    case=st.sampled_from(["head.**", "blocks.1.**", "**.bias", "**"]),
)
def freezes_all_but_what_matches(built: Built, seed: int, tied: bool, case: str) -> None:
    model = _model(seed, tied=tied)
    model.requires_grad_(bool(seed % 2))
    part = case.replace("**", "")
    expected = [
        name
        for name, _ in model.named_parameters(remove_duplicate=not (tied and case == "head.**"))
        if (name.endswith(part) if case == "**.bias" else name.startswith(part))
    ]
    names = built.freeze(model, but=case)
    holds(names == expected, f"what is trained is {names}, expected {expected}")
    kept = {id(model.get_parameter(name)) for name in names}
    for name, p in model.named_parameters():
        holds(p.requires_grad == (id(p) in kept), f"{name}: requires_grad is {p.requires_grad}")
    count = sum(model.get_parameter(name).numel() for name in expected)
    holds(built.trainable(model) == count, f"trainable is {built.trainable(model)}, expected {count}")


@prop(
    "The model is to learn the answer: its first token too, and neither the prompt nor the padding. Count the shift.",
    seed=seeds,
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    width=st.integers(1, 8),
    pad=st.sampled_from([None, 0, 3]),
)
def only_the_answer_is_a_target(built: Built, seed: int, lengths: list[int], width: int, pad: int | None) -> None:
    tokens = _tokens(seed, width, len(lengths)).t()  # [B T], strided
    kept = tokens.clone()
    expected = torch.full((len(lengths), width - 1), IGNORED)
    for row, length in enumerate(lengths):
        for i in range(1, width):
            if i >= length and int(tokens[row, i]) != pad:
                expected[row, i - 1] = tokens[row, i]
    inputs, targets = built.mask_prompt(tokens, torch.tensor(lengths), pad=pad)
    equal(inputs, tokens[:, :-1], "the inputs")
    equal(targets, expected, "the targets")
    equal(tokens, kept, "the tokens that were given")


@prop(
    "Parts must give the gradient of one batch: divide by the targets of all parts, and let go of each part's graph.",
    seed=seeds,
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=4),
)
def parts_equal_one_batch(built: Built, seed: int, counts: list[int]) -> None:
    model, targets = _fill(nn.Linear(3, 5).double(), seed), torch.full((len(counts), 4), IGNORED)
    for row, count in enumerate(counts):
        targets[row, :count] = torch.arange(count)
    inputs = normal(seed + 5, len(counts), 4, 3)
    hidden: list[weakref.ref[Tensor]] = []

    def loss(x: Tensor, y: Tensor) -> Tensor:
        holds(all(ref() is None for ref in hidden), "the graph of an earlier part is still alive")
        features = model(x)  # [B 4 5]; the square keeps it for backward
        hidden.append(weakref.ref(features))
        return F.cross_entropy(features.square().flatten(0, 1), y.flatten(), ignore_index=IGNORED, reduction="sum")

    parts = [(inputs[i : i + 1], targets[i : i + 1]) for i in range(len(counts))]
    mean = built.accumulate(loss, parts)
    grads = [p.grad.clone() for p in model.parameters()]
    hidden.clear()
    expected = loss(inputs, targets) / max(sum(counts), 1)
    equal(mean, expected.detach(), "the mean loss")
    holds(not mean.requires_grad, "the mean loss carries a graph")
    for got, wanted in zip(grads, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        equal(got, wanted, "the gradient")
    hidden.clear()
    built.accumulate(loss, parts)
    equal(model.weight.grad, 2 * grads[0], "the gradient after a second call, which adds,")


@prop(
    "Probes must find the layer's out where it was, with the update in it; the layer alone is base.out.",
    seed=seeds,
    examples=3,
)
def taps_its_sites_in_order(built: Built, seed: int) -> None:
    x = normal(seed, 2, 3, 5)
    explicit_taps(built.LoRALinear(nn.Linear(5, 4).double(), 2), ("update", "out"), x)
    made = _adapted(built, seed, Linear(5, 4).double(), 2)
    explicit_taps(made, ("base.out", "update", "out"), x)
    values = tapped(made, x)
    equal(values["out"], values["base.out"] + values["update"], "the site out")
    model, tokens = _trained(built, seed, where="blocks.**"), _tokens(seed, 2, 6)
    before, after = sites_of(_model(seed)).names, tapped(model, tokens)
    lost = [name for name in before if name not in sites_of(model).names]
    holds(not lost, f"the sites {lost} are gone")
    equal(after["blocks.0.attn.proj.out"], after["blocks.0.attn.out"], "the site blocks.0.attn.proj.out")
