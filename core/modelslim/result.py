# SPDX-License-Identifier: Apache-2.0
"""Encodes and writes behind the computation: while a unit is quantized, the one before goes to the disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from torch import Tensor

from modelslim.checkpoint import DTYPE_NAMES, byte_view
from modelslim.devices import work_alone
from modelslim.files import copy_companions
from modelslim.kv_cache import QuantizedCache
from modelslim.plan import Plan
from modelslim.quantized import QuantizedExperts, QuantizedLinear
from modelslim.saver import TensorRecord
from modelslim.types import QuantSpec, TensorSpec
from modelslim.writer import OutputDirectory, ShardWriter, write_json

_ENTRY_BYTES = 112  # of a header entry, without the name


class ResultWriter:
    """Writes the result of a plan into an output directory, in a thread of its own.

    At most one unit waits while another is being written, so memory holds two.

    Args:
        plan: the plan.
        output: where to write.
    """

    def __init__(self, plan: Plan, output: OutputDirectory) -> None:
        self._plan = plan
        self._output = output
        self._records: list[TensorRecord] = []
        names = plan.result_sizes()
        self._shards = ShardWriter(
            output.path,
            plan.saver.weights_name(plan.planned),
            plan.saver.max_shard_bytes,
            sum(len(name.encode()) + _ENTRY_BYTES for name in names),
            plan.session.tensor_written,
        )
        self._pool = ThreadPoolExecutor(1, "writer", work_alone)
        self._pending: Future[None] | None = None

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._shards.abandon()

    def put(
        self,
        unit: str,
        modules: Mapping[str, QuantizedLinear],
        caches: Mapping[str, QuantizedCache],
        edited: Mapping[str, Tensor],
        copies: Sequence[str],
    ) -> None:
        """Write a unit's quantized linears and copy its other tensors; waits for the unit before.

        Args:
            unit: its name, for the journal; empty for what lies outside the units.
            modules: quantized linears, and those of fused experts, on the CPU, by name in the model.
            caches: quantized key/value caches, on the CPU, by the names of their places.
            edited: float tensors that an algorithm changed, on the CPU, by stored name.
            copies: stored tensors that go into the result unchanged.

        Raises:
            SaveError, ModelError: writing or reading failed, for this unit or the one before.
        """
        self._wait()
        self._pending = self._pool.submit(self._write, unit, modules, caches, edited, copies)

    def finish(self) -> list[TensorRecord]:
        """Write what remains: indices, descriptions, config.json, the files beside the weights.

        Returns:
            What was written, tensor by tensor.
        """
        self._wait()
        self._shards.finish()
        plan = self._plan
        for name, value in plan.saver.finish(self._records, plan.planned).items():
            write_json(self._output.path / name, value)
        copy_companions(plan.checkpoint.path, self._output.path)
        config = plan.saver.edit_config(dict(plan.checkpoint.config), self._records, plan.planned)
        write_json(self._output.path / "config.json", config)
        return self._records

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _write(
        self,
        unit: str,
        modules: Mapping[str, QuantizedLinear],
        caches: Mapping[str, QuantizedCache],
        edited: Mapping[str, Tensor],
        copies: Sequence[str],
    ) -> None:
        saver, dtype = self._plan.saver, self._plan.info.dtype
        first = len(self._records)
        for stored, linear in self._stored(modules):
            for name, tensor in saver.encode(stored, linear, dtype):
                self._add(name, tensor, linear.spec)
        for place, cache in caches.items():
            for name, tensor in saver.encode_cache(self._plan.planned.caches[place], cache, dtype):
                self._add(name, tensor, None, cache.spec)
        for name, tensor in edited.items():
            self._add(name, tensor, None)
        for name in copies:
            source = self._plan.checkpoint.tensors[name]
            self._shards.add(name, source.dtype, source.shape, source.nbytes, self._plan.checkpoint.chunks(name))
            self._records.append(TensorRecord(name, None, source.nbytes))
        entry = {"unit": unit, **self._shards.progress, "tensors": [record.name for record in self._records[first:]]}
        self._output.journal(entry)

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

    def _add(self, name: str, tensor: Tensor, spec: QuantSpec | None, cache: TensorSpec | None = None) -> None:
        data = byte_view(tensor.contiguous())
        self._shards.add(name, DTYPE_NAMES[tensor.dtype], tensor.shape, len(data), [data] if len(data) else [])
        self._records.append(TensorRecord(name, spec, len(data), cache))
