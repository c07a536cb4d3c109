# SPDX-License-Identifier: Apache-2.0
"""Quantized key/value caches: the places where keys and values enter a cache, and what stands there.

Models run without a cache here. An attention that is called without one gets a stand-in that keeps nothing and
shows what would enter it to two modules of the attention, ``k_cache`` and ``v_cache``: they are measured like the
input of a linear, and replaced by what an engine does to keys and values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from modelslim.errors import ModelError
from modelslim.model_info import ModelInfo
from modelslim.scales import from_codes, to_codes
from modelslim.types import AttentionCache, CacheInfo, TensorSpec

PARTS = ("k_cache", "v_cache")
"""Names of the places in an attention, of keys and of values."""


class CachePlace(nn.Module):
    """Where keys or values enter a cache, in their own precision."""

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, channels], as it is."""
        return x


class QuantizedCache(nn.Module):
    """Keys or values in few bits: what comes out of the cache of an engine.

    Args:
        spec: ``per_channel``, or ``per_tensor`` with one scale for all channels.
        scale: float32 [channels] or [1].
        offset: int8 [channels] or [1]; zero when symmetric.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, spec: TensorSpec, scale: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, channels] -> ``(clamp(round(x / scale) + offset) - offset) * scale``, of the same dtype."""
        steps = x.float() / self.scale
        if not self.spec.symmetric:
            steps = steps.round_().add_(self.offset)
        values = from_codes(to_codes(steps, self.spec), self.spec)
        if not self.spec.symmetric:
            values -= self.offset
        return values.mul_(self.scale).to(x.dtype)

    def extra_repr(self) -> str:
        """Channels and scheme, for ``print(model)``."""
        return f"channels={len(self.scale)}, dtype={self.spec.dtype}"


def find_places(caches: Iterable[AttentionCache], info: ModelInfo) -> list[CacheInfo]:
    """The places of all caches, keys before values.

    Args:
        caches: what the adapter says.
        info: the structure of the model.

    Raises:
        ModelError: keys or values are made by something that is no linear of a unit.
    """
    places = []
    for one in caches:
        for part, name in zip(PARTS, (one.keys, one.values), strict=True):
            linear = info.linears.get(name)
            if linear is None or not linear.unit:
                raise ModelError(
                    f"the adapter says that {name} fills the cache of {one.attention}, and it is no linear of a unit",
                    hint="keys and values of an AttentionCache are full names of linears",
                )
            place = f"{one.attention}.{part}"
            places.append(CacheInfo(place, one.attention, linear.stored, linear.unit, one.heads, one.head_size))
    return places


def attentions(caches: Mapping[str, CacheInfo]) -> list[str]:
    """The attentions of some places, each once."""
    return list(dict.fromkeys(one.attention for one in caches.values()))


def open_places(model: nn.Module, attentions: Iterable[str]) -> None:
    """Put places into attentions, to which they show their keys and values from now on.

    Raises:
        ModelError: an attention has modules of these names already.
    """
    for name in attentions:
        attention = model.get_submodule(name)
        for part in PARTS:
            if hasattr(attention, part):
                raise ModelError(f"{name} has a module {part} of its own", hint="take dynamic_cache out of process")
            attention.add_module(part, CachePlace())
        attention.register_forward_pre_hook(_give_stand_in, with_kwargs=True)


class _StandIn:
    """What an attention takes for its cache."""

    def __init__(self, attention: nn.Module) -> None:
        self._attention = attention

    def update(self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, heads, tokens, size] as they come out of the cache."""
        return self._pass(PARTS[0], keys), self._pass(PARTS[1], values)

    def _pass(self, part: str, x: Tensor) -> Tensor:
        batch, heads, tokens, size = x.shape
        place = self._attention.get_submodule(part)
        flat: Tensor = place(x.transpose(1, 2).reshape(batch * tokens, heads * size))
        # What is unchanged goes on as the very tensor: kernels may round another layout differently.
        return x if isinstance(place, CachePlace) else flat.view(batch, tokens, heads, size).transpose(1, 2)


def _give_stand_in(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs.get("past_key_values") is not None:
        return None
    return args, {**kwargs, "past_key_values": _StandIn(attention)}
