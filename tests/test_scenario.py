"""Scenario files: what is read, what is refused, and how a refusal is worded."""

from __future__ import annotations

import copy
import json
import math
import operator
import tomllib
from typing import TYPE_CHECKING, Any

import pytest
import tomli_w
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lab.cli import status_of
from lab.errors import BadInput
from lab.projects import PROJECTS
from lab.scenario import Scenario, check_names, holds, load_scenario, make_faults, read_scenario
from lab.shelf import find_scenarios

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lab.catalogue import Catalogue

SHIPPED = find_scenarios()
# Every table and every key of a scenario file, each with a value that is right.
WHOLE: dict[str, Any] = {
    "title": "whole",
    "project": "attention",
    "about": "all keys",
    "seed": 1,
    "steps": 3,
    "probes": ["loss"],
    "model": {
        "layers": 1,
        "width": 16,
        "heads": 2,
        "kv_heads": 1,
        "context": 16,
        "tied": True,
        "mixer": "attention",
        "positions": "rope",
        "norm": "rms",
        "norm_at": "pre",
        "activation": "swiglu",
        "dropout": 0.1,
    },
    "data": {
        "source": "markov",
        "batch": 2,
        "order": 2,
        "vocabulary": 8,
        "tokenizer": "bpe",
        "merges": 3,
    },
    "train": {
        "lr": 1e-3,
        "warmup": 2,
        "weight_decay": 0.0,
        "clip": 0.5,
        "evaluate_every": 1,
        "objective": "sft",
        "start": "healthy-pretraining",
        "lora_rank": 2,
        "accumulate": 2,
        "quantize": ["int8-row"],
        "checkpoint_every": 2,
        "ranks": 2,
        "parallel": "tensor",
        "shard_optimizer": True,
    },
    "fault": [{"id": "mask.future_leak", "at": "blocks.0.attn", "from_step": 1, "offset": 2}],
    "check": [{"metric": "loss", "at": "", "is": "between 1 and 2", "on": "both", "take": "mean"}],
    "expect": {"verdict": "faulty", "cause": "mask.future_leak", "at": "blocks.0.attn", "by_step": 1},
    "learn": {"hints": ["look"]},
}
ANY_TEXT = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(folder: Path, document: dict[str, Any]) -> Path:
    path = folder / "s.toml"
    path.write_text(tomli_w.dumps(document), encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    """The line with which a file is refused."""
    with pytest.raises(BadInput) as caught:
        read_scenario(path)
    text = str(caught.value)
    assert len(text.splitlines()) == 1, text
    assert text.startswith(f"{path}: "), text
    return text.removeprefix(f"{path}: ")


def refused_or_read(path: Path) -> Scenario | None:
    """The scenario, or None where it was refused as every file should be: with BadInput, in one line."""
    try:
        scenario = read_scenario(path)
    except BadInput:
        refusal(path)
        return None
    assert isinstance(scenario, Scenario)
    return scenario


def changed(*place: str | int, value: Any) -> dict[str, Any]:
    """The whole document with one value changed."""
    document = copy.deepcopy(WHOLE)
    table: Any = document
    for part in place[:-1]:
        table = table[part]
    table[place[-1]] = value
    return document


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_scenario_is_read(name: str, catalogue: Catalogue) -> None:
    read_name, scenario = load_scenario(name)
    assert read_name == name
    assert scenario.title
    check_names(scenario, catalogue, name)
    faults = make_faults(scenario, catalogue, name)
    assert [fault.info.id for fault in faults] == [section.id for section in scenario.fault]
    if scenario.fault:
        assert scenario.expect.cause in {fault.info.cause for fault in faults}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_scenario_stands_in_the_folder_of_its_project(name: str) -> None:
    project = next(project for project in PROJECTS if project.id == SHIPPED[name].project)
    assert SHIPPED[name].path.parent.name == f"{project.number:02}-{project.id}"


def test_a_whole_document_is_read_as_it_was_written(tmp_path: Path) -> None:
    scenario = read_scenario(write(tmp_path, WHOLE))
    assert scenario.model_dump(by_alias=True) == WHOLE
    assert scenario.fault[0].parameters == {"at": "blocks.0.attn", "from_step": 1, "offset": 2}


def test_two_keys_are_enough(tmp_path: Path) -> None:
    scenario = read_scenario(write(tmp_path, {"title": "t", "project": "linear"}))
    assert scenario.expect.verdict == "healthy"
    assert scenario.probes is None


def test_a_scenario_is_found_by_id_or_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = next(iter(SHIPPED))
    assert load_scenario(name) == load_scenario(str(SHIPPED[name].path))
    write(tmp_path, WHOLE).rename("no-suffix")
    assert load_scenario("no-suffix")[1].title == "whole"
    with pytest.raises(BadInput, match=f"did you mean '{name}'"):
        load_scenario(f"{name}x")


# ---------------------------------------------------------------- conditions

FINITE = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def bounds_and_value(draw: st.DrawFn) -> tuple[float, float, float]:
    """Two bounds, and a value that is often one of them."""
    low, high = draw(FINITE), draw(FINITE)
    return low, high, draw(st.one_of(st.floats(), st.sampled_from([low, high])))


@given(bounds_and_value())
@example((1.0, 1.0, 1.0))
@example((0.0, 1.0, math.nan))
@example((-1.0, 1.0, -math.inf))
@example((1e300, 1e-300, math.inf))
def test_a_condition_means_what_python_means(numbers: tuple[float, float, float]) -> None:
    low, high, value = numbers
    assert holds(f"above {low!r}", value) == (value > low)
    assert holds(f"below {low!r}", value) == (value < low)
    assert holds(f"between {low!r} and {high!r}", value) == (low <= value <= high)
    assert holds("finite", value) == math.isfinite(value)
    assert holds("not finite", value) == (not math.isfinite(value))


@pytest.mark.parametrize("number", ["3", "+3", "-3", "3.", ".5", "3.5", "1e-6", "1E+6", "-.5e3"])
def test_a_number_is_written_as_in_python(number: str) -> None:
    assert holds(f"between {number} and {number}", float(number))
    assert not holds(f"above {number}", float(number))
    assert holds(f"above {number}", float(number) + 1)


NO_CONDITIONS = """
|above|above x|above 1 | above 1|above  1|Above 1|above nan|above inf|> 1|between 1 and|between 1 2|above 1 and 2
infinite|notfinite|finite 1|above 1e|above 0x10|above 1_000
"""


@pytest.mark.parametrize("condition", [*NO_CONDITIONS.strip("\n").replace("\n", "|").split("|"), "above 1\n"])
def test_anything_else_is_no_condition(tmp_path: Path, condition: str) -> None:
    with pytest.raises(ValueError, match="write 'above X'"):
        holds(condition, 1.0)
    line = refusal(write(tmp_path, changed("check", 0, "is", value=condition)))
    assert line.startswith(f"check[0].is: found {condition!r}; write 'above X'")


# ---------------------------------------------------------------- what is refused

TABLES: dict[str, list[str | int]] = {
    "": [],
    "model": ["model"],
    "data": ["data"],
    "train": ["train"],
    "check[0]": ["check", 0],
    "expect": ["expect"],
    "learn": ["learn"],
}
PLACES: list[list[str | int]] = [*TABLES.values(), ["fault", 0]]


def table_at(document: dict[str, Any], place: list[str | int]) -> dict[str, Any]:
    table: Any = document
    for part in place:
        table = table[part]
    assert isinstance(table, dict)
    return table


@pytest.mark.parametrize("name", TABLES)
def test_a_misspelt_key_is_refused_with_the_one_that_was_meant(tmp_path: Path, name: str) -> None:
    for key in table_at(WHOLE, TABLES[name]):
        document = copy.deepcopy(WHOLE)
        table = table_at(document, TABLES[name])
        table[f"{key}x"] = table[key]
        wrong = f"{name}.{key}x" if name else f"{key}x"
        assert refusal(write(tmp_path, document)) == f"unknown key {wrong!r}; did you mean {key!r}?"


def test_a_misspelt_parameter_is_refused_with_the_one_that_was_meant(catalogue: Catalogue) -> None:
    scenario = Scenario.model_validate(changed("fault", 0, "ofset", value=3))
    with pytest.raises(BadInput) as caught:
        make_faults(scenario, catalogue, "s.toml")
    assert str(caught.value) == "s.toml: fault[0]: mask.future_leak has no parameter 'ofset'; did you mean 'offset'?"


@pytest.mark.parametrize(
    ("place", "value", "line"),
    [
        (["title"], 3, "title: found 3; input should be a valid string"),
        (["project"], "atention", "project: found 'atention', which is no project; did you mean 'attention'?"),
        (["seed"], -1, "seed: found -1; input should be greater than or equal to 0"),
        (["seed"], 2**31, "seed: found 2147483648; input should be less than 2147483648"),
        (["steps"], 0, "steps: found 0; input should be greater than or equal to 1"),
        (["steps"], "3", "steps: found '3'; input should be a valid integer"),
        (["steps"], 3.0, "steps: found 3.0; input should be a valid integer"),
        (["steps"], True, "steps: found True; input should be a valid integer"),
        (["probes"], "loss", "probes: found 'loss'; input should be a valid list"),
        (["probes"], ["loss", 3], "probes[1]: found 3; input should be a valid string"),
        (["model"], 3, "model: found 3; it should be a table"),
        (["model", "layers"], -1, "model.layers: found -1; input should be greater than or equal to 0"),
        (
            ["model", "mixer"],
            "lstn",
            "model.mixer: found 'lstn'; input should be 'attention', 'convolution', 'rnn', 'gru',",
        ),
        (["model", "width"], 10**30, f"model.width: found {10**30}; input should be less than or equal to 1000000"),
        (["model", "tied"], 1, "model.tied: found 1; input should be a valid boolean"),
        (["data", "order"], 5, "data.order: found 5; input should be less than or equal to 4"),
        (["data", "vocabulary"], 1, "data.vocabulary: found 1; input should be greater than or equal to 2"),
        (["train", "lr"], math.nan, "train.lr: found nan; input should be a finite number"),
        (["train", "lr"], math.inf, "train.lr: found inf; input should be a finite number"),
        (["train", "lr"], "1e-3", "train.lr: found '1e-3'; input should be a valid number"),
        (["train", "clip"], 0, "train.clip: found 0; input should be greater than 0"),
        (["train", "evaluate_every"], -1, "train.evaluate_every: found -1; input should be greater than or equal to 0"),
        (["fault"], {"id": "x"}, "fault: found {'id': 'x'}; input should be a valid list"),
        (["fault", 0, "id"], 3, "fault[0].id: found 3; input should be a valid string"),
        (["check", 0, "on"], "brokn", "check[0].on: found 'brokn'; input should be 'broken', 'healthy' or 'both'"),
        (["expect", "by_step"], 0.5, "expect.by_step: found 0.5; input should be a valid integer"),
        (["expect", "verdict"], "good", "expect.verdict: found 'good'; input should be 'healthy', 'faulty' or"),
        (["learn", "hints"], ["a", 2], "learn.hints[1]: found 2; input should be a valid string"),
    ],
)
def test_a_line_says_the_key_what_was_found_and_what_would_be_right(
    tmp_path: Path, place: list[str | int], value: object, line: str
) -> None:
    assert refusal(write(tmp_path, changed(*place, value=value))).startswith(line)


@pytest.mark.parametrize("key", ["title", "project"])
def test_what_is_required_is_named(tmp_path: Path, key: str) -> None:
    document = {name: value for name, value in WHOLE.items() if name != key}
    assert refusal(write(tmp_path, document)) == f"{key}: missing; it is required"


def test_a_long_value_is_shown_in_part(tmp_path: Path) -> None:
    line = refusal(write(tmp_path, changed("seed", value="x" * 10_000)))
    assert len(line) < 200
    assert "xxx..." in line


START = 'title = "t"\nproject = "linear"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("title = = 3", "not valid TOML: Invalid value (at line 1"),
        (START + START, "not valid TOML: Cannot overwrite a value (at line 3"),
        (START + "seed = " + "9" * 5000, "not valid TOML: Exceeds the limit (4300 digits)"),
        (START + "seed = 0x" + "f" * 5000, "seed: found a int too large to show; input should be less than"),
        ("title" + ".a" * 5000 + " = 3\n" + START.splitlines()[1], "title: found "),
        (START + "[[fault]]\nid" + ".a" * 5000 + " = 3\n", "fault[0].id: found "),
        ("title = " + "[" * 5000 + "]" * 5000, "not valid TOML"),
        ("\ufeff" + START, "not valid TOML: Invalid statement (at line 1"),
        ('"a\\nb" = 1\n' + START, "unknown key 'a\\nb'"),
        ("", "title: missing; it is required"),
        ("\0", "not valid TOML"),
    ],
    ids=lambda text: text[:20],
)
def test_strange_files_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "s.toml"
    path.write_text(text, encoding="utf-8")
    assert refusal(path).startswith(words)


# ---------------------------------------------------------------- the schema


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    written: dict[str, Any] = json.loads(json.dumps(Scenario.model_json_schema(by_alias=True)))
    return written


TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
LIMITS: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": operator.ge,
    "maximum": operator.le,
    "exclusiveMinimum": operator.gt,
    "exclusiveMaximum": operator.lt,
}
UNDERSTOOD = {"$defs", "title", "description", "default", "type", "properties", "required", "additionalProperties"}
UNDERSTOOD |= {"items", "anyOf", "enum", "$ref", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}


def complaints(rule: dict[str, Any], value: Any, whole: dict[str, Any]) -> list[str]:
    """What a JSON Schema says against a value, as an editor would: as much of the standard as pydantic uses here."""
    assert rule.keys() <= UNDERSTOOD, rule.keys() - UNDERSTOOD
    found = []
    if "$ref" in rule:
        found += complaints(whole["$defs"][rule["$ref"].removeprefix("#/$defs/")], value, whole)
    if "anyOf" in rule and all(complaints(choice, value, whole) for choice in rule["anyOf"]):
        found.append(f"{value!r} is none of {rule['anyOf']}")
    if "enum" in rule and value not in rule["enum"]:
        found.append(f"{value!r} is not in {rule['enum']}")
    if "type" in rule and not _is_a(rule["type"], value):
        return [*found, f"{value!r} is no {rule['type']}"]
    found += [
        f"{value!r}: {name} {rule[name]}" for name in LIMITS if name in rule and not LIMITS[name](value, rule[name])
    ]
    if isinstance(value, list):
        found += [text for part in value for text in complaints(rule.get("items", {}), part, whole)]
    if isinstance(value, dict):
        found += _complaints_of_a_table(rule, value, whole)
    return found


def _is_a(type_: str, value: object) -> bool:
    return isinstance(value, TYPES[type_]) and not (isinstance(value, bool) and type_ in ("integer", "number"))


def _complaints_of_a_table(rule: dict[str, Any], table: dict[str, Any], whole: dict[str, Any]) -> list[str]:
    found = [f"{key} is missing" for key in rule.get("required", []) if key not in table]
    known = rule.get("properties", {})
    if rule.get("additionalProperties") is False:
        found += [f"{key} is unknown" for key in table.keys() - known.keys()]
    return found + [text for key in table.keys() & known.keys() for text in complaints(known[key], table[key], whole)]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_schema_accepts_every_shipped_scenario(schema: dict[str, Any], name: str) -> None:
    document = tomllib.loads(SHIPPED[name].path.read_text(encoding="utf-8"))
    assert complaints(schema, document, schema) == []


def test_the_schema_knows_every_key_and_asks_for_two(schema: dict[str, Any]) -> None:
    assert complaints(schema, WHOLE, schema) == []
    assert schema["type"] == "object"
    assert schema["required"] == ["title", "project"]
    assert set(schema["properties"]) == set(WHOLE)
    tables = {"ModelSection": "model", "DataSection": "data", "TrainSection": "train", "ExpectSection": "expect"}
    for section, key in tables.items():
        assert set(schema["$defs"][section]["properties"]) == set(WHOLE[key])
    assert set(schema["$defs"]["CheckSection"]["properties"]) == set(WHOLE["check"][0])


def test_lab_show_prints_the_schema(capsys: pytest.CaptureFixture[str], schema: dict[str, Any]) -> None:
    assert status_of(["show", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema


# ---------------------------------------------------------------- whatever is thrown at it

WORDS = st.sampled_from(["title", "project", "seed", "model", "fault", "id", "check", "is", '"a b"', "''", "x.y", "é"])
RIGHT = st.sampled_from(['"linear"', "3", "0x1F", "1e5", "nan", "-inf", "true", "[1, 2]", "{a = 1}", "1979-05-27"])
WRONG = st.sampled_from(
    ["", "=", "[", "]", "{", '"', "'''", "\\", "#", "\r", "\0", "1_", "0o9", '"\\ud800"', "[]]", "\u2028"]
)
LINE = st.one_of(
    st.tuples(WORDS, RIGHT).map(" = ".join),
    WORDS.map("[{}]".format),
    WORDS.map("[[{}]]".format),
    st.tuples(WORDS, WRONG).map(" = ".join),
    st.lists(st.one_of(WORDS, RIGHT, WRONG), max_size=4).map("".join),
)


@ANY_TEXT
@given(st.lists(LINE, max_size=8).map("\n".join))
def test_what_looks_like_toml_is_read_or_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "s.toml"
    path.write_bytes((START + text).encode())
    refused_or_read(path)


@ANY_TEXT
@given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(lambda text: text.encode("utf-16"))))
def test_bytes_are_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "s.toml"
    path.write_bytes(data)
    refusal(path)


VALUES = st.recursive(
    st.one_of(
        st.integers(),
        st.integers(0, 20),
        st.floats(),
        st.booleans(),
        st.text(max_size=8),
        st.sampled_from(["healthy", "broken", "linear", "above 1", "markov"]),
        st.dates(),
        st.datetimes(),
        st.times(),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """The whole document with some values replaced, some keys dropped, and some added."""
    document = copy.deepcopy(WHOLE)
    for _ in range(draw(st.integers(1, 3))):
        places = [place for place in PLACES if _is_there(document, place)]
        table = table_at(document, draw(st.sampled_from(places)))
        key = draw(st.sampled_from(sorted(table)) if table else st.text(max_size=5))
        act = draw(st.sampled_from(["replace", "drop", "add"]))
        if act == "drop":
            table.pop(key, None)
        else:
            table[key if act == "replace" else draw(st.text(max_size=5))] = draw(VALUES)
    return document


def _is_there(document: dict[str, Any], place: list[str | int]) -> bool:
    try:
        table_at(document, place)
    except (KeyError, IndexError, TypeError, AssertionError):
        return False
    return True


@ANY_TEXT
@given(documents())
def test_a_wrong_document_is_refused_in_one_line_and_the_schema_agrees(
    tmp_path: Path, schema: dict[str, Any], document: dict[str, Any]
) -> None:
    scenario = refused_or_read(write(tmp_path, document))
    against = complaints(schema, document, schema)
    if scenario is not None:
        assert against == []  # an editor must not mark what the lab takes
        assert scenario.model_fields_set == document.keys()
    elif not against:
        line = refusal(tmp_path / "s.toml")  # only three things are beyond a schema
        assert line.startswith(("project: ", "check[0].is: ")) or "finite" in line, line
