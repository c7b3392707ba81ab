"""Whatever a person gives that cannot be used is told in one line, with exit status 2, and nothing is lost."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lab
from lab.cli import status_of
from lab.scenario import Scenario, read_scenario

if TYPE_CHECKING:
    from pathlib import Path

GOOD = """
title = "small"
project = "decoder"
steps = 2
[model]
layers = 1
width = 16
heads = 2
context = 16
[data]
source = "markov"
batch = 2
"""
ARITHMETIC = GOOD.replace('"markov"', '"arithmetic"')
NO_MODEL = GOOD[: GOOD.index("[model]")] + '[data]\nsource = "arithmetic"\n'
FAULT = '[[fault]]\nid = "mask.future_leak"\n'
PLUGIN = """
import lab
@lab.probe("mine", title="mine")
class Mine(lab.Probe):
    def lab_step_end(self, step): ...
"""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    status = status_of(arguments)
    said = capsys.readouterr()
    assert status == 2, said
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("lab: ")
    assert lines[0].removeprefix("lab: ").strip()
    assert "Traceback" not in said.err
    for word in words:
        assert word in lines[0], lines[0]


SCENARIOS = {
    "unknown key": ("stpes = 3\n" + GOOD, ["stpes", "steps"]),
    "unknown key in a table": (GOOD.replace("layers", "layer"), ["model.layer", "'layers'"]),
    "wrong type": (GOOD.replace("steps = 2", 'steps = "many"'), ["steps", "'many'", "integer"]),
    "out of bounds": (GOOD.replace("heads = 2", "heads = 0"), ["model.heads", "0", "greater than or equal to 1"]),
    "a number that is none": (GOOD + "[train]\nlr = nan\n", ["train.lr", "nan", "finite"]),
    "missing project": (GOOD.replace('project = "decoder"', ""), ["project", "missing"]),
    "unknown project": (GOOD.replace('"decoder"', '"decodr"'), ["project", "decodr", "'decoder'"]),
    "unknown fault": (
        GOOD + '[[fault]]\nid = "mask.futur_leak"\n',
        ["fault[0].id", "mask.futur_leak", "'mask.future_leak'"],
    ),
    "unknown parameter": (GOOD + FAULT + "ofset = 2\n", ["fault[0]", "ofset", "'offset'"]),
    "parameter out of bounds": (GOOD + FAULT + "offset = 0\n", ["fault[0].offset", "0", "greater than or equal to 1"]),
    "missing parameter": (GOOD + '[[fault]]\nid = "numerics.nonfinite"\n', ["fault[0].at", "missing"]),
    "no such site": (
        GOOD + FAULT + 'at = "blocks.7.attn"\n',
        ["mask.future_leak", "at = 'blocks.7.attn'", "'blocks.0.attn.mask'"],
    ),
    "parameter of the wrong type": (GOOD + FAULT + 'offset = "one"\n', ["fault[0].offset", "'one'", "integer"]),
    "parameter that is no number": (
        GOOD + '[[fault]]\nid = "init.too_large"\nstd = nan\n',
        ["fault[0].std", "nan", "greater than 0"],
    ),
    "parameter that is a deep table": (
        GOOD + FAULT + "offset" + ".a" * 5000 + " = 1\n",
        ["fault[0].offset", "integer"],
    ),
    "fault without an id": (GOOD + "[[fault]]\noffset = 1\n", ["fault[0].id", "missing"]),
    "truth in place of a number": (GOOD.replace("steps = 2", "steps = true"), ["steps", "True", "integer"]),
    "an integer of 5000 digits": ("seed = " + "9" * 5000 + GOOD, ["not valid TOML", "digits"]),
    "a list in place of a table": ("train = [1]\n" + GOOD, ["train", "[1]", "table"]),
    "too large to count": (GOOD.replace("width = 16", f"width = {10**30}"), ["model.width", "less than or equal to"]),
    "too large for the memory": (GOOD.replace("width = 16", "width = 1000000"), ["memory of cpu", "[model]"]),
    "a rate that is too high": (GOOD + "[train]\nlr = 1e308\n", ["train.lr", "1e+308", "less than or equal to"]),
    "a source with a strange name": (GOOD.replace('"markov"', '"a\\u0000b"'), ["data.source", "a\\x00b", "markov"]),
    "a source with a long name": (GOOD.replace('"markov"', f'"{"x" * 5000}"'), ["data.source", "xxx", "too long"]),
    "no such parameter": (
        GOOD + '[[fault]]\nid = "optimizer.missing_parameter"\nat = "nose"\n',
        ["no parameter", "nose"],
    ),
    "no such matrix": (GOOD + '[[fault]]\nid = "init.too_large"\nat = "nose"\n', ["no matrix", "nose"]),
    "a step for what has none": (
        GOOD + '[[fault]]\nid = "init.too_large"\nfrom_step = 3\n',
        ["init.too_large", "from_step = 3"],
    ),
    "unknown probe": ('probes = ["gradient"]\n' + GOOD, ["probes", "gradient", "'gradients'"]),
    "unknown cause": (GOOD + '[expect]\ncause = "mask.future"\n', ["expect.cause", "mask.future"]),
    "bad condition": (
        GOOD + '[[check]]\nmetric = "loss"\nis = "bigger than 3"\n',
        ["check[0].is", "bigger than 3", "above X"],
    ),
    "syntax error": ("title = = 3", ["not valid TOML", "line 1"]),
    "unknown source": (GOOD.replace('"markov"', '"python-doc"'), ["data.source", "python-doc", "'python-docs'"]),
    "truth in place of a parameter": (GOOD + FAULT + "offset = true\n", ["fault[0].offset", "True", "no yes or no"]),
    "a step before the first": (GOOD + FAULT + "from_step = -1\n", ["fault[0].from_step", "-1"]),
    "an unknown objective": (GOOD + '[train]\nobjective = "dop"\n', ["train.objective", "'dop'", "dpo"]),
    "answers without questions": (GOOD + '[train]\nobjective = "sft"\n', ["data.source", "'arithmetic'", "'markov'"]),
    "preferences from nothing": (ARITHMETIC + '[train]\nobjective = "dpo"\n', ["'dpo'", "train.start"]),
    "an encoder with a choice that it lacks": (
        GOOD.replace("[model]", '[model]\npositions = "rope"') + '[train]\nobjective = "masked"\n',
        ["model.positions", "'masked'"],
    ),
    "a start that is none": (GOOD + '[train]\nstart = "pretraning"\n', ["train.start", "pretraning"]),
    "a start with faults": (NO_MODEL + '[train]\nstart = "reads-the-future"\n', ["reads-the-future", "faults"]),
    "a start that reads characters": (NO_MODEL + '[train]\nstart = "healthy-decoder"\n', ["healthy-decoder", "tokens"]),
    "a start that is no decoder": (NO_MODEL + '[train]\nstart = "healthy-encoder"\n', ["healthy-encoder", "decoder"]),
    "a start with another model": (
        GOOD + '[train]\nstart = "healthy-pretraining"\n',
        ["model", "healthy-pretraining", "leave [model] out"],
    ),
    "parts that do not fit": (GOOD + "[train]\naccumulate = 3\n", ["data.batch = 2", "train.accumulate = 3"]),
    "adapters too large": (GOOD + "[train]\nlora_rank = 100\n", ["rank", "100"]),
    "an unknown scheme": (GOOD + '[train]\nquantize = ["int3"]\n', ["train.quantize[0]", "'int3'", "int8-row"]),
    "width no multiple of heads": (GOOD.replace("heads = 2", "heads = 3"), ["model.width = 16", "model.heads = 3"]),
    "a table too large": (GOOD + "order = 4\nvocabulary = 4096\n", ["4096**4", "too large"]),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_bad_scenario(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    text, words = SCENARIOS[name]
    (tmp_path / "s.toml").write_text(text)
    refused(capsys, ["run", "s.toml"], "s.toml", *words)
    assert not list(tmp_path.glob("runs/*"))  # what was refused is no run


def test_a_refused_run_leaves_its_folder_free(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(GOOD + FAULT + 'at = "blocks.7.attn"\n')
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine.txt").write_text("mine")
    for out in ("new", "kept"):
        refused(capsys, ["run", "s.toml", "--out", out], "blocks.7.attn")
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["mine.txt"]
    (tmp_path / "s.toml").write_text(GOOD)
    for out in ("new", "kept"):
        assert status_of(["run", "s.toml", "--out", out]) == 0


def test_a_text_too_short_for_the_context(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "tiny.txt").write_text("too short")
    (tmp_path / "s.toml").write_text(GOOD.replace('"markov"', '"tiny.txt"'))
    refused(capsys, ["run", "s.toml"], "s.toml", "data.source", "tiny.txt", "9 characters", "context of 16")


def test_a_source_that_holds_no_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "bytes.txt").write_bytes(b"\xff" * 1000)
    for source, words in (
        ("empty", ["no .txt, .md, .rst or .py file"]),
        ("dangling", ["no file or folder", "markov"]),
        ("bytes.txt", ["bytes.txt", "not UTF-8"]),
    ):
        (tmp_path / "s.toml").write_text(GOOD.replace('"markov"', f'"{source}"'))
        refused(capsys, ["run", "s.toml"], "s.toml", "data.source", source, *words)


def test_files_that_are_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "dangling.toml").symlink_to("nowhere")
    refused(capsys, ["run", "bytes.toml"], "bytes.toml", "UTF-8")
    refused(capsys, ["run", "folder.toml"], "folder.toml")
    refused(capsys, ["run", "dangling.toml"], "dangling.toml", "no such file")
    refused(capsys, ["run", "read-the-future"], "read-the-future", "'reads-the-future'")


COMMANDS = {
    "unknown command": (["runn", "x"], ["runn"]),
    "unknown option": (["run", "s.toml", "--sed", "3"], ["--sed"]),
    "negative seed": (["run", "s.toml", "--seed", "-1"], ["--seed", "-1"]),
    "no steps": (["run", "s.toml", "--steps", "0"], ["--steps", "0"]),
    "unknown device": (["run", "s.toml", "--device", "nonsense"], ["--device nonsense", "cpu"]),
    "a device that is not here": (["run", "s.toml", "--device", "cuda:77"], ["--device cuda:77"]),
    "a device without values": (["run", "s.toml", "--device", "meta"], ["--device meta", "cpu"]),
    "a seed too large": (["run", "s.toml", "--seed", str(2**31)], ["--seed", str(2**31 - 1)]),
    "steps that are no number": (["run", "s.toml", "--steps", "many"], ["--steps", "'many'"]),
    "a scenario with a long name": (["run", "x" * 5000], ["xxx", "too long"]),
    "out with a long name": (["run", "s.toml", "--out", "x" * 5000], ["xxx", "too long"]),
    "a plugin with a long name": (["list", "--plugin", "x" * 5000], ["xxx", "too long"]),
    "a run with a long name": (["diagnose", "x" * 5000], ["xxx", "too long"]),
    "a board with a long name": (["board", "x" * 5000], ["xxx", "too long"]),
    "no scenario": (["run"], ["scenario", "lab list scenarios"]),
    "nothing to go on with": (["run", "--resume", "empty"], ["empty", "run.toml"]),
    "another seed to go on with": (["run", "--resume", "empty", "--seed", "1"], ["--resume", "--seed"]),
    "an option without its value": (["run", "s.toml", "--out"], ["--out"]),
    "one argument too many": (["diagnose", "a", "b"], ["b"]),
    "a port that is none": (["board", "--port", "99999"], ["--port", "65535"]),
    "a file in place of a run": (["diagnose", "s.toml"], ["s.toml", "no such folder"]),
    "a board on a file": (["board", "s.toml"], ["s.toml", "no such folder"]),
    "out is a file": (["run", "s.toml", "--out", "s.toml"], ["s.toml", "cannot hold a run"]),
    "unknown kind": (["list", "fault"], ["fault"]),
    "unknown name": (["show", "mask.future_leek"], ["mask.future_leek", "'mask.future_leak'"]),
    "nothing to show": (["show"], ["NAME"]),
    "no run at all": (["board"], ["runs", "no run yet"]),
    "no run folder": (["diagnose", "nowhere"], ["nowhere", "no such folder"]),
    "an empty folder": (["diagnose", "empty"], ["empty", "metrics.db"]),
    "a board on an empty folder": (["board", "empty"], ["empty", "no run folder"]),
    "out below a file": (["run", "s.toml", "--out", "s.toml/run"], ["s.toml/run", "cannot hold a run"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_bad_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    arguments, words = COMMANDS[name]
    (tmp_path / "s.toml").write_text(GOOD)
    (tmp_path / "empty").mkdir()
    refused(capsys, arguments, *words)


PLUGINS = {
    "syntax error": ("def f(:\n", ["line 1", "SyntaxError"]),
    "raises at import": ("x = 1\nraise KeyError('oops')\n", ["line 2", "oops"]),
    "exits": ("import sys\nsys.exit(3)\n", ["SystemExit"]),
    "nothing marked": ("x = 1\n", ["nothing in it is marked", "@lab.probe"]),
    "misspelt hook": (PLUGIN.replace("lab_step_end", "lab_step_ends"), ["lab_step_ends", "'lab_step_end'"]),
    "misspelt argument": (PLUGIN.replace("self, step", "self, stepp"), ["stepp", "'step'"]),
    "taken id": (PLUGIN.replace('"mine", title', '"loss", title'), ["'loss'", "taken"]),
    "no base class": (PLUGIN.replace("(lab.Probe)", ""), ["Mine", "lab.Probe"]),
    "a fault without its base class": (
        'import lab\n@lab.fault("x", title="t", cause="x", moves="loss", repair="r")\nclass X: ...\n',
        ["class X", "lab.Fault"],
    ),
    "a hook that is no method": (PLUGIN.replace("def lab_step_end(self, step): ...", "lab_step_end = 3"), ["method"]),
    "a module that is not there": ("x = 1\nimport no_such_module\n", ["line 2", "no_such_module"]),
    "bad input at import": ("import lab\nraise lab.BadInput('two\\nlines')\n", ["line 2", "two"]),
    "no text": ("x = 1\0", ["SyntaxError"]),
}


@pytest.mark.parametrize("name", PLUGINS)
def test_a_bad_plugin(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    text, words = PLUGINS[name]
    (tmp_path / "p.py").write_text(text)
    refused(capsys, ["list", "--plugin", "p.py"], "p.py", *words)


def test_a_plugin_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["list", "--plugin", "nowhere.py"], "nowhere.py", "no such file")
    refused(capsys, ["list", "--plugin", "no_such_module"], "no_such_module")


def test_a_plugin_that_is_no_python_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(PLUGIN)
    (tmp_path / "folder").mkdir()
    refused(capsys, ["list", "--plugin", "p.txt"], "p.txt", ".py")
    refused(capsys, ["list", "--plugin", "folder"], "folder", ".py")


def package(folder: Path, name: str, **modules: str) -> None:
    """A package that can be imported from `folder`."""
    (folder / name).mkdir()
    for module, text in {"__init__": "", **modules}.items():
        (folder / name / f"{module}.py").write_text(text)


def test_a_package_may_have_modules_that_help(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "path").mkdir()
    package(tmp_path / "path", "good_package", helper="x = 1\n", probes=PLUGIN)
    monkeypatch.syspath_prepend(tmp_path / "path")
    assert status_of(["show", "mine", "--plugin", "good_package"]) == 0
    assert "mine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "word"),
    [("import no_such_module\n", "no_such_module"), ("raise SystemExit(3)\n", "SystemExit"), ("x = 1\n", "marked")],
)
def test_a_bad_package(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, word: str
) -> None:
    (tmp_path / "path").mkdir()
    name = f"bad_{word.lower()}"
    package(tmp_path / "path", name, inside=module)
    monkeypatch.syspath_prepend(tmp_path / "path")
    refused(capsys, ["list", "--plugin", name], name, word)


@pytest.mark.parametrize(
    ("name", "module", "word"),
    [
        ("imports_nothing", "import no_such_module\n", "no_such_module"),
        ("exits", "raise SystemExit(3)\n", "SystemExit"),
        ("misspells_a_hook", PLUGIN.replace("lab_step_end", "lab_step_ends"), "'lab_step_end'"),
        ("takes_an_id", PLUGIN.replace('"mine", title', '"loss", title'), "taken by lab.probes.loss"),
    ],
)
def test_an_installed_package_that_is_broken_is_left_out_and_named(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    module: str,
    word: str,
) -> None:
    (tmp_path / "path" / "broken-1.0.dist-info").mkdir(parents=True)
    (tmp_path / "path" / f"{name}.py").write_text(module)
    (tmp_path / "path" / "broken-1.0.dist-info" / "METADATA").write_text("Name: broken\nVersion: 1.0\n")
    (tmp_path / "path" / "broken-1.0.dist-info" / "entry_points.txt").write_text(f"[lab]\nbroken = {name}\n")
    (tmp_path / "s.toml").write_text(GOOD)
    monkeypatch.syspath_prepend(tmp_path / "path")
    assert status_of(["run", "s.toml"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert f"plugin broken ({name}) is left out: " in lines[0]
    assert word in lines[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("plugins = [", ["not TOML"]),
        ("plugin = []", ["plugin", "'plugins'"]),
        ('plugins = ["x.py"]', ["plugins", "x.py", "no such file"]),
        ('plugins = "x.py"', ["plugins", "'x.py'", "list"]),
        ("plugins = [3]", ["plugins", "[3]", "list"]),
        ("plugins" + ".a" * 5000 + " = 3", ["plugins", "list"]),
        ("plugins = [" + "9" * 5000 + "]", ["digits"]),
        ('plugins = ["no_such_module"]', ["plugins", "no_such_module"]),
    ],
)
def test_a_bad_settings_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "lab.toml").write_text(text)
    refused(capsys, ["list"], "lab.toml", *words)


def test_a_run_that_is_there_is_not_overwritten(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(GOOD)
    status_of(["run", "s.toml", "--out", "run"])
    capsys.readouterr()
    before = lab.load("run").metrics
    refused(capsys, ["run", "s.toml", "--out", "run"], "run", "holds a run already")
    assert lab.load("run").metrics.equals(before)

    shutil.copytree("run", "damaged")
    for leftover in (tmp_path / "damaged").glob("metrics.db*"):
        leftover.unlink()
    (tmp_path / "damaged" / "metrics.db").write_bytes(b"not a database at all" * 100)
    refused(capsys, ["diagnose", "damaged"], "metrics.db", "damaged")
    (tmp_path / "damaged" / "metrics.db").write_bytes((tmp_path / "run" / "metrics.db").read_bytes()[:9000])
    refused(capsys, ["diagnose", "damaged"], "metrics.db", "damaged")
    shutil.copy("run/metrics.db", "damaged")
    (tmp_path / "damaged" / "run.toml").write_bytes(b"\xff")
    refused(capsys, ["diagnose", "damaged"], "run.toml", "damaged")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["run", "s.toml"], "stpes"), (["diagnose", "nowhere"], "nowhere"), (["lst"], "lst"), (["run", "--plugin"], "")],
)
def test_the_command_itself_ends_with_status_2_and_one_line(tmp_path: Path, arguments: list[str], word: str) -> None:
    (tmp_path / "s.toml").write_text("stpes = 3\n" + GOOD)
    command = [sys.executable, "-c", "from lab.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("lab: ")
    assert word in done.stderr


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=60), st.text(alphabet="[]={}\"'\n#.ab1 -", max_size=60).map(str.encode)))
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "s.toml"
    path.write_bytes(data)
    with pytest.raises(lab.BadInput) as refusal:
        read_scenario(path)
    assert len(str(refusal.value).splitlines()) == 1


SCALARS = st.one_of(
    st.none().map(lambda _: "x"), st.integers(-(2**62), 2**62), st.floats(), st.booleans(), st.text(max_size=5)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
)
KEYS = st.sampled_from([*Scenario.model_fields, "nonsense"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_document_is_read_or_refused_in_one_line(tmp_path: Path, document: dict[str, object]) -> None:
    path = tmp_path / "s.toml"
    path.write_text(tomli_w.dumps({"title": "t", "project": "decoder", **document}), encoding="utf-8")
    try:
        read = read_scenario(path)
    except lab.BadInput as refusal:
        said = str(refusal)
    else:
        assert isinstance(read, Scenario)
        return
    assert len(said.splitlines()) == 1
    assert "s.toml" in said
