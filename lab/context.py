"""What a hook is given: the run and the step."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from lab.errors import LookAgain, NotChecked, one_line
from lab.sites import Sites
from lab.store import History, Row

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from lab.manager import Manager
    from lab.sites import Mode

Kind = Literal["histogram", "image"]
Autocast = tuple[str, torch.dtype] | None
IGNORED = -100  # the target that the loss leaves out, as in torch


@dataclass
class Batch:
    """What the model is called with, and what it should answer.

    Attributes:
        args, kwargs: The call. The first tensor in it is the tokens [B T] of a language model.
        targets: The tokens [B T] that it should predict, or None when they are not known.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    targets: Tensor | None = None

    @property
    def inputs(self) -> Tensor | None:
        """The first tensor of the call."""
        found = (value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor))
        return next(found, None)

    def rows(self, count: int, *, last: bool = False, enough: int = 0) -> Batch:
        """Return the first rows of the batch, or the last, so that an experiment on it is cheap.

        Only where the call is one tensor, or where it can be told from several which of their dimensions is the batch.
        Else it is the whole batch.

        Args:
            count: How many rows, at most.
            last: Whether the last ones.
            enough: Positions that are enough: of tokens [B T], each with a target, no more rows than have so many. What
                is pooled over the positions of a row, or over the rows, has a target a row, and is given `count`.
        """
        inputs = self.inputs
        if enough and inputs is not None and self._by_token(inputs):
            count = min(count, -(-enough // max(1, inputs.shape[1])))
        if inputs is None or inputs.dim() == 0 or len(inputs) <= count:
            return self
        size = len(inputs)
        if not all(_cuts(value, size) for value in (*self.args, *self.kwargs.values()) if value is not inputs):
            return self

        these = slice(size - count, size) if last else slice(count)

        def cut(value: Any) -> Any:
            return value[these] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value

        kwargs = {name: cut(value) for name, value in self.kwargs.items()}
        targets = self.targets
        if targets is not None:
            targets = targets[these] if targets.shape[:1] == (size,) else None
        return Batch(tuple(map(cut, self.args)), kwargs, targets)

    def _by_token(self, inputs: Tensor) -> bool:
        tokens = inputs.dim() == 2 and not inputs.is_floating_point()
        return tokens and self.targets is not None and self.targets.shape == inputs.shape


def _cuts(value: Any, size: int) -> bool:
    """Whether it is known what the first rows of a batch of `size` are of something that a model is given beside it.

    Tensors of which the batch is the first dimension and no other; and what holds for all rows. Whole numbers [size]
    may be places in the batch, which a part of it does not have: on a GPU, asking for them ends the process.
    """
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, (bool, int, float, str))
    if value.layout != torch.strided or value.is_nested:
        return False
    if value.dim() == 0 or len(value) == 1:
        return True
    places = value.dim() == 1 and not value.is_floating_point() and value.dtype != torch.bool
    return len(value) == size and size not in value.shape[1:] and not places


@dataclass(frozen=True)
class Artifact:
    """A histogram's values [n] or an image [height width], on the host."""

    kind: Kind
    name: str
    site: str
    values: np.ndarray[Any, np.dtype[np.float64]]

    @property
    def title(self) -> str:
        """The name and the site."""
        return f"{self.name}/{self.site}" if self.site else self.name


@dataclass(frozen=True)
class Clip:
    """Gradients that were to be clipped by their joint norm.

    Attributes:
        params: Whose gradients.
        limit: The largest norm that they may have.
        norm: What the clipping answered: their norm [] before it.
        late: Whether no backward pass was seen between the update before and this.
    """

    params: tuple[Tensor, ...]
    limit: float
    norm: Tensor
    late: bool = False


@dataclass
class Step:
    """One step of a run, and what is recorded in it.

    Attributes:
        index: From 0. In evaluation and generation, the training step at which it happens.
        mode: What the step is for.
        batch, logits, loss: What the actions of this step made.
        part, parts: Which part of its batch passes, from 0, and how many there are.
        passes, cleared: How many backward passes there were, and after how many of them the gradients were cleared
            although nothing had used them; counted in the first steps and in those that are examined, in a loop that
            the lab did not write.
        loaders: How often a loader of several batches began anew, in a loop that the lab did not write.
        graphs: How many answers of an evaluation just before carry a graph that nobody used, in such a loop.
        compared: The shapes of what each loss of distances was given, in a loop that the lab did not write, where the
            step is examined.
        scored: By name each loss that takes logits or logarithms of probabilities, with the operator that made its
            input (such as ``Sigmoid``), in the same steps.
        grad_norm: The norm of all gradients before clipping.
        clips: Each clipping of gradients between the backward pass and the update, as far as it was seen.
        lr: The learning rate.
        examined: Whether experiments run at the end of this step.
        thorough: Whether all of them do, those that are made seldom too.
    """

    index: int
    mode: Mode = "train"
    batch: Batch | None = None
    part: int = 0
    parts: int = 1
    logits: Tensor | None = None
    loss: Tensor | None = None
    passes: int = 0
    cleared: int = 0
    loaders: int = 0
    graphs: int = 0
    compared: list[tuple[torch.Size, torch.Size]] = field(default_factory=list)
    scored: list[tuple[str, str]] = field(default_factory=list)
    grad_norm: Tensor | None = None
    clips: list[Clip] = field(default_factory=list)
    lr: float | None = None
    examined: bool = False
    thorough: bool = False
    _numbers: list[tuple[str, str, float]] = field(default_factory=list)
    _scalars: list[tuple[str, str, Tensor]] = field(default_factory=list)
    _vectors: list[tuple[str, Sequence[str], Tensor]] = field(default_factory=list)
    _shown: list[tuple[Kind, str, str, Tensor]] = field(default_factory=list)

    def record(self, metric: str, value: float | Tensor, site: str = "") -> None:
        """Record a number: a Python one, or a tensor [] that stays on its device until the step ends."""
        if isinstance(value, Tensor):
            self._scalars.append((metric, site, value.detach()))
        else:
            self._numbers.append((metric, site, float(value)))

    def record_all(self, metric: str, sites: Sequence[str], values: Tensor) -> None:
        """Record one metric at n sites at once, from a tensor [n] that stays on its device until the step ends."""
        if values.shape != (len(sites),):
            raise ValueError(f"{metric}: {len(sites)} sites, but values of shape {tuple(values.shape)}")
        self._vectors.append((metric, sites, values.detach()))

    def show(self, kind: Kind, name: str, value: Tensor, site: str = "") -> None:
        """Record values for a histogram, or an image [height width]; moved with the numbers when the step ends."""
        self._shown.append((kind, name, site, value.detach()))

    def take(self, other: Step) -> None:
        """Take the Python numbers that another step recorded: one that was begun, and had no update."""
        self._numbers += other._numbers
        other._numbers.clear()

    def flush(self) -> tuple[Row, list[Artifact]]:
        """Move everything recorded to the host, in one transfer for each device, and forget it here."""
        columns = [(metric, site) for metric, site, _ in self._numbers]
        columns += [(metric, site) for metric, site, _ in self._scalars]
        for metric, sites, _ in self._vectors:
            columns += [(metric, site) for site in sites]
        scalars = _stacked([value for _, _, value in self._scalars])
        pieces = [*scalars, *(value for _, _, value in self._vectors), *(value for *_, value in self._shown)]
        host = np.concatenate([np.array([v for _, _, v in self._numbers]), _to_host(pieces)])
        count = len(columns)
        artifacts, at = [], count
        for kind, name, site, value in self._shown:
            values = host[at : at + value.numel()].reshape(tuple(value.shape))
            artifacts.append(Artifact(kind, name, site, values))
            at += value.numel()
        for kept in (self._numbers, self._scalars, self._vectors, self._shown):
            kept.clear()
        return Row(tuple(columns), host[:count].copy()), artifacts


def _stacked(values: list[Tensor]) -> list[Tensor]:
    """Stack scalars that share a device, in order: a few tensors rather than hundreds."""
    if not values:
        return []
    if all(value.device == values[0].device for value in values):
        return [torch.stack(values)]
    return [value.reshape(1) for value in values]


def _to_host(pieces: list[Tensor]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Flatten and join tensors, in order, and bring them to the host: one transfer for each device."""
    out: list[Any] = [None] * len(pieces)
    for device in dict.fromkeys(piece.device for piece in pieces):
        index = [i for i, piece in enumerate(pieces) if piece.device == device]
        joined = torch.cat([pieces[i].reshape(-1).to(torch.float64) for i in index]).cpu().numpy()
        splits = np.cumsum([pieces[i].numel() for i in index])[:-1]
        for i, part in zip(index, np.split(joined, splits), strict=True):
            out[i] = part
    return np.concatenate(out) if out else np.empty(0)


@dataclass
class Run:
    """One execution, as every hook sees it.

    Attributes:
        folder: Where it is kept.
        plugins: What takes part in it.
        seed: The seed of weights, data and everything else.
        steps: How many training steps it is to have; None when nobody knows.
        device: Where the model lives.
        config: The scenario, in the lab's own runtime; None on training that the lab did not write.
        model, optimizer, data: What the build actions made.
        scheduler: The schedule of the learning rate; None when none is known.
        scheduled: What it counts: ``update``, or ``unknown``, which may be epochs.
        classes_second: Whether the model answers [B V T], as ``cross_entropy`` takes it, and not [B T V].
        autocast: How PyTorch casts by itself where the model is trained; see `autocast_now`.
        compiled: Modules that `torch.compile` has taken over: a hook in one would be compiled with it.
        sites: The named tensors of the model; none before it is built.
        history: What has been recorded, on the host.
        step: The current step.
        cleanup: Undone when the run ends, in reverse; a fault pushes its own undoing here.
    """

    folder: Path
    plugins: Manager
    seed: int = 0
    steps: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    config: Any = None
    history: History = field(default_factory=History)
    step: Step = field(default_factory=lambda: Step(0))
    cleanup: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    model: nn.Module = field(init=False)
    optimizer: Optimizer = field(init=False)
    scheduler: LRScheduler | None = field(init=False, default=None)
    scheduled: Literal["update", "unknown"] = "update"
    data: Any = field(init=False, default=None)
    classes_second: bool = field(init=False, default=False)
    autocast: Autocast = field(init=False, default=None)
    compiled: Collection[nn.Module] = field(init=False, default=())
    sites: Sites = field(init=False, default_factory=Sites)
    parameters: dict[str, nn.Parameter] = field(init=False)

    @property
    def hook(self) -> Any:
        """The hooks, to be called: ``run.hook.lab_forward(run=run, step=step)``."""
        return self.plugins.hook

    def attach(self, model: nn.Module, optimizer: Optimizer, sites: Sites) -> None:
        """Take a model and what trains it."""
        self.model, self.optimizer, self.sites = model, optimizer, sites
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    @property
    def held(self) -> set[int]:
        """The ids of the parameters that the optimiser holds."""
        return {id(p) for group in self.optimizer.param_groups for p in group["params"]}

    def call(self, batch: Batch) -> Tensor:
        """Call the model as training does; return the first floating-point tensor that it answers, classes last.

        Raises:
            NotChecked: None is known in what it answers.
        """
        answer = first_tensor(self.answer(batch))
        return answer.movedim(1, -1) if self.classes_second and answer.dim() > 2 else answer

    def answer(self, batch: Batch) -> Any:
        """Call the model as training does; return all that it answers.

        Raises:
            NotChecked: A model that the lab did not write cannot be called as an experiment does: on fewer rows, say.
        """
        try:
            with self.casting():
                return self.model(*batch.args, **batch.kwargs)
        except (NotChecked, LookAgain):
            raise
        except Exception as error:
            if self.config is not None or self.sites.mode != "examine":
                raise
            raise NotChecked(f"the model cannot be called as in this experiment ({one_line(error)})") from error

    def casting(self) -> contextlib.AbstractContextManager[Any]:
        """Return a block in which PyTorch casts as it does where the model is trained."""
        return contextlib.nullcontext() if self.autocast is None else torch.autocast(*self.autocast)


def autocast_now(device: str) -> Autocast:
    """Return a kind of device and the type to which PyTorch casts there now by itself; None where it does not."""
    return (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


def first_tensor(answer: Any) -> Tensor:
    """Return the floating-point tensor that a module's answer is about: itself, its ``logits``, or the first inside.

    Of a distribution without logits it is the mean. A single number is returned only where there is nothing else: a
    model may give its loss beside its output.

    Raises:
        NotChecked: There is none.
    """
    if isinstance(answer, Tensor) and answer.is_floating_point():
        return answer
    named = answer.get("logits") if isinstance(answer, dict) else getattr(answer, "logits", None)
    if isinstance(named, Tensor):
        return named
    mean = _mean(answer) if isinstance(answer, Distribution) else None
    if mean is not None:
        return mean
    parts = list(answer.values()) if isinstance(answer, dict) else answer
    found = []
    for part in parts if isinstance(parts, (tuple, list)) else ():
        with contextlib.suppress(NotChecked):
            found.append(first_tensor(part))
    if not found:
        raise NotChecked(
            f"the model answers with a {type(answer).__name__}, in which no floating-point tensor is known"
        )
    return next((value for value in found if value.dim()), found[0])  # a number beside others is a loss


def _mean(distribution: Distribution) -> Tensor | None:
    """The mean of a distribution; None of one that has none, as Cauchy's, or for which nobody has a formula."""
    try:
        mean = distribution.mean
    except NotImplementedError:
        return None
    return mean if mean.is_floating_point() and not bool(mean.isnan().all()) else None
