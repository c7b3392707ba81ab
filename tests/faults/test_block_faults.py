"""Faults of norms, residual branches and feed-forward layers do what they say, and are named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import lab
from lab.errors import BadInput

if TYPE_CHECKING:
    from conftest import SmallRun

    from lab import Run

MEANT: dict[str, Any] = {
    "norm.missing": lambda x, w, b: x * w + b,
    "norm.wrong_axis": lambda x, w, b: (
        (x - x.mean(1, keepdim=True)) / (x.var(1, False, keepdim=True) + 1e-5).sqrt() * w + b
    ),
    "norm.eps_huge": lambda x, w, b: torch.nn.functional.layer_norm(x, x.shape[-1:], w, b, 100.0),
    "norm.shifted": lambda x, w, b: torch.nn.functional.layer_norm(x, x.shape[-1:], w, b) + 1,
    "norm.sum_not_mean": lambda x, w, b: (
        torch.nn.functional.layer_norm(x, x.shape[-1:], None, None, 0.0) * x.shape[-1] ** -0.5 * w + b
    ),
}


@lab.plugin("between", title="Keeps what one module is given and gives out, at each step")
class Between(lab.Plugin):
    def __init__(self, name: str) -> None:
        self.name = name
        self.pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.module: Any = None

    def lab_start(self, run: Run) -> None:
        self.module = run.model.get_submodule(self.name)
        self.weights: dict[int, list[torch.Tensor]] = {}

        def hook(module: Any, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            index = run.step.index
            if run.sites.mode == "train":
                self.pairs[index] = (args[0].detach().clone(), out.detach().clone())
                self.weights[index] = [p.detach().clone() for p in module.parameters()]

        self.module.register_forward_hook(hook)


@pytest.mark.parametrize("id", sorted(MEANT))
def test_a_norm_gives_what_its_fault_says(small_run: SmallRun, id: str) -> None:
    between = Between("blocks.1.attn_norm")
    diagnosis, _ = small_run(between, faults=[{"id": id, "at": "blocks.1.attn_norm"}])
    for step, (x, out) in between.pairs.items():
        torch.testing.assert_close(out, MEANT[id](x, *between.weights[step]))
    assert (diagnosis.causes[0].id, diagnosis.causes[0].at) == (id, "blocks.1.attn_norm")
    assert len(diagnosis.causes) == 1
    assert diagnosis.unexplained == ()
    assert between.module.eps == 1e-5


@pytest.mark.parametrize("id", ["norm.missing", "norm.shifted", "norm.sum_not_mean", "norm.wrong_axis"])
def test_a_norm_is_whole_until_its_step(small_run: SmallRun, id: str) -> None:
    between = Between("blocks.0.mlp_norm")
    diagnosis, _ = small_run(between, faults=[{"id": id, "at": "blocks.0.mlp_norm", "from_step": 10}])
    for step, (x, out) in between.pairs.items():
        weight, bias = between.weights[step]
        whole = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)
        assert torch.allclose(out, whole, atol=1e-5) == (step < 10)
    assert (diagnosis.causes[0].id, diagnosis.causes[0].since_step) == (id, 10)


@pytest.mark.parametrize("id", sorted(MEANT))
def test_a_place_without_a_norm_is_refused(small_run: SmallRun, id: str) -> None:
    with pytest.raises(BadInput, match="no norm at"):
        small_run(faults=[{"id": id, "at": "blocks.0.mlp.up"}])


@pytest.mark.parametrize("norm_at", ["pre", "post"])
@pytest.mark.parametrize("branch", ["attn", "mlp"])
def test_a_dropped_stream_is_named_with_its_branch(small_run: SmallRun, branch: str, norm_at: str) -> None:
    at = f"blocks.1.{branch}"
    model = {"layers": 2, "width": 32, "heads": 2, "context": 24, "norm_at": norm_at}
    diagnosis, _ = small_run(faults=[{"id": "residual.dropped", "at": at}], model=model)
    best = diagnosis.causes[0]
    assert (best.id, best.at, best.since_step) == ("residual.dropped", at, 0)
    assert (len(diagnosis.causes), diagnosis.unexplained) == (1, ())


@pytest.mark.parametrize(("id", "factor"), [("residual.dropped", 0.0), ("residual.scaled", 0.25)])
def test_a_stream_is_multiplied_by_what_a_fault_says(small_run: SmallRun, id: str, factor: float) -> None:
    norm, branch, down = Between("blocks.0.mlp_norm"), Between("blocks.0.mlp"), Between("blocks.0.mlp.down")
    fault: dict[str, object] = {"id": id, "at": "blocks.0.mlp", "from_step": 6}
    if factor:
        fault["factor"] = factor
    small_run(norm, branch, down, faults=[fault])
    for step, (stream, _) in norm.pairs.items():
        clean = down.pairs[step][1]
        expected = clean + (factor - 1) * stream if step >= 6 else clean
        torch.testing.assert_close(branch.pairs[step][1], expected)
    for module in norm.module, branch.module:
        assert len(module._forward_pre_hooks) == 0


@pytest.mark.parametrize("id", ["residual.dropped", "residual.scaled"])
def test_a_place_without_a_branch_is_refused(small_run: SmallRun, id: str) -> None:
    with pytest.raises(BadInput, match="no branch of a block"):
        small_run(faults=[{"id": id, "at": "blocks.0.mlp.up"}])
