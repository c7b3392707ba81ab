"""How often `torch.compile` compiles the same function anew."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Stage, Symptom, probe, rule

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lab import History, Step


@probe(
    "compilation",
    title="How often is the same function compiled anew?",
    cost="none",
    stages={"compilation.steps": Stage("work", "exact", says="steps in which the same function was compiled")},
)
class Compilation(Probe):
    """Reads the compiler's own count of how often it has begun to compile each function, at the end of each step.

    Records ``compilation.steps``: of the function that was compiled in the most steps, in how many; and, once there is
    one, ``compilation.limit``, how many versions of a function PyTorch keeps
    (``torch._dynamo.config.recompile_limit``).
    """

    def lab_start(self) -> None:
        self._before = dict(_counts())
        self._steps: Counter[int] = Counter()

    def lab_step_end(self, step: Step) -> None:
        counts = _counts()
        if counts != self._before:
            if any(count > counts.get(name, 0) for name, count in self._before.items()):  # torch.compiler.reset()
                self._before, self._steps = {}, Counter()
            self._steps.update(name for name, count in counts.items() if count > self._before.get(name, 0))
            self._before = dict(counts)
        step.record("compilation.steps", max(self._steps.values(), default=0))
        if self._steps:
            step.record("compilation.limit", sys.modules["torch._dynamo.config"].recompile_limit)


def _counts() -> Mapping[int, int]:
    """How often each function began to be compiled, by the compiler's number for it; empty where there is none."""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    counts: Mapping[int, int] = getattr(frames, "FRAME_COMPILE_COUNTER", {})
    return counts


@rule(
    "compilation.again",
    title="What is compiled stays compiled",
    reads=("compilation.steps",),
    basis="theory",
)
def compilation_again(history: History) -> Iterator[Symptom]:
    """A function was compiled in more steps than PyTorch keeps versions of one.

    At that many it gives up, warns, and runs the function as it was written: all compiling was in vain. Shapes that
    change are compiled for twice, the second time for all; training and evaluation are compiled for once each.
    """
    series, limit = history.series("compilation.steps"), history.last("compilation.limit")
    if not series.values.any():
        raise NotChecked("nothing was compiled in this run")
    if found := series.first(series.values > limit):
        step, seen = found
        since = int(series.steps[series.values > 1][0])
        text = f"a compiled function was compiled anew in {seen:.0f} steps until step {step}; PyTorch keeps "
        text += f"{limit:.0f} versions of one, and then gives up"
        yield Symptom(at="", since=since, seen=seen, expected=f"at most {limit:.0f}", text=text)
