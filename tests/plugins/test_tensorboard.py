"""What a run writes for TensorBoard: asked of a real server, and read back event by event."""

from __future__ import annotations

import importlib
import io
import math
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from serving import serving, soon
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import lab
from lab.context import Artifact, Run, Step
from lab.diagnosis.model import Diagnosis, Finding, Symptom
from lab.manager import Manager
from lab.runtime.run import run_scenario
from lab.scenario import load_scenario
from lab.store import Row

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from serving import Ask

    from lab.catalogue import Catalogue

# As the lab finds it: a type checker knows the folder by another name.
tensorboard = importlib.import_module("lab.plugins.tensorboard")
TensorBoard, pixels = tensorboard.TensorBoard, tensorboard.pixels

STEPS = 12
NOTE = Symptom(at="blocks.0", since=3, seen=2.0, expected="below 1", text="it is large", id="large")


# ---------------------------------------------------------------- a real run, a real server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, catalogue: Catalogue) -> Path:
    name, scenario = load_scenario("reads-the-future")
    place = tmp_path_factory.mktemp("run") / "run"
    short = scenario.model_copy(update={"steps": STEPS, "seed": 0})
    outcome = run_scenario(name, short, catalogue, place, twin=False, tools=lambda: [TensorBoard()])
    assert outcome.diagnosis.causes[0].id == "mask.future_leak"
    assert "set_aside" not in outcome.facts
    return place


@pytest.fixture(scope="module")
def ask(folder: Path) -> Iterator[Ask]:
    """A function that asks a server on the loopback address."""
    with serving(folder) as answer:
        # The results are the last that is written: once they are there, all of it is.
        soon(lambda: "result/score" in answer("plugin/scalars/tags").get("tensorboard", {}), "the results")
        yield answer


def test_scalars_are_served_as_they_were_recorded(ask: Ask, folder: Path) -> None:
    results = lab.load(folder)
    recorded = results.table("loss")[""]
    served = ask("plugin/scalars/scalars", run="tensorboard", tag="loss")
    assert {step: value for _, step, value in served} == recorded.to_dict()
    assert len(recorded) == STEPS
    every = {f"{m}/{s}" if s else m for m in results.history.metrics for s in results.history.sites(m)}
    assert every <= set(ask("plugin/scalars/tags")["tensorboard"])


def test_attention_is_served_as_a_png_that_can_be_seen(ask: Ask) -> None:
    tag = "attention/blocks.1.attn.pattern"
    assert tag in ask("plugin/images/tags")["tensorboard"]
    [first, *_] = ask("plugin/images/images", run="tensorboard", tag=tag, sample="0")
    png = ask("plugin/images/individualImage?" + first["query"])
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert first["step"] == 0
    assert min(struct.unpack(">II", png[16:24])) >= 256  # width and height
    assert len(set(np.asarray(Image.open(io.BytesIO(png))).reshape(-1, 3)[:, 0].tolist())) > 10


def test_histograms_are_served(ask: Ask, folder: Path) -> None:
    tag = "weight/head.weight"
    assert tag in ask("plugin/histograms/tags")["tensorboard"]
    [[_, step, buckets], *_] = ask("plugin/histograms/histograms", run="tensorboard", tag=tag)
    assert step == 0
    assert sum(count for _, _, count in buckets) > 1000


def test_the_diagnosis_is_served_as_text(ask: Ask) -> None:
    tags = ask("plugin/text/tags")["tensorboard"]
    assert {"scenario", "diagnosis", "findings/causality.future"} <= set(tags)
    [diagnosis] = ask("plugin/text/text", run="tensorboard", tag="diagnosis")
    for part in ("Verdict: faulty", "mask.future_leak", "blocks.1.attn", "<li>", "Repair", "Not checked"):
        assert part in diagnosis["text"]
    [scenario] = ask("plugin/text/text", run="tensorboard", tag="scenario")
    assert "<h1>The decoder reads the future</h1>" in scenario["text"]
    assert "hints" not in scenario["text"]


def test_settings_and_results_are_served_as_hyper_parameters(ask: Ask, folder: Path) -> None:
    everything = {"allowedStatuses": ["STATUS_SUCCESS"], "startIndex": 0, "sliceSize": 10, "colParams": []}
    [group] = ask("plugin/hparams/session_groups", everything)["sessionGroups"]
    assert group["hparams"] == {
        "scenario": "The decoder reads the future",
        "faults": "mask.future_leak",
        "seed": 0,
        "steps": STEPS,
        "lr": 0.003,
        "layers": 2,
        "width": 64,
        "heads": 4,
    }
    results = {metric["name"]["tag"]: metric["value"] for metric in group["metricValues"]}
    assert results.keys() == {"result/final_loss", "result/symptoms", "result/score"}
    assert results["result/final_loss"] == lab.load(folder).history.last("loss")
    assert results["result/symptoms"] >= 1
    assert results["result/score"] > 0


# ---------------------------------------------------------------- event by event


class Board:
    """A plugin in a run that nobody computes."""

    def __init__(self, folder: Path, steps: int | None = None) -> None:
        self.run = Run(folder, Manager(), steps=steps)
        self.plugin = TensorBoard()
        self.plugin.lab_start(self.run)

    def row(self, index: int, values: dict[str, float], *, examined: bool = False) -> None:
        columns = tuple((name, "") for name in values)
        row = Row(columns, np.array(list(values.values())))
        self.run.history.add(index, row)
        self.plugin.lab_metrics(Step(index, examined=examined), row)

    def end(self, verdict: Diagnosis | None = None) -> EventAccumulator:
        self.plugin.lab_end(self.run, verdict or Diagnosis("healthy"))
        return self.read()

    def read(self) -> EventAccumulator:
        return EventAccumulator(str(self.run.folder / "tensorboard"), {"scalars": 0, "tensors": 0}).Reload()

    def steps(self, tag: str) -> list[int]:
        return [event.step for event in self.end().Scalars(tag)]

    def text(self, tag: str) -> str:
        [event] = self.read().Tensors(tag)
        return str(event.tensor_proto.string_val[0].decode())


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path)


def test_a_step_is_one_event_however_many_metrics_it_has(board: Board) -> None:
    for index in range(3):
        board.row(index, {f"m{i}": float(i) for i in range(300)})
    board.end()
    [path] = (board.run.folder / "tensorboard").iterdir()
    sizes = [len(event.summary.value) for event in LegacyEventFileLoader(str(path)).Load()]
    assert sizes.count(300) == 3
    assert sum(size for size in sizes if size != 300) < 20


def test_values_are_those_of_their_step(board: Board) -> None:
    board.row(0, {"a": 1.0, "b": 2.0})
    board.row(1, {"b": 3.0})
    board.row(2, {"a": 4.0, "b": 5.0})
    events = board.end()
    assert [(event.step, event.value) for event in events.Scalars("a")] == [(0, 1.0), (2, 4.0)]
    assert [(event.step, event.value) for event in events.Scalars("b")] == [(0, 2.0), (1, 3.0), (2, 5.0)]


def test_nan_and_infinity_are_kept(board: Board) -> None:
    board.row(0, {"a": math.nan, "b": math.inf, "c": 1e300})  # the last does not fit into the float32 of an event
    events = board.end()
    assert math.isnan(events.Scalars("a")[0].value)
    assert events.Scalars("b")[0].value == math.inf
    assert events.Scalars("c")[0].value == math.inf


def test_the_first_ten_each_fifth_each_examined_and_the_last_are_written(tmp_path: Path) -> None:
    board = Board(tmp_path, steps=25)
    for index in range(25):
        board.row(index, {"loss": 1.0}, examined=index == 17)
    assert board.steps("loss") == [*range(11), 15, 17, 20, 24]


def test_what_has_a_cadence_of_its_own_is_not_lost(board: Board) -> None:
    for index in range(60):
        board.row(index, {"loss": 1.0, "held_out": 2.0} if index % 20 == 11 else {"loss": 1.0})
    assert board.steps("held_out") == [11, 31, 51]


def test_a_finding_brings_the_numbers_of_its_step(board: Board) -> None:
    for index in range(16):
        board.row(index, {"loss": 1.0})
        if index == 13:
            board.plugin.lab_finding(Step(index), NOTE)
    assert board.steps("loss") == [*range(11), 13, 15]
    assert "it is large" in board.text("findings/large/blocks.0")
    assert "below 1" in board.text("findings/large/blocks.0")


def test_the_last_step_is_written_where_nobody_knew_that_it_was_the_last(board: Board) -> None:
    for index in range(13):
        board.row(index, {"loss": 1.0})
    assert board.steps("loss") == [*range(11), 12]


def test_an_error_brings_the_numbers_of_its_step_and_closes_the_file(board: Board) -> None:
    for index in range(13):
        board.row(index, {"loss": 1.0})
    board.plugin.lab_error(board.run, ValueError("no more"))
    assert [event.step for event in board.read().Scalars("loss")] == [*range(11), 12]
    assert "no more" in board.text("error")
    assert board.plugin._writer is None
    board.plugin.lab_error(board.run, ValueError("again"))


def test_an_error_before_the_start_is_not_made_worse(tmp_path: Path) -> None:
    TensorBoard().lab_error(Run(tmp_path, Manager()), ValueError("no model"))
    assert not list(tmp_path.iterdir())


def test_a_run_that_never_ends_can_be_read(board: Board) -> None:
    for index in range(3):
        board.row(index, {"loss": 1.0})

    def all_there() -> bool:
        events = board.read()
        return "loss" in events.Tags()["scalars"] and len(events.Scalars("loss")) == 3

    soon(all_there, "three steps in the file of a run that goes on")


def test_training_that_the_lab_did_not_write(board: Board) -> None:
    assert board.run.config is None
    board.row(0, {"loss": 1.0})
    cause = Finding("some.cause", "Something", "", 3, 1.5, ("it is large",), "repair it", look="there")
    diagnosis = Diagnosis("faulty", (cause,), (NOTE,), (NOTE,), {"a": "A is right"}, {"b": "no B"})
    events = board.end(diagnosis)
    settings = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    begun = HParamsPluginData.FromString(settings).session_start_info.hparams
    assert {name: value.number_value for name, value in begun.items()} == {"steps": 1}
    assert events.Scalars("result/score")[0].value == 1.5
    assert "did not write" in board.text("scenario")
    for part in ("some.cause", "the run as a whole", "- it is large", "repair it", "A is right", "`b`: no B"):
        assert part in board.text("diagnosis")


# ---------------------------------------------------------------- pictures


def test_a_histogram_is_of_what_is_finite(board: Board) -> None:
    for index, values in enumerate(([math.nan] * 4, [1.0] * 3, [1.0, 2.0, math.inf, math.nan], [])):
        board.plugin.lab_artifact(Step(index), Artifact("histogram", "weight", "head", np.array(values)))
    events = board.end().Tensors("weight/head")
    buckets = [np.frombuffer(event.tensor_proto.tensor_content).reshape(-1, 3) for event in events]
    assert [bucket[:, 2].sum() for bucket in buckets] == [0, 3, 2, 0]
    assert np.isfinite(buckets).all()


def test_an_image_of_nothing_is_left_out(board: Board) -> None:
    board.plugin.lab_artifact(Step(0), Artifact("image", "empty", "", np.empty((0, 4))))
    board.plugin.lab_artifact(Step(0), Artifact("image", "full", "", np.eye(4)))
    assert board.end().Tags()["images"] == ["full"]


def test_each_value_of_a_small_image_is_a_square() -> None:
    drawn = pixels(np.array([[0.0, 0.05], [0.2, math.nan]]))
    assert drawn.shape == (256, 256, 3)
    corners = [tuple(drawn[row, column]) for row, column in ((0, 0), (127, 127), (0, 128), (128, 0), (128, 128))]
    dark, same, middle, bright, broken = corners
    assert dark == same == (68, 1, 84)
    assert middle == (33, 145, 140)
    assert bright == (253, 231, 37)  # the largest, though it is only 0.2
    assert broken == (230, 0, 0)


@pytest.mark.parametrize("fill", [0.0, math.nan, math.inf, -1.0])
def test_an_image_without_a_largest_value_is_one_colour(fill: float) -> None:
    assert len(np.unique(pixels(np.full((3, 5), fill)).reshape(-1, 3), axis=0)) == 1


def test_a_large_image_keeps_a_thin_line() -> None:
    drawn = pixels(np.eye(1500, 1300, k=1))
    assert max(drawn.shape) <= 512
    bright = (drawn == (253, 231, 37)).all(axis=-1)
    assert bright.any(axis=0).all()


# ---------------------------------------------------------------- being found


def test_finding_the_plugin_imports_neither_torch_nor_tensorboard(catalogue: Catalogue) -> None:
    look = "import sys, lab.plugins.tensorboard; print(sorted({'torch', 'tensorboard'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"
    assert catalogue.plugins["tensorboard"] is TensorBoard
