# SPDX-License-Identifier: Apache-2.0
"""What the saver says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from modelslim.api import PlannedModel, QuantSpec
from modelslim_compressed_tensors.saver import CompressedTensorsSaver


@pytest.mark.parametrize(
    ("config", "limit"),
    [({}, 4 << 30), ({"part_file_size": 0}, 0), ({"part_file_size": 0.5}, 1 << 29), ({"part_file_size": 1e-12}, 1)],
)
def test_part_file_size_is_in_gib_and_only_zero_means_one_file(config: dict[str, Any], limit: int) -> None:
    saver = CompressedTensorsSaver.from_config({"type": "compressed_tensors_saver", **config})
    assert saver.max_shard_bytes == limit
    assert saver.weights_name(PlannedModel({}, "bfloat16", {}, {}, frozenset())) == "model"


def test_scales_are_held_in_the_dtype_of_the_model_unless_they_are_made_at_run_time(
    scheme: str, specs: Mapping[str, QuantSpec]
) -> None:
    weight, activation = CompressedTensorsSaver().scale_dtypes(specs[scheme], "bfloat16")
    assert weight == "bfloat16"
    assert activation == ("bfloat16" if specs[scheme].is_static else "float32")


def test_the_format_has_no_file_of_its_own() -> None:
    assert CompressedTensorsSaver().finish([], PlannedModel({}, "bfloat16", {}, {}, frozenset())) == {}
    assert not CompressedTensorsSaver.stores_multipliers
