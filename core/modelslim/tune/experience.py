# SPDX-License-Identifier: Apache-2.0
"""The strategy ``standing_high_with_experience``: a template made for the structure of the model, then standing_high.

The table is what practice says of parts of a layer, for a first protocol; that a model keeps its quality with it is
for the trials to show.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelslim.analysis.model import find_set
from modelslim.analysis.scores import as_patterns
from modelslim.errors import ProtocolError
from modelslim.model_info import ModelInfo
from modelslim.patterns import matches
from modelslim.protocol.document import Document, Place
from modelslim.protocol.model import MULTIMODAL
from modelslim.tune.fallback import StandingHigh
from modelslim.tune.strategy import Context
from modelslim.types import LinearInfo

_ACT_STATIC = {"scope": "per_tensor", "dtype": "int8", "symmetric": False, "method": "minmax"}
_ACT_DYNAMIC = {"scope": "per_token", "dtype": "int8", "symmetric": True, "method": "minmax"}
_INT8 = {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"}
_INT4 = {"scope": "per_channel", "dtype": "int4", "symmetric": True, "method": "ssz"}

SCHEMES: Mapping[str, Mapping[str, Any]] = {
    "w8a8_static": {"weight": _INT8, "act": _ACT_STATIC},
    "w8a8_dynamic": {"weight": _INT8, "act": _ACT_DYNAMIC},
    "w4a8_dynamic": {"weight": _INT4, "act": _ACT_DYNAMIC},
}
"""qconfigs by the names that the table uses; ``float`` leaves a linear alone."""

_OTHERS = ""
TABLE: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "w8a8": {
        "MHA": {"o_proj": "w8a8_dynamic", _OTHERS: "w8a8_static"},
        "GQA": {"o_proj": "w8a8_dynamic", _OTHERS: "w8a8_static"},
        "SWA": {_OTHERS: "w8a8_dynamic"},
        "MLA": {"kv_b_proj": "float", _OTHERS: "w8a8_dynamic"},
        "DSA": {_OTHERS: "float"},
        "GatedDeltaNet": {"in_proj_ba": "float", "in_proj_a": "float", "in_proj_b": "float", _OTHERS: "w8a8_dynamic"},
        "FFN": {"down_proj": "w8a8_dynamic", _OTHERS: "w8a8_static"},
        "MoE": {_OTHERS: "w8a8_dynamic"},
        "other": {_OTHERS: "w8a8_dynamic"},
    },
    "w4a8": {
        "MHA": {_OTHERS: "w8a8_dynamic"},
        "GQA": {_OTHERS: "w8a8_dynamic"},
        "SWA": {_OTHERS: "w8a8_dynamic"},
        "MLA": {"kv_b_proj": "float", _OTHERS: "w8a8_dynamic"},
        "DSA": {_OTHERS: "float"},
        "GatedDeltaNet": {"in_proj_ba": "float", "in_proj_a": "float", "in_proj_b": "float", _OTHERS: "w8a8_dynamic"},
        "FFN": {"down_proj": "w8a8_dynamic", _OTHERS: "w4a8_dynamic"},
        "MoE": {_OTHERS: "w4a8_dynamic"},
        "other": {_OTHERS: "w8a8_dynamic"},
    },
}
"""What the linears of a structure become, by quant type and last part of their names; "" stands for all others.

Output and down projections read products whose outliers differ from token to token, so they get a scale per token;
the small projections that steer a recurrence, and what chooses tokens for sparse attention, stay float.
"""


class Experience(StandingHigh):
    """standing_high with a template out of the table."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._template: dict[str, Any] | None = None

    def template(self) -> tuple[Any, Place]:
        """The protocol that the table makes for this model."""
        plan = self.context.plan
        if self._template is None:
            with self.context.open() as model:
                structures = self._structures(model.info)
            quant_type = self.config["quant_type"]
            process = [
                {"type": "linear_quant", "qconfig": SCHEMES[scheme], "include": as_patterns(names, structures)}
                for scheme, names in by_scheme(structures, quant_type).items()
            ]
            if not process:
                raise ProtocolError(f"{plan.document.file}: the table leaves every linear of this model in float")
            spec = {"process": process, "save": self.config["save"], "dataset": self.config["dataset"]}
            _, is_multimodal = find_set(self.config["dataset"], self.context.registry, plan.base)
            self._template = {"apiversion": MULTIMODAL if is_multimodal else "modelslim_v1", "spec": spec}
        place = plan.part(("strategy",))[1]
        count = len(self._template["spec"]["process"])
        entries: dict[str | int, Place] = {index: Place(place.value) for index in range(count)}
        save = plan.part(("strategy", "save"))[1]
        children: dict[str | int, Place] = {"process": Place(place.value, children=entries), "save": save}
        spec_place = Place(place.value, children=children)
        return self._template, Place(place.value, children={"spec": spec_place})

    def _structures(self, info: ModelInfo) -> dict[str, str]:
        """The structure that each linear of the layers belongs to."""
        found = find_structures(info)
        linears = info.linears
        for index, part in enumerate(self.config.get("structure_configs", ())):
            for number, pattern in enumerate(part["include"]):
                names = [name for name in found if matches(linears[name], pattern)]
                if not names:
                    document: Document = self.context.plan.document
                    path = ("strategy", "structure_configs", index, "include", number)
                    message = f"the pattern {pattern!r} matches no linear of the layers"
                    raise ProtocolError(
                        f"{document.file} does not fit the model", diagnostics=[document.diagnostic(message, path)]
                    )
                found.update(dict.fromkeys(names, part["type"]))
        return found


def by_scheme(structures: Mapping[str, str], quant_type: str) -> dict[str, list[str]]:
    """Names of the linears that get each scheme of the table; those that stay float are missing."""
    result: dict[str, list[str]] = {}
    for name, structure in structures.items():
        row = TABLE[quant_type][structure]
        scheme = row.get(name.rpartition(".")[2], row[_OTHERS])
        if scheme != "float":
            result.setdefault(scheme, []).append(name)
    return result


def find_structures(info: ModelInfo) -> dict[str, str]:
    """The structure that each linear of the layers seems to belong to, by its name and its neighbours'."""
    neighbours: dict[str, dict[str, LinearInfo]] = {}
    for linear in info.linears.values():
        parent, _, last = linear.name.rpartition(".")
        neighbours.setdefault(parent, {})[last] = linear
    return {
        name: _structure(name, neighbours[name.rpartition(".")[0]]) for name, one in info.linears.items() if one.unit
    }


def _structure(name: str, beside: Mapping[str, LinearInfo]) -> str:
    if "indexer" in name:
        return "DSA"
    if "expert" in name:
        return "MoE"
    if {"kv_a_proj_with_mqa", "kv_b_proj"} & beside.keys():
        return "MLA"
    if {"in_proj_qkvz", "in_proj_qkv", "in_proj_ba", "in_proj_a"} & beside.keys():
        return "GatedDeltaNet"
    if {"q_proj", "k_proj"} <= beside.keys():
        return "MHA" if beside["q_proj"].out_features == beside["k_proj"].out_features else "GQA"
    if "down_proj" in beside:
        return "FFN"
    return "other"
