# SPDX-License-Identifier: Apache-2.0
"""How a trial is judged: perplexity or KL in this process, or a program of the user's."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from modelslim.errors import DatasetError, UsageError
from modelslim.evaluation import evaluate
from modelslim.tune.plan import TunePlan


class OutOfTimeError(Exception):
    """The time of the whole tune was over before a program had judged."""


class Judge:
    """Scores checkpoints as ``evaluation`` of the plan says.

    Attributes:
        higher: True when larger scores are better.
        target: the score that a trial must reach, tolerance aside; None when any will do.
        metric: name of the score.

    Args:
        plan: the plan.
        model_path: the float model.
        device: as for ``quant``.
        trust_remote_code: allow code of the checkpoints to run.
    """

    def __init__(self, plan: TunePlan, model_path: Path, device: str | None, trust_remote_code: bool) -> None:
        self._config: Mapping[str, Any] = plan.evaluation
        self._model_path = model_path
        self._device = device
        self._trust = trust_remote_code
        self.in_process = self._config["type"] == "in_process"
        self.metric: str = self._config["metric"] if self.in_process else "score"
        self.higher: bool = self.metric == "top1_agreement" if self.in_process else self._config["better"] == "higher"
        self.target: float | None = self._config.get("target")
        self._text = self._read(plan) if self.in_process else ""

    def passes(self, score: float) -> bool:
        """True when the score reaches the target, or misses it by no more than the tolerance."""
        if self.target is None:
            return True
        tolerance: float = self._config["tolerance"]
        return score >= self.target - tolerance if self.higher else score <= self.target + tolerance

    def score(self, checkpoint: Path, seconds: float | None) -> tuple[float, dict[str, Any]]:
        """The score of a checkpoint, and what else the evaluation tells.

        Args:
            checkpoint: its directory.
            seconds: time that is left; None for no limit.

        Raises:
            UsageError: the program fails, takes too long, or prints no score.
            OutOfTimeError: ``seconds`` are over.
        """
        if not self.in_process:
            return self._ask(checkpoint, seconds)
        found = evaluate(
            checkpoint,
            self._model_path,
            self._text,
            window=self._config["window"],
            max_tokens=self._config["max_tokens"],
            dtype=self._config["dtype"],
            device=self._device,
            trust_remote_code=self._trust,
        )
        details = asdict(found)
        values = {"kl": found.kl, "perplexity": found.quantized_perplexity, "top1_agreement": found.top1_agreement}
        return values[self.metric], details

    def identity(self) -> Any:
        """What decides the scores, beside the checkpoint."""
        return [dict(self._config), self._text]

    def _ask(self, checkpoint: Path, seconds: float | None) -> tuple[float, dict[str, Any]]:
        """Run the program; no shell is involved."""
        words = [
            word.replace("{checkpoint}", str(checkpoint)).replace("{model}", str(self._model_path))
            for word in self._config["command"]
        ]
        limits = [one for one in (self._config.get("timeout"), seconds) if one is not None]
        try:
            done = subprocess.run(
                words, stdout=subprocess.PIPE, text=True, check=False, timeout=min(limits, default=None)
            )
        except OSError as error:
            raise UsageError(f"evaluation.command: {words[0]} cannot be started: {error.strerror}") from error
        except subprocess.TimeoutExpired as error:
            if seconds is not None and error.timeout == seconds:
                raise OutOfTimeError from error
            raise UsageError(
                f"evaluation.command took longer than {error.timeout:.0f} s",
                hint="raise evaluation.timeout; the same command goes on with this trial",
            ) from error
        if done.returncode:
            raise UsageError(
                f"evaluation.command failed with exit code {done.returncode} on {checkpoint}",
                hint="its own output says why; the same command goes on with this trial",
            )
        return read_score(done.stdout)

    def _read(self, plan: TunePlan) -> str:
        if "text" not in self._config:
            return files("modelslim.calibration").joinpath("eval_english.txt").read_text(encoding="utf-8")
        given = Path(self._config["text"]).expanduser()
        file = given if given.is_file() else plan.base / given
        try:
            return file.read_text(encoding="utf-8")
        except OSError as error:
            raise DatasetError(f"evaluation.text: {given} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DatasetError(f"{file}: not UTF-8 at byte {error.start}", hint="save the file as UTF-8") from error


def read_score(text: str) -> tuple[float, dict[str, Any]]:
    """The score in the last line that a program wrote: a number, or a JSON object with ``score``.

    Raises:
        UsageError: there is none.
    """
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    try:
        value = json.loads(last)
    except ValueError:
        value = None
    details = value if isinstance(value, dict) else {}
    score = details.get("score", value)
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
        raise UsageError(
            f"evaluation.command: its last line is no score: {last[:80]!r}",
            hint='let it print a number, or {"score": 0.8}, as its last line',
        )
    return float(score), details
