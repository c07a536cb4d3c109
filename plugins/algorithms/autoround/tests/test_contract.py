# SPDX-License-Identifier: Apache-2.0
"""The contract of algorithms, for every scheme and start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from modelslim.testing.algorithm import AlgorithmContract

ENTRIES: tuple[tuple[Mapping[str, Any], Mapping[str, Any]], ...] = (
    ({"weight": {"dtype": "int4"}}, {"start": "minmax"}),
    ({"weight": {"dtype": "int4"}, "act": {"scope": "per_token"}}, {"start": "mse"}),
    ({"weight": {"dtype": "int4", "scope": "per_group", "group_size": 64}, "act": {"dtype": "float"}}, {}),
    (
        {
            "weight": {"dtype": "int4", "scope": "per_group", "ext": {"group_size": 32}, "symmetric": False},
            "act": {"scope": "per_tensor"},
        },
        {"enable_round_tuning": False},
    ),
    ({"weight": {"dtype": "int8", "symmetric": False}}, {"iters": 0}),
    ({"weight": {"dtype": "int3", "scope": "per_group", "group_size": 64}}, {}),
    ({"weight": {"dtype": "int2", "scope": "per_group", "group_size": 32, "symmetric": False}}, {}),
)


class TestAutoRoundQuant(AlgorithmContract):
    @pytest.fixture(params=ENTRIES, ids=str)
    def config(self, request: pytest.FixtureRequest) -> Mapping[str, Any]:
        qconfig, fields = request.param
        strategy = {"qconfig": qconfig, "include": ["*"], "exclude": ["*k_proj"]}
        return {"type": "autoround_quant", "iters": 3, **fields, "strategies": [strategy]}

    @pytest.fixture
    def promises_output(self) -> bool:
        """It ends with the best that it saw, and it began with rounding to nearest."""
        return True
