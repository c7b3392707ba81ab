"""Right trainings of models that others wrote: none is called faulty, none is changed, and no probe fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import third_party_models
import third_party_torch
from third_party_loop import train

from lab.manager import discover

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from third_party_loop import Training


@pytest.mark.parametrize("make", [*third_party_models.MODELS, *third_party_torch.MODELS])
def test_a_right_training_is_healthy_and_the_same(tmp_path: Path, make: Callable[[], Training]) -> None:
    alone, _ = train(make)
    assert sum(alone[-5:]) < sum(alone[:5])  # there is something to learn
    for name, probes in (("default", None), ("all", [*discover().probes])):
        losses, diagnosis = train(make, tmp_path / name, probes)
        assert diagnosis is not None
        assert [(symptom.id, symptom.at, symptom.text) for symptom in diagnosis.symptoms] == []
        assert diagnosis.verdict == "healthy", diagnosis.not_checked  # so no probe was set aside
        assert losses == alone
