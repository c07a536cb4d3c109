# SPDX-License-Identifier: Apache-2.0
"""``modelslim plan``: what quant would do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from modelslim.cli.options import (
    config_path_option,
    devices_option,
    engine_option,
    json_option,
    model_path_option,
    model_type_option,
    tp_option,
    trust_remote_code_option,
    workers_option,
)
from modelslim.cli.output import Output, pass_output

_OTHERS = {
    "pattern": "all else",
    "layers": "",
    "count": "",
    "shape": (),
    "scheme": "FLOAT",
    "bits": None,
    "why": "embeddings, norms and the like",
}


@click.command()
@model_path_option
@config_path_option
@devices_option
@workers_option
@model_type_option
@engine_option
@tp_option
@trust_remote_code_option
@json_option
@pass_output
def command(
    output: Output,
    model_path: Path,
    config_path: Path,
    device: str | None,
    workers: int | None,
    model_type: str | None,
    engine: str | None,
    tp: int,
    trust_remote_code: bool,
) -> None:
    """Show what quant would do, and refuse what it could not.

    Reads config.json, the headers of the weight files and the calibration data; no weight.
    """
    from modelslim.devices import prepare_threads, resolve_devices

    prepare_threads()
    from modelslim.plan import make_plan
    from modelslim.plan_table import as_data

    devices = resolve_devices(device, workers)
    plan = make_plan(
        model_path,
        config_path,
        device=devices[0],
        ranks=len(devices),
        model_type=model_type,
        trust_remote_code=trust_remote_code,
        engine=engine,
        tp=tp,
    )
    for warning in plan.warnings:
        output.warn(warning)
    data = as_data(plan)
    output.table(
        f"{len(plan.info.units)} units of {model_path}",
        ["weights", "layers", "count", "shape", "becomes", "bits", "size", "because of"],
        [
            (
                row["pattern"],
                row["layers"],
                row["count"],
                " x ".join(map(str, row["shape"])),
                row["scheme"],
                "" if row["bits"] is None else f"{row['bits']:.4g}",
                _change(row["bytes_before"], row["bytes_after"]),
                row["why"],
            )
            for row in [*data["weights"], _OTHERS | data["others"]]
        ],
    )
    calibration = "none"
    if plan.dataset is not None:
        passes = data["forward_passes"]
        calibration = (
            f"{'one pass' if passes == 1 else f'{passes} passes'} over {len(plan.samples)} samples of "
            f"{plan.dataset.name}"
        )
    if data["smoothing"]:
        output.table(
            "",
            ["smoothing may divide", "count", "and multiply", "as"],
            [
                (
                    place["source"],
                    place["count"],
                    ", ".join(place["targets"]),
                    place["type"] or f"left out: {place['why']}",
                )
                for place in data["smoothing"]
            ],
        )
    output.table(
        "",
        ["", ""],
        [
            ("size", _change(data["bytes_before"], data["bytes_after"])),
            ("bits per weight, of linears", _bits(data["bits_per_weight"])),
            ("calibration", calibration),
            ("device", ", ".join(dict.fromkeys(devices))),
            ("runner", f"{plan.runner}: {plan.runner_why}"),
            ("adapter", plan.adapter),
            ("engine", data["engine"] or "not known"),
        ],
    )
    output.table("", ["engine", "loads the result"], [(one["engine"], _verdict(one)) for one in data["engines"]])
    output.data(data)


def _change(before: int, after: int) -> str:
    return f"{before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB"


def _bits(bits: Mapping[str, float | None]) -> str:
    if bits["quantized"] is None:
        return f"{bits['before']} -> {bits['after']}"
    return f"{bits['before']} -> {bits['after']}; {bits['quantized']} where quantized, scales included"


def _verdict(one: Mapping[str, Any]) -> str:
    if one["loads"] is None:
        return "nothing known speaks against it"
    if one["loads"]:
        return "yes"
    if one["rules"] == ["formats"]:
        return "no: it does not read this format"
    return f"no: {', '.join(one['rules'])}; --engine {one['engine']} says more"
