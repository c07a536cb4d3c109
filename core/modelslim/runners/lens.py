# SPDX-License-Identifier: Apache-2.0
"""KL per layer: a few texts follow the float and the quantized layers side by side, and the model's own end reads both.

Behind each unit both hidden states go through what the model has behind its last unit (its norm and its head), and the
two next-token distributions are compared: the logit lens. Behind the last unit that is the KL divergence of the whole
model; before, it says what the layers so far have done, as far as the end can read it. To let every state pass the
remaining layers would cost the square of their number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from modelslim.batches import batched
from modelslim.costs import KL_LOGITS, KL_POSITIONS, KL_TOKENS, kl_texts
from modelslim.disk import explained
from modelslim.divergence import kl_sum
from modelslim.errors import DatasetError, ModelError, first_line
from modelslim.inputs import cut_input, holds_media, model_inputs
from modelslim.model_info import vocabularies
from modelslim.open_model import main_tensor, tensors_in
from modelslim.plan import Plan
from modelslim.ranks import ALONE, Ranks
from modelslim.runners.standing import in_place
from modelslim.sampling import choose_samples, tokens_of
from modelslim.suspended import SuspendedForward, compute
from modelslim.wire import put_together, take_apart

_GUIDE = 2  # tokens with which the ends are led through the units: many of them wait at once
_BLOCK = 4096  # rows of a head's weight that are multiplied at once
_ROWS = 8  # tokens whose log-probabilities are in memory at once

_TEXTS = 2  # in a part: the parts, and so what is measured, do not depend on the number of ranks

Outputs = dict[int, list[Any]]
"""What a unit gave: by number of the part, for each time that its forward called the unit."""


class Lens:
    """The two ways through the model, float and quantized, with the ends that read them.

    What a unit gave is kept beside the result until the run is done, so that a run that is continued goes on with it.
    A fault of the model's code on the way ends the measurement, never the run; the report has it as a note.

    Ranks share the texts, and call the methods together.

    Args:
        plan: the plan of the main stage.
        model: the run's model.
        passed: the units that samples pass, in order.
        around: opened while code of the model outside the units runs.
        ranks: who shares the texts.
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        passed: Sequence[str],
        around: Callable[[], AbstractContextManager[None]],
        ranks: Ranks = ALONE,
    ) -> None:
        self._plan = plan
        self._model = model
        self._passed = list(passed)
        self._around = around
        self._ranks = ranks
        self._vocabularies = vocabularies(model, plan.checkpoint.config)
        self._note = ""
        self._ways: dict[str, dict[int, SuspendedForward]] = {"float": {}, "quantized": {}}
        self._ends: list[SuspendedForward] = []
        self._outputs: dict[str, Outputs] = {}
        self._guides: dict[str, list[Any]] = {}
        self._rows: dict[str, Tensor] = {}
        self._counts = {"texts": 0, "tokens": 0}
        self._positions = 0

    def start(self, inputs: Sequence[Any]) -> None:
        """Let the texts run to their first unit; the embeddings are filled for it.

        Args:
            inputs: model inputs of the calibration samples, one for each.
        """

        def start() -> None:
            texts = self._texts(inputs)
            self._counts = {"texts": len(texts), "tokens": sum(map(tokens_of, texts))}
            parts = [one for first in range(0, len(texts), _TEXTS) for one in batched(texts[first : first + _TEXTS])]
            own = range(self._ranks.rank, len(parts), self._ranks.size)
            self._ways = {way: {number: self._forward(parts[number]) for number in own} for way in self._ways}
            if own:
                short = cut_input(texts[0], _GUIDE, 1)
                self._ends = [self._forward(short) for _ in self._passed]

        self._measure(start)

    def pass_float(self, unit: str) -> None:
        """Let the float texts pass a unit that no algorithm has changed yet."""

        def go() -> None:
            self._outputs = {"float": self._pass("float", unit)}

        self._measure(go)

    def pass_quantized(self, index: int, modules: Mapping[str, nn.Module]) -> bytes:
        """Let the others pass it with what takes the places of its linears and caches.

        Returns:
            What a run that is continued behind this unit wants in ``pass_again``; empty at ranks that do not write.
        """

        def go() -> None:
            with in_place(self._model, modules):
                self._outputs["quantized"] = self._pass("quantized", self._passed[index])
            self._look(self._passed[index])
            take_apart(self._outputs, {})  # what could not be kept is a fault here

        self._measure(go)
        everywhere = self._ranks.gather([{} if self._note else self._outputs, self._note])
        self._note = next((note for _, note in everywhere if note), "")
        if not self._ranks.is_first:
            return b""
        tensors: dict[int, Tensor] = {}
        kept = take_apart([outputs for outputs, _ in everywhere], tensors)
        parts = {str(key): tensor.to("cpu").contiguous() for key, tensor in tensors.items()}
        content: bytes = safetensors.torch.save(parts, {"outputs": json.dumps(kept), "note": self._note})
        return content

    def pass_again(self, index: int, file: Path) -> None:
        """Let all pass a unit that an earlier run has finished, with what it gave then.

        Args:
            index: number of the unit.
            file: what was kept for it; the first rank reads it.
        """
        said = self._ranks.share(self._kept(file) if self._ranks.is_first else None)
        self._note = self._note or said["note"]

        def go() -> None:
            self._outputs = {
                way: {number: one for part in said["outputs"] for number, one in part[way].items() if number in own}
                for way, own in self._ways.items()
            }
            for way, outputs in self._outputs.items():
                for number, calls in outputs.items():
                    for output in calls:
                        self._ways[way][number].send(deepcopy(output))
            self._look(self._passed[index])

        self._measure(go)

    def _kept(self, file: Path) -> dict[str, Any]:
        with explained(file), safetensors.safe_open(file, "pt") as kept:
            said = kept.metadata()
            tensors = {int(key): kept.get_tensor(key).to(self._plan.device) for key in kept.keys()}  # noqa: SIM118
        return {"outputs": put_together(json.loads(said["outputs"]), tensors), "note": said["note"]}

    def measure(self) -> dict[str, Any]:
        """The KL divergence behind each unit, for the report; what lies behind the last one is filled for it.

        Returns:
            ``texts``, ``tokens`` and ``positions`` that were compared, ``units``: nats by name, and ``notes``.
        """
        sums: dict[str, float] = {}

        def read() -> None:
            if not self._ways["float"]:
                return  # other ranks have all texts
            if not self._rows:
                raise ModelError("no text enters a unit that gives hidden states")
            last = next(reversed(self._guides))
            form = main_tensor(self._guides[last][-1], last).shape
            units = [one for one in self._rows if main_tensor(self._guides[one][-1], one).shape == form]
            most = max(1, KL_LOGITS // (max(self._vocabularies) * len(self._rows[last])))
            with self._exact_head():
                for end, first in zip(self._ends, range(0, len(units), most), strict=False):
                    sums.update(self._read(end, last, units[first : first + most]))

        self._measure(read)
        self.close()
        everywhere = self._ranks.gather([sums, self._positions, self._note])
        positions = sum(count for _, count, _ in everywhere)
        counts = {**self._counts, "positions": positions}
        if note := next((note for _, _, note in everywhere if note), ""):
            return {**counts, "units": {}, "notes": [note]}
        parts = [part for part, count, _ in everywhere if count]
        found = {
            # A sum of rounded terms may end below zero.
            unit: float(f"{max(0.0, sum(part[unit] for part in parts) / positions):.4g}")
            for unit in self._passed
            if all(unit in part for part in parts)
        }
        notes = []
        missing = [unit for unit in self._passed if unit not in found]
        if missing:
            notes.append(f"{len(missing)} units, such as {missing[0]}, give nothing that the model's end could read")
        if len(self._passed) < len(self._plan.info.units):
            notes.append(f"nothing is calibrated behind {self._passed[-1]}, and no text passes what lies there")
        return {**counts, "units": found, "notes": notes}

    def close(self) -> None:
        """End all forwards."""
        for forward in [*self._ends, *(one for forwards in self._ways.values() for one in forwards.values())]:
            forward.close()
        self._ends, self._ways = [], {way: {} for way in self._ways}

    def _texts(self, inputs: Sequence[Any]) -> list[Any]:
        """Beginnings of a few calibration texts; of those that come with media the texts alone."""
        session, samples = self._plan.session, self._plan.samples
        most = kl_texts(sum(self._plan.lengths))
        found = [one for sample, one in zip(samples, inputs, strict=True) if not holds_media(sample)]
        if not found:
            bare = dict.fromkeys(replace(one, image=None, audio=None, video=None) for one in samples)
            found = model_inputs(session, choose_samples(list(bare), most), self._plan.device)
        found = [one for one in found if tokens_of(one) > 1]
        if not found:
            raise DatasetError("no calibration sample holds two tokens")
        long = [one for one in found if tokens_of(one) >= KL_TOKENS] or found
        return [cut_input(one, KL_TOKENS, number) for number, one in enumerate(choose_samples(long, most), start=1)]

    def _forward(self, inputs: Any) -> SuspendedForward:
        # A forward may change what it is given.
        return SuspendedForward.start(self._plan.session.generate_model_forward(self._model, deepcopy(inputs)))

    def _pass(self, way: str, unit: str) -> Outputs:
        """Compute a unit on what waits there, and let it go on, unless nothing behind it is wanted."""
        found: Outputs = {}
        for number, forward in self._ways[way].items():
            calls = found[number] = []
            while forward.request is not None and forward.waits(unit):
                output = compute(forward.request)
                calls.append(deepcopy(output))
                if unit == self._passed[-1]:
                    break
                forward.send(output)
        return found

    def _look(self, unit: str) -> None:
        """Take what the end is going to read of a unit's outputs."""
        calls = next(iter(self._outputs["float"].values()), [])
        if not calls:
            return
        texts, length = main_tensor(calls[-1], unit).shape[:2]
        self._guides[unit] = [_short(output, texts, length) for output in calls]
        read = {
            way: [self._states(one[-1], unit) for one in self._outputs[way].values()] for way in ("float", "quantized")
        }
        rows = [one for way in read.values() for one in way if one is not None]
        if len(rows) == sum(map(len, read.values())):
            self._rows[unit] = torch.cat(rows)

    @staticmethod
    def _states(output: Any, unit: str) -> Tensor | None:
        """Hidden states at some positions of the second half of each text, [rows, hidden]; None where it has none."""
        states = main_tensor(output, unit)
        if states.dim() != 3:
            return None
        length = states.shape[1]
        step = max(1, (length - length // 2) // KL_POSITIONS)
        return states[:, length // 2 :: step].flatten(0, 1)

    def _read(self, end: SuspendedForward, last: str, units: Sequence[str]) -> dict[str, float]:
        """KL of the distributions that the end makes of float and quantized states of units, sums in nats."""
        halves = [self._rows.pop(unit).chunk(2) for unit in units]
        states = torch.cat([half[way] for way in (0, 1) for half in halves])
        is_whole = len(self._passed) == len(self._plan.info.units)
        calls: dict[str, int] = {}
        while end.request is not None:
            name = end.request.name
            answers = self._guides.get(name) or self._guides[last]
            answer = answers[min(calls.get(name, 0), len(answers) - 1)]
            calls[name] = calls.get(name, 0) + 1
            if name == (last if is_whole else self._plan.info.units[-1]):
                answer = _with_states(answer, states.unsqueeze(0))
            end.send(deepcopy(answer))
        logits = main_tensor(end.result, "the model")
        end.result = None
        if logits.shape[-1] not in self._vocabularies:
            raise ModelError(f"the model has no language model head: its output has {logits.shape[-1]} channels")
        if logits.shape[:-1].numel() != len(states):
            raise ModelError("what the model has behind its last unit does not treat tokens one by one")
        p, q = logits.reshape(len(states), -1).chunk(2)
        positions = self._positions = len(p) // len(units)
        found = {}
        for unit, start in zip(units, range(0, len(p), positions), strict=True):
            parts = [slice(row, row + _ROWS) for row in range(start, start + positions, _ROWS)]
            found[unit] = sum(
                kl_sum(p[part].float().log_softmax(-1), q[part].float().log_softmax(-1)) for part in parts
            )
            if not math.isfinite(found[unit]):
                raise ModelError("the model computes numbers that are not finite")
        return found

    @contextmanager
    def _exact_head(self) -> Iterator[None]:
        """Let heads give float32: logits of a shorter type are rounded by more than a small KL."""
        names = [one.name for one in self._plan.info.by_unit[""] if one.out_features in self._vocabularies]
        found = (self._model.get_submodule(name) for name in names)
        heads = [head for head in found if isinstance(head, nn.Linear) and "forward" not in vars(head)]
        for head in heads:
            head.forward = partial(_paired_head, head)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for head in heads:
                del head.forward

    def _measure(self, work: Callable[[], None]) -> None:
        """Do a part of the measurement, and none any more behind a fault: a run does not end because of it."""
        if self._note:
            return
        try:
            with self._around():
                work()
        except Exception as error:  # whatever a model's code raises; the report has it
            self._note = first_line(error)


def _paired_head(head: nn.Linear, x: Tensor) -> Tensor:
    """Float32 logits of float states and, behind them, as many quantized ones.

    Those are multiplied by way of their difference: logits of a short type are rounded by more than a small KL.
    """
    rows, others = x.flatten(0, -2).chunk(2)
    states = torch.cat([rows, others - rows]).t()
    y = torch.empty(states.shape[1], len(head.weight), device=x.device)
    # The weight comes first, a piece at a time: as the second factor it would be copied into another order.
    for part, weight in zip(torch.split(y, _BLOCK, 1), torch.split(head.weight, _BLOCK), strict=True):
        part.copy_(torch.mm(weight, states).t())
    if head.bias is not None:
        y[: len(rows)] += head.bias
    y[len(rows) :] += y[: len(rows)]
    return y.view(*x.shape[:-1], -1)


def _short(output: Any, texts: int, length: int) -> Any:
    """A unit's output with the first tokens of the first text alone."""
    if isinstance(output, Tensor):
        return output[:1, :_GUIDE] if output.shape[:2] == (texts, length) else output
    if isinstance(output, dict):
        return {key: _short(part, texts, length) for key, part in output.items()}
    return type(output)(_short(part, texts, length) for part in output) if isinstance(output, (list, tuple)) else output


def _with_states(output: Any, states: Tensor) -> Any:
    """A unit's output with other hidden states in the place of its own, which are its first floating tensor."""
    if isinstance(output, Tensor):
        return states
    parts = list(output.items() if isinstance(output, dict) else enumerate(output))
    place = next(key for key, part in parts if any(one.is_floating_point() for one in tensors_in(part)))
    changed = [(key, _with_states(part, states) if key == place else part) for key, part in parts]
    return dict(changed) if isinstance(output, dict) else type(output)(part for _, part in changed)
