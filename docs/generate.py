"""Writes docs/reference from the code, so that it cannot drift: ``python docs/generate.py [--check]``."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import click

from lab import hookspecs
from lab.catalogue import parameters
from lab.cli import cli
from lab.manager import HOOKS, discover

OUT = Path(__file__).parent / "reference"
NOTE = "<!-- Made by docs/generate.py from the code. Change the code, then run it again. -->\n\n"


def _section(name: str, title: str, facts: dict[str, Any], doc: str = "") -> str:
    lines = [f"## `{name}`\n\n{title}\n"]
    lines += [f"- **{key}:** {value}" for key, value in facts.items() if value not in ("", (), None)]
    return "\n".join(lines) + (f"\n\n{doc}\n" if doc else "\n")


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _help(name: str, command: click.Command) -> str:
    return command.get_help(click.Context(command, info_name=f"lab {name}", max_content_width=100))


def pages() -> dict[str, str]:
    """Return the text of each page by its name."""
    known = discover()
    hooks = [name for name in vars(hookspecs) if name in HOOKS]
    text = {
        "hooks": [
            _section(
                f"{name}{inspect.signature(getattr(hookspecs, name))}".replace("'", ""),
                inspect.getdoc(getattr(hookspecs, name)) or "",
                {},
            )
            for name in hooks
        ],
        "faults": [
            _section(
                id,
                cls.info.title,
                {
                    "cause": f"`{cls.info.cause}`",
                    "moves": f"`{cls.info.moves}`",
                    "parameters": "; ".join(f"`{f.name}: {f.type}`" for f in parameters(cls).values()),
                    "repair": cls.info.repair,
                },
                cls.info.doc,
            )
            for id, cls in known.faults.items()
        ],
        "probes": [
            _section(
                id,
                cls.info.title,
                {
                    "kind": "examines" if cls.info.examines else "watches",
                    "every": f"{cls.info.every} steps" if cls.info.every > 1 else "",
                    "cost": cls.info.cost,
                    "checks": _listed(tuple(r.id for r in known.rules.values() if id in known.beside(r))),
                },
                cls.info.doc,
            )
            for id, cls in known.probes.items()
        ],
        "checks": [
            _section(r.id, r.title, {"basis": r.basis, "reads": _listed(r.reads)}, r.doc) for r in known.rules.values()
        ],
        "causes": [
            _section(
                c.id,
                c.title,
                {
                    "must show": _listed(c.must),
                    "may show": _listed(c.may),
                    "cannot show": _listed(c.cannot),
                    "repair": c.repair,
                    "refuted by": c.refute,
                    "look at": c.look,
                    "source": c.source,
                },
            )
            for c in known.causes.values()
        ],
        "plugins": [_section(id, cls.info.title, {}, cls.info.doc) for id, cls in known.plugins.items()],  # type: ignore[attr-defined]
        "commands": [
            f"## `lab {name}`\n\n```text\n{_help(name, command)}\n```\n" for name, command in cli.commands.items()
        ],
    }
    return {name: f"# {name.capitalize()}\n\n{NOTE}" + "\n".join(parts) for name, parts in text.items()}


def main() -> int:
    """Write the pages, or with ``--check`` say which differ from what the code gives."""
    drifted = []
    for name, text in pages().items():
        path = OUT / f"{name}.md"
        if "--check" in sys.argv:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                drifted.append(path.name)
        else:
            OUT.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if drifted:
        print(f"not what the code says: {', '.join(drifted)}; run python docs/generate.py")
    return 1 if drifted else 0


if __name__ == "__main__":
    sys.exit(main())
