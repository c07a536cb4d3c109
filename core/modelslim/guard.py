# SPDX-License-Identifier: Apache-2.0
"""Proves, on a tiny random model of the same architecture, that unit by unit is the model's own forward.

Calibration is silently wrong when an adapter hands a unit another mask, another position or other features
than the model would. No error tells it, and the result merely answers worse. So the plan of a run that
calibrates compares the two forwards to the bit, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from modelslim.adapters import GENERIC, open_session
from modelslim.checkpoint import Checkpoint
from modelslim.devices import one_thread
from modelslim.errors import CapabilityError, ModelError, first_line
from modelslim.open_model import OpenModel, call_model, tensors_in
from modelslim.recording import Recording, first_difference, same_tensors
from modelslim.registry import Registry
from modelslim.session import Session

PROOF = "run AdapterContract of modelslim.testing, and let the adapter implement make_tiny_checkpoint"
IDLE = "no input of its tiny model enters there"
HINT = (
    "generate_model_forward must hand every unit what the model's own forward hands it, and pass on what the unit "
    "gives; `modelslim.api.drive` does so without code"
)


def prove_forward(
    session: Session,
    model: nn.Module,
    source: Checkpoint,
    kind: str,
    name: str,
    trust_remote_code: bool,
    registry: Registry,
) -> list[str]:
    """Prove the forward of a run's adapter; see :meth:`Guard.check`.

    Args:
        session: the run's hooks.
        model: the model on meta.
        source: the real checkpoint, of which only config.json is of interest.
        kind: kind of the adapter's entry point, ``adapters`` or ``models``.
        name: name of its entry point.
        trust_remote_code: allow code of the checkpoint to run.
        registry: the installed plugins.
    """

    def reopen(model_type: str, path: Path) -> Session:
        return open_session(kind, name, model_type, path, trust_remote_code, registry)

    def shrink(path: Path) -> Sequence[Any] | None:
        # The adapter at work may go by a published name, beside one for the whole family.
        model_type, known = str(source.config["model_type"]), registry.names("adapters")
        for other in dict.fromkeys((model_type, GENERIC)):
            if other in known and (kind, name) != ("adapters", other):
                helper = open_session("adapters", other, model_type, source.path, trust_remote_code, registry)
                inputs = helper.make_tiny_checkpoint(helper.init_model("meta"), path)
                if inputs is not None:
                    return inputs
        return None

    return Guard(name, reopen, shrink).check(session, model)


class Guard:
    """Opens an adapter on a tiny checkpoint and compares the two forwards.

    Args:
        name: what messages call the adapter.
        reopen: gives a session of the adapter for another checkpoint, from its model_type and its directory.
        shrink: makes the tiny checkpoint and its inputs when the adapter itself does not; may give None.
    """

    def __init__(
        self,
        name: str,
        reopen: Callable[[str, Path], Session],
        shrink: Callable[[Path], Sequence[Any] | None] = lambda path: None,
    ) -> None:
        self._name = name
        self._reopen = reopen
        self._shrink = shrink

    def check(self, session: Session, model: nn.Module) -> list[str]:
        """Prove the forward of the session's adapter.

        Args:
            session: the run's hooks.
            model: the model on meta.

        Returns:
            Nothing, or one line that says what could not be proven, and why.

        Raises:
            CapabilityError: the forward is not the model's own; names the first unit that differs.
        """
        with ExitStack() as stack:
            path = Path(stack.enter_context(TemporaryDirectory()))
            for state in (torch.random.fork_rng(devices=[]), torch.no_grad(), one_thread()):
                stack.enter_context(state)
            torch.manual_seed(0)
            try:
                own = session.make_tiny_checkpoint(model, path)
                inputs = self._shrink(path) if own is None else own
                if not inputs:
                    raise CapabilityError("no tiny model of its architecture can be made")
                tiny = stack.enter_context(Checkpoint(path))
                expected = _Whole(self._open(tiny), inputs)
            except Exception as error:  # whatever a model's code raises; the run itself is not touched
                return [f"the forward of the adapter {self._name!r} is not proven: {first_line(error)}; {PROOF}"]
            return self._compare(self._open(tiny), inputs, expected, own is not None)

    def _open(self, tiny: Checkpoint) -> OpenModel:
        return OpenModel.opened_by(self._reopen(str(tiny.config["model_type"]), tiny.path), tiny)

    def _compare(self, opened: OpenModel, inputs: Sequence[Any], expected: _Whole, is_own: bool) -> list[str]:
        recording = Recording(opened.model, [request.name for request in opened.visit])
        failure: Exception | None = None
        try:
            outputs = opened.run_units(inputs)
        except Exception as error:  # of the adapter's code or the model's; told below, with the unit
            failure = error
        # Units that do not come as the visit says: records cannot be compared, and no input is to blame.
        is_disorder = isinstance(failure, ModelError)
        if failure is not None and not is_own and not recording.entered and not is_disorder:
            # Not the adapter's own inputs: they may lack what its handle_dataset would give.
            return [f"the forward of the adapter {self._name!r} is not proven: {first_line(failure)}; {PROOF}"]
        difference = None
        if recording.entered and not is_disorder:
            difference = first_difference(recording, expected.recording, failure is None)
        if difference is None and failure is not None:
            place = f"{'in' if recording.is_inside else 'behind'} {recording.entered}"
            difference = f"it fails {place if recording.entered else 'before the first unit'}: {first_line(failure)}"
        if difference is None:
            difference = _difference_of_ends(outputs, expected.outputs)
        if difference is not None:
            raise CapabilityError(
                f"the forward of the adapter {self._name!r}, unit by unit, is not the model's own: on a tiny random "
                f"model, {difference}",
                hint=HINT,
            ) from failure
        idle = [unit for unit, calls in expected.recording.calls.items() if not calls]
        if idle:
            return [f"the forward of the adapter {self._name!r} is not proven for {', '.join(idle)}: {IDLE}"]
        return []


class _Whole:
    """What the units and the model give in plain calls."""

    def __init__(self, opened: OpenModel, inputs: Sequence[Any]) -> None:
        opened.fill()
        self.recording = Recording(opened.model, [request.name for request in opened.visit])
        # A forward may change what it is given.
        self.outputs = [tensors_in(call_model(opened.model, sample)) for sample in deepcopy(inputs)]
        if any(tensor.isnan().any() for output in self.outputs for tensor in output):
            raise CapabilityError("the tiny random model computes NaN")


def _difference_of_ends(actual: Sequence[Any], expected: Sequence[Sequence[Tensor]]) -> str | None:
    """What differs about the outputs of the model; an adapter whose forward returns nothing is not asked."""
    for output, wanted in zip(actual, expected, strict=True):
        tensors = tensors_in(getattr(output, "logits", output))
        if output is not None and (what := same_tensors(tensors, wanted)):
            return f"all units agree and what the forward returns does not: {what}"
    return None
