# SPDX-License-Identifier: Apache-2.0
"""``modelslim plan``: what quant would do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from modelslim.cli.choosing import Asked, find_protocol
from modelslim.cli.options import (
    TagCommand,
    calib_length_option,
    calib_samples_option,
    config_path_option,
    devices_option,
    engine_option,
    json_option,
    max_memory_option,
    model_path_option,
    model_type_option,
    practices_option,
    quant_type_option,
    tag_option,
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


@click.command(cls=TagCommand)
@model_path_option
@model_type_option
@quant_type_option
@tag_option
@practices_option
@config_path_option
@calib_samples_option
@calib_length_option
@devices_option
@workers_option
@engine_option
@tp_option
@max_memory_option
@trust_remote_code_option
@json_option
@pass_output
def command(
    output: Output,
    model_path: Path,
    model_type: str | None,
    quant_type: str | None,
    tags: tuple[str, ...],
    practice_folders: tuple[Path, ...],
    config_path: Path | None,
    calib_samples: int | None,
    calib_length: int | None,
    device: str | None,
    workers: int | None,
    engine: str | None,
    tp: int,
    max_memory: str | None,
    trust_remote_code: bool,
) -> None:
    """Show what quant would do, and refuse what it could not.

    Reads config.json, the headers of the weight files and the calibration data; no weight.
    """
    from modelslim.devices import prepare_threads

    prepare_threads()
    from modelslim.memory import peaks_in_words
    from modelslim.plan import make_plan
    from modelslim.plan_table import as_data, in_time, phase_rows
    from modelslim.run_devices import devices_of

    found = find_protocol(Asked(config_path, quant_type, tags, practice_folders, model_path, model_type, engine))
    for remark in found.remarks:
        output.warn(remark)
    practice = found.practice
    if practice is not None and practice.needs_consent:
        output.warn(f"{practice.line}; quant asks for consent, or wants --yes")
    elif practice is not None:
        output.note(practice.line)
    devices = devices_of(device, workers, found.protocol)
    plan = make_plan(
        model_path,
        found.protocol,
        device=devices[0],
        ranks=len(devices),
        model_type=model_type,
        trust_remote_code=trust_remote_code,
        engine=found.engine,
        tp=tp,
        max_memory=max_memory,
        calib_samples=calib_samples,
        calib_length=calib_length,
        practice=practice,
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
        ["phase", "memory", "of which", "device", "time", "read", "written"],
        phase_rows(plan.costs),
    )
    output.table(
        "",
        ["", ""],
        [
            ("size", _change(data["bytes_before"], data["bytes_after"])),
            ("bits per weight, of linears", _bits(data["bits_per_weight"])),
            *((stage["entry"], calibration(stage)) for stage in data["prior"]),
            ("calibration", calibration(data)),
            ("time", f"about {in_time(data['seconds'])}, as estimated for {plan.costs.machine.name}"),
            ("peak memory", f"about {peaks_in_words(plan.costs.peaks)}, beyond the program itself"),
            ("residency", plan.costs.residency),
            ("device", ", ".join(dict.fromkeys(devices))),
            ("runner", f"{plan.runner}: {plan.runner_why}"),
            ("adapter", plan.adapter),
            ("engine", data["engine"] or "not known"),
            *([("practice", practice.practice.config_id)] if practice else []),
        ],
    )
    output.table("", ["engine", "loads the result"], [(one["engine"], _verdict(one)) for one in data["engines"]])
    output.data(data)


def calibration(stage: Mapping[str, Any]) -> str:
    """What a stage's calibration takes, in a few words."""
    if stage["dataset"] is None:
        return "none"
    passes = stage["forward_passes"]
    return (
        f"{'one pass' if passes == 1 else f'{passes} passes'} over {stage['samples']} samples of "
        f"{Path(stage['dataset']).name}"
    )


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
