"""The trace that PyTorch's profiler leaves: TensorBoard's profiler tab shows it, and its format holds."""

from __future__ import annotations

import importlib
import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest
from serving import serving, soon

from lab.catalogue import Catalogue
from lab.runtime.train import train
from lab.scenario import load_scenario

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from serving import Ask

TorchProfiler = importlib.import_module("lab.plugins.torch_profiler").TorchProfiler
VIEWS = {"Overview", "Operator", "Trace", "Memory", "Module"}


def traced(folder: Path, **options: int) -> Any:
    folder.mkdir()
    tool = TorchProfiler(**options)
    scenario = load_scenario("healthy-multihead")[1].model_copy(update={"steps": 8, "probes": []})
    train(scenario, Catalogue(), folder, (), [tool])
    return tool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trace") / "run"
    traced(place, wait=3, warmup=1, active=2)
    return place


@pytest.fixture(scope="module")
def ask(folder: Path) -> Iterator[Ask]:
    with serving(folder) as answer:
        soon(lambda: answer("plugin/pytorch_profiler/runs")["runs"], "the run")
        yield answer


def of(ask: Ask, page: str, view: str, **more: str) -> Any:
    [worker] = ask("plugin/pytorch_profiler/workers", run="trace", view=view)
    [span] = ask("plugin/pytorch_profiler/spans", run="trace", worker=worker)
    about = {"run": "trace", "worker": worker, "span": span, "view": view}
    return ask(f"plugin/pytorch_profiler/{page}", **about, **more)


def test_the_profiler_tab_offers_every_view(ask: Ask) -> None:
    assert set(ask("plugin/pytorch_profiler/views", run="trace")) >= VIEWS


def test_the_overview_has_steps(ask: Ask) -> None:
    steps = of(ask, "overview", "Overview")["steps"]["rows"]
    assert len(steps) == 2


def test_the_operators_are_those_of_a_decoder(ask: Ask) -> None:
    rows = of(ask, "operation/table", "Operator", group_by="Operation")["data"]
    calls = {row["name"]: row["calls"] for row in rows}
    assert calls["aten::addmm"] == 2 * 8  # two steps, of two blocks with four linear layers
    assert "aten::scaled_dot_product_attention" in calls
    shapes = of(ask, "operation/table", "Operator", group_by="OperationAndInputShape")["data"]
    assert any(row.get("input_shape") for row in shapes)


def test_memory_is_followed(ask: Ask) -> None:
    [rows] = of(ask, "memory", "Memory")["rows"].values()
    assert "aten::addmm" in {row[0] for row in rows}
    [curve] = of(ask, "memory_curve", "Memory")["rows"].values()
    assert len(curve) > 100


def test_modules_are_known_by_name(ask: Ask) -> None:
    def names(rows: list[Any]) -> set[str]:
        return {row["name"].rpartition("_")[0] for row in rows} | {n for row in rows for n in names(row["children"])}

    assert names(of(ask, "module", "Module")["data"]) >= {"Decoder", "Block", "Linear"}


def test_the_trace_is_served(ask: Ask) -> None:
    told = of(ask, "trace", "Trace")
    assert len(told["traceEvents"]) > 1000


def test_the_trace_keeps_to_its_format(folder: Path) -> None:
    """As the description of the Trace Event Format has it: what Perfetto drops would be missing in its picture."""
    [file] = (folder / "trace").glob("*.pt.trace.json")
    told = json.loads(file.read_text())
    by_thread = defaultdict(list)
    for event in told["traceEvents"]:
        assert event["ph"] in "XBEiIMCsftPbne", event
        assert {"name", "pid", "tid"} <= event.keys(), event
        if event["ph"] != "M":
            assert float(event["ts"]) >= 0
        if event["ph"] == "X":
            assert float(event["dur"]) >= 0
            begin = float(event["ts"])
            by_thread[event["pid"], event["tid"]].append((begin, begin + float(event["dur"]), event.get("cat", "")))
    assert by_thread
    crossing = [kinds for spans in by_thread.values() for kinds in crossings(spans)]
    # PyTorch's own: a range that somebody notes begins while the function that notes it still runs.
    assert all("user_annotation" in kinds for kinds in crossing)
    assert len(crossing) < 0.01 * sum(map(len, by_thread.values()))


def crossings(spans: list[tuple[float, float, str]]) -> Iterator[tuple[str, str]]:
    """Pairs of one thread of which neither holds the other, nor is over when it begins."""
    open_until: list[tuple[float, str]] = []
    for begin, end, name in sorted(spans, key=lambda span: (span[0], -span[1])):
        while open_until and open_until[-1][0] <= begin:
            open_until.pop()
        if open_until and end > open_until[-1][0] + 1e-2:  # microseconds, as they are rounded
            yield name, open_until[-1][1]
        open_until.append((end, name))


def test_its_operators_are_counted_by_the_step(tmp_path: Path) -> None:
    tool = traced(tmp_path / "run", wait=1, warmup=1, active=3)
    calls, seconds = tool.operators["aten::addmm"]
    assert calls == 8
    assert seconds > 0
    assert tool.said == ""


def test_a_run_that_ends_early_leaves_what_there_is(tmp_path: Path) -> None:
    tool = traced(tmp_path / "run", wait=100)
    assert not (tmp_path / "run" / "trace").exists()
    assert tool.operators == {}


def test_a_module_imported_meanwhile_costs_the_stacks_and_not_the_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its functions are gone when their names are asked for; PyTorch then raises, at the end of the last step."""
    spoil = iter([True, False])

    def take(self: Any, found: Any) -> None:
        if next(spoil):
            raise UnicodeDecodeError("utf-8", b"\xa0", 0, 1, "invalid start byte")
        plain(self, found)

    plain = TorchProfiler._take
    monkeypatch.setattr(TorchProfiler, "_take", take)
    tool = traced(tmp_path / "run", wait=1, warmup=1, active=2)
    assert "no stacks" in tool.said
    assert [*(tmp_path / "run" / "trace").glob("*.json")]
