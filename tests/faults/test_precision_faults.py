"""Values that pass through a format too small for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lab.errors import BadInput

if TYPE_CHECKING:
    from conftest import SmallRun


@pytest.mark.parametrize("scale", [1.0, 1e7])
def test_float16_holds_what_is_below_65504(small_run: SmallRun, scale: float) -> None:
    at = "blocks.0.mlp.out"
    fault = {"id": "numerics.overflow_float16", "at": at, "scale": scale, "from_step": 4}
    diagnosis, _ = small_run(faults=[fault])
    if scale == 1:
        assert diagnosis.verdict == "healthy"  # 11 bits are enough
    else:
        best = diagnosis.causes[0]
        assert (best.id, best.at, best.since_step) == ("numerics.nonfinite", at, 4)


def test_a_site_that_is_not_there_is_refused(small_run: SmallRun) -> None:
    with pytest.raises(BadInput, match="no site matches"):
        small_run(faults=[{"id": "numerics.overflow_float16", "at": "nowhere"}])
