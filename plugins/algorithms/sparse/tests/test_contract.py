# SPDX-License-Identifier: Apache-2.0
"""Both processors keep the contract of algorithms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from modelslim.testing.algorithm import AlgorithmContract


class TestFloatSparse(AlgorithmContract):
    """The contract, for entries that use every field."""

    @pytest.fixture(
        params=[{"sparse_ratio": 0.5, "exclude": ["lm_head"]}, {"sparse_ratio": 0.0}, {"include": ["*proj"]}]
    )
    def config(self, request: pytest.FixtureRequest) -> Mapping[str, Any]:
        """Entries of ``process``."""
        return {"type": "float_sparse", **request.param}


class TestLowbitSparse(AlgorithmContract):
    """The contract, for entries that use every field."""

    @pytest.fixture(
        params=[
            {"fraction": 0.05, "symmetric": True, "include": ["*mlp*", "*q_proj"], "exclude": ["*k_proj"]},
            {"fraction": 0.0},
            {},
        ]
    )
    def config(self, request: pytest.FixtureRequest) -> Mapping[str, Any]:
        """Entries of ``process``."""
        return {"type": "lowbit_sparse", **request.param}
