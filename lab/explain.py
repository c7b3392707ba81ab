"""Says in words where two runs part."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lab.stages import PARTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab.blame import Blame
    from lab.difference import Agreed, Difference
    from lab.points import Point
    from lab.stages import Part
    from lab.work import Amount, Work

FEW = 5  # places, of many
LARGE = 1e6  # what is as large is a hash, and says nothing to a reader


def explain(found: Difference) -> str:
    """Say it in a few sentences."""
    return " ".join(sentences(found))


def sentences(found: Difference) -> list[str]:
    """Say it in sentences: what is equal, what differs first, what that points to, and what was not compared."""
    said = [_agreement(found) if found.first is None else _parting(found, found.first)]
    if found.first is not None:
        said += [_reason(found, found.first), _inside(found, found.first)]
    else:
        said += _work(found.work)
    return [sentence for sentence in [*said, *_limits(found)] if sentence]


def headline(found: Difference) -> str:
    """Say it in one line."""
    if found.first is None:
        closest = max((agreed.closest for agreed in (*found.earlier, *found.before)), default=0.0)
        agree = f"agree {'to the last bit' if closest == 0 else _within(found, 'float noise')}"
        if not found.work.amounts:
            return f"they {agree}"
        return f"their numbers {agree}, their work differs at {found.work.where} from step {found.work.step} on"
    where = found.first.at and f" at {found.first.at}"
    return f"they part at step {found.first.step}{where}, in the {PARTS[found.first.part]}"


# ---------------------------------------------------------------- sentences


def _agreement(found: Difference) -> str:
    agreed = _joined([*found.earlier, *found.before])
    apart = [part for part in agreed if part.closest]
    told = f"All {found.count} numbers that both recorded, in {_steps(min(found.steps))}, "
    if not apart:
        return f"{told}are equal to the last bit."
    each = ", ".join(f"{_many(part.part)} to {part.closest:.1g} of {part.allowed:.1g}" for part in apart)
    return f"{told}agree {_within(found, 'what rounding explains')}, or are equal: {each}."


def _parting(found: Difference, first: Point) -> str:
    said = []
    if found.earlier:
        count = sum(agreed.count for agreed in found.earlier)
        said.append(f"All {count} numbers of the steps before step {first.step} {_closeness(found, found.earlier)}.")
    upstream = [agreed for agreed in found.before if agreed.part != first.part]
    equal = [agreed for agreed in upstream if not agreed.closest]
    close = [agreed for agreed in upstream if agreed.closest]
    told = [
        f"the {_list([_many(part.part) for part in mine])} {_closeness(found, mine)}" for mine in (equal, close) if mine
    ]
    if told:
        said.append(f"At step {first.step} {', and '.join(told)}.")
    said.append(f"The first difference is {_of(first)}, at step {first.step}: {_distance(found, first)}.")
    same = [agreed for agreed in found.before if agreed.part == first.part]
    if same and first.inside:
        said.append(f"Everything upstream of it there ({same[0].count} numbers) {_closeness(found, same, one=True)}.")
    return " ".join(said)


def _reason(found: Difference, first: Point) -> str:
    """Say what the first difference points to, beyond the place that it is at."""
    differ, count = found.beside
    if found.blame is not None:
        return _blamed(found.blame)
    if found.where in _REASONS and not (first.inside and found.where == first.at):
        return _REASONS[found.where].format(count=count)
    if first.part == "value" and found.where in (site.removesuffix(".out") for site in found.only[0] + found.only[1]):
        return f"Just upstream of it, one of the runs alone has {found.where}: look there."
    if found.where != "" and first.part == "experiment":
        return f"Experiments that looked inside found it in {found.where}."
    if found.after:
        told = f"It comes after {found.after}, which agrees: what makes them differ lies between the two."
        return f"{told} Of the {count} such numbers in this step {differ} differ."
    return f"Of the {count} such numbers in this step {differ} differ." if count > 1 else ""


def _blamed(blame: Blame) -> str:
    """Say what the loop did."""
    if blame.says:
        return f"In the {blame.why} run alone, {blame.says}."
    why = "unlike" if blame.why == "exchanged" and blame.number is None else blame.why
    return _BLAMED[why].format(factor=blame.number)


# What each part of a training loop has done where it is to blame, by its name in `lab.where`.
_REASONS = {
    "model": "Weights differ all over the model: they were drawn or loaded otherwise.",
    "random numbers": "One of the runs drew numbers that the other did not, or was seeded otherwise.",
    "loss": "What the model gave out agrees: look at the loss, and at what it is given beside.",
    "gradients": "Gradients differ all over the model, and all before them agrees: look at what is added to them.",
    "clipping": "The gradients agree until they are clipped.",
    "optimizer": "Weights differ all over the model after the update, and nothing that went into it does.",
}

# What a loop has done, by the name that `lab.blame` gives it.
_BLAMED = {
    "kept": "They are those of this step and of the step before together, in every weight: gradients were not cleared.",
    "gone": "One of the runs has none when the update comes: they were cleared after the backward pass, or it was not "
    "made.",
    "still": "In one of the runs no weight is changed by the update: it was not made.",
    "scaled": "Those of all weights in the first run are {factor:.6g} times those in the second.",
    "unscaled": "Those of all weights in the first run are {factor:.6g} times those in the second, as by a scale of "
    "the loss, and so they still were when they were clipped.",
    "exchanged": "The losses of all processes agree, and of the gradients that they exchange those of the first run "
    "are {factor:.6g} times those of the second.",
    "unlike": "The losses of all processes agree, and the gradients that they exchange do not.",
    "held": "In one of the runs the optimiser holds other tensors than the weights of the model.",
    "apart": "In another process they agree: what the processes should have alike was changed in some of them.",
}


def _inside(found: Difference, first: Point) -> str:
    """Say where a difference without a place is first seen inside the model."""
    place = found.place
    if first.inside:
        return ""
    if place is not None and place.step == first.step:
        return f"Inside the model it is first seen at {_of(place)}: {_distance(found, place)}."
    if first.step in found.compared:
        return "Inside the model nothing else differs in that step."
    seen = f"next recorded by both at step {place.step}, when weights had moved apart" if place else "recorded by both"
    no = "" if place else "not "
    return (
        f"Values inside were {no}{seen}: to see where at step {first.step}, record both with examinations in each step."
    )


def _work(work: Work) -> list[str]:
    """Say how the work of runs whose numbers agree compares."""
    if not work.amounts:
        alike = f"The work that was counted is the same as well, in {work.count} amounts."
        return [alike if work.count else "The work that they took was not counted by both."]
    here = [amount for amount in work.amounts if (amount.at or amount.about) == work.where]
    said = [f"Of {work.count} amounts of work the first to differ is at {work.where}, {_since(here[0])}:"]
    said[0] += f" {'; '.join(map(_amount, here))}."
    rest = work.amounts[len(here) :]
    whole = [amount for amount in rest if not amount.at]
    if whole:
        said.append(f"In all: {'; '.join(map(_amount, whole))}.")
    places = dict.fromkeys(amount.at for amount in rest if amount.at and not work.where.startswith(f"{amount.at}."))
    if places:
        said.append(f"So it is in {_list([*places][:FEW])}{f' and {len(places) - FEW} more' * (len(places) > FEW)}.")
    return said


def _since(amount: Amount) -> str:
    if amount.before is None:
        return f"at step {amount.step}, where it was counted first"
    return f"at step {amount.step} (at step {amount.before} it was the same)"


def _amount(amount: Amount) -> str:
    return f"{_count(amount.a)} and {_count(amount.b)} {amount.says}"


def _count(number: float) -> str:
    return f"{number:.0f}" if number == round(number) else f"{number:.2g}"


def _limits(found: Difference) -> list[str]:
    """Say what was not compared."""
    said = []
    a, b = found.steps
    if a != b:
        said.append(f"The first run has {_steps(a)}, the second {_steps(b)}; only those of both are compared.")
    if not found.compared:
        said.append("No value inside the model was recorded by both in the same step.")
    if found.coarser is not None:
        site, mine, others = found.coarser
        said.append(
            f"Rounding moves {site} by {mine:.1g} in the first run and by {others:.1g} in the second: they compute in "
            f"other formats from there on."
        )
    if found.lost is not None:
        said.append(
            f"From step {found.lost} on, rounding alone may have moved most numbers by half of themselves: what "
            f"differs from there on cannot be told from it."
        )
    if not found.measured and found.tolerance is None:
        said.append("How far rounding moves them was measured in neither run: 1e-05 counts as equal.")
    return said


# ---------------------------------------------------------------- words


def _of(point: Point) -> str:
    return f"{point.at}, in the {PARTS[point.part]}" if point.at else f"the {PARTS[point.part]}"


def _many(part: Part) -> str:
    """What a part is called where it has numbers of many places."""
    return f"{PARTS[part]}s" if part in ("value", "gradient") else PARTS[part]


def _distance(found: Difference, point: Point) -> str:
    if point.exact:
        small = max(abs(point.a), abs(point.b)) < LARGE
        return (
            f"{point.a:g} in the first run and {point.b:g} in the second" if small else "not the same in the two runs"
        )
    if math.isnan(point.a) != math.isnan(point.b):
        return f"there is none in the {'first' if math.isnan(point.a) else 'second'} run"
    both = f"{point.metric} {point.a:.6g} and {point.b:.6g}"
    explained = f"rounding explains {point.allowed:.1g}" if found.tolerance is None else f"{point.allowed:g} is allowed"
    allowed = f", where {explained}" if point.allowed else ""
    return both if math.isinf(point.relative) else f"{point.relative:.2g} relative{allowed} ({both})"


def _within(found: Difference, noise: str) -> str:
    return f"within {noise if found.tolerance is None else 'the tolerance'}"


def _closeness(found: Difference, agreed: Sequence[Agreed], *, one: bool = False) -> str:
    closest = max(part.closest for part in agreed)
    if not closest:
        return f"{'is' if one else 'are'} equal to the last bit"
    return f"{'agrees' if one else 'agree'} {_within(found, 'rounding')}, to {closest:.1g}"


def _joined(agreed: Sequence[Agreed]) -> list[Agreed]:
    """One for each part, over all steps."""
    parts: dict[Part, Agreed] = {}
    for each in agreed:
        known = parts.get(each.part)
        parts[each.part] = each if known is None else known.with_(each)
    return list(parts.values())


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
