"""Scenario files: read, validated, explained when wrong. A file is data: reading one runs nothing.

The models of this file are the schema; ``lab show --schema`` prints it for editors.
"""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from lab.catalogue import naming, parameters
from lab.errors import BadInput, nearest, shown
from lab.projects import PROJECTS
from lab.shelf import scenario_files

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydantic_core import ErrorDetails

    from lab.catalogue import Catalogue, Fault

SOURCES = ("markov", "arithmetic", "python-docs")
Amount = Annotated[int, Field(ge=1, le=1_000_000)]
# The names that lab.projects.residuals.component and activations know: a file is read without torch.
Mixer = Literal["attention", "convolution", "rnn", "gru", "lstm", "none"]
Positions = Literal["learned", "sinusoidal", "rope", "alibi", "none"]
Norm = Literal["layer", "rms"]
NormPlace = Literal["pre", "post"]
Tokenizer = Literal["characters", "bytes", "bpe"]
Parallel = Literal["data", "tensor"]
Scheme = Literal["int8-tensor", "int8-row", "int4-tensor", "int4-row", "int4-group32"]
Objective = Literal["next-token", "masked", "seq2seq", "sft", "dpo"]
Activation = Literal["gelu", "relu", "gelu-tanh", "silu", "sigmoid", "swiglu"]


class Section(BaseModel):
    """A table of a scenario file. Unknown keys are refused, and values of another type: ``true`` is no 1."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """The model."""

    layers: Annotated[int, Field(ge=0, le=1_000, description="0 leaves embedding and head: each token by itself")] = 2
    width: Amount = 64
    heads: Amount = 4
    kv_heads: Annotated[Amount | None, Field(description="heads of keys and values, as many as heads if left out")] = (
        None
    )
    context: Amount = 64
    tied: Annotated[bool, Field(description="whether the head uses the table of the embedding")] = False
    mixer: Annotated[Mixer, Field(description="what lets positions meet")] = "attention"
    positions: Annotated[Positions, Field(description="what tells positions from each other")] = "learned"
    norm: Annotated[Norm, Field(description="layer normalisation, or by the root mean square")] = "layer"
    norm_at: Annotated[NormPlace, Field(description="before each branch, or on the stream after it")] = "pre"
    activation: Annotated[Activation, Field(description="of the feed-forward layer")] = "gelu"
    dropout: Annotated[float, Field(ge=0, lt=1, description="share of each branch's output left out in training")] = 0.0


class DataSection(Section):
    """The data: one of the lab's own sources, or a text file or folder."""

    source: str = "python-docs"
    batch: Amount = 16
    order: Annotated[int, Field(ge=1, le=4)] = 1
    vocabulary: Annotated[int, Field(ge=2, le=4096, description="of the Markov source")] = 16
    tokenizer: Annotated[Tokenizer, Field(description="of text: a token a character, a byte, or learned merges")] = (
        "characters"
    )
    merges: Annotated[int, Field(ge=0, le=65_536, description="of bpe; 256 + merges tokens")] = 256


class TrainSection(Section):
    """The optimiser and its schedule."""

    lr: Annotated[float, Field(ge=0, le=1e6)] = 3e-3
    warmup: Annotated[int, Field(ge=0, le=10_000_000)] = 10
    weight_decay: Annotated[float, Field(ge=0, le=1e6)] = 0.1
    clip: Annotated[float, Field(gt=0)] = 1.0
    evaluate_every: Annotated[int, Field(ge=0, description="0 evaluates only at the end")] = 0
    objective: Annotated[Objective, Field(description="what is learned: the next token, hidden ones, answers, ...")] = (
        "next-token"
    )
    start: Annotated[str, Field(description="the healthy scenario whose trained model this starts from")] = ""
    lora_rank: Annotated[int, Field(ge=0, le=4096, description="0 trains every weight")] = 0
    accumulate: Annotated[int, Field(ge=1, le=4096, description="parts in which a batch passes the model")] = 1
    quantize: Annotated[list[Scheme], Field(description="schemes in which the trained model is evaluated too")] = []
    checkpoint_every: Annotated[int, Field(ge=0, description="steps; 0 keeps none")] = 0
    ranks: Annotated[int, Field(ge=1, le=64, description="processes that train together")] = 1
    parallel: Annotated[Parallel, Field(description="what the processes share out: rows of a batch, or weights")] = (
        "data"
    )
    shard_optimizer: Annotated[bool, Field(description="each process keeps its share of the optimiser's state")] = False


class FaultSection(BaseModel):
    """A fault: its id, and its parameters beside it (checked against the fault itself)."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow", frozen=True, strict=True)

    id: str

    @property
    def parameters(self) -> dict[str, Any]:
        """All keys but the id."""
        return dict(self.model_extra or {})


NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
CONDITIONS = {
    "above": re.compile(rf"above ({NUMBER})"),
    "below": re.compile(rf"below ({NUMBER})"),
    "between": re.compile(rf"between ({NUMBER}) and ({NUMBER})"),
    "finite": re.compile(r"finite"),
    "not finite": re.compile(r"not finite"),
}


def _condition(text: str) -> str:
    if not any(form.fullmatch(text) for form in CONDITIONS.values()):
        raise ValueError(f"found {text!r}; write 'above X', 'below X', 'between X and Y', 'finite' or 'not finite'")
    return text


def holds(condition: str, value: float) -> bool:
    """Whether a value meets a condition such as ``above 1e-6``. NaN is neither above nor below anything."""
    _condition(condition)
    word, *rest = condition.split()
    numbers = [float(part) for part in rest if part not in ("and", "finite")]
    if word == "above":
        return value > numbers[0]
    if word == "below":
        return value < numbers[0]
    if word == "between":
        return numbers[0] <= value <= numbers[1]
    return math.isfinite(value) == (word == "finite")


Take = Literal["last", "first", "max", "min", "mean"]


class CheckSection(Section):
    """A metric to check. On ``broken``, the healthy twin must show the opposite; and the other way round."""

    metric: str
    at: str = ""
    is_: Annotated[str, AfterValidator(_condition)] = Field(alias="is")
    on: Literal["broken", "healthy", "both"] = "broken"
    take: Take = "last"


class ExpectSection(Section):
    """What the diagnosis should say. Only tests and scores read this; the diagnosis never does."""

    verdict: Literal["healthy", "faulty", "inconclusive"] = "faulty"
    cause: str = ""
    at: str = ""
    by_step: int | None = None


class LearnSection(Section):
    """Help for a learner, one hint at a time."""

    hints: list[str] = []


class Scenario(Section):
    """A project, the faults to diagnose in it, and the metrics to check."""

    title: str
    project: str
    about: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    steps: Annotated[int, Field(ge=1, le=10_000_000)] = 120
    probes: list[str] | None = None
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    fault: list[FaultSection] = []
    check: list[CheckSection] = []
    expect: ExpectSection = ExpectSection(verdict="healthy")
    learn: LearnSection = LearnSection()

    @property
    def task(self) -> tuple[object, ...]:
        """What is to be learned: losses of scenarios that differ in it cannot be compared."""
        data = self.data
        return self.train.objective, data.source, data.order, data.vocabulary, data.tokenizer, data.merges

    @field_validator("project")
    @classmethod
    def _known_project(cls, value: str) -> str:
        known = [project.id for project in PROJECTS]
        if value not in known:
            raise ValueError(f"found {value!r}, which is no project{nearest(value, known)}")
        return value


def load_scenario(name: str) -> tuple[str, Scenario]:
    """Return the id and the scenario, from an id or the path of a file.

    Raises:
        BadInput: There is none of that name, or the file is wrong; the text names the file, the key, what was
            found and what would be right.
    """
    path = Path(name)
    if name.endswith(".toml") or path.is_file():
        return path.stem, read_scenario(path)
    known = scenario_files()
    if name not in known:
        raise BadInput(f"no scenario {name!r}{nearest(name, known)}; a path to a .toml file works as well")
    return name, read_scenario(known[name])


def read_scenario(path: Path) -> Scenario:
    """Read and validate one file; see `load_scenario`."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not UTF-8 text; a scenario is a TOML file") from None
    except (ValueError, RecursionError) as error:  # more than TOMLDecodeError: an integer of 5000 digits
        raise BadInput(f"{path}: not valid TOML: {error}") from None
    try:
        return Scenario.model_validate(raw)
    except ValidationError as error:
        raise BadInput(f"{path}: {explain(error, Scenario)}") from None


def explain(error: ValidationError, model: type[BaseModel] | None) -> str:
    """Say the first thing that is wrong in one line: the key, what was found, what would be right."""
    first = error.errors(include_url=False)[0]
    key = _dotted(first["loc"])
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {key!r}{nearest(str(first['loc'][-1]), _keys(model, first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"{key}: missing; it is required"
    return f"{key}: {_reason(first)}"


def _reason(detail: ErrorDetails) -> str:
    message = detail["msg"].removeprefix("Value error, ")
    if message.startswith("found") or not detail["loc"]:
        return message
    if detail["type"] == "model_type":
        message = "it should be a table"
    return f"found {shown(detail['input'])}; {message[:1].lower()}{message[1:]}"


def _dotted(loc: Iterable[int | str]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def _keys(model: type[BaseModel] | None, loc: Iterable[int | str]) -> list[str]:
    """Return the keys that are known at a place in the file."""
    for part in loc:
        if model is None or isinstance(part, int):
            continue
        field = next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        kind: Any = field.annotation if field else None
        kind = next((k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel)), None)
        model = kind
    return [f.alias or n for n, f in model.model_fields.items()] if model else []


def make_faults(scenario: Scenario, catalogue: Catalogue, where: str) -> list[Fault]:
    """Build the faults of a scenario, their parameters checked against their types and bounds.

    Raises:
        BadInput: An id or a parameter is unknown, or a value is out of bounds.
    """
    return [make_fault(section, catalogue, f"{where}: fault[{i}]") for i, section in enumerate(scenario.fault)]


def make_fault(section: FaultSection, catalogue: Catalogue, where: str) -> Fault:
    """Build one fault; see `make_faults`."""
    if section.id not in catalogue.faults:
        raise BadInput(f"{where}.id: found {section.id!r}, which is no fault{nearest(section.id, catalogue.faults)}")
    cls = catalogue.faults[section.id]
    known = parameters(cls)
    for name in section.parameters:
        if name not in known:
            raise BadInput(f"{where}: {section.id} has no parameter {name!r}{nearest(name, known)}")
        value = section.parameters[name]
        if isinstance(value, bool) and not isinstance(known[name].default, bool):
            raise BadInput(f"{where}.{name}: found {value}; it is no yes or no")
    with naming(cls):
        try:
            return TypeAdapter(cls).validate_python(section.parameters)
        except ValidationError as error:
            key = "." if error.errors()[0]["loc"] else ""
            raise BadInput(f"{where}{key}{explain(error, None)}") from None


def check_names(scenario: Scenario, catalogue: Catalogue, where: str) -> None:
    """Check that the probes and the cause that a scenario names exist.

    Raises:
        BadInput: One does not.
    """
    for name in scenario.probes or ():
        if name not in catalogue.probes:
            raise BadInput(f"{where}: probes: found {name!r}, which is no probe{nearest(name, catalogue.probes)}")
    cause = scenario.expect.cause
    if cause and cause not in catalogue.causes:
        raise BadInput(f"{where}: expect.cause: found {cause!r}, which is no cause{nearest(cause, catalogue.causes)}")
