"""Fingerprints of all that passes through a step: what two runs are compared by, from their folders alone."""

from __future__ import annotations

import array
import hashlib
import random
from typing import TYPE_CHECKING, Any

from lab import Probe, Stage, probe, torch
from lab import numpy as np

from .signs import Signs, Sum, mixed, plain

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    from torch import Tensor, nn

    from lab import Batch, Run, Site, Step

HIDDEN = {"mask", "scores"}  # of the sites inside attention: what is hidden there may be infinite
FIRST_ROW = "pattern"  # training's own path has one row of the batch computed aside
UNSEEDED = {"python", "numpy"}  # begin from the system's own random numbers, unless seeded
KEPT = 2**52  # what float64 holds of a whole number


@probe(
    "fingerprint",
    title="Fingerprints of batch, random state, values, gradients and weights, by which two runs are compared",
    every=0,
    cost="a norm and a product with a vector of signs for each value, gradient and weight, on measured steps",
    stages={
        "fingerprint.setting": Stage("setting", "exact"),
        "fingerprint.weight": Stage("weight"),
        "fingerprint.weight_signed": Stage("weight", "signed", "fingerprint.weight"),
        "fingerprint.random": Stage("random", "exact"),
        "fingerprint.held": Stage("held", "exact"),
        "fingerprint.rate": Stage("rate"),
        "fingerprint.batch": Stage("batch", "exact"),
        "fingerprint.value": Stage("value"),
        "fingerprint.value_signed": Stage("value", "signed", "fingerprint.value"),
        "fingerprint.loss": Stage("loss"),
        "fingerprint.parts": Stage("batch", "parts"),
        "fingerprint.gradient": Stage("gradient"),
        "fingerprint.gradient_signed": Stage("gradient", "signed", "fingerprint.gradient"),
        "fingerprint.clip": Stage("clip"),
        "fingerprint.update": Stage("update"),
        "fingerprint.update_signed": Stage("update", "signed", "fingerprint.update"),
        "fingerprint.evaluation": Stage("evaluation"),
        "fingerprint.evaluation_signed": Stage("evaluation", "signed", "fingerprint.evaluation"),
    },
)
class Fingerprint(Probe):
    """Records two numbers of each tensor x of n elements: its root mean square, and s x / sqrt(n) with signs s.

    The signs are the same in every run, and without a pattern. What changes x by d, in whatever way, changes the second
    number by about the root mean square of d: also where elements only change their places or their signs. Both add up
    over the parts in which a batch passes the model, so a batch is comparable however it is split.

    In this way: each value at a site, ``fingerprint.value``; gradients at the sites of modules made of others, and of
    parameters before they were clipped, ``fingerprint.gradient``; all weights and buffers before the update and after
    it, ``fingerprint.weight`` and ``fingerprint.update``; and, in the lab's own training, values in the first batch of
    an evaluation, ``fingerprint.evaluation``. The second number of each has ``_signed`` behind its name.

    Hashes, which are equal only for what is equal to the last bit: ``fingerprint.batch``, of what the model is called
    with and of the targets; ``fingerprint.random``, of the state of each generator of random numbers when the model is
    called, which is read and not drawn from (0 for Python's and numpy's own, until somebody draws from them). And as
    they are: ``fingerprint.loss``, the sum over the parts, and ``fingerprint.parts``, how many there are;
    ``fingerprint.clip``, by how much each clipping scaled the gradients; ``fingerprint.held``, 1 for each weight that
    the optimiser holds and else 0; ``fingerprint.rate``, of each of its groups; and at step 0 ``fingerprint.setting``,
    the numbers that modules and groups were made with.
    """

    def lab_start(self, run: Run) -> None:
        self._run = run
        self._signs = Signs()
        self._sums: dict[tuple[str, str], Sum] = {}
        self._batches: list[Batch] = []
        self._losses: list[Tensor] = []
        self._random = _random_states()
        self._over = False
        self._looks = 0  # calls since an evaluation began: the first is read
        inner = {name for name, module in run.model.named_modules() if next(module.children(), None) is not None}
        for site in run.sites.match("**"):
            leaf = site.name.rpartition(".")[2]
            if leaf in HIDDEN:
                continue
            self.read(run, site.name, self._see)
            if site.name == run.sites.output or (leaf == "out" and site.module in inner):
                self.read(run, site.name, self._see_gradient, grad=True)
            if leaf != FIRST_ROW:
                see = run.plugins.guard(self, self._see_evaluated)
                run.sites.read(site.name, see, lambda: self._looks == 0, modes=("evaluate",))
        if run.sites.output:
            run.sites.read(run.sites.output, self._looked, modes=("evaluate",))

    # ---------------------------------------------------------------- values and gradients at sites

    def _see(self, site: Site, value: Tensor) -> None:
        step = self._run.step
        if step.batch is not None and (not self._batches or step.batch is not self._batches[-1]):
            if not self._batches:
                self._record_random(step)
            elif step.loss is not None:
                self._losses.append(step.loss.detach())  # of the part before
            self._batches.append(step.batch)
            self._over = False
        # What is called again for the same batch is a forward pass done anew for the backward pass.
        if self._over:
            return
        self._over = site.name == self._run.sites.output
        if site.name.rpartition(".")[2] == FIRST_ROW:
            if len(self._batches) > 1:  # the first row of the batch is in its first part
                return
            value = value[:1]
        self._add("value", site.name, value)

    def _record_random(self, step: Step) -> None:
        for which, state in _random_states().items():
            # Nobody seeds what nobody draws from: that is another in each process, and means nothing.
            unused = which in UNSEEDED and state == self._random.get(which)
            step.record("fingerprint.random", 0.0 if unused else float(state), which)

    def _see_gradient(self, site: Site, gradient: Tensor) -> None:
        self._add("gradient", site.name, gradient)

    def _add(self, part: str, site: str, value: Tensor) -> None:
        """Add what passes in this part of the batch to what passed in those before it."""
        if not plain(value) or not value.dim():
            return
        batch = self._run.step.batch
        inputs = batch.inputs if batch is not None else None
        found = self._sums.get((part, site))
        if found is None:
            found = self._sums[part, site] = Sum()
        elif part == "gradient" and found.batch is batch:
            found.partial = True  # a layer that is called twice has parts of its gradient at two places
            return
        elif part != "evaluation" and inputs is not None and inputs.dim() and len(value) != len(inputs):
            # It has no rows of the batch, as a table of positions has none; or they are not where they can be joined.
            found.partial |= part == "gradient" or len(inputs) in value.shape
            return
        found.batch = batch
        found.add(value, self._signs)

    # ---------------------------------------------------------------- evaluation

    def lab_evaluate(self) -> Generator[None, Tensor, Tensor]:
        self._looks = 0
        return (yield)

    def _see_evaluated(self, site: Site, value: Tensor) -> None:
        self._add("evaluation", site.name, value)

    def _looked(self, _site: Site, _value: Tensor) -> None:
        self._looks += 1

    # ---------------------------------------------------------------- a step

    def lab_before_update(self, run: Run, step: Step) -> None:
        batches, self._batches = self._batches, []
        losses, self._losses = self._losses, []
        if not self.due(step):
            return
        step.record("fingerprint.parts", float(len(batches)))
        if step.loss is not None:
            # The lab's own training has joined them already.
            parts = losses if run.config is None else []
            step.record("fingerprint.loss", torch.stack([loss.mean() for loss in (*parts, step.loss.detach())]).sum())
        if step.index == 0:
            for name, number in {**_module_settings(run.model), **_group_settings(run)}.items():
                step.record("fingerprint.setting", number, name)
        held_by = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
        for name, p in run.parameters.items():
            step.record("fingerprint.held", float(id(p) in held_by), name)
        for i, group in enumerate(run.optimizer.param_groups):
            if isinstance(group.get("lr"), (int, float, torch.Tensor)):
                step.record("fingerprint.rate", _number(group["lr"]), f"group.{i}")
        for name, hashed in _hashed(batches or ([step.batch] if step.batch is not None else [])).items():
            step.record("fingerprint.batch", hashed, name)
        _record(step, "weight", self._sums_of(dict(held(run))))
        _record(step, "gradient", self._gradients(run, step))

    def lab_step_end(self, run: Run, step: Step) -> None:
        if self.due(step):
            _record(step, "update", self._sums_of(dict(held(run))))
        self._flush(step)

    def _sums_of(self, tensors: dict[str, Tensor]) -> dict[str, Sum]:
        """The fingerprints of tensors that are there as a whole."""
        found = {name: Sum() for name, x in tensors.items() if plain(x)}
        for name, mine in found.items():
            mine.add(tensors[name], self._signs)
        return found

    def _gradients(self, run: Run, step: Step) -> dict[str, Sum]:
        """The fingerprints of gradients as they were before they were clipped; record by how much that scaled them.

        By how much is what their joint norm is now, over what it was before: whatever the clipping should have done.
        """
        found = self._sums_of({name: p.grad for name, p in run.parameters.items() if p.grad is not None})
        names = {id(p): name for name, p in run.parameters.items()}
        for i, clip in enumerate(step.clips):
            mine = [found[name] for p in clip.params if (name := names.get(id(p), "")) in found]
            if mine and torch.is_tensor(clip.norm):
                now = torch.stack([_on(each.square, clip.norm.device) for each in mine]).sum().sqrt()
                scale = now / clip.norm.detach().double()
                scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
                step.record("fingerprint.clip", scale, f"clip.{i}")
                for each in mine:
                    each.scale(_on(scale, each.square.device))
        return found

    def _flush(self, step: Step) -> None:
        """Record what was added up."""
        sums, self._sums = self._sums, {}
        for part in dict.fromkeys(part for part, _ in sums):
            _record(step, part, {site: found for (of, site), found in sums.items() if of == part})


def _record(step: Step, part: str, sums: dict[str, Sum]) -> None:
    """Record both numbers of what is known as a whole."""
    whole = {site: found for site, found in sums.items() if not found.partial}
    for device in dict.fromkeys(found.square.device for found in whole.values()):
        here = {site: found for site, found in whole.items() if found.square.device == device}
        counts = torch.tensor([found.count for found in here.values()], dtype=torch.float64, device=device)
        squares, signed = (torch.stack([getattr(f, of) for f in here.values()]) for of in ("square", "signed"))
        step.record_all(f"fingerprint.{part}", tuple(here), (squares / counts).sqrt())
        step.record_all(f"fingerprint.{part}_signed", tuple(here), signed / counts.sqrt())


def _on(x: Tensor, device: torch.device) -> Tensor:
    return x if x.device == device else x.to(device)


def held(run: Run) -> Iterator[tuple[str, Tensor]]:
    """Every weight, trained or not, and every buffer."""
    yield from run.model.named_parameters()
    yield from run.model.named_buffers()


# ---------------------------------------------------------------- hashes


def _hashed(batches: Iterable[Batch]) -> dict[str, Tensor]:
    """A hash of each tensor of a batch, by its name in the call: the same however the rows are split into parts."""
    sums: dict[str, Any] = {}
    rows: dict[str, int] = {}
    for batch in batches:
        for name, x in _tensors(batch):
            if x.dim() == 0 or not x.numel() or not (plain(x) or not (x.is_floating_point() or x.is_complex())):
                continue
            bits = x.detach()
            if bits.is_floating_point():
                bits = bits.float().contiguous().view(torch.int32)
            flat = bits.reshape(len(bits), -1).long()  # [B n]
            each = (flat * (mixed(flat.shape[1], 0, x.device) | 1)).sum(-1)  # [B]
            begin = rows.get(name, 0)
            order = mixed(begin + len(each), 1, x.device)[begin:] | 1
            sums[name] = sums.get(name, 0) + ((each ^ (each >> 12)) * order).sum()
            rows[name] = begin + len(each)
    return {name: (total & (KEPT - 1)).double() for name, total in sums.items()}


def _tensors(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    inputs, seen = batch.inputs, False
    named = [*((f"argument {i}", value) for i, value in enumerate(batch.args)), *batch.kwargs.items()]
    for name, value in named:
        if torch.is_tensor(value):
            yield ("inputs" if value is inputs and not seen else name), value
            seen = seen or value is inputs
    if batch.targets is not None:
        yield "targets", batch.targets


def _random_states() -> dict[str, int]:
    """Hashes of the states of all random numbers, by generator: they are read, and nothing is drawn."""
    version, inner, following = random.getstate()
    name, keys, *rest = np.random.get_state()
    states = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "python": array.array("L", inner).tobytes() + repr((version, following)).encode(),
        "numpy": np.asarray(keys).tobytes() + repr((name, *rest)).encode(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for i, generator in enumerate(torch.cuda.default_generators):
            states[f"cuda:{i}"] = generator.get_state().numpy().tobytes()  # seed and offset, kept on the host
    return {which: int.from_bytes(hashlib.blake2b(s, digest_size=6).digest(), "little") for which, s in states.items()}


# ---------------------------------------------------------------- settings


def _module_settings(model: nn.Module) -> dict[str, float]:
    """The numbers that stand in modules by name: rates, widths, counts of heads."""
    return {
        f"{name}.{key}" if name else key: float(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float)) and not key.startswith("_") and key != "training"
    }


def _group_settings(run: Run) -> dict[str, float]:
    """The numbers that the optimiser was given, but for the rates, which change."""
    found = {}
    for i, group in enumerate(run.optimizer.param_groups):
        for key, value in group.items():
            if key in ("params", "lr", "initial_lr"):
                continue
            parts = value if isinstance(value, (tuple, list)) else [value]
            for j, part in enumerate(parts):
                if isinstance(part, (bool, int, float)):
                    found[f"optimizer.{i}.{key}" + (f".{j}" if len(parts) > 1 else "")] = float(part)
    return found


def _number(value: float | Tensor) -> float | Tensor:
    return value.detach().reshape(()) if isinstance(value, torch.Tensor) else float(value)
