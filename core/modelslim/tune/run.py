# SPDX-License-Identifier: Apache-2.0
"""A tune from plan to finished checkpoint: trials until the strategy is done, then the best protocol in earnest."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

from modelslim.disk import explained, write_json
from modelslim.errors import QuantizationError, UsageError
from modelslim.output_directory import check_save_path
from modelslim.plan import Plan, make_plan
from modelslim.registry import Registry
from modelslim.report import digest, journal_header
from modelslim.run import quantize
from modelslim.tune.budget import Budget
from modelslim.tune.experience import Experience
from modelslim.tune.fallback import BinaryFallback, StandingHigh
from modelslim.tune.judge import Judge, OutOfTimeError
from modelslim.tune.plan import TunePlan, read_tune_plan
from modelslim.tune.strategy import Candidate, Context, Strategy, Verdict
from modelslim.tune.trials import VERSION, Trials, check_trials, key_of

STRATEGIES: Mapping[str, type[Strategy]] = {
    "budget": Budget,
    "standing_high": StandingHigh,
    "standing_high_with_experience": Experience,
    "binary_fallback": BinaryFallback,
}
PROTOCOL = "protocol.yaml"
RESULT = "tune.json"

_TIMEOUT = re.compile(r"(?:(\d+)D)?(?:(\d+)H)?(?:(\d+)M)?(?:(\d+)S)?", re.IGNORECASE)


def parse_timeout(text: str) -> float:
    """Seconds of ``1D2H30M10S``, of which any part may be left out.

    Raises:
        UsageError: it is something else, or no time at all.
    """
    match = _TIMEOUT.fullmatch(text)
    parts = match.groups() if match else ()
    seconds = sum(int(part or 0) * unit for part, unit in zip(parts, (86400, 3600, 60, 1), strict=False))
    if not seconds:
        raise UsageError(f"--timeout {text!r} is no time", hint="write days, hours, minutes, seconds: 1D12H or 2H30M")
    return float(seconds)


def trials_path(save_path: Path) -> Path:
    """Where the trials of a tune for ``save_path`` lie."""
    return save_path.with_name(f"{save_path.name}.tune")


def tune(
    model_path: Path,
    save_path: Path,
    config_path: Path,
    *,
    device: str | None = None,
    timeout: float | None = None,
    model_type: str | None = None,
    trust_remote_code: bool = False,
    restart: bool = False,
    observers: Sequence[tuple[str, object]] = (),
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Search for a protocol, and quantize with it.

    Args:
        model_path: directory of the float model; never touched.
        save_path: where the result goes; trials lie in ``<save_path>.tune``.
        config_path: the plan of the tune, YAML.
        device: ``cpu``, ``cuda:0``, ...; None for the best that is there.
        timeout: seconds after which no further trial is begun; None for no limit.
        model_type: published model name or model_type; None to go by config.json.
        trust_remote_code: allow code of the checkpoint to run.
        restart: begin anew what an interrupted tune left; False to continue it.
        observers: further plugins of every run, by name.
        say: called with what is going on.

    Returns:
        The trials, and the number of the one whose protocol made the result; also in ``tune.json`` beside it.

    Raises:
        UsageError: the trials there are those of another tune.
        ProtocolError: the plan is wrong; carries every mistake.
        QuantizationError: no trial reached the target.
        ModelSlimError: another of its subclasses.
    """
    start = time.monotonic()
    check_save_path(save_path, model_path)
    check_trials(trials_path(save_path))
    registry = Registry.scan()
    plan = read_tune_plan(config_path, registry)
    settings: dict[str, Any] = {"device": device, "model_type": model_type, "trust_remote_code": trust_remote_code}
    judge = Judge(plan, model_path, device, trust_remote_code)
    context = Context(plan, model_path, registry, trials_path(save_path), {**settings, "observers": observers}, say)
    strategy = STRATEGIES[plan.strategy["type"]](context)
    planned = [make_plan(model_path, config_path, document=document, **settings) for document in strategy.probes()]
    with Trials(context.directory, _header(plan, planned, judge), restart=restart) as trials:
        if trials.records:
            say(f"continuing {trials.path}: {len(trials.records)} trials are done")
        arena = _Arena(context, judge, trials, {**settings, "observers": observers})
        tried, ended = _search(strategy, arena, None if timeout is None else start + timeout)
        say(ended)
        best = _best(tried, judge)
        protocol = trials.path / best["protocol"]
        say(f"quantizing with the protocol of trial {best['trial']}")
        report = quantize(model_path, save_path, protocol, observers=observers, **settings)
        result = {
            "ended": ended,
            "metric": judge.metric,
            "best": best["trial"],
            "score": best["score"],
            "bytes_after": report["bytes_after"],
            "protocol": str(save_path / PROTOCOL),
            "trials": tried,
        }
        with explained(save_path):
            shutil.copyfile(protocol, save_path / PROTOCOL)
            write_json(save_path / RESULT, result)
    return result


def _search(strategy: Strategy, arena: _Arena, deadline: float | None) -> tuple[list[dict[str, Any]], str]:
    """The trials that the strategy asked for, and why they ended."""
    tried: list[dict[str, Any]] = []
    judge, most = arena.judge, arena.context.plan.max_trials
    with closing(strategy.propose()) as proposals:
        candidate = next(proposals, None)
        while candidate is not None:
            record = arena.known(candidate)
            if record is None and len(arena.trials.records) >= most:
                return tried, f"max_trials ({most}) is reached"
            left = None if deadline is None else deadline - time.monotonic()
            if record is None and left is not None and left <= 0:
                return tried, "the time is over"
            try:
                record = record or arena.fight(candidate, left)
            except OutOfTimeError:
                return tried, "the time is over"
            tried.append(record)
            mark = "" if judge.target is None else (", passes" if record["passed"] else ", fails")
            arena.context.say(f"trial {record['trial']}: {record['note']}: {judge.metric} {record['score']:.6g}{mark}")
            try:
                candidate = proposals.send(Verdict(record["score"], record["passed"]))
            except StopIteration:
                candidate = None
    return tried, "the strategy is done"


class _Arena:
    """Makes a trial of a candidate."""

    def __init__(self, context: Context, judge: Judge, trials: Trials, settings: Mapping[str, Any]) -> None:
        self.context = context
        self.judge = judge
        self.trials = trials
        self._settings = settings

    def known(self, candidate: Candidate) -> dict[str, Any] | None:
        """The trial of the same protocol, when there was one."""
        return self.trials.find(key_of(self.complete(candidate)))

    def complete(self, candidate: Candidate) -> dict[str, Any]:
        """The protocol as it is written: a data set that lies beside the plan by its whole path."""
        protocol = dict(candidate.protocol)
        spec = dict(protocol["spec"])
        if "dataset" in spec:
            beside = self.context.plan.base / Path(spec["dataset"]).expanduser()
            if not Path(spec["dataset"]).expanduser().exists() and beside.exists():
                spec["dataset"] = str(beside.resolve())
        return {**protocol, "spec": spec}

    def fight(self, candidate: Candidate, left: float | None) -> dict[str, Any]:
        """Quantize and judge; what is interrupted is continued by the next start."""
        protocol = self.complete(candidate)
        key = key_of(protocol)
        directory = self.trials.directory(key)
        file, checkpoint = directory / PROTOCOL, directory / "checkpoint"
        with explained(file):
            file.write_text(yaml.safe_dump(protocol, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")
        begin = time.monotonic()
        if not checkpoint.exists():
            quantize(self.context.model_path, checkpoint, file, check=False, **self._settings)
        middle = time.monotonic()
        score, details = self.judge.score(checkpoint, None if left is None else max(1.0, left - (middle - begin)))
        end = time.monotonic()
        size = sum(one.stat().st_size for one in checkpoint.iterdir() if one.suffix == ".safetensors")
        record = {
            "trial": len(self.trials.records) + 1,
            "key": key,
            "note": candidate.note,
            "protocol": str(file.relative_to(self.trials.path)),
            "score": score,
            "passed": self.judge.passes(score),
            "bytes_after": size,
            "seconds": {"quantize": round(middle - begin, 3), "evaluate": round(end - middle, 3)},
            "evaluation": details,
        }
        self.trials.add(record)
        with explained(directory):
            write_json(directory / "result.json", record)
            if not self.context.plan.keep_checkpoints:
                shutil.rmtree(checkpoint)
        return record


def _header(plan: TunePlan, planned: Sequence[Plan], judge: Judge) -> dict[str, Any]:
    """All that shapes the scores, so that a later start can tell whether it is the same tune."""
    headers = [journal_header(one) for one in planned]
    first = {key: value for key, value in headers[0].items() if key not in ("journal", "protocol", "dataset")}
    data = [digest(plan.document.value), *(header["protocol"] for header in headers)]
    return {
        "tune": VERSION,
        "plan": digest(data),
        "dataset": digest([header["dataset"] for header in headers]),
        "evaluation": digest(judge.identity()),
        **first,
    }


def _best(tried: Sequence[dict[str, Any]], judge: Judge) -> dict[str, Any]:
    """The smallest trial that passes, the better score among equals; without a target the best score.

    Raises:
        QuantizationError: none passes.
    """
    passed = [record for record in tried if record["passed"]]
    if not passed:
        sign = -1 if judge.higher else 1
        scores = sorted((record["score"] for record in tried), key=lambda score: sign * score)
        told = f"the best {judge.metric} is {scores[0]:.6g}, the target {judge.target}" if scores else "none was made"
        raise QuantizationError(
            f"no trial reached the target: {told}",
            hint="lower the target, give it more to leave in float, or more time; trials are kept",
        )
    sign = -1 if judge.higher else 1
    if judge.target is None:
        return min(passed, key=lambda record: (sign * record["score"], record["bytes_after"]))
    return min(passed, key=lambda record: (record["bytes_after"], sign * record["score"]))
