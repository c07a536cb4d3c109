# SPDX-License-Identifier: Apache-2.0
"""How an adapter describes what kv_smooth may rescale."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from msmodelslim.interfaces import KVSmoothFusedInterface

__all__ = ["KVSmoothFusedInterface", "KVSmoothFusedType", "KVSmoothFusedUnit"]


class KVSmoothFusedType(Enum):
    """Where the scale goes, which has to pass the rotary embedding: into a norm or into a linear."""

    StateViaRopeToNorm = "state-rope-norm"
    StateViaRopeToLinear = "state-rope-linear"


@dataclass
class KVSmoothFusedUnit:
    """One attention module.

    Attributes:
        attention_name: its name in the model.
        layer_idx: number of its layer.
        fused_from_query_states_name: last part of the name of the module that takes the queries' scale.
        fused_from_key_states_name: the same for the keys.
        fused_type: what kind of module these are.
    """

    attention_name: str
    layer_idx: int
    fused_from_query_states_name: str
    fused_from_key_states_name: str
    fused_type: KVSmoothFusedType
