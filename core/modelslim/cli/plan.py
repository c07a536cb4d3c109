# SPDX-License-Identifier: Apache-2.0
"""``modelslim plan``: what quant would do."""

from __future__ import annotations

from pathlib import Path

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
    from modelslim.devices import prepare_threads, resolve_devices

    prepare_threads()
    from modelslim.memory import peaks_in_words
    from modelslim.plan import make_plan
    from modelslim.plan_table import as_data, in_time, phase_rows, rows

    found = find_protocol(Asked(config_path, quant_type, tags, practice_folders, model_path, model_type, engine))
    for remark in found.remarks:
        output.warn(remark)
    practice = found.practice
    if practice is not None and practice.needs_consent:
        output.warn(f"{practice.line}; quant asks for consent, or wants --yes")
    elif practice is not None:
        output.note(practice.line)
    devices = resolve_devices(device, workers)
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
    output.table(
        f"{len(plan.info.units)} units of {model_path}",
        ["weights", "count", "shape", "becomes", "because of"],
        [(row.pattern, row.count, " x ".join(map(str, row.shape)), row.scheme, row.why) for row in rows(plan)],
    )
    data = as_data(plan)
    before, after = data["bytes_before"], data["bytes_after"]
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
        ["phase", "memory", "of which", "device", "time", "read", "written"],
        phase_rows(plan.costs),
    )
    output.table(
        "",
        ["", ""],
        [
            ("size", f"{before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB"),
            ("calibration", calibration),
            ("time", f"about {in_time(plan.costs.seconds)}, as estimated for {plan.costs.machine.name}"),
            ("peak memory", f"about {peaks_in_words(plan.costs.peaks)}, beyond the program itself"),
            ("residency", plan.costs.residency),
            ("device", ", ".join(dict.fromkeys(devices))),
            ("runner", f"{plan.runner}: {plan.runner_why}"),
            ("adapter", plan.adapter),
            ("engine", data["engine"] or "not known"),
            *([("practice", practice.practice.config_id)] if practice else []),
        ],
    )
    output.data(data)
