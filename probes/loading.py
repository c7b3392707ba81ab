"""Where weights come from: what a checkpoint gave and what it did not, and tables that were meant to be one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab import NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from torch import Tensor, nn

    from lab import History, Run, Step

UNSEEN = "no weights were loaded while the run was built"
FEWEST = 256  # elements; of fewer, the cosine tells little
SPREADS = 6.0  # standard deviations of the cosine of two draws at random; a billion matrices stay below
LOOKS = 3
HEADS = 4
HALF = 0.5  # a row of padding may be 0 in both; of two random tables far less than a hundredth is equal, in 8 bits even
NO_TABLES = "no two tables of the same shape are trained, one for the tokens and one for the logits"


@probe(
    "loading",
    title="Does every weight that a checkpoint holds reach the model, and stay?",
    cost="a copy of the weights until the first update",
)
class Loading(Probe):
    """Reads what `load_state_dict` answers while the model is built; a loop that the lab did not write loads before.

    Records at step 0 ``loading.keys``, how many weights were asked for by the model that was loaded last, and
    ``loading.lost``, how many of them it did not get although the checkpoint holds one of that shape and of that name
    behind another prefix; at each of those ``loading.missed``, 1. Of the matrices that were loaded last and are still
    in the model: ``loading.matrices``, how many, and ``loading.kept``, how many of them still resemble what was loaded.
    """

    def lab_start(self) -> None:
        self._recorded = False

    def lab_build_model(self) -> Generator[None, nn.Module, nn.Module]:
        self._asked, self._missed = 0, tuple[str, ...]()
        self._loaded: list[tuple[nn.Parameter, Tensor]] = []
        plain = torch.nn.Module.load_state_dict

        def load(module: nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
            given = {name: tuple(value.shape) for name, value in state_dict.items() if torch.is_tensor(value)}
            answer = plain(module, state_dict, *args, **kwargs)
            unread = [name for name in answer.unexpected_keys if name in given]
            self._asked = len(shapes)
            self._missed = tuple(n for n in answer.missing_keys if any(_renamed(n, o, shapes, given) for o in unread))
            named = dict(module.named_parameters())
            self._loaded = [(p, p.detach().clone()) for n, p in named.items() if n in given and _random(p)]
            return answer

        torch.nn.Module.load_state_dict = load  # type: ignore[method-assign, assignment]
        try:
            return (yield)
        finally:
            torch.nn.Module.load_state_dict = plain  # type: ignore[method-assign]

    def lab_before_update(self, run: Run, step: Step) -> None:
        asked = getattr(self, "_asked", 0)
        if self._recorded or not asked:
            return
        self._recorded = True
        step.record("loading.keys", float(asked))
        step.record("loading.lost", float(len(self._missed)))
        for name in self._missed:
            step.record("loading.missed", 1.0, name)
        loaded, self._loaded = self._loaded, []
        here = {id(p) for p in run.model.parameters()}
        held = [(p, was) for p, was in loaded if id(p) in here and p.shape == was.shape and p.device == was.device]
        kept = [_alike(p, was) for p, was in held]
        if kept:
            step.record("loading.matrices", float(len(kept)))
            step.record("loading.kept", torch.stack(kept).float().sum())


def _random(p: nn.Parameter) -> bool:
    return p.dim() >= 2 and p.numel() >= FEWEST and p.is_floating_point()


def _alike(p: Tensor, was: Tensor) -> Tensor:
    """Whether two tensors point in one direction rather than in any: the cosine of two draws is 1 / sqrt(n) or so."""
    a, b = p.detach().double().flatten(), was.double().flatten()
    cosine = (a @ b) / (torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)).clamp_min(1e-300)
    alike: Tensor = cosine.abs() > SPREADS / p.numel() ** 0.5
    return alike


def _renamed(name: str, other: str, shapes: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether two names of tensors of one shape differ by a prefix alone, as ``module.`` or ``model.``."""
    same = other.endswith(f".{name}") or name.endswith(f".{other}")
    return same and shapes.get(name) == given[other]


@rule(
    "loading.missed",
    title="Every weight of a checkpoint reaches the model",
    reads=(),
    basis="experiment",
    phase="forward",
)
def loading_missed(history: History) -> Iterator[Symptom]:
    """A weight that the model asks for and does not get, and one of that shape that it was given and did not ask for.

    Their names have to be the same but for a prefix. So a new head on a trained body, adapters that no checkpoint
    holds yet, or a part that is left out on purpose, are not named.
    """
    if not history.sites("loading.keys"):
        raise NotChecked(UNSEEN)
    keys, lost = history.last("loading.keys"), history.last("loading.lost")
    for name, series in history.each("loading.missed"):
        yield Symptom(
            at=name,
            since=int(series.steps[0]),
            seen=lost,
            expected="0",
            text=f"{name} was not loaded: the checkpoint holds it behind another prefix, as {lost:.0f} of {keys:.0f}",
        )


@rule(
    "loading.replaced",
    title="What was loaded is what is trained",
    reads=(),
    basis="experiment",
    phase="forward",
)
def loading_replaced(history: History) -> Iterator[Symptom]:
    """No matrix resembles what was loaded into it: each has a cosine with it as two draws at random have.

    The last layers, or the tables of tokens, are drawn anew on purpose by some who fine-tune; all matrices by nobody,
    who could have loaded nothing. What is scaled, rounded, merged or disturbed a little still resembles it.
    """
    if not history.sites("loading.kept"):
        raise NotChecked(UNSEEN)
    matrices, kept = history.last("loading.matrices"), history.last("loading.kept")
    if matrices < 2:
        raise NotChecked("one matrix was loaded, or none")
    if kept == 0:
        text = f"none of {matrices:.0f} matrices resembles what was loaded into it when the first step begins"
        yield Symptom(at="", since=0, seen=kept, expected=f"{matrices:.0f}", text=text)


@probe("ties", title="Do two tables that start as one stay one?", every=10, cost="one comparison of two tables")
class Ties(Probe):
    """Compares the table of the tokens with that of the logits, where they have one shape; a tied one with itself.

    Records, by the name of the second, ``ties.equal``: the share of elements that are equal, and not 0; of several
    tables of that shape, as where there are as many positions as tokens, the one that it equals most.
    """

    def lab_start(self, run: Run) -> None:
        # With both names of a table that is tied: it is compared with itself.
        named = run.model.named_parameters(remove_duplicate=False)
        tables = {name: p for name, p in named if p.requires_grad and p.dim() == 2}
        kinds = {name: run.model.get_submodule(name.rpartition(".")[0]) for name in tables}
        tokens = [n for n, kind in kinds.items() if isinstance(kind, torch.nn.Embedding) or _looks_up(kind)]
        heads = [n for n in tables if n not in tokens]
        found = [(b, tables[b], [tables[a] for a in tokens if _comparable(tables[a], tables[b])]) for b in heads]
        self._found = [(name, b, beside) for name, b, beside in found if beside][-HEADS:]

    def lab_before_update(self, step: Step) -> None:
        if self.due(step):
            for name, b, beside in self._found:
                equal = [((a.detach() == b.detach()) & (b.detach() != 0)).float().mean() for a in beside]
                step.record("ties.equal", torch.stack(equal).amax(), name)


def _comparable(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device


def _looks_up(module: nn.Module) -> bool:
    return getattr(module, "fan_in", None) == 1


@rule(
    "ties.apart",
    title="Tables of tokens and of logits that start as one stay one",
    reads=(),
    basis="experiment",
    phase="update",
)
def ties_apart(history: History) -> Iterator[Symptom]:
    """Two tables of random numbers that start bit for bit alike are copies of one: of two draws next to none is equal.

    To start alike and then part has no purpose in a model that knows nothing yet, which is where the loss starts at
    ln V, three standard errors allowed for. Whoever starts from a trained model may part what was one on purpose.
    """
    judged = False
    for name, series in history.each("ties.equal"):
        judged = True
        alike = series.values > HALF
        if not alike[0]:
            continue
        if len(series) < LOOKS:
            raise NotChecked("fewer than three looks at two tables that start alike")
        if np.all(alike):
            continue
        loss, error, classes = (history.last(f"start.{metric}") for metric in ("loss", "error", "classes"))
        if not loss >= np.log(classes) - 3 * error:
            raise NotChecked("two tables start alike, in a model that was trained before or is no classifier")
        step = int(series.steps[np.flatnonzero(~alike)[0]])
        text = (
            f"{name} starts bit for bit as the table of the tokens, in a tensor of its own, and at step {step} "
            f"{1 - series.values[-1]:.0%} of it differ"
        )
        yield Symptom(at=name, since=step, seen=float(series.values[-1]), expected="1", text=text)
    if not judged:
        raise NotChecked(NO_TABLES)
