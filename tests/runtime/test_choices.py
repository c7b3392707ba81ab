"""What a scenario's model is made of, and the measures that it checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import pytest
import torch

from lab.errors import BadInput
from lab.projects.activations.component import ACTIVATIONS
from lab.projects.decoder.component import Decoder
from lab.projects.residuals.component import MIXERS, NORM_PLACES, NORMS, POSITIONS, Choices
from lab.runtime.run import check_measures, run_scenario
from lab.scenario import Activation, Mixer, Norm, NormPlace, Positions, Scenario

if TYPE_CHECKING:
    from pathlib import Path

    from lab.catalogue import Catalogue

SIZE: dict[str, Any] = {"context": 16, "layers": 2, "width": 16, "heads": 4}
EACH = [
    *({"mixer": name} for name in MIXERS),
    *({"positions": name} for name in POSITIONS),
    *({"norm": name} for name in NORMS),
    *({"norm_at": name} for name in NORM_PLACES),
    *({"activation": name} for name in (*ACTIVATIONS, "swiglu")),
    *({"kv_heads": count} for count in (1, 2, 4)),
]


def scenario(project: str, *checks: dict[str, str], **model: Any) -> Scenario:
    sections = {"model": {**SIZE, **model}, "data": {"source": "markov", "batch": 2}, "check": list(checks)}
    return Scenario.model_validate({"title": "t", "project": project, "steps": 2, **sections})


def test_a_file_may_name_what_the_components_know() -> None:
    for names, known in (
        (Mixer, MIXERS),
        (Positions, POSITIONS),
        (Norm, NORMS),
        (NormPlace, NORM_PLACES),
        (Activation, (*ACTIVATIONS, "swiglu")),
    ):
        assert set(get_args(names)) == set(known)


@pytest.mark.parametrize("choice", EACH, ids=str)
def test_whatever_it_is_made_of_a_model_is_causal_and_every_parameter_has_a_gradient(choice: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Decoder(11, **SIZE, choices=Choices(**choice)).double()
    before = torch.randint(11, (2, 9))
    after = before.clone()
    after[:, 5] = (after[:, 5] + 1) % 11
    a, b = model(before), model(after)
    torch.testing.assert_close(a[:, :5], b[:, :5], rtol=0, atol=1e-12)
    assert not torch.allclose(a[:, 5], b[:, 5])
    a.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


@pytest.mark.parametrize("choice", [{"mixer": "attention"}, {"mixer": "gru"}, {"mixer": "convolution"}], ids=str)
def test_a_mixer_lets_the_last_position_see_the_one_before(choice: dict[str, Any]) -> None:
    model = Decoder(11, **SIZE, choices=Choices(**choice))
    before = torch.randint(11, (1, 9))
    after = before.clone()
    after[:, 7] = (after[:, 7] + 1) % 11
    assert not torch.equal(model(before)[:, 8], model(after)[:, 8])


def test_an_unknown_choice_is_named_with_what_is_known() -> None:
    with pytest.raises(BadInput, match=r"model.mixer: found 'lstn'; did you mean 'lstm'"):
        Choices(mixer="lstn")


def test_a_measure_is_checked_and_an_unknown_one_refused(tmp_path: Path, catalogue: Catalogue) -> None:
    right = {"metric": "measure.score_std", "is": "between 0.9 and 1.1", "on": "healthy"}
    wrong = {**right, "is": "above 2"}
    outcome = run_scenario("t", scenario("attention", right, wrong), catalogue, tmp_path / "run")
    assert [check.passed for check in outcome.checks] == [True, False]
    assert outcome.checks[0].value == pytest.approx(1.0, abs=0.05)
    with pytest.raises(BadInput, match=r"t: check: attention has no measure 'score_sd'; did you mean 'score_std'"):
        check_measures(scenario("attention", {**right, "metric": "measure.score_sd"}), "t")


def test_measuring_does_not_change_what_torch_draws(tmp_path: Path, catalogue: Catalogue) -> None:
    check = {"metric": "measure.mean_square_he", "is": "finite", "on": "healthy"}
    states = []
    for name, checks in (("without", ()), ("with", (check,))):
        run_scenario(name, scenario("linear", *checks), catalogue, tmp_path / name)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
