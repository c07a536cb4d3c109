# SPDX-License-Identifier: Apache-2.0
"""``quantization_config`` of config.json: what it says, from what was planned and written, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelslim.api import (
    ModelError,
    PlannedLinear,
    PlannedModel,
    QuantSpec,
    TensorRecord,
    TensorSpec,
    planned_linears,
)

_FORMATS = {"gptq": 1, "gptq_v2": 2}
_BITS = (2, 3, 4, 8)


def quantization_config(records: Sequence[TensorRecord], model: PlannedModel) -> dict[str, Any]:
    """The section as the readers want it; empty when nothing was quantized.

    Args:
        records: what was written.
        model: as ``check`` saw it.
    """
    specs = {record.name.rpartition(".")[0]: record.spec for record in records if record.spec is not None}
    if not specs:
        return {}
    weight = next(iter(specs.values())).weight  # `check` allows one scheme
    linears = planned_linears(model)
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": weight.bits,
        "group_size": weight.group_size or -1,
        "sym": weight.symmetric,
        "desc_act": False,
        "checkpoint_format": "gptq" if weight.symmetric else "gptq_v2",
        "lm_head": any(linear.info.stored in specs and not linear.info.unit for linear in linears),
        "dynamic": {f"-:{pattern}": {} for pattern in _float_patterns(linears, specs)},
    }
    # Experts are not in the list: vLLM does not look for them in it, and they may be tens of thousands.
    names = [linear.info.stored for linear in linears if linear.info.stored in specs and not linear.moe]
    if names:
        config["modules_in_block_to_quantize"] = [names]
    if config["lm_head"]:
        # The list above names whole paths, so nothing else is found outside the blocks.
        config["block_name_to_quantize"] = ""
    return config


def _float_patterns(linears: Iterable[PlannedLinear], specs: Mapping[str, QuantSpec]) -> list[str]:
    """Regular expressions for the linears that stay float among those of the units; one for all experts of a layer."""
    names = {}
    for linear in linears:
        if linear.info.unit and linear.info.stored not in specs:
            names[linear.moe or linear.info.stored] = r"(\..*)?" if linear.moe else ""
    return [f"^{re.escape(name)}{rest}$" for name, rest in names.items()]


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
    if not isinstance(section, dict) or section.get("quant_method") != "gptq":
        return None
    return section


def scheme_of(section: Mapping[str, Any], place: Path) -> tuple[TensorSpec, int]:
    """Scheme of the weights, and version of the format.

    Raises:
        ModelError: the section says what is not read here.
    """
    bits, size = section.get("bits"), section.get("group_size", -1)
    version = _FORMATS.get(str(section.get("checkpoint_format", "gptq")))
    overrides = [key for key, value in (section.get("dynamic") or {}).items() if value and not key.startswith("-:")]
    strange = (
        f"bits {bits!r}"
        if bits not in _BITS
        else f"group_size {size!r}"
        if not isinstance(size, int)
        else f"checkpoint_format {section['checkpoint_format']!r}"
        if version is None
        else f"another scheme for {overrides[0]!r}"
        if overrides
        else ""
    )
    if strange or version is None:
        raise ModelError(
            f"{place / 'config.json'}: quantization_config has {strange}, which is not read here",
            hint="2, 3, 4 and 8 bits, one group_size, and checkpoint_format gptq or gptq_v2 are",
        )
    symmetric = section.get("sym", True) is True
    if size > 0:
        return TensorSpec(f"int{bits}", "per_group", symmetric, size), version
    return TensorSpec(f"int{bits}", "per_channel", symmetric), version
