# SPDX-License-Identifier: Apache-2.0
"""What smoothing is going to rescale: the adapter's topology, cut to what the algorithms of the run make of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from modelslim.model_info import ModelInfo
from modelslim.patterns import matches_name
from modelslim.plan_checks import Step
from modelslim.session import Session
from modelslim.types import Subgraph, Topology

if TYPE_CHECKING:
    from torch import nn

NON_FUSION = "non-fusion"


def find_topology(steps: Sequence[Step], session: Session, model: nn.Module) -> Topology | None:
    """What smoothing may rescale, when one of the steps wants to know and the adapter can tell.

    Inputs are multiplied at run time for linears that are quantized alone: one that stays float gains nothing.
    """
    hook = "get_adapter_config_for_subgraph"
    if not any(hook in step.algorithm.requires for step in steps) or not session.has(hook):
        return None
    topology = session.get_adapter_config_for_subgraph(model)
    if topology is None:
        return None
    quantized = {step.info.linears[name].module for step in steps for name in step.specs}
    subgraphs = []
    for subgraph in topology.subgraphs:
        targets = subgraph.targets
        if subgraph.type == NON_FUSION:
            targets = tuple(target for target in targets if target in quantized)
        if targets:
            subgraphs.append(replace(subgraph, targets=targets))
    return replace(topology, subgraphs=tuple(subgraphs))


def with_subgraphs(steps: Sequence[Step], topology: Topology) -> list[Step]:
    """The steps with the subgraphs of each unit."""
    by_unit: dict[str, list[Subgraph]] = {}
    for subgraph in topology.subgraphs:
        name = subgraph.targets[0]
        unit = next((unit for unit in steps[0].info.units if name.startswith(f"{unit}.")), "")
        by_unit.setdefault(unit, []).append(subgraph)
    return [replace(step, subgraphs=by_unit) for step in steps]


def find_multiplied(steps: Sequence[Step], info: ModelInfo, model: nn.Module) -> Mapping[str, Step]:
    """The modules whose inputs are multiplied at run time, by name, with the step that asks for it."""
    return {
        name: step
        for step in steps
        if step.algorithm.rescales
        for unit in info.units
        for name in sorted(step.algorithm.multiplies_inputs(step.unit(unit, model)))
    }


def as_used(topology: Topology, multiplied: Iterable[str]) -> Topology:
    """The topology without run-time multiplications that nobody asks for, and without reasons that do not hold then.

    Args:
        topology: what may be rescaled.
        multiplied: modules whose inputs are multiplied.
    """
    chosen = set(multiplied)
    kept = [one for one in topology.subgraphs if one.type != NON_FUSION or not chosen.isdisjoint(one.targets)]
    left_out = {
        name: why
        for name, why in topology.left_out.items()
        if not any(matches_name(one, name) for one in chosen)  # a pattern speaks of equal places in all layers
    }
    return Topology(tuple(kept), left_out)


def find_rescaled(steps: Sequence[Step], info: ModelInfo, model: nn.Module) -> frozenset[str]:
    """Full names of the parameters that smoothing changes or adds; the model is on meta."""
    return frozenset(
        name
        for step in steps
        if step.algorithm.rescales
        for unit in info.units
        for name in step.algorithm.edits(step.unit(unit, model))
    )


def find_added_biases(rescaled: Iterable[str], model: nn.Module) -> frozenset[str]:
    """Full names of the biases that smoothing adds to modules without one.

    Args:
        rescaled: what smoothing changes or adds.
        model: the model on meta.
    """
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in rescaled if name.endswith(".bias")}
    return frozenset(name for name, owner in owners.items() if getattr(owner, "bias", None) is None)
