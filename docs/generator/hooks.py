# SPDX-License-Identifier: Apache-2.0
"""The reference of hooks, from the docstrings of the hook specifications."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from textwrap import dedent
from typing import Any

from generator.words import code, heading, prose, row, rows
from modelslim import hookspecs

_SECTIONS = re.compile(r"^(Args|Returns|Raises|Example):{1,2}\n", re.MULTILINE)
_ENTRY = re.compile(r"^(\w+): ", re.MULTILINE)


def hooks_page() -> str:
    """Every hook with its arguments, its answer and an example."""
    found = {
        name: (hook, getattr(hook, f"{hookspecs.PROJECT}_spec"))
        for name, hook in vars(hookspecs).items()
        if hasattr(hook, f"{hookspecs.PROJECT}_spec")
    }
    lines = [
        heading(1, "Hooks"),
        "What an adapter, or a vendor plugin, implements with `modelslim.api.hookimpl`. An implementation takes the",
        "arguments that it wants, by their names, without defaults. [Writing a plugin](../plugins.md) says how they",
        "come together.",
        "",
    ]
    table = [
        row(f"[{name}](#{name})", prose(_sections(hook)[""].partition("\n\n")[0]), _who(spec))
        for name, (hook, spec) in found.items()
    ]
    lines += rows(("hook", "purpose", "who answers"), table)
    for name, (hook, _) in found.items():
        lines += ["", *_hook(name, hook)]
    return "\n".join(lines) + "\n"


def _who(spec: Any) -> str:
    return "one" if spec["firstresult"] else "all are called"


def _sections(hook: Callable[..., Any]) -> dict[str, str]:
    """The parts of the docstring by title; the text before the first one under the empty title."""
    parts = _SECTIONS.split(inspect.getdoc(hook) or "")
    titles = ["", *parts[1::2]]
    return {title: dedent(text).strip() for title, text in zip(titles, parts[0::2], strict=True)}


def _hook(name: str, hook: Callable[..., Any]) -> Iterator[str]:
    sections = _sections(hook)
    yield heading(2, name)
    signature = inspect.signature(hook)
    yield f"```python\n{name}{signature}\n```\n".replace("'", "")
    yield prose(sections[""])
    if text := sections.get("Args"):
        parts = _ENTRY.split(text)
        yield ""
        yield from rows(
            ("argument", "meaning"),
            (row(code(word), prose(meaning)) for word, meaning in zip(parts[1::2], parts[2::2], strict=True)),
        )
    for title in ("Returns", "Raises"):
        if text := sections.get(title):
            yield f"\n**{title}:** {prose(' '.join(text.split()))}"
    if text := sections.get("Example"):
        yield f"\n```python\n{text}\n```"
