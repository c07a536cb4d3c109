# SPDX-License-Identifier: Apache-2.0
"""Subgraphs as the existing tool describes them, in the words of ModelSlim."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from modelslim.api import CapabilityError, Subgraph, Topology
from msmodelslim.core.graph.adapter_types import AdapterConfig, FusionConfig


def to_topology(subgraphs: Sequence[AdapterConfig], model: nn.Module, config: Any) -> Topology:
    """Translate what ``get_adapter_config_for_subgraph`` of an adapter gives.

    Args:
        subgraphs: its answer.
        model: the model, on meta.
        config: its configuration, which tells heads where a subgraph does not.

    Raises:
        CapabilityError: a subgraph names what the model does not have, or a fusion of its own kind.
    """
    return Topology(tuple(_subgraph(subgraph, model, config) for subgraph in subgraphs))


def _subgraph(subgraph: AdapterConfig, model: nn.Module, config: Any) -> Subgraph:
    source, targets = subgraph.mapping.source, tuple(subgraph.mapping.targets)
    modules = dict(model.named_modules())
    unknown = next((name for name in (*targets, *([source] if source else [])) if name not in modules), None)
    if unknown is not None:
        raise CapabilityError(
            f"get_adapter_config_for_subgraph names {unknown}, which the model does not have",
            hint="use the names of the model's modules under the installed transformers",
        )
    fusion = subgraph.fusion or FusionConfig()
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = (
        fusion.num_attention_heads or text.num_attention_heads,
        fusion.num_key_value_heads or getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
    )
    kind = subgraph.subgraph_type if source else "non-fusion"
    return Subgraph(
        type=kind,
        source=source or "",
        targets=targets,
        heads=heads if kind == "ov" else None,
        rows=_rows(fusion, heads, modules[source]) if source else None,
        unit_offset=kind == "norm-linear" and _adds_one(modules[source or ""]),
    )


def _rows(fusion: FusionConfig, heads: tuple[int, int], source: nn.Module) -> tuple[int, ...] | None:
    """Rows of the values in a weight that holds more than them."""
    if fusion.fusion_type == "none":
        return None
    if fusion.fusion_type == "qkv":
        assert isinstance(source, nn.Linear)
        size = source.out_features // (heads[0] + 2 * heads[1])
        first = size * (heads[0] + heads[1])
        return tuple(range(first, first + size * heads[1]))
    if fusion.fusion_type == "kv":
        sizes = fusion.custom_config or {}
        keys, values = sizes["qk_nope_head_dim"], sizes["v_head_dim"]
        return tuple(head * (keys + values) + keys + row for head in range(heads[0]) for row in range(values))
    raise CapabilityError(
        f"a fusion of type {fusion.fusion_type!r} is the adapter's own",
        hint="leave the subgraph out of get_adapter_config_for_subgraph, or split the weight in the adapter",
    )


def _adds_one(norm: nn.Module) -> bool:
    """True for a norm that multiplies by (1 + weight): with a weight of zero it still lets something through."""
    alone = deepcopy(norm).to_empty(device="cpu").float().requires_grad_(False)
    for parameter in alone.parameters():
        parameter.zero_()
    weight = alone.weight
    assert isinstance(weight, torch.Tensor)
    with torch.no_grad():
        return bool(alone(torch.arange(1.0, len(weight) + 1).view(1, -1)).any())
