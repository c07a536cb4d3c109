# SPDX-License-Identifier: Apache-2.0
"""The schemes of the table as protocols."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from families import Family

STATIC = {"scope": "per_tensor", "dtype": "int8", "symmetric": False, "method": "minmax"}
DYNAMIC = {"scope": "per_token", "dtype": "int8", "symmetric": True, "method": "minmax"}
INT8 = {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"}
INT4 = {"scope": "per_channel", "dtype": "int4", "symmetric": True, "method": "minmax"}
GROUPED = {"scope": "per_group", "dtype": "int4", "symmetric": True, "method": "minmax", "group_size": 32}

QConfig = Mapping[str, Any]
W8A8: QConfig = {"act": STATIC, "weight": INT8}
W8A8_DYNAMIC: QConfig = {"act": DYNAMIC, "weight": INT8}
W8A16: QConfig = {"weight": INT8}
W4A8_DYNAMIC: QConfig = {"act": DYNAMIC, "weight": INT4}
W4A16: QConfig = {"weight": GROUPED}

SCHEMES: Mapping[str, tuple[QConfig, QConfig]] = {
    "W8A8": (W8A8, W8A8_DYNAMIC),
    "W8A8_DYNAMIC": (W8A8_DYNAMIC, W8A8_DYNAMIC),
    "W8A16": (W8A16, W8A16),
    "W4A8_DYNAMIC": (W8A8_DYNAMIC, W4A8_DYNAMIC),
    "W4A16": (W4A16, W4A16),
}
"""What the linears of a mixture of experts become: those outside and those inside its routed experts.

The engine has no static experts. A dense model has the first, and W4A8_DYNAMIC has no first of its own.
"""
DENSE: Mapping[str, QConfig] = {**{name: parts[0] for name, parts in SCHEMES.items()}, "W4A8_DYNAMIC": W4A8_DYNAMIC}


def write_protocol(path: Path, family: Family, scheme: str, samples: Path) -> None:
    """The YAML that quantizes every linear of a family's units but those that are left float."""
    outside, experts = SCHEMES[scheme] if family.experts else (DENSE[scheme], DENSE[scheme])
    left = list(family.left_float)
    process = [_entry(outside, ["*"], left)]
    if experts is not outside:
        process = [_entry(outside, ["*"], [*left, family.experts]), _entry(experts, [family.experts], [])]
    spec: dict[str, Any] = {
        "process": process,
        "save": [{"type": "ascendv1_saver"}],
        "dataset": str(samples / family.samples),
    }
    version = "modelslim_v1" if family.samples == "texts.jsonl" else "multimodal_vlm_modelslim_v1"
    path.write_text(yaml.safe_dump({"apiversion": version, "spec": spec}, sort_keys=False), encoding="utf-8")


def _entry(qconfig: QConfig, include: list[str], exclude: list[str]) -> dict[str, Any]:
    entry = {"type": "linear_quant", "qconfig": qconfig, "include": include}
    return {**entry, "exclude": exclude} if exclude else entry
