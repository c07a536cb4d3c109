# SPDX-License-Identifier: Apache-2.0
"""The contract of algorithms, for every scheme and every method."""

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
METHODS = (
    {"method": "ssz"},
    {"method": "mse"},
    {"method": "mse", "ext": {"error": "weight"}},
    {"method": "gptq"},
    {"method": "gptq", "ext": {"act_order": False, "range": "minmax", "block_size": 48}},
)
QCONFIGS = (
    *({"act": act, "weight": weight} for act in ACTIVATIONS for weight in WEIGHTS),
    *({"weight": {**weight, **method}} for method in METHODS for weight in WEIGHTS if "ext" not in weight),
    *({"act": {"method": "histogram", "symmetric": symmetric}, "weight": {}} for symmetric in (True, False)),
    {"act": {"method": "histogram"}, "weight": {"dtype": "int4", "method": "gptq"}},
)


class TestLinearQuant(AlgorithmContract):
    @pytest.fixture(params=QCONFIGS, ids=str)
    def config(self, request: pytest.FixtureRequest) -> Mapping[str, Any]:
        return {"type": "linear_quant", "qconfig": request.param, "include": ["*"], "exclude": ["*k_proj"]}
