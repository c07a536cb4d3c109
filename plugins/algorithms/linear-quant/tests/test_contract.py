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
    {"dtype": "int3", "scope": "per_group", "group_size": 64, "symmetric": False},
    {"dtype": "int2", "scope": "per_group", "group_size": 32},
)
ACTIVATIONS = ({"dtype": "float"}, {"scope": "per_token"}, {"scope": "per_tensor"}, {"symmetric": True})
METHODS = (
    {"method": "ssz"},
    {"method": "ssz", "ext": {"error": "weight", "step": 20}},
    {"method": "mse"},
    {"method": "mse", "ext": {"error": "weight"}},
    {"method": "gptq"},
    {"method": "gptq", "ext": {"act_order": False, "range": "minmax", "block_size": 48}},
)
FLOATS: tuple[Mapping[str, Any], ...] = (
    {"act": {"scope": "pd_mix"}, "weight": {}},
    {"act": {"dtype": "int4", "scope": "per_token"}, "weight": {"dtype": "int4"}},
    {"act": {"dtype": "fp8_e4m3", "scope": "per_token"}, "weight": {"dtype": "fp8_e4m3"}},
    {"act": {"dtype": "fp8_e4m3"}, "weight": {"dtype": "fp8_e4m3"}},
    {"act": {"dtype": "fp8_e4m3", "scope": "per_block"}, "weight": {"dtype": "fp8_e4m3", "scope": "per_block"}},
    {"act": {"dtype": "mxfp8"}, "weight": {"dtype": "mxfp8"}},
    {"act": {"dtype": "mxfp8"}, "weight": {"dtype": "mxfp8", "method": "mse_round"}},
    {"act": {"dtype": "mxfp8"}, "weight": {"dtype": "mxfp4", "method": "mse"}},
    {"act": {"dtype": "mxfp4"}, "weight": {"dtype": "mxfp4", "method": "fouroversix"}},
    {"weight": {"dtype": "mxfp4", "method": "ceil_x"}},
    {"weight": {"dtype": "mxfp4", "method": "ceil_x", "ext": {"enable_search": True}}},
    {"act": {"dtype": "nvfp4"}, "weight": {"dtype": "nvfp4"}},
    {"act": {"dtype": "nvfp4"}, "weight": {"dtype": "nvfp4", "method": "mse", "ext": {"error": "weight"}}},
)
QCONFIGS = (
    *({"act": act, "weight": weight} for act in ACTIVATIONS for weight in WEIGHTS),
    *({"weight": {**weight, **method}} for method in METHODS for weight in WEIGHTS if "ext" not in weight),
    *({"act": {"method": "histogram", "symmetric": symmetric}, "weight": {}} for symmetric in (True, False)),
    {"act": {"method": "histogram"}, "weight": {"dtype": "int4", "method": "gptq"}},
    *FLOATS,
)


class TestLinearQuant(AlgorithmContract):
    @pytest.fixture(params=QCONFIGS, ids=str)
    def config(self, request: pytest.FixtureRequest) -> Mapping[str, Any]:
        return {"type": "linear_quant", "qconfig": request.param, "include": ["*"], "exclude": ["*k_proj"]}

    @pytest.fixture
    def promises_output(self, config: Mapping[str, Any]) -> bool:
        """All methods but those that look at the error of the weight alone."""
        return config["qconfig"]["weight"].get("ext", {}).get("error") != "weight"
