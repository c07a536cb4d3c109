# SPDX-License-Identifier: Apache-2.0
"""What ``--debug`` keeps beside a result: scales, ranges, divisors and decisions, two files per unit.

``unit-<number>.safetensors`` holds tensors by ``<linear>/<part>``, ``unit-<number>.json`` the unit's record with the
specs, and ``plan.json`` what was planned and why. No engine looks into the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from modelslim.disk import explained, write_json
from modelslim.errors import UsageError
from modelslim.kv_cache import QuantizedCache
from modelslim.observed import Observed
from modelslim.output_directory import DEBUG_INFO
from modelslim.patterns import matches_name
from modelslim.plan import Plan
from modelslim.plan_table import as_data
from modelslim.quantized import QuantizedLinear

_NO_CONTEXT = frozenset({"codes", "bias"})
_SHOWN = 16


def write_plan(folder: Path, plan: Plan) -> None:
    """Write what was planned.

    Args:
        folder: that of the result.
        plan: the plan.

    Raises:
        SaveError: it cannot be written.
    """
    with explained(folder):
        (folder / DEBUG_INFO).mkdir(exist_ok=True)
    write_json(folder / DEBUG_INFO / "plan.json", as_data(plan))


def write_unit(
    folder: Path,
    number: int,
    modules: Mapping[str, QuantizedLinear],
    caches: Mapping[str, QuantizedCache],
    observed: Observed,
    record: Mapping[str, Any],
) -> None:
    """Write what is known of a unit, while it is known.

    Args:
        folder: that of the result.
        number: of the unit.
        modules: its quantized linears by name.
        caches: its quantized key/value caches by name.
        observed: what calibration has shown.
        record: its record for the report.

    Raises:
        SaveError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in {**modules, **caches}.items():
        for part, buffer in module.named_buffers():
            if part not in _NO_CONTEXT:
                tensors[f"{name}/{part}"] = buffer
    for prefix, ranges in (("float_input", observed.before), ("input", observed.after)):
        for name, port in ranges.items():
            # What was not divided was quantized as the float model has it.
            if (prefix == "float_input" or name in observed.divisors) and port.minimum is not None:
                tensors[f"{name}/{prefix}_minimum"] = port.minimum
                tensors[f"{name}/{prefix}_maximum"] = torch.as_tensor(port.maximum)
    tensors |= {f"{name}/input_divisor": divisor for name, divisor in observed.divisors.items()}
    kept = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    specs = {name: asdict(module.spec) for name, module in modules.items()}
    specs |= {name: asdict(cache.spec) for name, cache in caches.items()}
    with explained(folder):
        (folder / DEBUG_INFO).mkdir(exist_ok=True)
        file = folder / DEBUG_INFO / f"{_stem(number)}.safetensors"
        file.write_bytes(safetensors.torch.save(kept))
    write_json(folder / DEBUG_INFO / f"{_stem(number)}.json", {**record, "specs": specs})


def has_unit(folder: Path, number: int) -> bool:
    """True when something is kept of a unit."""
    return (folder / DEBUG_INFO / f"{_stem(number)}.json").is_file()


def read(path: Path, pattern: str = "*") -> dict[str, Any]:
    """What was kept, as JSON values.

    Args:
        path: folder of a result, or its ``debug_info``.
        pattern: shell pattern for whole names of linears, or of tensors when it has a slash.

    Returns:
        ``linears``: by name unit, scheme, spec, quality, ``fell_back`` and notes, as far as there are any.
        ``tensors``: by name dtype, shape, minimum, mean and maximum, and few values themselves.

    Raises:
        UsageError: nothing is kept there, or it cannot be read.
    """
    folder = path if path.name == DEBUG_INFO else path / DEBUG_INFO
    files = sorted(folder.glob("unit-*.json"))
    if not files:
        raise UsageError(f"{path} has no {DEBUG_INFO}", hint="`modelslim quant --debug` writes it beside the result")
    linears: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    try:
        for file in files:
            linears.update(_linears(json.loads(file.read_text(encoding="utf-8")), pattern))
            tensors.update(_tensors(file.with_suffix(".safetensors"), pattern))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UsageError(f"{file} cannot be read: {error}", hint="quantize again with --debug") from error
    return {"path": str(folder), "pattern": pattern, "linears": linears, "tensors": tensors}


def _stem(number: int) -> str:
    return f"unit-{number:05d}"


def _linears(record: Mapping[str, Any], pattern: str) -> dict[str, Any]:
    wanted = pattern.partition("/")[0]
    found = {}
    for name in dict.fromkeys((*record["specs"], *record.get("fell_back", {}))):
        if matches_name(name, wanted):
            found[name] = {
                "unit": record["unit"],
                "scheme": record["linears"].get(name, record.get("caches", {}).get(name, "FLOAT")),
                "spec": record["specs"].get(name),
                **{
                    word: record[key][name]
                    for word, key in (("quality", "quality"), ("fell_back", "fell_back"), ("notes", "notes"))
                    if name in record.get(key, {})
                },
            }
    return found


def _tensors(file: Path, pattern: str) -> dict[str, Any]:
    found = {}
    with safetensors.safe_open(file, "pt") as stored:
        for name in stored.keys():  # noqa: SIM118  (no mapping)
            if matches_name(name if "/" in pattern else name.partition("/")[0], pattern):
                found[name] = _summary(stored.get_tensor(name))
    return found


def _summary(tensor: Tensor) -> dict[str, Any]:
    values = tensor.to(torch.float64)
    figures: dict[str, Any] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    if tensor.numel():
        numbers = {"minimum": values.min(), "mean": values.mean(), "maximum": values.max()}
        figures |= {word: _json_number(float(number)) for word, number in numbers.items()}
    if tensor.numel() <= _SHOWN:
        figures["values"] = [_json_number(float(number)) for number in values.flatten()]
    return figures


def _json_number(number: float) -> float | str:
    """JSON has no NaN and no infinity; in words then."""
    return number if abs(number) < float("inf") else str(number)
