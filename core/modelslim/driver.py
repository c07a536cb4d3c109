# SPDX-License-Identifier: Apache-2.0
"""Runs a model's own forward and yields at unit boundaries; no forward is written twice.

The forward runs in a greenlet. The forward of every unit is replaced by a switch to the engine,
which carries the real arguments; the engine computes the unit when it wants and switches back with
the output. Masks per layer type, rotary tables, injected features and shared key/value states stay
right, because the model itself computes them.

Gradient mode is a property of the thread, not of a greenlet: the engine holds it off around all
switches.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Any

from greenlet import getcurrent, greenlet
from torch import nn

from modelslim.types import ProcessRequest


class _Forward(greenlet):
    """A greenlet that runs one forward; marks the calls that are to be handed to the engine."""


def drive(
    units: Iterable[ProcessRequest], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Generator[ProcessRequest, Any, Any]:
    """Run ``forward(*args, **kwargs)``, yielding each call of a unit and receiving its output through send.

    Several such generators over one model may be alive at once, one per sample. While none of them
    is running, calling a unit computes it as usual.

    Args:
        units: the units, as ``generate_model_visit`` yields them.
        forward: usually the model itself.

    Returns:
        A generator, which returns what the forward returned. Closing it ends the forward.
    """
    for unit in units:
        _intercept(unit.name, unit.module)
    worker = _Forward(partial(forward, *args, **kwargs))
    try:
        worker.parent = getcurrent()
        result = worker.switch()
        while not worker.dead:
            output = yield result
            worker.parent = getcurrent()
            result = worker.switch(output)
        return result
    finally:
        if not worker.dead:
            worker.parent = getcurrent()
            worker.throw()


def _intercept(name: str, module: nn.Module) -> None:
    """Replace the unit's forward, once, by a switch to the engine when a driven forward calls it."""
    if getattr(module.forward, "is_unit_boundary", False):
        return
    original = module.forward

    def boundary(*args: Any, **kwargs: Any) -> Any:
        worker = getcurrent()
        if isinstance(worker, _Forward) and worker.parent is not None:
            return worker.parent.switch(ProcessRequest(name, module, args, kwargs))
        return original(*args, **kwargs)

    boundary.is_unit_boundary = True  # type: ignore[attr-defined]
    module.forward = boundary
