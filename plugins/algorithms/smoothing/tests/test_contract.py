# SPDX-License-Identifier: Apache-2.0
"""The contract of algorithms, for every entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from modelslim.testing.algorithm import AlgorithmContract

W8A8 = {"act": {"scope": "per_token"}, "weight": {"dtype": "int8"}}
W4 = {"dtype": "int4", "scope": "per_group", "group_size": 32}
ENTRIES: list[dict[str, Any]] = [
    {"type": "smooth_quant", "alpha": 0.6},
    {"type": "smooth_quant", "symmetric": False, "include": None},
    {"type": "iter_smooth", "alpha": 0.8, "scale_min": 1e-4, "enable_subgraph_type": ["norm-linear", "ov"]},
    {"type": "iter_smooth", "symmetric": False, "include": ["*"], "exclude": ["*k_proj"]},
    {"type": "flex_smooth_quant", "alpha": None, "beta": 0.5, "qconfig": W8A8},
    {"type": "flex_awq_ssz", "qconfig": {"weight": {**W4, "method": "ssz", "ext": {"step": 10}}}},
    {"type": "awq", "weight_qconfig": W4, "n_grid": 10},
]


class TestSmoothing(AlgorithmContract):
    edits_weights = True

    @pytest.fixture(params=ENTRIES, ids=str)
    def config(self, request: pytest.FixtureRequest) -> Mapping[str, Any]:
        return request.param
