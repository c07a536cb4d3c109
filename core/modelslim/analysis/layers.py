# SPDX-License-Identifier: Apache-2.0
"""Scope ``layer``: what it does to a unit's output, or to the model's, when the unit alone is quantized."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
import yaml
from torch import nn

from modelslim.activations import Boundary
from modelslim.analysis.distance import Distance
from modelslim.analysis.linears import select_linears
from modelslim.analysis.model import FloatModel
from modelslim.analysis.scores import Score, rank
from modelslim.analysis.simulate import Simulation, collector_of, statistics_of
from modelslim.analysis.variants import follow_variants
from modelslim.errors import UsageError
from modelslim.open_model import main_tensor
from modelslim.protocol.document import parse_document
from modelslim.registry import Registry
from modelslim.runners.standing import in_place
from modelslim.suspended import compute
from modelslim.unit_statistics import UnitStatistics

PROBE = {
    "type": "linear_quant",
    "qconfig": {"weight": {"dtype": "mxfp4", "scope": "per_block"}, "act": {"dtype": "mxfp4", "scope": "per_block"}},
}
"""What quantized means to this scope: float4 in blocks of 32, weights and inputs, which hurts every layer."""


def analyze_layers(
    model: FloatModel, samples: Sequence[Any], metric: str, quant_modules: Sequence[str], registry: Registry
) -> list[Score]:
    """Score the units, the worst first.

    Args:
        model: the model.
        samples: calibration samples.
        metric: ``mse_layer_wise``: error of the unit's output; ``mse_model_wise``: of the model's.
        quant_modules: which linears are quantized, as in ``include`` of a protocol.
        registry: the installed plugins.

    Raises:
        UsageError: a pattern matches no linear.
        ProtocolError: a linear cannot take float4 in blocks of 32.
    """
    select_linears(model.info, quant_modules, "--quant_modules")
    if PROBE["type"] not in registry.names("algorithms"):
        raise UsageError(
            f"the scope layer quantizes with {PROBE['type']}, which is not installed",
            hint="pip install modelslim-algorithm-linear-quant",
        )
    entry = {**PROBE, "include": list(quant_modules)}
    document = parse_document(yaml.safe_dump({"spec": {"process": [entry]}}), "--quant_modules")
    simulation = Simulation(document, [(("spec", "process", 0), entry)], model.info, registry)
    if metric == "mse_layer_wise":
        found = {unit: distance.mse for unit, distance in layer_errors(model, samples, simulation).items()}
    else:
        effects = follow_variants(
            model, samples, lambda unit, statistics: _whole(simulation, unit, model.model, statistics), [simulation]
        )
        found = {str(unit): effect.distance.mse for unit, effect in effects.items()}
    return rank(Score(unit, found.get(unit)) for unit in model.info.units if unit in found)


def _whole(simulation: Simulation, unit: str, model: nn.Module, statistics: UnitStatistics) -> dict[str, Any]:
    """All quantized linears of the unit as the one variant of it; none where nothing is quantized."""
    modules = simulation.quantize(unit, model, statistics)
    return {unit: modules} if modules else {}


def layer_errors(model: FloatModel, samples: Sequence[Any], simulation: Simulation) -> dict[str, Distance]:
    """How far the output of each unit is from the float one when it alone is quantized; its inputs are float.

    Units in which nothing is quantized are missing.
    """
    found: dict[str, Distance] = {}
    with torch.no_grad():
        last = model.info.units[-1]
        with closing(model.start(model.inputs(samples))) as boundary:
            for unit in model.each_unit():
                with collector_of([simulation], unit, model.model) as ports:
                    tokens = boundary.measure_unit(unit, ports.next_sample, hold=True)
                modules = simulation.quantize(unit, model.model, statistics_of(ports, tokens))
                if modules:
                    with in_place(model.model, modules):
                        found[unit] = compare_held(boundary, unit)
                boundary.run_unit(unit, lambda: None, resume=unit != last)
                model.release_filled()
    return found


def compare_held(boundary: Boundary, unit: str) -> Distance:
    """Compute the unit again on the samples that wait there, and compare with the outputs that are held."""
    distance = Distance()
    for index, request in boundary.waiting(unit).items():
        distance.add(main_tensor(compute(request), unit), main_tensor(boundary.held[index], unit))
    return distance
