# SPDX-License-Identifier: Apache-2.0
"""Writes the reference pages of the documentation from what the program itself says, and tells when they are stale.

``python docs/generate.py`` writes docs/reference; ``--check`` compares instead, and exits with 1 when a page differs.
The pages show what this source tree ships: other installed plugins are left out. All of it must be installed.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import tomllib

from generator.commands import commands_page
from generator.errors import errors_page
from generator.hooks import hooks_page
from generator.schemas import protocol_page
from generator.words import heading, row, rows
from modelslim.registry import KINDS, RESTRICT, Registry

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "reference"


def shipped() -> list[str]:
    """Names of the distributions of this source tree that hold plugins."""
    files = sorted(ROOT.glob("plugins/*/*/pyproject.toml"))
    return [tomllib.loads(file.read_text(encoding="utf-8"))["project"]["name"] for file in files]


def plugins_page(registry: Registry) -> str:
    """What the distributions of this source tree offer, by kind."""
    lines = [
        heading(1, "Plugins that ship"),
        "`modelslim plugins` says the same of an installation, with versions, and whether each works.",
        "[Writing a plugin](../plugins.md) says how one is made.",
    ]
    for kind, facts in KINDS.items():
        found = [entry for entry in registry.entries if entry.kind == kind]
        lines += ["", heading(2, f"modelslim.{kind}"), f"An entry names a {facts.noun}.", ""]
        if not found:
            lines.append("None ships.")
            continue
        by_distribution: dict[str, list[str]] = {}
        for entry in found:
            by_distribution.setdefault(entry.distribution, []).append(f"`{entry.name}`")
        table = [
            row(", ".join(names), f"`{name}`", metadata.metadata(name)["Summary"])
            for name, names in sorted(by_distribution.items())
        ]
        lines += rows(("name", "distribution", "what it is"), table)
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Text of every reference page, by file name."""
    registry = Registry.scan({RESTRICT: ",".join(shipped())})
    return {
        "commands.md": commands_page(),
        "errors.md": errors_page(),
        "hooks.md": hooks_page(),
        "plugins.md": plugins_page(registry),
        "protocol.md": protocol_page(registry),
    }


def stale(wanted: dict[str, str]) -> list[str]:
    """Names of pages that are missing, differ, or should not be there."""
    there = {file.name: file.read_text(encoding="utf-8") for file in TARGET.glob("*.md")}
    return sorted(name for name in {*there, *wanted} if there.get(name) != wanted.get(name))


def main(arguments: list[str]) -> int:
    """Write the pages, or with ``--check`` compare them; the exit code."""
    if arguments not in ([], ["--check"]):
        print("usage: python docs/generate.py [--check]", file=sys.stderr)
        return 2
    wanted = pages()
    differing = stale(wanted)
    if arguments:
        for name in differing:
            print(f"docs/reference/{name} is stale: run `python docs/generate.py`", file=sys.stderr)
        return 1 if differing else 0
    TARGET.mkdir(exist_ok=True)
    for name in differing:
        if name in wanted:
            (TARGET / name).write_text(wanted[name], encoding="utf-8")
        else:
            (TARGET / name).unlink()
        print(f"docs/reference/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
