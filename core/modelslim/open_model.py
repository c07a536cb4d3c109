# SPDX-License-Identifier: Apache-2.0
"""A small checkpoint opened by an adapter, to compare unit by unit with the whole forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from modelslim.activations import Boundary
from modelslim.checkpoint import Checkpoint
from modelslim.errors import ModelError
from modelslim.loader import Loader
from modelslim.session import Session
from modelslim.types import ProcessRequest


@dataclass(frozen=True)
class OpenModel:
    """A model as the engine holds it before the first unit.

    Attributes:
        session: the adapter's hooks.
        model: what ``init_model("cpu")`` gave.
        checkpoint: the source.
        loader: fills the model.
        visit: the units, in the order of the forward.
    """

    session: Session
    model: nn.Module
    checkpoint: Checkpoint
    loader: Loader
    visit: Sequence[ProcessRequest]

    @classmethod
    def of(cls, adapter: object, checkpoint: Checkpoint) -> OpenModel:
        """Open the checkpoint with the adapter."""
        return cls.opened_by(Session(adapter), checkpoint)

    @classmethod
    def opened_by(cls, session: Session, checkpoint: Checkpoint) -> OpenModel:
        """Open the checkpoint with the adapter of a session."""
        model = session.init_model("cpu")
        checkpoint.decode(session.get_decoded_tensors(checkpoint.stored))
        sources = session.get_weight_sources(model, checkpoint.shapes)
        loader = Loader(model, checkpoint, sources, "cpu")
        return cls(session, model, checkpoint, loader, list(session.generate_model_visit(model)))

    def fill(self) -> None:
        """Load every parameter."""
        self.loader.install(self.loader.read(self.loader.names()))

    def run_units(self, inputs: Sequence[Any]) -> list[Any]:
        """Run all inputs in lockstep, one unit resident at a time; what each forward returned."""
        units = [request.name for request in self.visit]
        self.loader.fill_on_demand(units)
        boundary = Boundary(self.session, self.model, inputs, units)
        boundary.start()
        self.loader.release_filled()
        for unit in units[:-1]:
            names = self.loader.names(unit)
            self.loader.install(self.loader.read(names))
            boundary.run_unit(unit, lambda: None)
            self.loader.release(names)
        self.loader.install(self.loader.read(self.loader.names(units[-1])))
        outputs = [boundary.finish_sample(index, units[-1]) for index in range(len(inputs))]
        boundary.close()
        return outputs


def call_model(model: nn.Module, inputs: Any) -> Any:
    """The logits of a plain call, or the whole output of a model that gives none."""
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return getattr(output, "logits", output)


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in an output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]


def main_tensor(output: Any, place: str) -> Tensor:
    """The activations in what a module returned: its first floating tensor.

    Raises:
        ModelError: there is none.
    """
    found = next((one for one in tensors_in(output) if one.is_floating_point()), None)
    if found is None:
        raise ModelError(f"{place} returns no activations", hint="its error cannot be measured; leave it out")
    return found
