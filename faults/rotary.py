"""Rotary positions that do not depend on distances alone, and the causes behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from lab import Run

PAIRING = Cause(
    id="positions.rope_pairing",
    title="Queries and keys are turned in different pairs of channels",
    must=("rotary.pairing",),
    module=True,
    repair="Pair the channels of queries and keys alike: i with i + D/2 (rotate_half), or 2i with 2i + 1. Where "
    "weights come from a model of the other pairing, permute the rows of q_proj and of k_proj, both.",
    refute="The norm of the same pairs stays the same at every position, in queries and in keys.",
    look="The two calls of the rotation, and the permutation of the weights where they were converted.",
    source="Su et al., 2021, section 3.2; huggingface/transformers, convert_llama_weights_to_hf.py (permute)",
)

BASE = Cause(
    id="positions.rope_base",
    title="Queries and keys are turned at different rates",
    must=("rotary.rates",),
    module=True,
    repair="Compute the cosines and sines once and apply them to both (apply_rotary_pos_emb(q, k, cos, sin)), from one "
    "base: rope_theta of the configuration. A cached table must be made again when the base changes.",
    refute="The same vector as query and as key is turned by the same angles.",
    look="Where each of the two gets its base (rope_theta) and its table from.",
    source="Su et al., 2021, section 3.2: <R_m q, R_n k> depends on m - n alone where both are turned alike",
)

VALUES = Cause(
    id="positions.rope_on_values",
    title="Values are turned by their positions",
    must=("rotary.values",),
    module=True,
    repair="Apply the rotation to queries and keys only, and give attention the values as they are projected. A fused "
    "qkv has to be split before it is turned.",
    refute="The same vector at every position has the same value at every position.",
    look="What is given to the rotation: q and k, or the whole of qkv.",
    source="Su et al., 2021, section 3.2.2 (only queries and keys are turned)",
)

HALF = Cause(
    id="positions.rope_half",
    title="The angles of rotary positions are computed in half precision",
    must=("rotary.uneven",),
    module=True,
    repair="Compute positions, rates and their product in float32, with torch.autocast(enabled=False) around them, and "
    "cast the cosines and sines at the end. model.to(torch.bfloat16) casts a buffer of rates (inv_freq) too.",
    refute="From each position to the next, a pair is turned by the same angle.",
    look="The dtype of torch.arange, of inv_freq, and of their product.",
    source="huggingface/transformers#29285 (RoPE loses precision in half precision)",
)


def turning(run: Run, fault: Fault) -> Iterator[tuple[str, Any]]:
    """Yield the attention layers at `fault.at` that turn queries and keys.

    Raises:
        BadInput: There is none.
    """
    found = False
    for site in run.sites.match(f"{fault.at}.q"):
        layer: Any = run.model.get_submodule(site.module)
        if getattr(layer, "turn", None) is not None:
            found = True
            yield site.module, layer
    if not found:
        raise BadInput(f"{fault.info.id}: no attention at {fault.at!r} turns its queries: model.positions = 'rope'")


def rotated(x: Tensor, start: int, base: float, dtype: torch.dtype) -> Tensor:  # [B H T D] -> [B H T D]
    """Turn channel i with i + D/2 by ``t base^(-2i / D)``, with angles computed in `dtype`."""
    length, width = x.shape[-2:]
    rates = (base ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float64) / width)).to(dtype)  # [D/2]
    places = torch.arange(start, start + length, device=x.device).to(dtype)  # [T]
    angles = (places[:, None] * rates).to(torch.promote_types(x.dtype, torch.float32))  # [T D/2]
    cos, sin = angles.cos(), angles.sin()
    a, b = x.to(angles.dtype).chunk(2, dim=-1)  # [B H T D/2] each
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class _Turns:
    """What a layer calls to turn its queries, and then its keys."""

    def __init__(self, fault: _TurnFault, right: Callable[[Tensor, int], Tensor], active: Callable[[], bool]) -> None:
        self.fault, self.right, self.active = fault, right, active
        self.queries = True

    def begin(self, *_: object) -> None:
        """The layer is called: queries come first."""
        self.queries = True

    def __call__(self, x: Tensor, start: int = 0) -> Tensor:  # [B H T D] -> [B H T D]
        queries, self.queries = self.queries, False
        if not self.active() or not (queries or self.fault.keys_too):
            return self.right(x, start)
        return self.fault.turned(x, start, self.right)


class _TurnFault(Fault):
    """A fault in how queries, and perhaps keys, are turned."""

    at: str = "blocks.*.attn"

    keys_too = False

    def lab_start(self, run: Run) -> None:
        for _, layer in [*turning(run, self)]:
            right = layer.turn
            turns = _Turns(self, right, lambda: self.active(run))
            run.cleanup.callback(setattr, layer, "turn", right)
            run.cleanup.callback(layer.register_forward_pre_hook(turns.begin).remove)
            layer.turn = turns

    def turned(self, x: Tensor, start: int, right: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Turn x [B H T D] wrongly."""
        raise NotImplementedError


@fault(
    "positions.rope_pairing",
    title="Queries are turned in neighbouring channels, keys in halves",
    cause="positions.rope_pairing",
    moves="rotary.unlike",
    repair=PAIRING.repair,
)
class RopePairing(_TurnFault):
    """Pairs channel 2i of the queries with 2i + 1; the keys are turned as before."""

    at: str = "blocks.*.attn"

    def turned(self, x: Tensor, start: int, right: Callable[[Tensor, int], Tensor]) -> Tensor:
        halves = right(torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1), start)
        return torch.stack(halves.chunk(2, dim=-1), dim=-1).flatten(-2)


@fault(
    "positions.rope_base",
    title="Queries are turned at the rates of another base than keys",
    cause="positions.rope_base",
    moves="rotary.apart",
    repair=BASE.repair,
)
class RopeBase(_TurnFault):
    """Turns queries by the angles of `base`; the keys are turned as before."""

    at: str = "blocks.*.attn"
    base: Annotated[float, Interval(ge=1, le=1e9)] = 500_000.0

    def turned(self, x: Tensor, start: int, right: Callable[[Tensor, int], Tensor]) -> Tensor:  # noqa: ARG002
        return rotated(x, start, self.base, torch.promote_types(x.dtype, torch.float32))


@fault(
    "positions.rope_half",
    title="Angles are computed in bfloat16",
    cause="positions.rope_half",
    moves="rotary.unevenness",
    repair=HALF.repair,
)
class RopeHalf(_TurnFault):
    """Multiplies positions by rates in bfloat16, for queries and keys."""

    at: str = "blocks.*.attn"
    base: Annotated[float, Interval(ge=1, le=1e9)] = 10_000.0

    keys_too = True

    def turned(self, x: Tensor, start: int, right: Callable[[Tensor, int], Tensor]) -> Tensor:  # noqa: ARG002
        return rotated(x, start, self.base, torch.bfloat16)


@fault(
    "positions.rope_on_values",
    title="The rotation is applied to values too",
    cause="positions.rope_on_values",
    moves="rotary.value_change",
    repair=VALUES.repair,
)
class RopeOnValues(Fault):
    """Turns the values as the queries are turned."""

    at: str = "blocks.*.attn"

    def lab_start(self, run: Run) -> None:
        for name, layer in [*turning(run, self)]:
            self._turn(run, name, layer)

    def _turn(self, run: Run, name: str, layer: Any) -> None:
        start = 0

        def before(_layer: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal start
            start = args[1].length if len(args) > 1 and args[1] is not None else 0

        run.cleanup.callback(layer.register_forward_pre_hook(before).remove)
        self.replace(run, f"{name}.v", lambda values: layer.turn(values, start))
