"""What happens at once when something is found in a loop that is watched: a call, a warning, a log record, an end."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Literal

from lab.catalogue import Plugin, plugin
from lab.errors import BadInput, FaultFound, nearest

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.diagnosis.model import Symptom

    OnFinding = Callable[[Symptom], None] | Literal["raise", "warn", "log"] | None

LOG = logging.getLogger("lab")


@plugin("findings", title="Keeps what is found, until the loop can be told")
class Findings(Plugin):
    """Tells each new symptom between two steps, where an error does no harm to what is being recorded.

    Args:
        on_finding: What to do with one; see `lab.watch`.

    Raises:
        BadInput: It is a word that means nothing.
    """

    def __init__(self, on_finding: OnFinding = None) -> None:
        known = {"raise": self._end, "warn": self._warn, "log": self._log}
        if isinstance(on_finding, str) and on_finding not in known:
            raise BadInput(f"on_finding = {on_finding!r}; a function, or one word{nearest(on_finding, known)}")
        self._tell = known[on_finding] if isinstance(on_finding, str) else on_finding
        self._ends = on_finding == "raise"
        self._new: list[Symptom] = []

    def lab_finding(self, symptom: Symptom) -> None:
        """Keep it."""
        self._new.append(symptom)

    def tell(self, *, over: bool = False) -> None:
        """Tell what is new; when the run is `over`, nothing is ended any more.

        Raises:
            FaultFound: Something is, and that is what was asked for.
        """
        new, self._new = self._new, []
        if self._tell is not None and not (over and self._ends):
            for symptom in new:
                self._tell(symptom)

    @staticmethod
    def _end(symptom: Symptom) -> None:
        raise FaultFound(f"{symptom.id}: {symptom.text}")

    @staticmethod
    def _warn(symptom: Symptom) -> None:
        warnings.warn(f"{symptom.id}: {symptom.text}", stacklevel=2)

    @staticmethod
    def _log(symptom: Symptom) -> None:
        LOG.warning("%s: %s", symptom.id, symptom.text)
