# SPDX-License-Identifier: Apache-2.0
"""What prior stages made of a model, kept on the disk beside the result: later stages find it in place of the source.

Only one unit is in memory at a time, so each stage writes what it changed into weight files of its own; when it is
done they are read like those of the source, tensor by tensor.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from modelslim.checkpoint import DTYPE_NAMES, Checkpoint, byte_view, read_header
from modelslim.context import Context
from modelslim.disk import explained, sync
from modelslim.edits import add_bias
from modelslim.errors import QuantizationError, RankError, SaveError
from modelslim.journal import FinishedStage, StageUnit
from modelslim.kv_cache import QuantizedCache
from modelslim.multipliers import drop_input_multiplier, share_multiplier
from modelslim.quantized import QuantizedExperts, QuantizedLinear, QuantizedTensor
from modelslim.writer import ShardWriter

_SHARD_BYTES = 4 << 30
_HEADER_BYTES = 1 << 20
_CONTEXT = "context"
_INPUTS = ("bias", "input_scale", "input_offset", "input_multiplier")


@dataclass(frozen=True)
class Left:
    """What the stages so far left of a unit.

    Attributes:
        modules: what stands in place of linears, by name.
        caches: what stands in place of key/value caches, by name.
        edited: names of the parameters that were changed or added and stay float.
    """

    modules: Mapping[str, QuantizedLinear] = field(default_factory=dict)
    caches: Mapping[str, QuantizedCache] = field(default_factory=dict)
    edited: frozenset[str] = frozenset()


class Overlay:
    """The prior stages that are done.

    Args:
        path: the folder for their files.
        stages: those that an earlier run has finished.
        journal: notes one more that is done; None at a rank that writes nothing.
        is_wanted: False when all units of the result are written, and some of the files may be gone.

    Attributes:
        stages: those that are done, in order.
        context: what their algorithms handed over.
    """

    def __init__(
        self,
        path: Path,
        stages: Sequence[FinishedStage] = (),
        journal: Callable[[Mapping[str, Any]], None] | None = None,
        *,
        is_wanted: bool = True,
    ) -> None:
        self._path = path
        self._journal = journal
        self._open = ExitStack()
        self._files: list[Checkpoint] = []
        self._edited: dict[str, int] = {}
        self.stages: list[FinishedStage] = []
        self.context = Context()
        if not is_wanted:
            self.stages += stages
            return
        for stage in stages:
            self.take(stage)

    def close(self) -> None:
        """Close the files."""
        self._open.close()

    def begin(self) -> StageWriter:
        """Takes what the next stage changes; what an earlier run has left of it is removed."""
        folder = self._folder(len(self.stages))
        with explained(folder):
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
        return StageWriter(folder)

    def finish(self, writer: StageWriter, records: Sequence[Mapping[str, Any]]) -> None:
        """Let later stages see what a stage has changed, and note that it is done.

        Args:
            writer: what ``begin`` gave for the stage.
            records: its units' records in the report.
        """
        folder = self._folder(len(self.stages))
        writer.finish()
        with explained(folder):
            self.context.save(folder / _CONTEXT)
            for place in (*folder.iterdir(), folder, folder.parent):
                sync(place)
        stage = FinishedStage(len(self.stages), writer.units, records)
        assert self._journal is not None
        self._journal(stage.as_data())
        self.take(stage)

    def __contains__(self, parameter: str) -> bool:
        """True for a parameter that a stage has changed or added."""
        return parameter in self._edited

    def read(self, parameter: str) -> Tensor:
        """A parameter that a stage has changed or added, as the last one left it."""
        return self._files[self._edited[parameter]].read(parameter)

    def quantized(self, unit: str) -> frozenset[str]:
        """Names of the modules of a unit whose weights are quantized."""
        return frozenset(name for stage in self.stages if unit in stage.units for name in stage.units[unit].modules)

    def edited(self, unit: str) -> frozenset[str]:
        """Names of the parameters of a unit that were changed or added and stay float so far."""
        names = {name for stage in self.stages if unit in stage.units for name in stage.units[unit].edited}
        gone = self.quantized(unit)
        return frozenset(name for name in names if name.rpartition(".")[0] not in gone)

    def left(self, unit: str, banks: Collection[str]) -> Left:
        """What the stages left of a unit, on the CPU.

        Args:
            unit: its name; empty for what lies outside the units.
            banks: names of the modules that hold fused experts.
        """
        modules: dict[str, QuantizedLinear] = {}
        caches: dict[str, QuantizedCache] = {}
        for stage, file in zip(self.stages, self._files, strict=True):
            found = stage.units.get(unit, StageUnit())
            for name, spec in found.modules.items():
                parts = _parts(file, name)
                weight = QuantizedTensor(
                    parts["codes"], parts["scale"], parts.get("offset"), spec.weight, parts.get("whole_scale")
                )
                kind = QuantizedExperts if name in banks else QuantizedLinear
                modules[name] = kind(weight, spec, *(parts.get(part) for part in _INPUTS))
            for name, held in found.caches.items():
                parts = _parts(file, name)
                caches[name] = QuantizedCache(held, parts["scale"], parts["offset"])
        return Left(modules, caches, self.edited(unit))

    @contextmanager
    def applied(self, model: nn.Module, unit: str, device: str) -> Iterator[None]:
        """Give a unit what no loader can: added biases, and, while this is open, inputs that are multiplied."""
        for name in sorted(self.edited(unit)):
            owner, _, part = name.rpartition(".")
            module = model.get_submodule(owner)
            if part == "bias" and module._parameters.get("bias") is None:
                add_bias(module, self.read(name).to(device))
        linears: list[nn.Module] = []
        for names, multiplier in self._multipliers(unit):
            sharing = [model.get_submodule(name) for name in names]
            share_multiplier(sharing, multiplier.to(device))
            linears += sharing
        try:
            yield
        finally:
            for linear in linears:
                drop_input_multiplier(linear)

    def _multipliers(self, unit: str) -> Iterator[tuple[list[str], Tensor]]:
        """Linears whose inputs are multiplied, those together that share the product, as the last stage left them."""
        number = next((stage.stage for stage in reversed(self.stages) if unit in stage.units), None)
        if number is None:
            return
        groups: dict[str, list[str]] = {}
        for linear, tensor in self.stages[number].units[unit].multipliers.items():
            groups.setdefault(tensor, []).append(linear)
        for tensor, linears in groups.items():
            yield linears, self._files[number].read(tensor)

    def take(self, stage: FinishedStage) -> None:
        """Let later stages see what a stage has changed.

        Raises:
            RankError, SaveError: its files are not there, at a rank that writes nothing, or at the first one.
        """
        folder = self._folder(stage.stage)
        if not folder.is_dir() and self._journal is not None:
            raise SaveError(
                f"{folder}: what the journal says is not there",
                hint="something else has changed it; --restart begins anew",
            )
        if not folder.is_dir():
            raise RankError(
                f"{folder}: this rank does not see what a prior stage has written",
                hint="give all hosts a --save_path on a file system that they share, or leave prior out",
            )
        self.context = Context.load(folder / _CONTEXT)
        tensors = {
            name: stored for file in sorted(folder.glob("*.safetensors")) for name, stored in read_header(file).items()
        }
        self._files.append(self._open.enter_context(Checkpoint(folder, tensors)))
        self.stages.append(stage)
        self._edited.update((name, stage.stage) for unit in stage.units.values() for name in unit.edited)

    def _folder(self, stage: int) -> Path:
        return self._path / str(stage)


class StageWriter:
    """Writes what a stage changes, unit by unit.

    Args:
        folder: where its files go.

    Attributes:
        units: what was written so far, by unit.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards = ShardWriter(folder, "model", _SHARD_BYTES, _HEADER_BYTES, lambda name, nbytes: None)
        self.units: dict[str, StageUnit] = {}

    def put(
        self,
        unit: str,
        modules: Mapping[str, QuantizedLinear],
        caches: Mapping[str, QuantizedCache],
        edited: Mapping[str, Tensor],
        multiplied: Sequence[tuple[Sequence[str], Tensor]],
    ) -> None:
        """Write what became of a unit.

        Args:
            unit: its name; empty for what lies outside the units.
            modules: quantized linears, and those of fused experts, by name.
            caches: quantized key/value caches, by the names of their places.
            edited: parameters that were changed or added and stay float, by name.
            multiplied: linears that share a multiplier of their input, and the multiplier.

        Raises:
            SaveError: writing failed.
            QuantizationError: a module is of a class that only its algorithm knows.
        """
        for name, module in modules.items():
            if type(module) not in (QuantizedLinear, QuantizedExperts):
                raise QuantizationError(
                    f"{name}: a {type(module).__name__} cannot be handed to the next stage",
                    hint="put the entry that makes it into process, behind the prior stages",
                )
        for name, one in {**modules, **caches}.items():
            for part, buffer in one.named_buffers():
                self._add(f"{name}/{part}", buffer)
        for name, tensor in edited.items():
            self._add(name, tensor)
        multipliers: dict[str, str] = {}
        for linears, multiplier in multiplied:
            key = f"{linears[0]}/multiplier"
            self._add(key, multiplier)
            multipliers.update(dict.fromkeys(linears, key))
        specs = {name: module.spec for name, module in modules.items()}
        places = {name: cache.spec for name, cache in caches.items()}
        self.units[unit] = StageUnit(specs, places, sorted(edited), multipliers)

    def finish(self) -> None:
        """Close the files.

        Raises:
            SaveError: writing failed.
        """
        self._shards.finish()

    def abandon(self) -> None:
        """Close the open file of a stage that failed."""
        self._shards.abandon()

    def _add(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.detach().to("cpu").contiguous()
        data = byte_view(tensor)
        self._shards.add(name, DTYPE_NAMES[tensor.dtype], tensor.shape, len(data), [data] if len(data) else [])


def _parts(file: Checkpoint, module: str) -> dict[str, Tensor]:
    parts = ("codes", "scale", "offset", "whole_scale", *_INPUTS)
    return {part: file.read(f"{module}/{part}") for part in parts if f"{module}/{part}" in file.tensors}
