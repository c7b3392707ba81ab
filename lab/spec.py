"""Specs: what any implementation of a component must do, said as properties; and measures, numbers that theory knows.

A project's ``spec.py`` holds functions marked `prop`. Each takes what was built (the reference, or a learner's file)
and values that hypothesis draws. Each carries one sentence that says what it means when it fails. A project's
``measures.py`` holds functions marked `measure`; a scenario checks them like any other metric.
"""

from __future__ import annotations

import math
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from lab.errors import one_line, shown
from lab.sites import sites_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

Built = Any  # a namespace with the names of a component: the reference's module, or a learner's

EXAMPLES = 25
SHOWN = 16  # numbers of a tensor that are shown in whole

seeds = st.integers(0, 999)
floats = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


class Mismatch(AssertionError):  # noqa: N818 - the name says what it is
    """A property does not hold. The text is one line; `lines` show numbers below it."""

    def __init__(self, text: str, lines: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.lines = lines


@dataclass(frozen=True)
class Failure:
    """A property that failed.

    Attributes:
        name: Of the property.
        meaning: One sentence: what it means.
        example: The smallest values drawn for which it fails.
        text: One line: what was seen.
        lines: Expected against got, in numbers.
    """

    name: str
    meaning: str
    example: dict[str, str]
    text: str
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Property:
    """One thing that every implementation must do."""

    name: str
    meaning: str
    function: Callable[..., None]
    strategies: Mapping[str, st.SearchStrategy[Any]] = field(default_factory=dict)
    examples: int = EXAMPLES

    def check(self, built: Built, file: str = "") -> Failure | None:
        """Try it on drawn values; return how the smallest of them that fails does so.

        Args:
            built: What to check.
            file: The learner's file, whose lines are named where it raises.
        """
        seen: list[tuple[dict[str, Any], Exception]] = []

        def attempt(**drawn: Any) -> None:
            try:
                self.function(built, **drawn)
            except Exception as error:
                seen.append((drawn, error))
                raise

        try:
            if self.strategies:
                _trying(self.examples)(given(**self.strategies)(attempt))()
            else:
                attempt()
        except Exception as error:  # noqa: BLE001 - whatever a learner's code raises is what is reported
            # The last one that hypothesis tries again is the smallest.
            drawn, error = seen[-1] if seen else ({}, error)
            lines = error.lines if isinstance(error, Mismatch) else ()
            values = {name: shown(value) for name, value in drawn.items()}
            return Failure(self.name, self.meaning, values, _told(error, file), lines)
        return None


def _trying(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )


def _told(error: Exception, file: str) -> str:
    """Say in one line what was raised, and at which line of the learner's file."""
    if isinstance(error, Mismatch):
        return str(error)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if file and frame.filename == file]
    where = f" ({Path(file).name}:{frames[-1].lineno})" if frames else ""
    text = one_line(error)
    return f"{text.removeprefix('NotImplementedError: ')}{where}"


def prop(
    meaning: str, *, examples: int = EXAMPLES, **strategies: st.SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Property]:
    """Mark a function as a property.

    Args:
        meaning: One sentence that says what it means when it fails, to somebody who wrote the component.
        examples: How many values are drawn.
        strategies: What is drawn, by the name of the function's argument. The first argument is what was built.
    """

    def mark(function: Callable[..., None]) -> Property:
        return Property(function.__name__, meaning, function, strategies, examples)

    return mark


@dataclass(frozen=True)
class Measure:
    """A number that theory knows, measured on the component."""

    name: str
    title: str
    function: Callable[[int], float]

    def __call__(self, seed: int) -> float:
        """Measure."""
        return float(self.function(seed))


def measure(title: str) -> Callable[[Callable[[int], float]], Measure]:
    """Mark a function of a seed as a measure; `title` says what the number is, and which value theory gives it."""

    def mark(function: Callable[[int], float]) -> Measure:
        return Measure(function.__name__, title, function)

    return mark


def properties(module: ModuleType) -> list[Property]:
    """Return the properties of a spec, in the order in which they are written."""
    return [thing for thing in vars(module).values() if isinstance(thing, Property)]


def measures(module: ModuleType) -> list[Measure]:
    """Return the measures of a module, in the order in which they are written."""
    return [thing for thing in vars(module).values() if isinstance(thing, Measure)]


# ---------------------------------------------------------------- what properties are written with


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    """Draw standard normal numbers, times `scale`, by a generator of their own."""
    draw = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=draw, dtype=torch.float64)).to(dtype)


def holds(condition: bool | Tensor, text: str) -> None:
    """Raise `Mismatch` with this text unless the condition holds."""
    if not bool(condition):
        raise Mismatch(text)


def near(got: float, expected: float, tolerance: float, what: str) -> None:
    """Raise `Mismatch` unless a number is within an absolute tolerance of another."""
    if not abs(float(got) - expected) <= tolerance:  # NaN is near nothing
        raise Mismatch(f"{what} is {float(got):.6g}, expected {expected:.6g} within {tolerance:.2g}")


def equal(
    got: Any, expected: Tensor, what: str = "the output", *, rtol: float | None = None, atol: float | None = None
) -> None:
    """Raise `Mismatch` unless a tensor has the shape, dtype, device and values of another.

    Tolerances are those of `torch.testing.assert_close` for the dtype, unless given. NaN equals NaN.
    """
    if not isinstance(got, Tensor):
        raise Mismatch(f"{what} is a {type(got).__name__}, expected a tensor of shape {_shape(expected)}")
    for name, a, b in (
        ("shape", _shape(got), _shape(expected)),
        ("dtype", got.dtype, expected.dtype),
        ("device", got.device, expected.device),
    ):
        if a != b:
            raise Mismatch(f"{what} has {name} {a}, expected {b}")
    try:
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, equal_nan=True)
    except AssertionError:
        raise Mismatch(_difference(got, expected, what), _table(got, expected)) from None


def _shape(x: Tensor) -> str:
    return f"[{' '.join(map(str, x.shape))}]"


def _difference(got: Tensor, expected: Tensor, what: str) -> str:
    a, b = got.detach().double(), expected.detach().double()
    gap = (a - b).abs()
    gap = torch.where(gap.isnan(), torch.full_like(gap, math.inf), gap)
    alike = (a == b) | (a.isnan() & b.isnan())  # inf - inf is NaN, and yet they are equal
    gap = gap.masked_fill(alike, 0.0)
    worst = int(gap.argmax()) if gap.numel() else 0
    place = " ".join(str(int(i)) for i in torch.unravel_index(torch.tensor(worst), a.shape)) if a.dim() else ""
    at = f" at [{place}]" if place else ""
    return f"{what}{at} is {float(a.reshape(-1)[worst]):.6g}, expected {float(b.reshape(-1)[worst]):.6g}"


def _table(got: Tensor, expected: Tensor) -> tuple[str, ...]:
    if got.numel() > SHOWN:
        return ()
    return (f"got       {_numbers(got)}", f"expected  {_numbers(expected)}")


def _numbers(x: Tensor) -> str:
    if x.dim() == 0:
        return f"{float(x.detach()):.5g}"
    return f"[{' '.join(_numbers(part) for part in x)}]"


def gradients(function: Callable[..., Any], *inputs: Tensor) -> None:
    """Raise `Mismatch` unless gradients equal finite differences (`torch.autograd.gradcheck`), in float64."""
    leaves = tuple(x.detach().clone().double().requires_grad_() for x in inputs)
    try:
        torch.autograd.gradcheck(function, leaves)
    except GradcheckError as error:
        raise Mismatch(f"the gradient is not that of finite differences: {one_line(error)}") from None


def tapped(module: torch.nn.Module, *args: Any, call: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """Return what passes the sites of a module, by name, while it (or `call`) is called with these arguments."""
    with sites_of(module).capture("**") as values:
        (call or module)(*args)
    return dict(values)


def explicit_taps(module: torch.nn.Module, names: tuple[str, ...], *args: Any) -> None:
    """Raise `Mismatch` unless calling a module passes just these sites, in this order."""
    seen = list(tapped(module, *args))
    holds(seen == list(names), f"the sites tapped are {', '.join(seen) or 'none'}; expected {', '.join(names)}")
