"""What a step keeps in memory: each tensor's bytes, from where it is made until it is let go."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from lab.profiling.places import Place

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn
    from torch.optim import Optimizer

Kind = Literal["parameters", "gradients", "optimizer", "activations", "other"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BEFORE = Place("before")  # what was there when the step began
EVERY = 16  # operators between two looks at the process


@dataclass
class Piece:
    """One storage.

    Attributes:
        size: Bytes.
        place: Where it was made.
        begun, ended: The operators, by number, between which it was there; `ended` is None for what still is.
        used: The last operator that read it.
        kind: What it is for, as far as that is known.
    """

    size: int
    place: Place
    begun: int
    ended: int | None = None
    used: int = 0
    kind: Kind | None = None


class Ledger:
    """Follows the memory of tensors through one step.

    Attributes:
        pieces: All of them, in the order in which they were made.
        process: By number of operators that had run, the resident bytes of the process.
        places: Where each operator ran, by its number.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        import psutil

        self._process = psutil.Process()
        self.pieces: list[Piece] = []
        self.process: dict[int, int] = {}
        self.places: list[Place] = []
        self._alive: dict[int, tuple[Piece, Any]] = {}
        self._model, self._optimizer = model, optimizer
        self._know("parameters", [*model.parameters(), *model.buffers()])
        self._know("gradients", _gradients(model))
        self._know("optimizer", _states(optimizer))

    def made(self, place: Place, values: Iterable[Tensor], given: Iterable[Tensor] = ()) -> None:
        """Note what an operator answered: what of it is new memory; and what it read."""
        number = len(self.places)
        self.places.append(place)
        if number % EVERY == 0:
            self.process[number] = self._process.memory_info().rss
        for value in values:
            self._add(place, value)
        for value in given:
            piece = self._known(value)
            if piece is not None:
                piece.used = number

    @property
    def alive(self) -> int:
        """Bytes that are there now."""
        return sum(piece.size for piece in self.pieces if piece.ended is None)

    @property
    def passing(self) -> int:
        """The most bytes that the way forward needs at once, if nothing is kept for a way back.

        Each tensor is there until it is read for the last time on that way.
        """
        back = self._back()
        changes = [0] * (back + 2)
        for piece in self.pieces:
            if piece.place != BEFORE and piece.begun < back:
                changes[max(0, piece.begun)] += piece.size
                changes[min(back, max(piece.used if piece.used < back else piece.begun, piece.begun)) + 1] -= piece.size
        return max(itertools.accumulate(changes))

    def updates(self) -> None:
        """Note, when gradients are whole, and again when the optimiser has stepped, which memory is theirs."""
        self._know("gradients", _gradients(self._model))
        self._know("optimizer", _states(self._optimizer))

    def close(self) -> None:
        """End; what is not known otherwise and outlives the way forward is an activation, kept for the way back."""
        back = self._back()
        for piece in self.pieces:
            kept = piece.begun < back and (piece.ended is None or piece.ended >= back)
            piece.kind = piece.kind or ("activations" if kept and piece.place != BEFORE else "other")
        self._alive.clear()

    def _back(self) -> int:
        """The first operator of the way back."""
        return next((i for i, place in enumerate(self.places) if place.direction == "backward"), len(self.places))

    def timeline(self) -> dict[Kind, list[int]]:
        """Bytes of each kind after each operator."""
        length = len(self.places) + 1
        found = {}
        for kind in KINDS:
            changes = [0] * (length + 1)
            for piece in self.pieces:
                if piece.kind == kind:
                    changes[max(0, piece.begun)] += piece.size
                    if piece.ended is not None:
                        changes[piece.ended] -= piece.size
            total, line = 0, []
            for change in changes[:length]:
                total += change
                line.append(total)
            found[kind] = line
        return found

    def held(self) -> list[tuple[str, Kind, int]]:
        """Where what is held at the peak was made, of what kind, and how many bytes; the most first."""
        totals = [*map(sum, zip(*self.timeline().values(), strict=True))]
        when = totals.index(max(totals))
        found: dict[tuple[str, Kind], int] = {}
        for piece in self.pieces:
            if piece.begun <= when and (piece.ended is None or piece.ended > when):
                key = piece.place.name, piece.kind or "other"
                found[key] = found.get(key, 0) + piece.size
        return sorted(((*key, size) for key, size in found.items()), key=lambda each: -each[2])

    def _known(self, value: Tensor) -> Piece | None:
        storage = _storage(value)
        known = self._alive.get(_key(storage)) if storage is not None else None
        return known[0] if known is not None else None

    def _add(self, place: Place, value: Tensor, begun: int | None = None) -> Piece | None:
        storage = _storage(value)
        if storage is None:
            return None
        key = _key(storage)
        if key in self._alive:
            return self._alive[key][0]
        piece = Piece(storage.nbytes(), place, len(self.places) - 1 if begun is None else begun)
        self.pieces.append(piece)
        self._alive[key] = piece, weakref.ref(storage, lambda _: self._gone(key))
        return piece

    def _gone(self, key: int) -> None:
        if key in self._alive:
            self._alive.pop(key)[0].ended = len(self.places)

    def _know(self, kind: Kind, values: Iterable[Tensor]) -> None:
        for value in values:
            piece = self._add(BEFORE, value, -1)
            if piece is not None and piece.kind is None:
                piece.kind = kind


def _storage(value: Tensor) -> torch.UntypedStorage | None:
    try:
        return value.untyped_storage()
    except (NotImplementedError, RuntimeError):  # it has none of its own, as a sparse one
        return None


def _key(storage: torch.UntypedStorage) -> int:
    return int(storage._cdata)  # noqa: SLF001 - torch offers no other name for memory


def _gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def _states(optimizer: Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
