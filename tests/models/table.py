# SPDX-License-Identifier: Apache-2.0
"""docs/models.md, made of what the runs gave."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cells import Cell, FamilyRun
from schemes import SCHEMES

HEAD = """\
# Models

Families that are tested, each in five schemes. A test writes this page (`pytest tests/models --write-models`), and
fails when the page no longer says what the code does.

A family is tested on a random checkpoint of two or three layers as transformers saves it, or as its publisher does
where the two differ. It is calibrated with a few samples of text, and of text with images and sounds where the model
takes them. A cell says what came of it:

- *runs*: the plan passes and `quant` writes a result. Every tensor of the source is quantized, or copied to the bit.
  The result keeps the rules by which vLLM-Ascend reads ascendv1, checked by a reader that is independent of the saver.
- *loads*: the result is opened again and run. Its logits are near those of the float model, and near those that
  transformers computes with the weights that the result stands for. No engine takes part in this.
- *no*: the plan or the run refuses it; the note has the words of the refusal.

A note behind *runs, loads* is a warning of the plan. For every family, the forward unit by unit equals the whole
forward of transformers to the bit. The checkpoints of DeepSeek and of GLM with experts have a layer of multi-token
prediction, which is quantized too; that of glm4v_moe is copied.

W8A8 is static; routed experts are W8A8_DYNAMIC in it, since the engine has no static experts. W4A8_DYNAMIC of a model
with routed experts is W4A8_DYNAMIC in these and W8A8_DYNAMIC elsewhere. W4A16 has groups of 32. All linears of the
layers and of the towers take part except those in the column "excluded"; embeddings, routers, norms and `lm_head` stay
float anyway.
"""


def render(runs: Mapping[str, FamilyRun]) -> str:
    """The page."""
    notes: dict[str, int] = {}
    rows = [f"| family | adapter | excluded | {' | '.join(SCHEMES)} |", "|---" * (3 + len(SCHEMES)) + "|"]
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
    text = re.sub(r" \[[^\[\]]*\]", "", text)  # where the contract of an engine says so
    return re.sub(r" \([^()]*\)", "", text).partition("; ")[0]
