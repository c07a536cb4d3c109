# SPDX-License-Identifier: Apache-2.0
"""Which attentions keep keys and values head by head in a cache: found by calling those of a tiny model with one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from modelslim.api import AttentionCache
from modelslim_transformers.topology_layouts import head_size

KEYS, VALUES = "k_proj", "v_proj"


def candidates(model: nn.Module) -> Iterator[AttentionCache]:
    """Attentions with a linear for keys and one for values, under the names that formats use."""
    for name, module in model.named_modules():
        keys, values = (getattr(module, part, None) for part in (KEYS, VALUES))
        size = head_size(module)
        if isinstance(keys, nn.Linear) and isinstance(values, nn.Linear) and size:
            rows = keys.out_features
            if rows == values.out_features and not rows % size:
                yield AttentionCache(name, f"{name}.{KEYS}", f"{name}.{VALUES}", rows // size, size)


def proven_kinds(tiny: nn.Module, inputs: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Classes of the attentions of a tiny model that show all their keys and values to a cache, and compute the same.

    Args:
        tiny: the model, loaded.
        inputs: arguments of its forward, one mapping per sample.
    """
    before = _outputs(tiny, inputs)
    recorders = {one.attention: _Recorder(one) for one in candidates(tiny)}
    handles = [
        tiny.get_submodule(name).register_forward_pre_hook(recorder.enter, with_kwargs=True)
        for name, recorder in recorders.items()
    ]
    try:
        after = _outputs(tiny, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not all(map(torch.equal, before, after)):
        return frozenset()
    works: dict[str, bool] = {}
    for name, recorder in recorders.items():
        kind = kind_of(tiny.get_submodule(name))
        works[kind] = works.get(kind, True) and recorder.complete
    return frozenset(kind for kind, all_of_them in works.items() if all_of_them)


def kind_of(attention: nn.Module) -> str:
    """What attentions of one behaviour have in common."""
    return type(attention).__qualname__


class _Recorder:
    """Stands for the cache of one attention."""

    def __init__(self, cache: AttentionCache) -> None:
        self._cache = cache
        self._calls = 0
        self._updates = 0

    @property
    def complete(self) -> bool:
        """True when every call of the attention showed keys and values of all heads."""
        return 0 < self._calls == self._updates

    def enter(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self._calls += 1
        return args, {**kwargs, "past_key_values": self}

    def update(self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        expected = (self._cache.heads, self._cache.head_size)
        self._updates += all(x.dim() == 4 and (x.shape[1], x.shape[3]) == expected for x in (keys, values))
        return keys, values


def _outputs(model: nn.Module, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    with torch.no_grad():
        answers = [model(**sample, use_cache=False) for sample in inputs]
    return [leaf for answer in answers for leaf in tree_leaves(answer) if isinstance(leaf, Tensor)]
