# SPDX-License-Identifier: Apache-2.0
"""A run from plan to finished checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from modelslim.checkpoint import StoredTensor
from modelslim.debug_info import has_unit, write_plan
from modelslim.disk import write_json
from modelslim.errors import Diagnostic, RankError, VerificationError
from modelslim.journal import FAULTY, FinishedStage, FinishedUnit, differences, is_whole
from modelslim.launch import Crew, crew, is_first_process
from modelslim.memory import Meter
from modelslim.output_directory import DEBUG_INFO, PRIOR, OutputDirectory, check_save_path, check_space
from modelslim.overlay import Overlay
from modelslim.plan import Plan, make_plan
from modelslim.practice_choice import Choice
from modelslim.ranks import ALONE, Ranks
from modelslim.report import REPORT, Phases, journal_header, make_report, memory_record
from modelslim.report_page import write_page
from modelslim.result import ResultWriter, RunOutput
from modelslim.verify import verify_run


def quantize(
    model_path: Path,
    save_path: Path,
    config_path: Path,
    *,
    device: str | None = None,
    workers: int | None = None,
    model_type: str | None = None,
    trust_remote_code: bool = False,
    engine: str | None = None,
    tp: int = 1,
    max_memory: str | None = None,
    calib_samples: int | None = None,
    calib_length: int | None = None,
    check: bool = True,
    restart: bool = False,
    debug: bool = False,
    observers: Sequence[tuple[str, object]] = (),
) -> dict[str, Any]:
    """Quantize a checkpoint.

    Args:
        model_path: directory of the float model; never touched.
        save_path: where the result goes; must not exist, or be empty.
        config_path: the YAML protocol.
        device: ``cpu``, ``cuda:0``, or several as in ``npu:0,1``, which share the work; None for the best that is
            there.
        workers: how many processes share the CPU; None for one.
        model_type: published model name or model_type; None to go by config.json.
        trust_remote_code: allow code of the checkpoint to run.
        engine: refuse what this engine does not load; see ``make_plan``.
        tp: the engine's degree of tensor parallelism.
        max_memory: what the run may hold; see ``make_plan``.
        calib_samples: calibrate on at most so many samples; None for as many as the algorithms want.
        calib_length: tokens after which a calibration text is cut; None for never.
        check: verify the result before it gets its name.
        restart: begin anew what an interrupted run left in ``<save_path>.partial``; False to continue it.
        debug: keep scales, ranges and decisions in ``<save_path>/debug_info``.
        observers: further plugins of this run, by name; of the first process alone.

    Returns:
        The report, which also lies in ``<save_path>/report.json``.

    Raises:
        RankError: a process that shares the work has ended.
        UsageError: the interrupted run was another one; says what differs.
        VerificationError: the result is faulty; it keeps the name ``<save_path>.partial``.
        ModelSlimError: another of its subclasses; nothing lies under ``save_path`` then.
    """
    if is_first_process():
        check_save_path(save_path, model_path)
    planned = {
        "model_path": str(model_path),
        "config_path": str(config_path),
        "model_type": model_type,
        "trust_remote_code": trust_remote_code,
        "engine": engine,
        "tp": tp,
        "max_memory": max_memory,
        "calib_samples": calib_samples,
        "calib_length": calib_length,
    }
    with crew(device, workers, {"save_path": str(save_path), "planned": planned}) as members:
        plan = plan_as(members, planned, observers)
        with members.meet() as ranks:
            return run_plan(plan, save_path, check=check, restart=restart, debug=debug, ranks=ranks)


def plan_as(
    members: Crew,
    planned: Mapping[str, Any],
    observers: Sequence[tuple[str, object]] = (),
    practice: Choice | None = None,
) -> Plan:
    """The plan of a run as one of its ranks makes it.

    Args:
        members: the ranks.
        planned: arguments of ``make_plan`` that all share, as JSON values.
        observers: further plugins of this rank.
        practice: how the protocol was chosen, at the rank that reports it.
    """
    options = dict(planned)
    model_path, config_path = (Path(options.pop(name)) for name in ("model_path", "config_path"))
    return make_plan(
        model_path,
        config_path,
        device=members.device,
        ranks=members.size,
        practice=practice,
        observers=observers,
        **options,
    )


def quantize_as(members: Crew, job: Mapping[str, Any]) -> None:
    """Take part in a run that the first rank leads.

    Args:
        members: the ranks.
        job: what ``crew`` was told.
    """
    plan = plan_as(members, job["planned"])
    with members.meet() as ranks:
        run_plan(plan, Path(job["save_path"]), ranks=ranks)


def run_plan(
    plan: Plan,
    save_path: Path,
    *,
    check: bool = True,
    restart: bool = False,
    say: Callable[[str], None] = lambda message: None,
    ranks: Ranks = ALONE,
    command: Sequence[str] = (),
    debug: bool = False,
) -> dict[str, Any]:
    """Execute a plan; see :func:`quantize`.

    Args:
        plan: the plan.
        save_path: where the result goes.
        check: verify the result before it gets its name.
        restart: begin anew what an interrupted run left.
        say: called with what the user should know of an interrupted run that is continued, and of the verification.
        ranks: who shares the run, each with the same plan; the first one writes, checks and reports.
        command: the command line, for the report.
        debug: keep scales, ranges and decisions in ``<save_path>/debug_info``.

    Returns:
        The report; an empty one at ranks that write nothing.
    """
    if not ranks.is_first:
        _help(plan, ranks)
        return {}
    phases = Phases()
    phases.end("plan", plan.seconds)
    check_save_path(save_path, plan.checkpoint.path)
    in_file = max(
        (one.costs.job.activation_bytes for one in plan.stages if one.costs.layout.activations == "file"), default=0
    )
    check_space(save_path, sum(plan.result_sizes().values()) + plan.kept_bytes() + in_file)
    meter = Meter(plan.device)
    meter.start()
    runner = plan.registry.load("runners", plan.runner)()
    header = journal_header(plan)
    output = OutputDirectory(save_path, header, resume=not restart)
    with _telling_of_rest(output, say), plan.checkpoint, output:
        if output.finished or output.stages:
            done = sum(one.report is not None for one in output.finished)
            stages = f"{len(output.stages)} of {len(plan.prior)} prior stages and " if plan.prior else ""
            say(f"continuing {output.path}: {stages}{done} units are done")
        with ResultWriter(plan, output, debug) as writer:
            if debug:
                write_plan(output.path, plan)
                lost = sum(not has_unit(output.path, number) for number in range(len(output.finished)))
                if lost:
                    say(f"{lost} of them were done without --debug and are not in {DEBUG_INFO}")
            _tell(header, writer, ranks)
            units = runner.run(plan, writer, ranks)
            prior = [stage.records for stage in writer.overlay.stages]
            phases.end("units")
            records = writer.finish()
        report = {**make_report(plan, save_path, units, records, meter, prior, command), "verified": False}
        phases.end("files and report")
        report["phases"] = phases.done
        write_json(output.path / REPORT, report)
        if plan.practice is not None:
            plan.practice.write(output.path)
        if check:
            size = sum(record.nbytes for record in records)
            say(f"verifying {len(records)} tensors, {size / 1e6:,.1f} MB")
            _verify(plan, output, [*(unit for stage in prior for unit in stage), *units])
            report["verified"] = True
            phases.end("verify")
            report["memory"] = memory_record(plan, meter)
            write_json(output.path / REPORT, report)
        write_page(report, output.path)
        output.commit()
    plan.session.run_finished(report)
    return report


def _tell(header: Mapping[str, Any], writer: ResultWriter, ranks: Ranks) -> None:
    """Tell the other ranks what there is already, and see that they have the same plan."""
    if ranks.size == 1:
        return
    stored = [
        [one.name, one.dtype, list(one.shape), str(one.file), one.offset, one.nbytes] for one in writer.stored.values()
    ]
    stages = [stage.as_data() for stage in writer.overlay.stages]
    ranks.share([str(writer.path), [unit.as_data() for unit in writer.finished], stored, stages])
    _compare(header, ranks)


def _help(plan: Plan, ranks: Ranks) -> None:
    """Do the part of a rank that writes nothing."""
    path, finished, stored, stages = ranks.share(None)
    _compare(journal_header(plan), ranks)
    tensors = {
        name: StoredTensor(name, dtype, tuple(shape), Path(file), offset, nbytes)
        for name, dtype, shape, file, offset, nbytes in stored
    }
    runner = plan.registry.load("runners", plan.runner)()
    units = [FinishedUnit.from_data(unit) for unit in finished]
    done = [FinishedStage.from_data(stage) for stage in stages]
    overlay = Overlay(Path(path) / PRIOR, done, is_wanted=not is_whole(units))
    with plan.checkpoint, closing(overlay):
        runner.run(plan, RunOutput(Path(path), units, tensors, overlay), ranks)


def _compare(own: Mapping[str, Any], ranks: Ranks) -> None:
    """Refuse ranks that would not compute the same, by the headers of their journals."""
    headers = ranks.gather({key: own[key] for key in ("protocol", "dataset", "calib_length", "adapter", "versions")})
    for rank, header in enumerate(headers):
        changes = list(differences(headers[0], header))
        if changes:
            raise RankError(
                f"rank {rank} does not have the plan of rank 0",
                diagnostics=[Diagnostic(change) for change in changes],
                hint="have the same model, data and versions on all hosts",
            )


@contextmanager
def _telling_of_rest(output: OutputDirectory, say: Callable[[str], None]) -> Iterator[None]:
    """Say that a run which failed can be continued."""
    try:
        yield
    except VerificationError:
        raise
    except BaseException:
        if output.left:
            say(f"what was finished is kept in {output.path}; the same command continues there")
        raise


def _verify(plan: Plan, output: OutputDirectory, units: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to give a faulty result its name."""
    problems = verify_run(plan, output.path, units)
    if problems:
        output.keep()
        output.journal(FAULTY)
        raise VerificationError(
            f"{output.path}: the result is faulty and keeps this name",
            diagnostics=[Diagnostic(problem.message, hint=problem.hint) for problem in problems],
            hint="this is a fault of ModelSlim or of a plugin, please report it; --no-verify skips this check",
        )
