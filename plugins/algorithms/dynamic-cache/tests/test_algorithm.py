# SPDX-License-Identifier: Apache-2.0
"""Which caches are selected, and their scales against ranges that were computed in float64."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest
import torch

from modelslim.api import CacheInfo, ChannelRange, QuantizationError, TensorSpec, Unit, UnitStatistics
from modelslim_dynamic_cache.algorithm import DynamicCache

CACHES = [
    CacheInfo(f"model.layers.{layer}.self_attn.{part}", f"model.layers.{layer}.self_attn", "", "", 2, 3)
    for layer in range(2)
    for part in ("k_cache", "v_cache")
]
NAME = CACHES[0].name


def quantize(x: torch.Tensor | None, **qconfig: object) -> tuple[torch.Tensor, torch.Tensor]:
    algorithm = DynamicCache.from_config({"type": "dynamic_cache", "qconfig": qconfig})
    spec = algorithm.select_caches(CACHES)[NAME]
    unit = Unit("model.layers.0", {}, {}, caches={NAME: spec})
    assert algorithm.needs(unit) == {NAME: frozenset({ChannelRange})}
    seen = ChannelRange()
    if x is not None:
        seen.update(x)
    cache = algorithm.quantize_caches(unit, UnitStatistics({NAME: {ChannelRange: seen}}))[NAME]
    return cache.scale, cache.offset


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7) + 0.5


def test_defaults_are_those_of_the_schema() -> None:
    schema = json.loads(files("modelslim_dynamic_cache").joinpath("dynamic_cache.schema.json").read_text())
    fields = schema["properties"]["qconfig"]["properties"]
    defaults = {name: field["default"] for name, field in fields.items()}
    assert defaults.pop("method") == "minmax"
    chosen = DynamicCache.from_config({"type": "dynamic_cache"}).select_caches(CACHES)
    assert set(chosen.values()) == {TensorSpec(**defaults)}
    assert set(chosen) == {one.name for one in CACHES}


def test_include_and_exclude_are_patterns_of_attentions() -> None:
    config = {"type": "dynamic_cache", "include": ["*layers.*"], "exclude": ["*.1.self_attn"]}
    algorithm = DynamicCache.from_config(config)
    assert set(algorithm.select_caches(CACHES)) == {CACHES[0].name, CACHES[1].name}
    assert [pattern for _, pattern in algorithm.patterns()] == ["*layers.*", "*.1.self_attn"]


@pytest.mark.parametrize(("dtype", "largest"), [("int8", 127), ("fp8_e4m3", 448)])
@pytest.mark.parametrize("scope", ["per_channel", "per_tensor"])
def test_symmetric_scale(dtype: str, largest: int, scope: str, x: torch.Tensor) -> None:
    scale, offset = quantize(x, dtype=dtype, scope=scope)
    absmax = x.double().abs().amax(0) if scope == "per_channel" else x.double().abs().amax().view(1)
    assert torch.allclose(scale.double(), absmax / largest, rtol=1e-6)
    assert offset.shape == scale.shape
    assert not offset.any()


@pytest.mark.parametrize("scope", ["per_channel", "per_tensor"])
def test_scale_and_offset(scope: str, x: torch.Tensor) -> None:
    scale, offset = quantize(x, scope=scope, symmetric=False)
    low, high = (
        (x.double().amin(0), x.double().amax(0)) if scope == "per_channel" else (x.double().min(), x.double().max())
    )
    assert torch.allclose(scale.double(), (high - low) / 255, rtol=1e-6)
    assert torch.equal(offset.double(), (-128 - (low / scale.double()).round()).view(offset.shape))


def test_cache_that_saw_no_token_or_nan_is_an_error(x: torch.Tensor) -> None:
    with pytest.raises(QuantizationError, match="no calibration token"):
        quantize(None)
    x[3, 2] = torch.nan
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        quantize(x)
