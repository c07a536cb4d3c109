# SPDX-License-Identifier: Apache-2.0
"""float8 key/value caches: one scale for the keys and one for the values of each attention."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modelslim.api import CacheInfo, ModelError, PlannedModel, Problem, QuantizedCache, SavedCache, TensorSpec

SPEC = TensorSpec("fp8_e4m3", "per_tensor")
"""What engines take for a cache."""

SCHEME: Mapping[str, Any] = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "symmetric": True,
    "dynamic": False,
    "group_size": None,
    "block_structure": None,
    "actorder": None,
    "observer": "minmax",
    "observer_kwargs": {},
}
"""``kv_cache_scheme`` of config.json."""

_SCALES = {"k_proj": "k_scale", "v_proj": "v_scale"}


def scale_name(stored: str) -> str:
    """Name of the scale of the cache that a linear fills: ``a.k_proj`` -> ``a.k_scale``."""
    attention, _, last = stored.rpartition(".")
    return f"{attention}.{_SCALES[last]}"


def encode_cache(cache: CacheInfo, module: QuantizedCache, model_dtype: str) -> Iterator[tuple[str, Tensor]]:
    """The only tensor of a cache: what is kept times the scale is the key or the value."""
    dtype: torch.dtype = getattr(torch, model_dtype)
    yield scale_name(cache.stored), module.scale.to(dtype)


def check_caches(model: PlannedModel) -> Iterator[Problem]:
    """Refuse what ``kv_cache_scheme``, which is one for all attentions, does not say."""
    if not model.caches:
        return
    first = next(iter(model.caches))
    kept = (SPEC.dtype, SPEC.scope)
    other = [(name, spec) for name, spec in model.cache_specs.items() if (spec.dtype, spec.scope) != kept]
    if other:
        name, spec = other[0]
        yield Problem(
            f"compressed-tensors has caches in fp8_e4m3 per_tensor only, and {name} becomes {spec.dtype} {spec.scope}",
            hint="use dtype fp8_e4m3 with scope per_tensor for the cache",
        )
    strange = [one.stored for one in model.caches.values() if one.stored.rpartition(".")[2] not in _SCALES]
    if strange:
        yield Problem(f"engines look for the scales of caches beside k_proj and v_proj, and {strange[0]} fills one")
    filled = {one.stored for one in model.caches.values()}
    # Towers have attentions of other names, and no cache.
    kinds = {_without_numbers(name) for name in filled}
    names = (one.stored for one in model.linears.values())
    left = next((name for name in names if name not in filled and _without_numbers(name) in kinds), None)
    if left is not None:
        yield Problem(
            f"engines quantize the caches of all attentions or of none, and that which {left} fills stays float",
            hint="include all attentions",
        )
    if not model.specs:
        yield Problem(
            f"engines read {first} of a model with quantized linears only, and there are none",
            hint="quantize some linears as well",
        )


def read_caches(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, SavedCache]:
    """The caches of a checkpoint, by the stored name of the linear that fills each.

    Args:
        config: ``quantization_config``.
        shapes: every tensor of the checkpoint with its shape.

    Raises:
        ModelError: config.json asks for other caches than those that are known here, or a scale is missing.
    """
    scheme = config.get("kv_cache_scheme")
    found = {
        f"{name.rpartition('.')[0]}.{linear}": name
        for name in sorted(shapes)
        for linear, scale in _SCALES.items()
        if name.rpartition(".")[2] == scale
    }
    if not scheme:
        if found:
            raise ModelError(f"{next(iter(found.values()))} is stored, and config.json has no kv_cache_scheme")
        return {}
    wanted = ("num_bits", "type", "strategy", "symmetric", "dynamic")
    if any(scheme.get(key) != SCHEME[key] for key in wanted):
        raise ModelError(f"kv_cache_scheme asks for caches that are not known here: {scheme}")
    if not found:
        raise ModelError("config.json has a kv_cache_scheme, and no k_scale is stored", hint="quantize again")
    attentions = {linear.rpartition(".")[0] for linear in found}
    absent = [name for name in (f"{one}.{part}" for one in attentions for part in _SCALES) if name not in found]
    if absent:
        raise ModelError(f"the scale {scale_name(min(absent))} of a cache is missing", hint="quantize again")
    return {linear: SavedCache(SPEC, (name,), partial(_decode, name)) for linear, name in found.items()}


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _decode(name: str, tensors: Mapping[str, Tensor]) -> QuantizedCache:
    scale = tensors[name].to(torch.float32).view(1)
    return QuantizedCache(SPEC, scale, torch.zeros(1, dtype=torch.int8))
