"""Training loops that are right and wasteful: what they keep, and what they compute in vain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab import BadInput, Cause, Fault, NotChecked, Saving, fault, torch

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor

    from lab import History, Profile, Run, Step


def _activations(profile: Profile) -> int:
    """Bytes of what a step keeps for the way back."""
    return profile.at_peak()["activations"]


def _graphs_cost(profile: Profile, _history: History, _at: str) -> Saving:
    """A graph holds what the way back needs."""
    return Saving(0.0, "in each step: what the way back needs is kept when it is over", bytes=_activations(profile))


def _outputs_cost(profile: Profile, _history: History, _at: str) -> Saving:
    return Saving(0.0, "in each step: the model's answer is kept", bytes=profile.output)


def _evaluation_cost(profile: Profile, _history: History, _at: str) -> Saving:
    why = "an evaluation keeps what a step of training keeps, for a way back that never comes"
    return Saving(0.0, why, "evaluation", bytes=max(0, _activations(profile) - profile.passing))


def _uncached_cost(profile: Profile, history: History, _at: str) -> Saving:
    """What one position more in a pass takes, times those that pass again."""
    repeated, slope = float(history.last("generation.repeated")), profile.scopes["generation"].slope
    if not slope > 0:
        raise NotChecked("passes of several lengths were not timed")
    why = f"{repeated:.0f} positions pass again for each token, and each takes {slope * 1e6:.3g} us"
    return Saving(repeated * slope, why, "generation")


RETAINED_GRAPH = Cause(
    id="performance.retained_graph",
    title="The graph of every step is kept",
    must=("memory.graphs",),
    may=("memory.logits",),
    place="loop",
    repair="Keep numbers, not tensors with a history: losses.append(loss.detach()), total += loss.detach(). Drop "
    "retain_graph=True unless a second backward pass follows in the same step.",
    refute="When a step has ended, no graph of an earlier one lives.",
    look="Lists and running sums that the loss is added to, and retain_graph=True.",
    source="PyTorch documentation: frequently asked questions, my model reports out of memory",
    saves=_graphs_cost,
)

LIST_GROWS = Cause(
    id="performance.list_grows",
    title="The outputs of every step are kept",
    must=("memory.logits",),
    cannot=("memory.graphs",),
    place="loop",
    repair="Reduce each step's outputs to the numbers that are wanted before they are put in a list, and empty the "
    "list when it has been used.",
    refute="When a step has ended, no logits of an earlier one are in memory.",
    look="Lists and dictionaries that outlive a step: collected outputs, hooks that store what they see.",
    source="PyTorch documentation: frequently asked questions, my model reports out of memory",
    saves=_outputs_cost,
)

GRADIENTS_AT_EVALUATION = Cause(
    id="performance.gradients_at_evaluation",
    title="Evaluation builds a graph for gradients",
    must=("evaluation.graphs",),
    place="evaluation",
    repair="Evaluate under torch.inference_mode() or torch.no_grad(); model.eval() alone does not do it. No activation "
    "needs then be kept for a backward pass that never comes.",
    refute="The logits of an evaluation do not require a gradient.",
    look="Where evaluation begins, and whether the block or the decorator covers the calls of the model.",
    source="PyTorch documentation: autograd mechanics, evaluation mode",
    saves=_evaluation_cost,
)

NO_CACHE = Cause(
    id="performance.no_cache",
    title="Generation computes the whole text again for each token",
    must=("generation.repeated",),
    place="generation",
    repair="Keep the keys and values of the positions that have passed, and pass only the newest token: with a cache L "
    "tokens after a prompt of P pass P + L - 1 positions, without one L P + L (L - 1) / 2.",
    refute="Each position passes the model once while the text grows.",
    look="What the model is called with inside the loop that generates; use_cache=False.",
    source="Shazeer, 2019; Hugging Face documentation: caching",
    saves=_uncached_cost,
)


@fault(
    "performance.retained_graph",
    title="Every loss is kept with its graph",
    cause="performance.retained_graph",
    moves="memory.graphs",
    repair=RETAINED_GRAPH.repair,
)
class RetainedGraph(Fault):
    """Goes backward with ``retain_graph=True``, and puts each loss in a list: no activation is ever freed."""

    at: str = "loop"

    def lab_start(self, run: Run) -> None:
        self._losses: list[Tensor] = []
        run.cleanup.callback(self._losses.clear)

    def lab_backward(self, run: Run, step: Step) -> bool | None:
        if not self.active(run) or step.loss is None:
            return None
        step.loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        self._losses.append(step.loss)
        return True


@fault(
    "performance.list_grows",
    title="The logits of every step are put in a list",
    cause="performance.list_grows",
    moves="memory.logits",
    repair=LIST_GROWS.repair,
)
class ListGrows(Fault):
    """Keeps each step's logits, without their graph."""

    at: str = "loop"

    def lab_start(self, run: Run) -> None:
        self._outputs: list[Tensor] = []
        run.cleanup.callback(self._outputs.clear)

    def lab_forward(self, run: Run, step: Step) -> Generator[None, Tensor, Tensor]:
        logits = yield
        if step.mode == "train" and self.active(run):
            self._outputs.append(logits.detach())
        return logits


@fault(
    "performance.gradients_at_evaluation",
    title="Evaluation runs without no_grad",
    cause="performance.gradients_at_evaluation",
    moves="evaluation.graphs",
    repair=GRADIENTS_AT_EVALUATION.repair,
)
class GradientsAtEvaluation(Fault):
    """Turns gradients on while the model is called for an evaluation."""

    at: str = "evaluation"

    def lab_forward(self, run: Run, step: Step) -> Generator[None, Tensor, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() or (step.mode == "evaluate" and self.active(run))):
            logits = yield
        return logits


@fault(
    "performance.no_cache",
    title="Generation has no cache",
    cause="performance.no_cache",
    moves="generation.repeated",
    repair=NO_CACHE.repair,
)
class NoCache(Fault):
    """Lets the engine pass the whole text for each new token."""

    at: str = "generation"

    def lab_start(self, run: Run) -> None:
        self.from_the_start()
        engine: Any = next((p for _, p in run.plugins.list_name_plugin() if getattr(p, "cached", False)), None)
        forward = getattr(run.model, "forward", None)
        if engine is None or "cache" not in getattr(getattr(forward, "__code__", None), "co_varnames", ()):
            raise BadInput("performance.no_cache: needs a model that generates with a cache")
        if not any(hasattr(module, "core") and hasattr(module, "heads") for module in run.model.modules()):
            raise BadInput("performance.no_cache: needs a model whose positions meet in attention")
        run.cleanup.callback(setattr, engine, "cached", True)
        engine.cached = False
