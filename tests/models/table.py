# SPDX-License-Identifier: Apache-2.0
"""docs/models.md, made of what the runs gave."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cells import Cell, FamilyRun
from schemes import SCHEMES

HEAD = """\
# Models

Families that are tested, each in five schemes. This page is written by a test
(`pytest tests/models --write-models`), and another run of it fails when the page no longer says what the code does.

A family is tested on a random checkpoint of two layers as transformers saves it, calibrated with a few samples of text, and
of text with images where the model takes images. A cell says what came of it:

- *runs*: the plan passes and `quant` writes a result. Every tensor of the source is quantized or copied to the bit; the
  result keeps the rules by which vLLM-Ascend reads ascendv1, as an independent reader checks them.
- *loads*: the result is opened and run again. Its logits are near those of the float model, and near those that
  transformers computes with the weights that the result stands for.

For every family, the forward unit by unit equals the whole forward of transformers to the bit.

W8A8 is static; routed experts are W8A8_DYNAMIC in it, since the engine has no static experts. W4A8_DYNAMIC of a mixture of
experts is that of its routed experts, the rest is W8A8_DYNAMIC. W4A16 has groups of 32. All linears of the layers and of
the towers take part but those that are named under "float"; embeddings, routers, norms and `lm_head` stay float anyway.
"""


def render(runs: Mapping[str, FamilyRun]) -> str:
    """The page."""
    notes: dict[str, int] = {}
    rows = [f"| family | adapter | float | {' | '.join(SCHEMES)} |", "|---" * (3 + len(SCHEMES)) + "|"]
    for name, run in runs.items():
        left = " ".join(f"`{pattern}`" for pattern in run.family.left_float)
        cells = [_cell(run.cell(scheme), notes) for scheme in SCHEMES]
        rows.append(f"| {name} | {run.adapter} | {left} | {' | '.join(cells)} |")
    listed = [f"{number}. {text}" for text, number in notes.items()]
    return "\n".join([HEAD, *rows, "", *(["Notes:", "", *listed, ""] if listed else [])])


def _cell(cell: Cell, notes: dict[str, int]) -> str:
    if cell.problems:
        return f"fails: {cell.problems[0]}"
    texts = [cell.refusal] if cell.refusal else list(dict.fromkeys(map(_short, cell.warnings)))
    numbers = [f"({notes.setdefault(text, len(notes) + 1)})" for text in texts]
    return " ".join(["no" if cell.refusal else "runs, loads", *numbers])


def _short(warning: str) -> str:
    """A warning without its place in the protocol and without the linears that it names."""
    text = re.sub(r"^\S+\.yaml:\d+:\d+: \S+: ", "", warning)
    return re.split(r"; | \(", text)[0]
