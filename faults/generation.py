"""Caches of keys and values that are not what the full pass would have computed, and the cause behind them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lab import Run

INCONSISTENT = Cause(
    id="cache.inconsistent",
    title="Cached generation is not what the full pass gives",
    must=("generation.cached",),
    locate=("generation.cached_module",),
    repair="Append the keys and values of every new position to the cache of their own layer, keep all of them, and "
    "number the new position by the length of the cache, not from 0.",
    refute="With the cache and without it, the logits of each position are the same.",
    look="Of the module named: the position that a new token is given, and which keys it sees.",
    source="Shazeer, 2019; Hugging Face documentation: caching, cache_position",
)

LEAKED = Cause(
    id="cache.leaked",
    title="A request sees the keys and values of the one before it",
    must=("requests.leaked",),
    may=("generation.cached", "generation.cached_module"),
    place="cache",
    repair="Make a cache for each request, past_key_values=None or a new DynamicCache; or reset one that is kept "
    "(StaticCache.reset()), its length and its mask with it, before the prompt passes.",
    refute="With an empty cache, the same prompt gets the same logits whatever was asked before it.",
    look="Where the cache is made, and what holds it between two requests.",
    source="Hugging Face documentation: caching, StaticCache.reset; Kwon et al., 2023",
)


def _caches(run: Run) -> bool:
    """Whether the model takes a cache, and has attention that would fill one."""
    model = run.config.model
    takes = "cache" in inspect.signature(run.model.forward).parameters
    return takes and model.layers > 0 and model.mixer == "attention"


class _CacheFault(Fault):
    """Changes what a layer's memory gives back."""

    def lab_start(self, run: Run) -> None:
        from_here = [module for name, module in run.model.named_modules() if name == self.at]
        if not from_here:
            raise BadInput(f"{self.info.id}: no module at {self.at!r}")
        if not _caches(run) or "memory" not in inspect.signature(from_here[0].forward).parameters:
            raise BadInput(f"{self.info.id}: {self.at!r} is given no cache of keys and values")

        def before(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            if not self.active(run):
                return None
            wrap = self._wrapped
            return tuple(wrap(arg) for arg in args), {name: wrap(arg) for name, arg in kwargs.items()}

        run.cleanup.callback(from_here[0].register_forward_pre_hook(before, with_kwargs=True).remove)

    def _wrapped(self, arg: Any) -> Any:
        return _Memory(arg, self) if hasattr(arg, "extend") and hasattr(arg, "length") else arg

    def recalled(self, kept: Tensor, start: int) -> Tensor:
        """What is given back instead of `kept` [B K S D], of which the positions from `start` on are new."""
        raise NotImplementedError


class _Memory:
    """A memory as a layer sees it, with a fault between."""

    def __init__(self, memory: Any, fault: _CacheFault) -> None:
        self.memory, self.fault = memory, fault

    @property
    def length(self) -> int:
        """How many positions it holds."""
        return int(self.memory.length)

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [B K T D]; return all, [B K S D], as the fault leaves them."""
        start = self.length
        keys, values = self.memory.extend(k, v)
        if not start:  # the prompt, whole
            return keys, values
        return self.fault.recalled(keys, start), self.fault.recalled(values, start)


@fault(
    "cache.stale",
    title="A layer's cache holds the prompt, and no token after it",
    cause="cache.inconsistent",
    moves="generation.cached_gap",
    repair=INCONSISTENT.repair,
)
class Stale(_CacheFault):
    """In place of each new position's key and value, one layer is given those of the position before."""

    at: str = "blocks.0.attn"

    def recalled(self, kept: Tensor, start: int) -> Tensor:
        """Repeat the newest that was there."""
        kept[:, :, start:] = kept[:, :, start - 1 : start].clone()
        return kept


@fault(
    "cache.truncated",
    title="A layer's cache forgets its oldest positions",
    cause="cache.inconsistent",
    moves="generation.cached_gap",
    repair=INCONSISTENT.repair,
)
class Truncated(_CacheFault):
    """After the prompt, one layer is given the newest `window` keys and values only."""

    at: str = "blocks.0.attn"
    window: Annotated[int, Interval(ge=1, le=65536)] = 2

    def recalled(self, kept: Tensor, start: int) -> Tensor:
        """Leave the newest, and never fewer than the new ones."""
        return kept[:, :, -max(self.window, kept.shape[2] - start) :]


@fault(
    "cache.corrupt",
    title="One position of a layer's cache is written over",
    cause="cache.inconsistent",
    moves="generation.cached_gap",
    repair=INCONSISTENT.repair,
)
class Corrupt(_CacheFault):
    """After the prompt, the key and the value of the first position are those of the second."""

    at: str = "blocks.0.attn"

    def recalled(self, kept: Tensor, start: int) -> Tensor:
        """Write the second over the first; a prompt of one token is written over by the token after it."""
        del start
        kept[:, :, 0] = kept[:, :, 1].clone()
        return kept


@fault(
    "cache.off_by_one",
    title="A layer's cache writes each new token one place too early",
    cause="cache.inconsistent",
    moves="generation.cached_gap",
    repair=INCONSISTENT.repair,
)
class OffByOne(_CacheFault):
    """What is new is written over the newest position that was there, and one key too few is seen."""

    at: str = "blocks.0.attn"

    def recalled(self, kept: Tensor, start: int) -> Tensor:
        """Leave the newest of the old positions out."""
        return torch.cat([kept[:, :, : start - 1], kept[:, :, start:]], dim=2)


@fault(
    "cache.leaked",
    title="A layer's cache still holds the request before",
    cause="cache.leaked",
    moves="requests.gap",
    repair=LEAKED.repair,
)
class Leaked(_CacheFault):
    """Gives one layer the keys and values of the request before, too, ahead of those of this one."""

    at: str = "blocks.0.attn"

    def lab_start(self, run: Run) -> None:
        self.before: list[Tensor] = []
        self.now: list[Tensor] = []
        super().lab_start(run)

    def _wrapped(self, arg: Any) -> Any:
        return _Full(arg, self) if hasattr(arg, "extend") and hasattr(arg, "length") else arg


class _Full(_Memory):
    """A memory that was not emptied."""

    fault: Leaked

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values; return all, after those of the request before if it had as many rows."""
        if not self.length:  # a new request
            self.fault.before = self.fault.now
        keys, values = self.memory.extend(k, v)
        self.fault.now = [keys.detach(), values.detach()]
        if not self.fault.before or len(self.fault.before[0]) != len(keys):
            return keys, values
        old_keys, old_values = self.fault.before
        return torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2)


@fault(
    "cache.position_ignored",
    title="With a cache, each new token is numbered from 0",
    cause="cache.inconsistent",
    moves="generation.cached_gap",
    repair=INCONSISTENT.repair,
)
class PositionIgnored(Fault):
    """Gives the positions a start of 0, whatever the cache holds: added ones, or the turns of attention at `at`."""

    at: str = "positions"

    def lab_start(self, run: Run) -> None:
        place: Any = dict(run.model.named_modules()).get(self.at)
        if place is None:
            raise BadInput(f"cache.position_ignored: no module at {self.at!r}")
        if not _caches(run):
            raise BadInput("cache.position_ignored: the model generates without a cache")
        turn = getattr(place, "turn", None)
        if turn is not None:
            run.cleanup.callback(setattr, place, "turn", turn)
            place.turn = lambda x, start=0: turn(x, 0 if self.active(run) else start)
        else:

            def before(_module: nn.Module, args: Any) -> Any:
                return (args[0], 0) if self.active(run) and len(args) > 1 else None

            run.cleanup.callback(place.register_forward_pre_hook(before).remove)
