# SPDX-License-Identifier: Apache-2.0
"""Scope ``attn``: what it does to an attention's output when its keys and values are rounded to 8 bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modelslim.analysis.distance import Distance
from modelslim.analysis.model import FloatModel
from modelslim.analysis.scores import Score, rank
from modelslim.errors import CapabilityError
from modelslim.kv_cache import QuantizedCache, attentions, find_places, open_places
from modelslim.open_model import main_tensor
from modelslim.ports import PortCollector
from modelslim.runners.standing import in_place
from modelslim.scales import range_to_scale
from modelslim.statistics import ChannelRange
from modelslim.suspended import compute
from modelslim.types import CacheInfo, TensorSpec
from modelslim.unit_statistics import UnitStatistics

_SPEC = TensorSpec("int8", "per_channel", True)


def analyze_attentions(model: FloatModel, samples: Sequence[Any]) -> list[Score]:
    """Score the attentions, the worst first: mean squared error of the output, keys and values int8 per head.

    Args:
        model: the model.
        samples: calibration samples.

    Raises:
        CapabilityError: the adapter does not say where keys and values enter a cache, or nowhere do they.
    """
    if not model.session.has("get_kv_caches"):
        raise CapabilityError(
            "the model's adapter does not implement get_kv_caches, so its attentions are not known",
            hint="analyze linear or layer instead, or let the adapter implement it",
        )
    places = {one.name: one for one in find_places(model.session.get_kv_caches(model.model), model.info)}
    if not places:
        raise CapabilityError(
            "no attention of this model keeps keys and values head by head, made by a k_proj and a v_proj",
            hint="analyze linear or layer instead",
        )
    open_places(model.model, attentions(places))
    found: dict[str, Distance] = {}
    with torch.no_grad():
        last = model.info.units[-1]
        with closing(model.start(model.inputs(samples))) as boundary:
            for unit in model.each_unit():
                here = {name: one for name, one in places.items() if one.unit == unit}
                needs = dict.fromkeys(here, frozenset({ChannelRange}))
                ports = PortCollector({name: model.model.get_submodule(name) for name in here}, needs)
                names = attentions(here)
                with ports, _outputs(model.model, names) as expected:
                    boundary.measure_unit(unit, ports.next_sample, hold=True)
                for name in names:
                    with in_place(model.model, _rounded(name, here, ports.statistics())):
                        # Only what the attention itself makes of rounded keys and values: its inputs are float.
                        with _outputs(model.model, [name]) as outputs:
                            for request in boundary.waiting(unit).values():
                                compute(request)
                        found[name] = _distance(outputs[name], expected[name])
                boundary.run_unit(unit, lambda: None, resume=unit != last)
                model.release_filled()
    return rank(Score(name, found[name].mse) for name in attentions(places))


def _rounded(attention: str, places: Mapping[str, CacheInfo], statistics: UnitStatistics) -> dict[str, nn.Module]:
    """What takes the places of an attention's caches: one scale per head; none where no token came."""
    modules: dict[str, nn.Module] = {}
    for name, place in places.items():
        seen = statistics.get(name, ChannelRange)
        if place.attention == attention and seen.minimum is not None and seen.maximum is not None:
            low = seen.minimum.view(place.heads, -1).amin(1).repeat_interleave(place.head_size)
            high = seen.maximum.view(place.heads, -1).amax(1).repeat_interleave(place.head_size)
            scale, _ = range_to_scale(low, high, _SPEC)
            modules[name] = QuantizedCache(_SPEC, scale, torch.zeros_like(scale, dtype=torch.int8))
    return modules


def _distance(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> Distance:
    distance = Distance()
    for y, wanted in zip(outputs, expected, strict=True):
        distance.add(y, wanted)
    return distance


@contextmanager
def _outputs(model: nn.Module, names: Sequence[str]) -> Iterator[Mapping[str, list[Tensor]]]:
    """What modules return while this is open, call by call."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Any:
        return lambda _module, _args, output: found[name].append(main_tensor(output, name))

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
