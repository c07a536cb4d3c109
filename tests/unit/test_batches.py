# SPDX-License-Identifier: Apache-2.0
"""Texts of equal length are joined, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modelslim import batches
from modelslim.activations import Boundary
from modelslim.batches import batched
from modelslim.run import quantize
from modelslim.runners import engine


def ids(*numbers: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([numbers])}


def test_equal_lengths_are_joined_in_the_order_of_the_first() -> None:
    found = batched([ids(1, 2), ids(3, 4, 5), ids(6, 7), ids(8), ids(9, 10, 11)])
    rows = [one["input_ids"].tolist() for one in found]
    assert rows == [[[1, 2], [6, 7]], [[3, 4, 5], [9, 10, 11]], [[8]]]


def test_batches_are_bounded_and_a_full_one_is_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MOST_TOKENS", 6)
    rows = [one["input_ids"].tolist() for one in batched([ids(n, n) for n in range(7)])]
    assert rows == [[[0, 0], [1, 1], [2, 2]], [[3, 3], [4, 4], [5, 5]], [[6, 6]]]


@pytest.mark.parametrize(
    "other",
    [
        [torch.tensor([[1, 2]])],
        {**ids(1, 2), "pixel_values": torch.ones(4, 4)},
        {"input_ids": torch.tensor([1, 2])},
        {"input_ids": torch.tensor([[1, 2], [3, 4]])},
        {"input_ids": [[1, 2]]},
        {"inputs_embeds": torch.ones(1, 2, 8)},
    ],
    ids=["arguments", "image", "no batch dimension", "two rows", "a list", "embeddings"],
)
def test_what_is_more_than_tokens_stays_as_it_is(other: Any) -> None:
    found = batched([ids(1, 2), other, ids(3, 4), other])
    assert len(found) == 3 and found[1] is other and found[2] is other


def test_masks_are_joined_with_their_tokens() -> None:
    both = [{**ids(1, 2), "attention_mask": torch.tensor([[n, 1]])} for n in (0, 1)]
    (found,) = batched([*both])
    assert found["attention_mask"].tolist() == [[0, 1], [1, 1]]
    assert len(batched([both[0], ids(1, 2)])) == 2  # with a mask and without are two forms


def test_a_run_on_batches_finds_what_one_on_single_samples_finds(
    tiny_llama: Path, protocol: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges of activations, which batches change by the rounding of bfloat16 kernels at most."""
    data = tmp_path / "data.jsonl"
    letters = torch.randint(0, 7, (12, 32), generator=torch.Generator().manual_seed(0)).tolist()
    texts = ["".join("QXZJKVW"[number] for number in row) for row in letters]  # a token each, for this tokenizer
    data.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    config = protocol(
        "apiversion: modelslim_v1\nspec:\n  process:\n    - type: linear_quant\n"
        "      qconfig: {act: {scope: per_tensor}, weight: {dtype: int8}}\n"
        f"  save: [{{type: ascendv1_saver}}]\n  dataset: {data}\n"
    )
    counts: list[int] = []
    make = Boundary.__init__

    def counted(boundary: Boundary, session: Any, model: Any, inputs: Any, *rest: Any) -> None:
        counts.append(len(inputs))
        make(boundary, session, model, inputs, *rest)

    monkeypatch.setattr(Boundary, "__init__", counted)
    together = quantize(tiny_llama, tmp_path / "together", config, device="cpu")
    monkeypatch.setattr(engine, "batched", list)
    single = quantize(tiny_llama, tmp_path / "single", config, device="cpu")
    assert [count for count in counts if count in (1, 12)][-2:] == [1, 12]
    assert [unit["tokens"] for unit in together["units"]] == [unit["tokens"] for unit in single["units"]]
    one, other = (next(iter((tmp_path / name).glob("*.safetensors"))) for name in ("together", "single"))
    left, right = load_file(one), load_file(other)
    scales = [name for name in left if name.endswith("input_scale")]
    assert scales
    for name in scales:
        assert torch.allclose(left[name], right[name], rtol=0.02), name
