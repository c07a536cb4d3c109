# SPDX-License-Identifier: Apache-2.0
"""The rows of a plan where experts are one weight in the model, against the files that a run writes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from modelslim.plan import make_plan
from modelslim.plan_rows import _ranges, rows
from modelslim.plan_table import others
from modelslim.run import quantize

WriteProtocol = Callable[[str], Path]


def bytes_by_row(folder: Path, pattern: str) -> int:
    tensors = {name: one.nbytes for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}
    owner = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    return sum(nbytes for name, nbytes in tensors.items() if owner.fullmatch(name.rpartition(".")[0]))


def test_rows_of_experts_are_as_large_as_the_files_say(
    tiny_moe: Path, protocol: WriteProtocol, w8a8_dynamic: str, tmp_path: Path
) -> None:
    config = protocol(w8a8_dynamic.replace('include: ["*"]', 'include: ["*"]\n      exclude: ["*layers.1.*experts*"]'))
    plan = make_plan(tiny_moe, config, device="cpu")
    found = rows(plan)
    quantize(tiny_moe, tmp_path / "out", config, device="cpu")
    up = [row for row in found if row.pattern == "model.layers.*.mlp.experts.*.up_proj"]
    assert [(row.layers, row.scheme, row.count) for row in up] == [("0", "W8A8_DYNAMIC", 4), ("1", "FLOAT", 4)]
    for pattern in {row.pattern for row in found}:
        alike = [row for row in found if row.pattern == pattern]
        name = pattern.removesuffix(".weight")
        assert sum(row.bytes_before for row in alike) == bytes_by_row(tiny_moe, name), pattern
        assert sum(row.bytes_after for row in alike) == bytes_by_row(tmp_path / "out", name), pattern
    (router,) = [row for row in found if row.pattern.startswith("model.layers.*.mlp.gate")]
    assert (router.layers, router.count, router.bits) == ("0-1", 2, 16)
    assert all(nbytes > 0 for nbytes in others(plan, found).values())


def test_a_tied_head_has_no_bytes_and_says_why(
    tiny_llama_tied: Path, protocol: WriteProtocol, w8a8_dynamic: str
) -> None:
    found = rows(make_plan(tiny_llama_tied, protocol(w8a8_dynamic), device="cpu"))
    (head,) = [row for row in found if row.pattern == "lm_head"]
    assert (head.bytes_before, head.bytes_after, head.bits) == (0, 0, None)
    assert head.why == "not stored: it is tied to another weight"


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([None], ""), ([3], "3"), ([2, 0, 1, 5, 5], "0-2, 5"), ([0, 2], "0, 2")]
)
def test_numbers_in_a_row_are_a_range(numbers: list[int | None], text: str) -> None:
    assert _ranges(numbers) == text
