"""``lab profile``: where a scenario's time and memory go, and what to change first."""

from __future__ import annotations

from pathlib import Path

import click

from lab.cli.options import json_option, plugin_option, print_json
from lab.cli.run import asked, checked, new_name, refused_runs_removed, use_components
from lab.errors import BadInput, NotChecked
from lab.files import new_folder


@click.command()
@click.argument("scenario")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="In place of the scenario's seed.")
@click.option("--steps", type=click.IntRange(1, 10_000_000), help="In place of the scenario's number of steps.")
@click.option("--out", type=click.Path(path_type=Path), help="The run folder; by default a new one in ./runs.")
@click.option("--device", default="cpu", show_default=True, help="Where the model lives: cpu, cuda, cuda:1, ...")
@click.option(
    "--use", "uses", multiple=True, metavar="PROJECT=FILE", help="Profile your own component. May be repeated."
)
@click.option("--trace/--no-trace", default=True, show_default=True, help="Write a trace by PyTorch's own profiler.")
@click.option("--sample/--no-sample", default=True, show_default=True, help="Let py-spy write a flame graph.")
@json_option
@plugin_option
def profile(
    scenario: str,
    *,
    seed: int | None,
    steps: int | None,
    out: Path | None,
    device: str,
    uses: tuple[str, ...],
    trace: bool,
    sample: bool,
    as_json: bool,
    plugins: tuple[str, ...],
) -> int:
    """Measure where the time and the memory of SCENARIO go, and say what to change first, and what that may bring.

    The training runs twice: unwatched, to be measured, and watched, to be diagnosed. The run folder holds the numbers
    (profile.json), a roofline and the memory through a step as pictures, a trace that TensorBoard's profiler tab and
    Perfetto open (trace), and a flame graph (flame.svg, speedscope.json).

    Exit status: 0, whatever was found.
    """
    name, loaded = asked(scenario, seed, steps)
    catalogue = checked(loaded, plugins, scenario)
    folder = out or new_name(f"profile-{name}", loaded.seed)
    from lab.profiling.quiet import import_quietly

    import_quietly()
    use_components(uses)
    from lab.profiling.keep import keep
    from lab.profiling.tools import make_tools
    from lab.runtime.profile import profile_scenario
    from lab.runtime.run import find_device

    find_device(device)
    new_folder(folder)
    tools = make_tools(trace=trace, sample=sample)
    with refused_runs_removed(folder, scenario, device):
        try:
            found = profile_scenario(name, loaded, catalogue, folder, device=device, tools=tools)
        except NotChecked as error:
            raise BadInput(f"{error}; give --steps") from None
    keep(found.profile, found.changes, folder)
    said = [text for tool in tools if (text := getattr(tool, "said", ""))]
    if as_json:
        changes = [change.to_dict() for change in found.changes]
        about = {"run": str(folder), "scenario": name, **found.profile.to_dict(), "changes": changes}
        print_json({**about, "diagnosis": found.diagnosis.to_dict(), "said": said})
        return 0
    from rich.console import Console

    from lab.cli.profile_report import print_files, print_profile

    console = Console()
    print_profile(found.profile, found.changes, console, f"{name}, seed {loaded.seed}", *said)
    print_files(folder, console)
    return 0
