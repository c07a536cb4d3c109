# SPDX-License-Identifier: Apache-2.0
"""``modelslim quant``: the main job."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from modelslim.cli.choosing import Asked, find_protocol, is_told, settle
from modelslim.cli.convert import convert_and_show
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
    option,
    practices_option,
    quant_type_option,
    quiet_option,
    restart_option,
    save_path_option,
    tag_option,
    tp_option,
    trust_remote_code_option,
    verify_option,
    workers_option,
    yes_option,
)
from modelslim.cli.output import Output, pass_output


@click.command(cls=TagCommand)
@model_path_option
@save_path_option
@model_type_option
@quant_type_option
@tag_option
@yes_option
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
@verify_option
@restart_option
@option(
    "--debug",
    is_flag=True,
    help="Keep scales, ranges and decisions in <save_path>/debug_info, for modelslim inspect.",
)
@json_option
@quiet_option
@pass_output
def command(
    output: Output,
    model_path: Path,
    save_path: Path,
    model_type: str | None,
    quant_type: str | None,
    tags: tuple[str, ...],
    yes: bool,
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
    check: bool,
    restart: bool,
    debug: bool,
) -> None:
    """Quantize a model and write the result.

    A protocol says how: yours, given as --config_path, or the best known one of --quant_type. Where
    that one is not verified for the model you are asked first.

    Everything that can be wrong is refused before a weight is read. The result appears under its
    name only when it is whole and verified; until then it grows in <save_path>.partial. The same
    command continues there after an interruption.
    """
    from modelslim.devices import prepare_threads

    prepare_threads()
    from modelslim.cli.progress import progress
    from modelslim.convert_protocol import read_conversion
    from modelslim.launch import crew, is_first_process
    from modelslim.output_directory import check_save_path

    start = time.monotonic()
    if is_first_process():
        check_save_path(save_path, model_path)
    else:
        output.mode = "quiet"
    found = find_protocol(Asked(config_path, quant_type, tags, practice_folders, model_path, model_type, engine))
    engine, practice = found.engine, found.practice
    if is_first_process():
        if practice is not None:
            settle(output, practice, yes, found.remarks)
        else:
            for remark in found.remarks:
                output.warn(remark)
    asked = read_conversion(found.protocol)
    for warning in asked.warnings if asked else ():
        output.warn(warning)
    if asked and (calib_samples or calib_length):
        output.warn("--calib_samples and --calib_length have no effect on a conversion, which calibrates nothing")
    if asked and asked.protocol is None:
        convert_and_show(
            output,
            model_path,
            save_path,
            asked.to,
            part_file_size=asked.part_file_size,
            engine=engine,
            tp=tp,
            trust_remote_code=trust_remote_code,
            check=check,
        )
        return
    # What a plugin prints is not this command's result.
    with (
        asked.protocol_file() if asked else nullcontext(found.protocol) as protocol,
        progress(output, "quantizing") as observers,
        output.foreign_prints(),
    ):
        planned = {
            "model_path": str(model_path),
            "config_path": str(protocol),
            "model_type": model_type,
            "trust_remote_code": trust_remote_code,
            "engine": engine,
            "tp": tp,
            "max_memory": max_memory,
            "calib_samples": calib_samples,
            "calib_length": calib_length,
        }
        with crew(device, workers, {"save_path": str(save_path), "planned": planned}) as members:
            from modelslim.run import plan_as, run_plan  # and torch, while other ranks do the same

            plan = plan_as(members, planned, observers, practice)
            for warning in plan.warnings if members.rank == 0 else ():
                if not is_told(warning, practice):
                    output.warn(warning)
            output.debug(f"planned in {plan.seconds:.2f} s: {plan.adapter}, {len(plan.info.units)} units")
            output.note(f"runner {plan.runner}: {plan.runner_why}")
            if max_memory is not None:
                output.note(plan.costs.residency)
            with members.meet() as ranks:
                report = run_plan(
                    plan,
                    save_path,
                    check=check,
                    restart=restart,
                    say=output.note,
                    ranks=ranks,
                    command=output.command,
                    debug=debug,
                )
    if not report:
        return
    unseen = idle_experts(report)
    if unseen:
        borrowed = sum(len(unit.get("borrowed", ())) for unit in all_units(report))
        what = f"; {borrowed} of their linears are calibrated by the other experts' tokens" if borrowed else ""
        output.warn(f"{len(unseen)} experts saw no calibration token, such as {unseen[0]}{what}; see report.json")
    if said := notes(report):
        more = f" (and {len(said) - 1} more notes; see report.json)" if len(said) > 1 else ""
        output.warn(said[0] + more)
    worst = worst_linears(report)
    if worst:
        columns = ["least faithful linears", "scheme", "relative error", "SNR, dB", "clipped"]
        output.table("", columns, worst)
    output.table(f"Quantized in {time.monotonic() - start:.1f} s", ["", ""], summary(report))
    output.data(report)


def all_units(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The records of a report's units, those of prior stages first."""
    return [*(unit for stage in report["prior"] for unit in stage["units"]), *report["units"]]


def worst_linears(report: Mapping[str, Any], count: int = 10) -> list[tuple[str, ...]]:
    """Rows of the linears whose outputs on calibration data are farthest from the float ones."""
    found = [
        (quality["relative_error"], name, unit["linears"][name], quality)
        for unit in all_units(report)
        for name, quality in unit.get("quality", {}).items()
    ]
    return [
        (
            name,
            scheme,
            f"{error:.4f}",
            "" if quality["snr_db"] is None else f"{quality['snr_db']:.1f}",
            f"{quality['clipped']:.2%}",
        )
        for error, name, scheme, quality in sorted(found, key=lambda one: -one[0])[:count]
    ]


def notes(report: Mapping[str, Any]) -> list[str]:
    """What the algorithms say about single linears, each with the name of the linear."""
    return [
        f"{name}: {note}" for unit in all_units(report) for name, said in unit.get("notes", {}).items() for note in said
    ]


def fallen_back(report: Mapping[str, Any]) -> str:
    """What fell back, in a few words; empty when nothing did."""
    fallen = [(name, fate["to"]) for unit in all_units(report) for name, fate in unit.get("fell_back", {}).items()]
    more = f" and {len(fallen) - 1} more" if len(fallen) > 1 else ""
    return f"{fallen[0][0]} to {fallen[0][1]}{more}" if fallen else ""


def idle_experts(report: Mapping[str, Any]) -> list[str]:
    """Names of the fused experts to which no calibration token was routed."""
    return [
        f"{layer}.{number}"
        for unit in all_units(report)
        for layer, seen in unit.get("experts", {}).items()
        for number, tokens in enumerate(seen["tokens"])
        if not tokens
    ]


def summary(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The report in a few lines."""
    from modelslim.memory import peaks_in_words

    before, after = report["bytes_before"], report["bytes_after"]
    schemes = ", ".join(f"{count} linears {scheme}" for scheme, count in report["schemes"].items())
    rows = [
        ("result", report["save_path"]),
        ("schemes", schemes),
        ("size", f"{before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB ({before / after:.2f} times smaller)"),
        *((stage["entry"], _calibration(stage)) for stage in report["prior"]),
        ("calibration", _calibration(report)),
    ]
    if report["practice"]:
        rows.insert(1, ("practice", report["practice"]["config_id"]))
    if fallen := fallen_back(report):
        rows.append(("fell back", fallen))
    if report["peak_memory_bytes"]:
        rows.append(("peak memory", f"{report['peak_memory_bytes'] / 1e6:,.0f} MB, imports included"))
    if measured := report["memory"]["peak_bytes"]:
        expected = peaks_in_words(report["memory"]["estimated_bytes"])
        rows.append(("run alone", f"{peaks_in_words(measured)}; the estimate was {expected}"))
    return rows


def _calibration(stage: Mapping[str, Any]) -> str:
    """What a stage was calibrated on, in a few words."""
    return f"{stage['samples']} samples of {Path(stage['dataset']).name}" if stage["samples"] else "none"
