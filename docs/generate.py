"""Writes docs/reference, and the table in docs/scenarios.md, from the code, so that they cannot drift.

python docs/generate.py            # write
python docs/generate.py --check    # write nothing; exit status 1 when something differs from the code
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import TypeAdapter

from lab import hookspecs
from lab.cli import cli
from lab.manager import HOOKS, discover
from lab.projects import PROJECTS
from lab.scenario import Scenario
from lab.shelf import find_scenarios
from lab.spec import measures, properties

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lab.catalogue import Catalogue, Fault, Plugin, Probe, Rule
    from lab.diagnosis.model import Cause
    from lab.projects import Project

DOCS = Path(__file__).parent
NOTE = "<!-- Made by docs/generate.py from the code. Change the code, then run it again. -->"
BEGIN, END = "<!-- made by docs/generate.py: keys -->", "<!-- end -->"
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}

# What each key of a scenario file means. A description in the model itself goes before this.
MEANING = {
    "title": "one line, for lists",
    "project": "the project it belongs to: `lab list projects`",
    "about": "what happens in it, for a reader",
    "seed": "of weights, data and everything else",
    "steps": "training steps",
    "probes": "ids of the probes to use; without it, all",
    "model": "",
    "model.layers": "blocks",
    "model.width": "of the residual stream; a multiple of `heads`",
    "model.heads": "attention heads in each block",
    "model.context": "tokens that the model sees at once",
    "model.tied": "whether the head uses the table of the embedding",
    "data": "",
    "data.source": "`python-docs`, `markov`, `arithmetic`, or the path of a text file or a folder of texts",
    "data.batch": "sequences in a batch",
    "data.order": "`markov` only: how many tokens the next depends on",
    "data.vocabulary": "`markov` only: different tokens",
    "train": "",
    "train.lr": "the highest learning rate",
    "train.warmup": "steps until it is reached; a cosine follows",
    "train.weight_decay": "of matrices",
    "train.clip": "the largest joint norm of the gradients",
    "train.evaluate_every": "",
    "fault": "",
    "fault.id": "`lab list faults`; any other key is a parameter of that fault: [faults](reference/faults.md)",
    "check": "",
    "check.metric": "its name, as in [probes](reference/probes.md); `measure.NAME` is a number of the project",
    "check.at": "the site, where the metric has one",
    "check.is": "`above X`, `below X`, `between X and Y`, `finite` or `not finite`",
    "check.on": "where it should hold",
    "check.take": "which of the metric's values over the steps counts",
    "expect": "",
    "expect.verdict": "when there are faults and no `[expect]`, `faulty` is expected",
    "expect.cause": "id of the first cause; empty: any",
    "expect.at": "where the first cause is; empty: anywhere",
    "expect.by_step": "the latest step since which it may be seen",
    "learn": "",
    "learn.hints": "one at a time",
}


# ---------------------------------------------------------------- markdown


def code(text: object) -> str:
    """Set a text as code."""
    return f"`{text}`"


def codes(names: Iterable[object]) -> str:
    """Set several as code, with commas between them."""
    return ", ".join(map(code, names))


def facts(given: dict[str, str]) -> str:
    """List what is known, leaving out what is empty."""
    return "\n".join(f"- **{key}:** {value}" for key, value in given.items() if value)


def section(name: str, *parts: str) -> str:
    """Make a section of the parts that are not empty."""
    return "\n\n".join([f"## {name}", *(part for part in parts if part)])


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Make a table; nothing when it has no rows."""
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(header)} |", "|---" * len(header) + "|", *lines]) if lines else ""


# ---------------------------------------------------------------- types, bounds and defaults


def kind(schema: dict[str, Any]) -> str:
    """Say the type that a JSON Schema asks for, and its bounds."""
    if "enum" in schema:
        return "one of " + codes(schema["enum"])
    if "anyOf" in schema:
        return " or ".join(kind(part) for part in schema["anyOf"] if part.get("type") != "null")
    if schema.get("type") == "array":
        return f"list of {kind(schema['items'])}"
    bounds = [f"{sign} {_number(schema[key])}" for key, sign in BOUNDS.items() if key in schema]
    return ", ".join([str(schema["type"]), *bounds])


def _number(value: float) -> str:
    return f"{value:g}" if value < 10_000 else f"{int(value):,}"


def default(schema: dict[str, Any], *, required: bool) -> str:
    """Say the default."""
    if required:
        return "required"
    value = schema.get("default")
    if value is None or value in ("", []):
        return ""
    return code(str(value).lower() if isinstance(value, bool) else value)


def keys(schema: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, ...]]:
    """Yield a row for each key of a scenario file, from its JSON Schema.

    Raises:
        KeyError: A key has no meaning above.
    """
    defs = schema.get("$defs", {})
    for name, field in schema["properties"].items():
        path = f"{prefix}{name}"
        inner = (field.get("items") or field).get("$ref", "").rpartition("/")[2]
        if inner:
            heading = f"[[{name}]]" if "items" in field else f"[{name}]"
            yield f"**`{heading}`**", "", "", defs[inner]["description"].split("\n\n")[0].replace("``", "`")
            yield from keys({**defs[inner], "$defs": defs}, f"{path}.")
            continue
        known = default(field, required=name in schema.get("required", ()))
        yield code(name), kind(field), known, field.get("description") or MEANING[path]


# ---------------------------------------------------------------- what there is


def hooks() -> str:
    """Every hook, by family, with its signature; first the whole loop."""
    lines, family = [(inspect.getdoc(hookspecs) or "").replace("::\n", ":\n")], ""
    for banner, name in re.findall(
        r"^# -{60,} (\w+)$|^def (lab_\w+)\(", inspect.getsource(hookspecs), flags=re.MULTILINE
    ):
        family = banner or family
        if name in HOOKS:
            spec = getattr(hookspecs, name)
            signature = str(inspect.signature(spec)).replace("'", "")
            call = f"```python\ndef {name}{signature}\n```"
            lines.append(section(name, f"*{family.removesuffix('s').capitalize()}.*", call, inspect.getdoc(spec) or ""))
    return "\n\n".join(lines)


def fault(cls: type[Fault], known: Catalogue) -> str:
    """One fault."""
    schema = TypeAdapter(cls).json_schema()
    rows = [
        (code(name), kind(field), default(field, required=name in schema.get("required", ())))
        for name, field in schema["properties"].items()
    ]
    cause = known.causes.get(cls.info.cause)
    return section(
        cls.info.id,
        f"{cls.info.title}.",
        cls.info.doc,
        table(("parameter", "type and bounds", "default"), rows),
        facts(
            {
                "cause": f"[{cls.info.cause}](causes.md#{anchor(cls.info.cause)})" if cause else code(cls.info.cause),
                "moves": code(cls.info.moves),
                "repair": cls.info.repair,
                "source": cause.source if cause else "",
            }
        ),
    )


def probe(cls: type[Probe], known: Catalogue) -> str:
    """One probe."""
    info = cls.info
    checks = [r.id for r in known.rules.values() if info.id in known.beside(r)]
    # What cadence an examination has is up to the session, and so says nothing here.
    every = f"the first three steps, then every {info.every}th" if info.every > 1 else ""
    every = "the first three steps, and some of those that are examined" if info.every == 0 else every
    return section(
        info.id,
        f"{info.title.removesuffix('.')}{'' if info.title.endswith('?') else '.'}",
        info.doc,
        facts(
            {
                "kind": ("examines, in a sandbox" if info.examines else "watches")
                + (", seldom" if info.seldom else ""),
                "on your own training": "only if asked for" if info.on_request else "",
                "measures at": every,
                "cost": info.cost,
                "checks beside it": ", ".join(f"[{id}](checks.md#{anchor(id)})" for id in checks),
            }
        ),
    )


def check(rule: Rule, known: Catalogue) -> str:
    """One rule."""
    causes = [c.id for c in known.causes.values() if rule.id in (*c.must, *c.may, *c.locate)]
    return section(
        rule.id,
        f"{rule.title}.",
        rule.doc,
        facts(
            {
                "reads": codes(rule.reads),
                "basis": rule.basis,
                "phase": rule.phase,
                "explained by": ", ".join(f"[{id}](causes.md#{anchor(id)})" for id in causes),
            }
        ),
    )


def cause(cause: Cause, known: Catalogue) -> str:
    """One cause."""
    injectors = [f.info.id for f in known.faults.values() if f.info.cause == cause.id]
    return section(
        cause.id,
        f"{cause.title}.",
        facts(
            {
                "must show": codes(cause.must),
                "may show": codes(cause.may),
                "cannot show": codes(cause.cannot),
                "placed by": codes(cause.locate),
                "otherwise placed at": code(cause.place) if cause.place else "",
                "injected by": codes(injectors) or "no fault",
                "repair": cause.repair,
                "not it, if": cause.refute,
                "look at": cause.look,
                "source": cause.source,
            }
        ),
    )


def plugin(cls: type[Plugin]) -> str:
    """One link to another tool."""
    info: Any = vars(cls)["info"]
    return section(info.id, f"{info.title}.", info.doc)


def command(name: str, command: click.Command) -> str:
    """One command, with its arguments and options."""
    given = [p for p in command.params if isinstance(p, click.Argument)]
    usage = " ".join(["lab", name, *(_argument(p) for p in given), "[OPTIONS]"])
    rows = [_option(p) for p in command.params if isinstance(p, click.Option)]
    options = table(("option", "value", "default", "what it does"), rows)
    return section(f"lab {name}", f"```text\n{usage}\n```", inspect.cleandoc(command.help or ""), options)


def _argument(param: click.Argument) -> str:
    name = (param.name or "").upper()
    return name if param.required else f"[{name}]"


def _option(param: click.Option) -> tuple[str, ...]:
    names = "/".join(map(code, (*param.opts, *param.secondary_opts)))
    shown = str(param.default) if param.show_default else ""
    if param.is_flag:
        chosen = param.opts if param.default else param.secondary_opts
        return names, "", code(chosen[0]) if shown and chosen else "", param.help or ""
    value = param.metavar or param.type.name
    if isinstance(param.type, click.IntRange):
        value = f"{param.type.min} to {param.type.max}"
    return names, value, code(shown) if shown else "", param.help or ""


def project(each: Project) -> str:
    """One project: its scenarios, what its component must do, and the numbers that its theory knows."""
    spec, numbers = (importlib.import_module(f"{each.module}.{name}") for name in ("spec", "measures"))
    names = [name for name, found in find_scenarios().items() if found.project == each.id]
    rows = [(code(p.name), p.meaning) for p in properties(spec)]
    known = [(code(m.name), m.title) for m in measures(numbers)]
    return section(
        f"{each.number}. {each.title}",
        f"`lab build {each.id}`: {each.builds}. Scenarios: {', '.join(map(code, sorted(names)))}.",
        table(("property", "what it means when it fails"), rows),
        table(("measure", "what it is; what theory says"), known),
    )


def anchor(heading: str) -> str:
    """Return the anchor that a heading gets on a rendered page."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


# ---------------------------------------------------------------- pages


def pages() -> dict[str, str]:
    """Return the text of each generated page, by its path in docs."""
    known = discover(folder=DOCS)
    parts = {
        "hooks": [hooks()],
        "faults": [fault(cls, known) for cls in known.faults.values()],
        "probes": [probe(cls, known) for cls in known.probes.values()],
        "checks": [check(rule, known) for rule in known.rules.values()],
        "causes": [cause(each, known) for each in known.causes.values()],
        "plugins": [plugin(cls) for cls in known.plugins.values()],
        "projects": [project(each) for each in PROJECTS if each.ready],
        "commands": [command(name, each) for name, each in cli.commands.items()],
    }
    text = {
        f"reference/{name}.md": f"# {name.capitalize()}\n\n{NOTE}\n\n" + "\n\n".join(p) for name, p in parts.items()
    }
    return {name: f"{page.rstrip()}\n" for name, page in text.items()} | {"scenarios.md": _scenarios()}


def _scenarios() -> str:
    """Return docs/scenarios.md with the table in it made anew; the rest of that page is written by hand."""
    written = (DOCS / "scenarios.md").read_text(encoding="utf-8")
    before, begin, rest = written.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"docs/scenarios.md: no place for the table; it needs the lines {BEGIN} and {END}")
    rows = table(("key", "type and bounds", "default", "meaning"), keys(Scenario.model_json_schema(by_alias=True)))
    return f"{before}{BEGIN}\n\n{rows}\n\n{END}{after}"


def main() -> int:
    """Write the pages, or with ``--check`` say which differ from what the code gives."""
    drifted = []
    for name, text in pages().items():
        path = DOCS / name
        if "--check" in sys.argv:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                drifted.append(name)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if drifted:
        print(f"not what the code says: {', '.join(drifted)}; run python docs/generate.py")
    return 1 if drifted else 0


if __name__ == "__main__":
    sys.exit(main())
