# SPDX-License-Identifier: Apache-2.0
"""Experts that saw no calibration token: found, counted, and treated as the protocol says."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from modelslim.errors import QuantizationError
from modelslim.ports import PortCollector
from modelslim.unit_statistics import Port

POLICIES = ("fallback", "route", "all")
"""What ``experts`` in a protocol may say.

``route``: statistics of an expert come from the tokens that the router sent to it; an expert without
any is an error. ``fallback``: the same, and an expert without any is quantized from its weight alone;
where a static activation scale is wanted all the same, that of all tokens of its layer's experts.
``all``: every expert sees every token, for the statistics only.
"""

_EXPERT = re.compile(r"(?P<layer>.*\bexperts)\.(?P<number>\d+)\.(?P<part>.+)")


def expert_of(name: str) -> tuple[str, str] | None:
    """Place and number of the expert that a linear belongs to: ``("layers.0.mlp.experts.*.up_proj", "3")``."""
    match = _EXPERT.fullmatch(name)
    return (f"{match['layer']}.*.{match['part']}", match["number"]) if match else None


def cover(ports: PortCollector, names: Sequence[str], policy: str) -> list[str]:
    """Give experts that saw no token what the policy says.

    Args:
        ports: what was measured in a unit; statistics are added in place.
        names: the linears of the unit of which statistics are wanted.
        policy: one of ``POLICIES``.

    Returns:
        Names of the linears whose statistics are those of the layer's other experts, such as
        ``model.layers.0.mlp.experts.3.up_proj``.

    Raises:
        QuantizationError: the policy is ``route``, and an expert saw no token; or none of a layer did.
    """
    borrowed: list[str] = []
    for place, members in _layers(ports, names).items():
        seen = {number: port for number, port in members.items() if port is not None}
        unseen = [number for number, port in members.items() if port is None]
        if not unseen:
            continue
        lacking = [place.replace("*", number) for number in unseen]
        if policy != "fallback" or not seen:
            more = f" (and {len(unseen) - 1} more experts of this layer)" if len(unseen) > 1 else ""
            raise QuantizationError(
                f"{lacking[0]}: no calibration token was routed to this expert{more}, so nothing is known of its input",
                hint="calibrate on more varied data, or say experts: fallback or experts: all in spec"
                if seen
                else "the layer saw no token at all: calibrate on other data, or quantize its activations per_token",
            )
        for number in unseen:
            _pool(ports, place, number, list(seen.values()))
        borrowed += lacking
    return borrowed


def _layers(ports: PortCollector, names: Sequence[str]) -> Mapping[str, dict[str, Port | None]]:
    """The experts of each layer by number, with what was measured; None for one that saw no token."""
    layers: dict[str, dict[str, Port | None]] = defaultdict(dict)
    for name in names:
        if name in ports.experts:
            for number, port in enumerate(ports.experts[name]):
                parent, _, part = name.rpartition(".")
                seen = ports.tokens[name][number] > 0
                layers[f"{parent}.*.{part}"][str(number)] = port if seen else None
        elif (expert := expert_of(name)) is not None:
            place, number_ = expert
            layers[place][number_] = ports.ports.get(name)
    return layers


def _pool(ports: PortCollector, place: str, number: str, seen: Sequence[Port]) -> None:
    """Fill an expert's statistics from those of the others."""
    parent, _, part = place.partition(".*.")
    bank = f"{parent}.{part}"
    port: Port = ports.experts[bank][int(number)] if bank in ports.experts else {kind: kind() for kind in seen[0]}
    for kind, statistic in port.items():
        for other in seen:
            statistic.merge(other[kind])
    if bank not in ports.experts:
        ports.set_port(place.replace("*", number), port)
