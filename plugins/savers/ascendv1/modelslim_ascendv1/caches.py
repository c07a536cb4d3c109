# SPDX-License-Identifier: Apache-2.0
"""C8: int8 key/value caches, stored as scales and offsets beside the linears that fill them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from modelslim.api import CacheInfo, ModelError, PlannedModel, Problem, QuantizedCache, SavedCache, TensorSpec

CACHE_TYPE = "C8"
SCALE, OFFSET = "kv_cache_scale", "kv_cache_offset"

GLOBAL = {"kv_cache_type": CACHE_TYPE, "kv_quant_type": CACHE_TYPE}
"""What the description says of the whole model: the first key is the engine's, the second that of the existing tool."""


def encode_cache(cache: CacheInfo, module: QuantizedCache) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a cache: q = clamp(round(x / scale + offset)), x = (q - offset) * scale, channel by channel."""
    for part, tensor in ((SCALE, module.scale), (OFFSET, module.offset)):
        yield f"{cache.stored}.{part}", tensor.to(torch.float32).expand(cache.channels).contiguous()


def cache_sizes(cache: CacheInfo) -> Mapping[str, int]:
    """Bytes of each tensor."""
    return {f"{cache.stored}.{part}": 4 * cache.channels for part in (SCALE, OFFSET)}


def check_caches(model: PlannedModel) -> Iterator[Problem]:
    """Refuse what is not int8."""
    others = {name: spec.dtype for name, spec in model.cache_specs.items() if spec.dtype != "int8"}
    if others:
        name, dtype = next(iter(others.items()))
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        yield Problem(f"ascendv1 has no type for {dtype} caches ({name}{more})", hint="use int8 for the cache")


def read_caches(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, SavedCache]:
    """The caches of a checkpoint, by the stored name of the linear that fills each.

    Raises:
        ModelError: scale or offset is missing, or their shapes differ.
    """
    names = {name.rpartition(".")[0] for name in shapes if name.endswith((f".{SCALE}", f".{OFFSET}"))}
    found = {}
    for name in sorted(names):
        parts = (f"{name}.{SCALE}", f"{name}.{OFFSET}")
        absent = [part for part in parts if part not in shapes]
        if absent or shapes[parts[0]] != shapes[parts[1]]:
            raise ModelError(
                f"the cache that {name} fills has no {absent[0]}"
                if absent
                else f"{parts[0]} has shape {shapes[parts[0]]}, and {parts[1]} {shapes[parts[1]]}",
                hint="the checkpoint is damaged; quantize again",
            )
        spec = TensorSpec("int8", "per_channel", symmetric=False)
        found[name] = SavedCache(spec, parts, partial(_decode, spec))
    return found


def _decode(spec: TensorSpec, tensors: Mapping[str, Tensor]) -> QuantizedCache:
    scale, offset = tensors.values()
    return QuantizedCache(spec, scale.to(torch.float32), offset.to(torch.int8))
