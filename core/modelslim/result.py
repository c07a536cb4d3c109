# SPDX-License-Identifier: Apache-2.0
"""Encodes and writes behind the computation: while a unit is quantized, the one before goes to the disk."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors.torch
from torch import Tensor

from modelslim.checkpoint import StoredTensor, byte_view
from modelslim.devices import work_alone
from modelslim.disk import explained, sync, write_json
from modelslim.errors import SaveError
from modelslim.files import copy_companions
from modelslim.journal import FinishedUnit, Written, is_whole
from modelslim.kv_cache import QuantizedCache
from modelslim.output_directory import DEBUG_INFO, PRIOR, STATE, OutputDirectory
from modelslim.overlay import Overlay
from modelslim.plan import Plan
from modelslim.quantized import QuantizedExperts, QuantizedLinear
from modelslim.saver import TensorRecord
from modelslim.writer import ShardWriter

_ENTRY_BYTES = 112  # of a header entry, without the name


@dataclass
class UnitResult:
    """What is written of a unit.

    Attributes:
        unit: its name, for the journal; empty for what lies outside the units.
        modules: quantized linears, and those of fused experts, on the CPU, by name in the model.
        caches: quantized key/value caches, on the CPU, by the names of their places.
        edited: float tensors that an algorithm changed, on the CPU, by stored name.
        copies: stored tensors that go into the result unchanged.
        changed: names of the parameters in ``edited``.
        report: the unit's record for the report, for the journal; not to be changed any more.
        kept: what a run that is continued behind the unit wants to find in ``beside``.
        arrived: waits until the tensors of ``modules``, ``caches`` and ``edited`` are on the CPU.
    """

    unit: str = ""
    modules: Mapping[str, QuantizedLinear] = field(default_factory=dict)
    caches: Mapping[str, QuantizedCache] = field(default_factory=dict)
    edited: Mapping[str, Tensor] = field(default_factory=dict)
    copies: Sequence[str] = ()
    changed: Sequence[str] = ()
    report: Mapping[str, Any] | None = None
    kept: bytes = b""
    arrived: Callable[[], None] = lambda: None


class RunOutput:
    """Where the result of a run goes, as a rank sees it that writes nothing.

    Args:
        path: the partial directory.
        finished: what an earlier run has written there, in order of ``put``.
        stored: its tensors by name.
        overlay: what prior stages left for later ones.

    Attributes:
        path: see there.
        finished: see there.
        stored: see there.
        overlay: see there.
        debug: True when what is known of each unit is kept.
    """

    debug = False

    def __init__(
        self, path: Path, finished: Sequence[FinishedUnit], stored: Mapping[str, StoredTensor], overlay: Overlay
    ) -> None:
        self.path = path
        self.finished = finished
        self.stored = stored
        self.overlay = overlay

    def put(self, result: UnitResult) -> None:
        """Another rank writes the unit."""

    def wait(self) -> None:
        """Nothing is being written here."""

    def beside(self, number: int) -> Path:
        """The file in which what was ``kept`` for a unit lies until the run is done."""
        return self.path / STATE / f"{number}.kept"


class ResultWriter(RunOutput):
    """Writes the result of a plan into an output directory, in a thread of its own.

    At most one unit waits while another is being written, so memory holds two.

    Args:
        plan: the plan.
        output: where to write; what an earlier run has finished there is taken over.
        debug: keep what is known of each unit.
    """

    def __init__(self, plan: Plan, output: OutputDirectory, debug: bool = False) -> None:
        self.debug = debug
        self._plan = plan
        self._output = output
        is_wanted = not is_whole(output.finished)
        overlay = Overlay(output.path / PRIOR, output.stages, output.journal, is_wanted=is_wanted)
        super().__init__(output.path, output.finished, {}, overlay)
        self._written = [one for unit in self.finished for one in unit.tensors]
        names = plan.result_sizes()
        self._shards = ShardWriter(
            output.path,
            plan.saver.weights_name(plan.planned),
            plan.saver.max_shard_bytes,
            sum(len(name.encode()) + _ENTRY_BYTES for name in names),
            plan.session.tensor_written,
        )
        self._number = len(self.finished)
        try:
            self.stored = self._restore()
        except BaseException:
            self._shards.abandon()
            raise
        self._pool = ThreadPoolExecutor(1, "writer", work_alone, (plan.device,))
        self._pending: Future[None] | None = None

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._shards.abandon()
        self.overlay.close()

    def _restore(self) -> dict[str, StoredTensor]:
        """Take over what is finished; its tensors by name."""
        places = self._shards.restore(self._written)
        if self.finished:
            last = self.finished[-1]
            if self._shards.progress != {"shard": last.shard, "position": last.position}:
                raise SaveError(f"{self.path}: its journal contradicts itself", hint="--restart begins anew")
        return {
            one.record.name: StoredTensor(one.record.name, one.dtype, one.shape, *place, one.record.nbytes)
            for one, place in zip(self._written, places, strict=True)
        }

    def put(self, result: UnitResult) -> None:
        """Write a unit's quantized linears and copy its other tensors; waits for the unit before.

        Raises:
            SaveError, ModelError: writing or reading failed, for this unit or the one before.
        """
        self.wait()
        self._pending = self._pool.submit(self._write, result)

    def finish(self) -> list[TensorRecord]:
        """Write what remains: indices, descriptions, config.json, the files beside the weights.

        Returns:
            What was written, tensor by tensor.
        """
        self.wait()
        self._shards.finish()
        self.overlay.close()
        for folder in (STATE, PRIOR) if self.debug else (STATE, PRIOR, DEBUG_INFO):
            if (self.path / folder).is_dir():
                with explained(self.path):
                    shutil.rmtree(self.path / folder)
        plan, records = self._plan, [one.record for one in self._written]
        for name, value in plan.saver.finish(records, plan.planned).items():
            write_json(self._output.path / name, value)
        copy_companions(plan.checkpoint.path, self._output.path)
        config = plan.saver.edit_config(dict(plan.checkpoint.config), records, plan.planned)
        write_json(self._output.path / "config.json", config)
        return records

    def wait(self) -> None:
        """Wait until what was put has been written.

        Raises:
            SaveError, ModelError: it could not be.
        """
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _write(self, result: UnitResult) -> None:
        result.arrived()
        saver, dtype = self._plan.saver, self._plan.info.dtype
        first = len(self._written)
        for stored, linear in self._stored(result.modules):
            for name, tensor in saver.encode(stored, linear, dtype):
                self._written.append(self._shards.add_tensor(name, tensor, linear.spec))
        for place, cache in result.caches.items():
            for name, tensor in saver.encode_cache(self._plan.planned.caches[place], cache, dtype):
                self._written.append(self._shards.add_tensor(name, tensor, cache=cache.spec))
        for name, tensor in result.edited.items():
            self._written.append(self._shards.add_tensor(name, tensor))
        for name in result.copies:
            source = self._plan.checkpoint.tensors[name]
            self._shards.add(name, source.dtype, source.shape, source.nbytes, self._plan.checkpoint.chunks(name))
            self._written.append(Written(TensorRecord(name, None, source.nbytes), source.dtype, source.shape))
        state = ""
        if self._plan.samples and self._plan.propagates_quantized:
            state = state_digest(result.modules, result.caches)
            write_small_parts(self.path, self._number, result.modules)
        if result.kept:
            _keep(self.beside(self._number), result.kept)
        self._number += 1
        specs = {name: module.spec for name, module in result.modules.items()}
        tensors = self._written[first:]
        self._shards.sync()
        line = FinishedUnit(
            result.unit,
            **self._shards.progress,
            tensors=tensors,
            modules=specs,
            caches=list(result.caches),
            edited=list(result.changed),
            state=state,
            report=result.report,
        )
        self._output.journal(line.as_data())

    def _stored(self, modules: Mapping[str, QuantizedLinear]) -> Iterator[tuple[str, QuantizedLinear]]:
        """Every linear under its stored name, experts one by one."""
        info = self._plan.info
        for name, module in modules.items():
            if isinstance(module, QuantizedExperts):
                for expert, linears in enumerate(info.banks[name].linears):
                    for linear, rows in zip(linears, info.banks[name].rows, strict=True):
                        yield linear.stored, module.linear(expert, rows)
            else:
                yield info.linears[name].stored, module


def write_small_parts(path: Path, number: int, modules: Mapping[str, QuantizedLinear]) -> None:
    """Keep what weighs little, beside the result, until the run is done: formats may store products of it.

    Args:
        path: the partial directory.
        number: of the unit.
        modules: its quantized linears.
    """
    parts = {
        f"{name}/{part}": buffer.clone()
        for name, module in modules.items()
        for part, buffer in module.named_buffers()
        if is_small(module, buffer)
    }
    _keep(path / STATE / str(number), safetensors.torch.save(parts))


def _keep(file: Path, content: bytes) -> None:
    with explained(file.parent.parent):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        sync(file)


def read_small_parts(path: Path, number: int, modules: Mapping[str, QuantizedLinear]) -> None:
    """Give modules that were read back what ``write_small_parts`` kept of them."""
    parts = safetensors.torch.load((path / STATE / str(number)).read_bytes())
    for name, module in modules.items():
        for part, buffer in list(module._buffers.items()):
            if buffer is None or is_small(module, buffer):
                setattr(module, part, parts.get(f"{name}/{part}"))


def is_small(module: QuantizedLinear, buffer: Tensor) -> bool:
    """True for what has at most one value for each row of the weight, such as scales per channel."""
    return buffer.numel() <= module.codes.numel() // module.in_features


def state_digest(modules: Mapping[str, QuantizedLinear], caches: Mapping[str, QuantizedCache]) -> str:
    """A digest of all numbers with which modules compute."""
    digest = hashlib.sha256()
    for name, module in sorted({**modules, **caches}.items()):
        for part, buffer in sorted(module.named_buffers()):
            digest.update(f"{name} {part} {buffer.dtype} {list(buffer.shape)};".encode())
            digest.update(byte_view(buffer.contiguous()))
    return digest.hexdigest()
