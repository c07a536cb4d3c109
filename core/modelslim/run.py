# SPDX-License-Identifier: Apache-2.0
"""A run from plan to finished checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelslim.errors import Diagnostic, VerificationError
from modelslim.journal import FAULTY
from modelslim.memory import Meter
from modelslim.plan import Plan, make_plan
from modelslim.report import REPORT, journal_header, make_report, memory_record
from modelslim.result import ResultWriter
from modelslim.verify import verify_run
from modelslim.writer import OutputDirectory, check_save_path, check_space, write_json


def quantize(
    model_path: Path,
    save_path: Path,
    config_path: Path,
    *,
    device: str | None = None,
    model_type: str | None = None,
    trust_remote_code: bool = False,
    engine: str | None = None,
    tp: int = 1,
    max_memory: str | None = None,
    check: bool = True,
    restart: bool = False,
    observers: Sequence[tuple[str, object]] = (),
) -> dict[str, Any]:
    """Quantize a checkpoint.

    Args:
        model_path: directory of the float model; never touched.
        save_path: where the result goes; must not exist, or be empty.
        config_path: the YAML protocol.
        device: ``cpu``, ``cuda:0``, ...; None for the best that is there.
        model_type: published model name or model_type; None to go by config.json.
        trust_remote_code: allow code of the checkpoint to run.
        engine: refuse what this engine does not load; see ``make_plan``.
        tp: the engine's degree of tensor parallelism.
        max_memory: what the run may hold; see ``make_plan``.
        check: verify the result before it gets its name.
        restart: begin anew what an interrupted run left in ``<save_path>.partial``; False to continue it.
        observers: further plugins of this run, by name.

    Returns:
        The report, which also lies in ``<save_path>/report.json``.

    Raises:
        UsageError: the interrupted run was another one; says what differs.
        VerificationError: the result is faulty; it keeps the name ``<save_path>.partial``.
        ModelSlimError: another of its subclasses; nothing lies under ``save_path`` then.
    """
    check_save_path(save_path, model_path)
    plan = make_plan(
        model_path,
        config_path,
        device=device,
        model_type=model_type,
        trust_remote_code=trust_remote_code,
        engine=engine,
        tp=tp,
        max_memory=max_memory,
        observers=observers,
    )
    return run_plan(plan, save_path, check=check, restart=restart)


def run_plan(
    plan: Plan,
    save_path: Path,
    *,
    check: bool = True,
    restart: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Execute a plan; see :func:`quantize`.

    Args:
        plan: the plan.
        save_path: where the result goes.
        check: verify the result before it gets its name.
        restart: begin anew what an interrupted run left.
        say: called with what the user should know of an interrupted run that is continued.
    """
    check_save_path(save_path, plan.checkpoint.path)
    in_file = plan.costs.job.activation_bytes if plan.costs.layout.activations == "file" else 0
    check_space(save_path, sum(plan.result_sizes().values()) + in_file)
    meter = Meter(plan.device)
    meter.start()
    runner = plan.registry.load("runners", plan.runner)()
    output = OutputDirectory(save_path, journal_header(plan), resume=not restart)
    with _telling_of_rest(output, say), plan.checkpoint, output:
        if output.finished:
            done = sum(one.report is not None for one in output.finished)
            say(f"continuing {output.path}: {done} units are done")
        with ResultWriter(plan, output) as writer:
            units = runner.run(plan, writer)
            records = writer.finish()
        report = {**make_report(plan, save_path, units, records, meter), "verified": False}
        write_json(output.path / REPORT, report)
        if check:
            _verify(plan, output, units)
            report["verified"] = True
            report["memory"] = memory_record(plan, meter)
            write_json(output.path / REPORT, report)
        output.commit()
    plan.session.run_finished(report)
    return report


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
