# SPDX-License-Identifier: Apache-2.0
"""``quantization_config`` of config.json: what it says, from what was planned and written, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelslim.api import ModelError, PlannedModel, TensorRecord, TensorSpec, planned_linears


def quantization_config(records: Sequence[TensorRecord], model: PlannedModel) -> dict[str, Any]:
    """The section as the readers want it; empty when nothing was quantized.

    Args:
        records: what was written.
        model: as ``check`` saw it.
    """
    specs = {record.name.rpartition(".")[0]: record.spec for record in records if record.spec is not None}
    if not specs:
        return {}
    weight = next(iter(specs.values())).weight  # `check` allows one group_size
    return {
        "quant_method": "awq",
        "bits": weight.bits,
        "group_size": weight.group_size or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": float_names(model, specs),
    }


def float_names(model: PlannedModel, quantized: Mapping[str, object]) -> list[str]:
    """Names of all that a reader could take for a quantized linear, sorted; one for all experts of a layer.

    Args:
        model: the planned model.
        quantized: stored names of the linears that are.
    """
    names = set(model.matrices)
    for linear in planned_linears(model):
        if linear.info.stored not in quantized:
            # transformers goes by the names of modules, vLLM by those of tensors.
            names.update((linear.moe,) if linear.moe else (linear.info.stored, linear.info.name))
    return sorted(names)


def read_config(path: Path) -> Mapping[str, Any] | None:
    """The section of a checkpoint's config.json; None when the checkpoint is of another format.

    Raises:
        ModelError: config.json cannot be read.
    """
    file = path / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: {error}", hint="the checkpoint is damaged; quantize again") from error
    section = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(section, dict) or section.get("quant_method") != "awq":
        return None
    return section


def scheme_of(section: Mapping[str, Any], place: Path) -> TensorSpec:
    """Scheme of the weights; whether they are symmetric is known from their zeros only.

    Raises:
        ModelError: the section says what is not read here.
    """
    bits, size = section.get("bits", section.get("w_bit")), section.get("group_size", section.get("q_group_size"))
    version = str(section.get("version", section.get("format", "gemm"))).lower()
    strange = (
        f"bits {bits!r}"
        if bits != 4
        else f"group_size {size!r}"
        if not isinstance(size, int)
        else f"version {version!r}"
        if version != "gemm"
        else "no zero points"
        if section.get("zero_point", True) is not True
        else ""
    )
    if strange or not isinstance(size, int):
        raise ModelError(
            f"{place / 'config.json'}: quantization_config has {strange}, which is not read here",
            hint="4 bits, version gemm, zero_point true and one group_size are",
        )
    if size > 0:
        return TensorSpec("int4", "per_group", symmetric=False, group_size=size)
    return TensorSpec("int4", "per_channel", symmetric=False)
