"""Forward passes that are right and wasteful: too many operators, too many bits, or the host in their way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab import BadInput, Cause, Fault, NotChecked, Saving, fault, torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from lab import History, Profile, Run


def _wide_cost(profile: Profile, _history: History, at: str) -> Saving:
    """What meets a number of float64 moves, and multiplies, at half the rate."""
    row, machine = profile.own(at), profile.machine
    wide = row.formats.get("float64", 0) / machine.flops["float64"]
    narrow = row.formats.get("float64", 0) / machine.flops["float32"]
    share = (wide - narrow) / row.roof if wide > row.cost.bytes / machine.bytes else 0.5
    return Saving(
        share * row.seconds, f"{row.cost.calls} operators in {row.seconds * 1e3:.3g} ms, and half the bytes would do"
    )


def _read_cost(profile: Profile, history: History, at: str) -> Saving:
    reads = float(history.last("operators.host_reads", at))
    return Saving(
        reads * profile.machine.operator, f"{reads:.0f} numbers are read in each pass; on this device that is short"
    )


def _again_cost(profile: Profile, history: History, at: str) -> Saving:
    again, row = float(history.last("operators.again", at)), profile.at(at)
    products = profile.at(at, "forward").cost.products
    if not products:
        raise NotChecked("no product was counted there")
    why = f"{again:.0f} of {products} products is one of those before, in {row.seconds * 1e3:.3g} ms"
    return Saving(row.seconds * again / products, why)


def _pieces_cost(profile: Profile, _history: History, at: str) -> Saving:
    """What a layer computes, at the rate of the others."""
    seconds, saved = 0.0, 0.0
    for way in ("forward", "backward"):
        row, rate = profile.at(at, way), profile.rate(way, but=at)
        if not rate:
            raise NotChecked("no other layer multiplies, to compare its rate")
        seconds += row.seconds
        saved += row.seconds - min(row.seconds, row.cost.flops / rate)
    return Saving(
        saved, f"it takes {seconds * 1e3:.3g} ms; at the rate of the other layers, {(seconds - saved) * 1e3:.3g} ms"
    )


def _heads_cost(profile: Profile, history: History, at: str) -> Saving:
    """All operators but one in so many are there since heads are taken one by one."""
    slices, row = float(history.last("operators.slices", at)), profile.own(at)
    return Saving(row.dispatch * (1 - 1 / slices), f"{row.cost.calls} operators, where a {slices:.0f}th would do")


def _joined_cost(profile: Profile, history: History, at: str) -> Saving:
    ratio, row = float(history.last("operators.joined", at)), profile.own(at)
    return Saving(
        row.seconds * (1 - 1 / ratio),
        f"{ratio:.0f} times as much is written as is needed, in {row.seconds * 1e3:.3g} ms",
    )


FLOAT64 = Cause(
    id="performance.float64",
    title="Part of the forward pass runs in float64",
    must=("operators.promoted",),
    repair="Make tables and constants in the dtype of the activations: torch.tensor(x, dtype=h.dtype), "
    "torch.from_numpy(table).float(). numpy computes in float64, and one such operand makes the result float64.",
    refute="Every floating-point tensor in the module has the dtype of its inputs.",
    look="Constants that come from numpy, and buffers that were made with dtype=torch.float64.",
    source="PyTorch documentation: torch.result_type, type promotion",
    saves=_wide_cost,
)

HOST_SYNC = Cause(
    id="performance.host_sync",
    title="The forward pass reads numbers on the host",
    must=("operators.host_reads",),
    repair="Keep the number a tensor (x.abs().mean().detach()), and read it after the step, once for all. "
    ".item(), float(x), print(x) and if x > 1: make the host wait for the device, and the device run dry.",
    refute="The forward pass calls no .item() on what it computes.",
    look="Statistics for logging inside forward, and branches on a value.",
    source="PyTorch documentation: performance tuning guide, avoid unnecessary CPU-GPU synchronization",
    saves=_read_cost,
)

RECOMPUTE = Cause(
    id="performance.recompute",
    title="The same product is computed twice",
    must=("operators.again",),
    repair="Call the layer once and use its result twice.",
    refute="No layer is called twice with the same input and the same weights.",
    look="Where the module named is called, above all for a second use of its output.",
    source="PyTorch documentation: performance tuning guide",
    saves=_again_cost,
)

HEAD_LOOP = Cause(
    id="performance.loop_over_heads",
    title="Attention loops over its heads",
    must=("operators.slices",),
    repair="Give the heads an axis of their own, x.view(B, T, H, D).transpose(1, 2), and let one batched product or "
    "one scaled_dot_product_attention serve them all.",
    refute="The number of operators does not depend on the number of heads.",
    look="A Python loop, or a list of heads, in the attention named.",
    source="Vaswani et al., 2017, section 3.2.2",
    saves=_heads_cost,
)

POSITION_LOOP = Cause(
    id="performance.loop_over_positions",
    title="A layer loops over positions that do not depend on each other",
    must=("operators.by_position",),
    repair="Apply the layer to the whole [B T C] at once: a linear layer or a norm treats every position alike.",
    refute="The number of operators does not depend on the length.",
    look="A Python loop over x[:, t] in the module named.",
    source="PyTorch documentation: performance tuning guide",
    saves=_pieces_cost,
)

PIECE_BY_PIECE = Cause(
    id="performance.quadratic_concatenation",
    title="A tensor is concatenated piece by piece",
    must=("operators.joined",),
    repair="Append the pieces to a list and call torch.cat or torch.stack once, or write into a tensor made for all. "
    "n pieces joined one after another copy (n + 1) / 2 times as much.",
    refute="The bytes that concatenation writes grow as the length, not as its square.",
    look="x = torch.cat([x, ...]) inside a loop in the module named.",
    source="PyTorch documentation: torch.cat",
    saves=_joined_cost,
)


def _module(run: Run, fault: Fault) -> Any:
    """Return the module at `at`."""
    module = dict(run.model.named_modules()).get(fault.at)
    if module is None:
        raise BadInput(f"{fault.info.id}: no module at {fault.at!r}")
    return module


def _layer(run: Run, fault: Fault) -> nn.Module:
    """Return the module at `at`, which must be a single layer with a weight matrix."""
    module = _module(run, fault)
    weight = getattr(module, "weight", None)
    if [*module.children()] or not torch.is_tensor(weight) or weight.dim() != 2 or not hasattr(module, "tap"):
        raise BadInput(f"{fault.info.id}: needs a linear layer; {fault.at!r} is a {type(module).__name__}")
    return module  # type: ignore[no-any-return]


def _untapped(module: Any, call: Callable[[], Tensor]) -> Tensor:
    """Call with the module's taps off: what is computed in pieces is none of its sites."""
    taps = module.__dict__.pop("_taps", None)
    try:
        return call()
    finally:
        if taps is not None:
            module._taps = taps  # noqa: SLF001 - as it was


@fault(
    "performance.float64",
    title="A constant of float64 meets a layer's output",
    cause="performance.float64",
    moves="operators.promoted",
    repair=FLOAT64.repair,
)
class Float64(Fault):
    """Multiplies what `at` gives out by ones of float64, and turns the result back: the numbers stay as they are."""

    at: str = "blocks.0.mlp"

    def lab_start(self, run: Run) -> None:
        def change(x: Tensor) -> Tensor:
            return (x * torch.ones(x.shape[-1], dtype=torch.float64, device=x.device)).to(x.dtype)

        self.replace(run, f"{self.at}.out", change)


@fault(
    "performance.host_sync",
    title="A layer reads a statistic of its output on the host",
    cause="performance.host_sync",
    moves="operators.host_reads",
    repair=HOST_SYNC.repair,
)
class HostSync(Fault):
    """Takes the mean size of what `at` gives out with ``.item()``, in each forward pass."""

    at: str = "blocks.0.mlp"

    def lab_start(self, run: Run) -> None:
        self.seen = 0.0

        def look(x: Tensor) -> Tensor:
            self.seen = x.detach().abs().mean().item()
            return x

        self.replace(run, f"{self.at}.out", look)


@fault(
    "performance.recompute",
    title="A layer is computed twice",
    cause="performance.recompute",
    moves="operators.again",
    repair=RECOMPUTE.repair,
)
class Recompute(Fault):
    """Computes a linear layer a second time on the same input, and gives the mean of both: the same again."""

    at: str = "blocks.0.mlp.up"

    def lab_start(self, run: Run) -> None:
        layer = _layer(run, self)

        def twice(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            if not self.active(run):
                return out
            return (out + _untapped(module, lambda: type(module).forward(module, *args))) / 2

        run.cleanup.callback(layer.register_forward_hook(twice).remove)


@fault(
    "performance.loop_over_positions",
    title="A layer takes one position at a time",
    cause="performance.loop_over_positions",
    moves="operators.by_position",
    repair=POSITION_LOOP.repair,
)
class LoopOverPositions(Fault):
    """Computes a linear layer for each position by itself, in a Python loop."""

    at: str = "blocks.0.mlp.up"

    def lab_start(self, run: Run) -> None:
        layer: Any = _layer(run, self)
        plain = layer.forward

        def looped(x: Tensor) -> Tensor:  # [B T C] -> [B T F]
            if not self.active(run) or x.dim() != 3 or x.shape[1] < 2:
                return plain(x)  # type: ignore[no-any-return]
            rows = x.chunk(x.shape[1], dim=1)  # [B 1 C] each
            return layer.tap("out", _untapped(layer, lambda: torch.cat([plain(row) for row in rows], dim=1)))  # type: ignore[no-any-return]

        layer.forward = looped
        run.cleanup.callback(layer.__dict__.pop, "forward")


@fault(
    "performance.quadratic_concatenation",
    title="A layer's output is put together position by position",
    cause="performance.quadratic_concatenation",
    moves="operators.joined",
    repair=PIECE_BY_PIECE.repair,
)
class QuadraticConcatenation(Fault):
    """Takes what a module gives out apart, and joins its positions one after another: the same numbers again."""

    at: str = "blocks.0.mlp"

    def lab_start(self, run: Run) -> None:
        def join(_module: nn.Module, _args: Any, out: Any) -> Any:
            if not self.active(run) or not torch.is_tensor(out) or out.dim() != 3:
                return out
            first, *rest = out.chunk(out.shape[1], dim=1)  # [B 1 C] each
            for piece in rest:
                first = torch.cat([first, piece], dim=1)
            return first

        run.cleanup.callback(_module(run, self).register_forward_hook(join).remove)


@fault(
    "performance.loop_over_heads",
    title="Attention computes one head after another",
    cause="performance.loop_over_heads",
    moves="operators.slices",
    repair=HEAD_LOOP.repair,
)
class LoopOverHeads(Fault):
    """Calls the fused kernel once for each head, in a Python loop. Where a mask or a score is replaced, it does not."""

    at: str = "blocks.0.attn"

    def lab_start(self, run: Run) -> None:
        attention = _module(run, self)
        core, heads = getattr(attention, "core", None), getattr(attention, "heads", 1)
        if core is None or getattr(attention, "bias", self) is not None:
            raise BadInput("performance.loop_over_heads: needs causal attention without a bias on its scores")
        if heads < 2:
            raise BadInput("performance.loop_over_heads: needs two heads or more")
        plain = core.forward

        def looped(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:  # [B H T D] each
            inside = tuple(core.SITES)
            if not self.active(run) or core.replaced(*inside) or q.shape[-2] != k.shape[-2]:
                return plain(q, k, v, bias)  # type: ignore[no-any-return]
            if core.wanted(*inside):
                with torch.no_grad():
                    plain(q[:1], k[:1], v[:1], bias)
            attend = torch.nn.functional.scaled_dot_product_attention
            each = zip(*(x.chunk(q.shape[1], dim=1) for x in (q, k, v)), strict=True)  # [B 1 T D], H times
            return torch.cat([attend(*head, is_causal=True) for head in each], dim=1)  # type: ignore[misc]

        core.forward = looped
        run.cleanup.callback(core.__dict__.pop, "forward")
