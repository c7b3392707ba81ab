"""What every watched training shares, the lab's own and anybody else's: recording, examining, judging.

Whoever trains calls `start`, then `before_update` and `end_step` for each step, then `finish`.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import numpy as np

from lab.diagnosis.diagnose import diagnose, judge
from lab.files import DIAGNOSIS, FINDINGS, METRICS, plain
from lab.sandbox import sandbox
from lab.store import DECLINED, FACT, SET_ASIDE, STAGE, TRACEBACK, Store, read_history

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.catalogue import Catalogue
    from lab.context import Run, Step
    from lab.diagnosis.model import Diagnosis, Symptom
    from lab.store import History, Row


WHOLE = 10_000  # steps of which every one is kept; of later ones fewer and fewer
SOON = 3  # steps that are judged whether they are examined or not: what is wrong from the start is told at once


def _thinned(index: int) -> int:
    """Of how many steps one is kept, so far into a run: 1 until `WHOLE`, 2 until twice that, then 4, and so on."""
    return 1 << (index // WHOLE).bit_length()


class Session:
    """Watches one run.

    Args:
        run: With its model, optimiser and sites attached.
        catalogue: The rules and causes to judge by.
        examine_every: The cadence of experiments, in steps. It becomes half of the run so far, once that is more, up
            to ten times as much. A new symptom, or a suspicion, calls for one more at the next step. Experiments that
            are made seldom belong to the first two of these steps, to the last step, to those that a suspicion calls
            for, and else to each of which the number is three times that of the one before, or 40 times the cadence
            away. From step 10,000 on both are twice as far apart, from 20,000 on four times, and so on: what is kept of
            a run of any length has to fit on a disk and in memory.
        agree: Whether any process of several wants to look again. An experiment calls the model, and the processes
            may have to call it together.
        others: Reads what other processes of the same training have shown, when this one has ended; it may wait for
            them where it is told that this one ended well.
    """

    def __init__(
        self,
        run: Run,
        catalogue: Catalogue,
        *,
        examine_every: int = 10,
        agree: Callable[[bool], bool] = bool,
        others: Callable[[bool], dict[str, History]] = lambda _: {},
    ) -> None:
        self.run = run
        self.catalogue = catalogue
        self.examine_every = examine_every
        self.agree, self.others = agree, others
        self.store = Store(run.folder / METRICS)
        self._known: set[tuple[str, str]] = set()
        self._look_again = False
        self._next = self._next_thorough = 0  # the steps that are examined next, whatever is found before
        self._loss_was_finite = True
        self._reasons: dict[str, str] = {}

    def fact(self, name: str, text: str) -> None:
        """Keep something that is known of the run once and for all."""
        self.run.history.facts[name] = text
        self.store.remark(FACT, name, text)

    def start(self) -> None:
        """Everything is built: let the plugins attach."""
        if self.run.steps is not None:
            self.fact("steps", str(self.run.steps))
        for plugin in self.run.plugins.get_plugins():
            info = getattr(plugin, "info", None)
            for metric, stage in getattr(info, "stages", {}).items():
                self.run.history.stages[metric] = stage
                self.store.remark(STAGE, metric, stage.text)
        self.run.plugins.event("lab_start", self.run)
        self.store.commit()

    def begin_step(self, step: Step) -> None:
        """Make a step the current one, and decide whether it is examined."""
        every, index = self.examine_every, step.index
        now = self._look_again or index + 1 == self.run.steps
        step.examined = now or index >= self._next
        step.thorough = now or (step.examined and index >= self._next_thorough)
        if index >= self._next:
            self._next = index + max(every, min(index // 2, 10 * every * _thinned(index)))
        if step.examined and index >= self._next_thorough:
            self._next_thorough = index + max(every, min(2 * index, 40 * every * _thinned(index)))
        self.run.step = step

    def before_update(self, step: Step) -> None:
        """Gradients are final, weights are old."""
        self.run.plugins.event("lab_before_update", self.run, step=step)

    def end_step(self, step: Step) -> None:
        """Weights are new: examine if due, move what was recorded to the host, judge if due."""
        self.run.plugins.event("lab_step_end", self.run, step=step)
        if step.examined:
            self._examine(step)
        row = self._flush(step)
        self._look_again = False
        if self._loss_broke(row) or step.examined or step.index < SOON:
            self._look_again = self._judge(step)
        self._look_again = self.agree(self._look_again)
        # Nothing of this step may outlive it: its graph would hold the activations.
        step.logits = step.loss = None

    def finish(self, *, ended: bool = True) -> Diagnosis:
        """Take a last look, diagnose, and tell everyone."""
        run = self.run
        if ended and run.history.last_step < 0:
            self._flush(run.step)  # what was noted although no step ever ended
            self.fact("unseen", "no update was made")
        elif ended:
            self._flush(run.step)  # what was recorded after the last step, as by generation
            if not run.step.examined or self._look_again:
                run.step.thorough = True
                self._examine(run.step)
                self._flush(run.step)
                if self.agree(self._judge(run.step)):
                    self._examine(run.step)
                    self._flush(run.step)
            self.fact("ended", f"after step {run.step.index}")
        self._note_reasons()
        self.store.write_order(run.sites.order)
        self.store.commit()  # before there is a diagnosis: who waits for that one reads this
        run.history.others = self.others(ended)
        diagnosis = diagnose(run.history, self.catalogue)
        self._tell(diagnosis.symptoms, run.step)
        text = json.dumps(plain(diagnosis.to_dict()), indent=2, allow_nan=False)
        (run.folder / DIAGNOSIS).write_text(text + "\n", encoding="utf-8")
        run.plugins.event("lab_end", run, diagnosis=diagnosis)
        return diagnosis

    def state(self) -> dict[str, int]:
        """What the next step depends on, for a checkpoint."""
        about: dict[str, int] = {"look_again": self._look_again, "loss_was_finite": self._loss_was_finite}
        return {**about, "next": self._next, "next_thorough": self._next_thorough}

    def resume(self, step: int, state: dict[str, int]) -> None:
        """Go on from a checkpoint before `step`: what was recorded later is forgotten, and will be recorded again."""
        self.store.rewind(step)
        self.run.history = read_history(self.store.path)
        self._look_again = bool(state.get("look_again", False))
        self._loss_was_finite = bool(state.get("loss_was_finite", True))
        self._next, self._next_thorough = state.get("next", 0), state.get("next_thorough", 0)
        findings = self.run.folder / FINDINGS
        lines = findings.read_text(encoding="utf-8").splitlines(keepends=True) if findings.is_file() else []
        kept = [line for line in lines if json.loads(line)["step"] < step]
        findings.write_text("".join(kept), encoding="utf-8")
        self._known = {(found["id"], found["at"]) for found in map(json.loads, kept)}

    def close(self) -> None:
        """Take everything off the model, undo the faults, and close the store."""
        try:
            self.run.sites.detach()
            self.run.cleanup.close()
        finally:
            self.store.close()

    def _examine(self, step: Step) -> None:
        asked = self.run.hook.lab_examine.get_hookimpls()  # with nothing to ask, the model need not be copied
        if step.batch is not None and asked:
            with sandbox(self.run.model, self.run.sites):
                self.run.plugins.examine(self.run, step)

    def _flush(self, step: Step) -> Row:
        row, artifacts = step.flush()
        run = self.run
        if len(row) and self._is_kept(step, row):
            run.history.add(step.index, row)
            self.store.write(step.index, row)
        if step.index == 0 or step.examined:
            run.history.order = run.sites.order
            self.store.write_order(run.sites.order)
        run.plugins.event("lab_metrics", run, step=step, metrics=row)
        for artifact in artifacts:
            run.plugins.event("lab_artifact", run, step=step, artifact=artifact)
        return row

    @staticmethod
    def _is_kept(step: Step, row: Row) -> bool:
        """Whether a step is kept, so that a run of any length fits on a disk and in memory.

        All of the first 10,000 are, then every second until 20,000, every fourth until 40,000, and so on; and each that
        is examined, or in which something is not finite. A plugin is given all of them.
        """
        return step.examined or step.index % _thinned(step.index) == 0 or not np.isfinite(row.values).all()

    def _loss_broke(self, row: Row) -> bool:
        """Whether the loss was finite until now and is not any more: a reason to judge at once."""
        if not self._loss_was_finite:
            return False
        where = [i for i, column in enumerate(row.columns) if column == ("loss", "")]
        self._loss_was_finite = all(math.isfinite(row.values[i]) for i in where)
        return not self._loss_was_finite

    def _judge(self, step: Step) -> bool:
        """Apply the rules to what is known, and tell what is new; whether the next step should be examined too."""
        self._note_reasons()
        found = judge(self.run.history, self.catalogue)
        new = self._tell(found.symptoms, step)
        self.store.commit()
        return bool(new or found.suspects)

    def _tell(self, symptoms: tuple[Symptom, ...] | list[Symptom], step: Step) -> list[Symptom]:
        new = [s for s in symptoms if (s.id, s.at) not in self._known]
        self._known |= {(s.id, s.at) for s in new}
        if new:
            with (self.run.folder / FINDINGS).open("a", encoding="utf-8") as file:
                for symptom in new:
                    file.write(json.dumps(plain({"step": step.index, **symptom.to_dict()}), allow_nan=False) + "\n")
        for symptom in new:
            self.run.plugins.event("lab_finding", self.run, step=step, symptom=symptom)
        return new

    def _note_reasons(self) -> None:
        """Keep why a probe was set aside or could not judge, in the history and in the store."""
        plugins, history = self.run.plugins, self.run.history
        reasons = {**plugins.declined, **plugins.reasons}
        if reasons == self._reasons:
            return
        for name in self._reasons.keys() - reasons.keys():
            self.store.forget(DECLINED, name)
        for name, text in reasons.items():
            self.store.remark(SET_ASIDE if name in plugins.reasons else DECLINED, name, text)
        for name, text in plugins.set_aside.items():
            self.store.remark(TRACEBACK, name, text)
        for name, kind in (("set_aside", plugins.reasons.keys() - plugins.tools), ("tools_set_aside", plugins.tools)):
            if kind:
                self.fact(name, ", ".join(sorted(kind)))
        self._reasons = reasons
        history.reasons = dict(reasons)
