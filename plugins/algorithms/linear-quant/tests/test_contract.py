# SPDX-License-Identifier: Apache-2.0
"""The contract of algorithms, for every scheme."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from modelslim.testing.algorithm import AlgorithmContract

WEIGHTS = (
    {"dtype": "int8"},
    {"dtype": "int8", "symmetric": False},
    {"dtype": "int4", "scope": "per_group", "group_size": 64},
    {"dtype": "int4", "scope": "per_group", "ext": {"group_size": 32}, "symmetric": False},
)
ACTIVATIONS = ({"dtype": "float"}, {"scope": "per_token"}, {"scope": "per_tensor"}, {"symmetric": True})


class TestLinearQuant(AlgorithmContract):
    @pytest.fixture(params=[{"act": act, "weight": weight} for act in ACTIVATIONS for weight in WEIGHTS], ids=str)
    def config(self, request: pytest.FixtureRequest) -> Mapping[str, Any]:
        return {"type": "linear_quant", "qconfig": request.param, "include": ["*"], "exclude": ["*k_proj"]}
