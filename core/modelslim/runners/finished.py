# SPDX-License-Identifier: Apache-2.0
"""Units that an earlier run finished: what stood in them while samples passed, read back from the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from modelslim.checkpoint import Checkpoint
from modelslim.disk import write_json
from modelslim.edits import stored_name
from modelslim.errors import ModelError
from modelslim.experts import ExpertLinear
from modelslim.kv_cache import QuantizedCache
from modelslim.plan import Plan
from modelslim.quantized import QuantizedLinear
from modelslim.ranks import ALONE, Ranks
from modelslim.result import RunOutput, read_small_parts, state_digest
from modelslim.saved_experts import SavedExperts
from modelslim.saver import SavedCache, SavedLinear


@dataclass(frozen=True)
class Standing:
    """What a finished unit computes with.

    Attributes:
        modules: what stands in place of linears and key/value caches, by name, on the CPU.
        edited: parameters that were changed and stay float, by name, on the CPU.
    """

    modules: Mapping[str, nn.Module]
    edited: Mapping[str, Tensor]


class FinishedUnits:
    """Reads finished units back, through the way back that every format has.

    Args:
        plan: the plan.
        writer: has taken over the earlier run's result.
        model: the run's model, on meta.
        ranks: who shares the run; all do the same with a unit.
    """

    def __init__(self, plan: Plan, writer: RunOutput, model: nn.Module, ranks: Ranks = ALONE) -> None:
        self._plan = plan
        self._writer = writer
        self._model = model
        self._ranks = ranks

    def standing(self, index: int) -> Standing | None:
        """What stood in a unit, to the bit; None where the format has not kept it so.

        Args:
            index: number of the unit, which must be loaded.
        """
        found = self._read(index)
        everywhere = all(self._ranks.gather(found is not None))  # a host may lack the directory
        return found if everywhere else None

    def _read(self, index: int) -> Standing | None:
        unit = self._writer.finished[index]
        if unit.report is None or "fell_back" in unit.report:
            return None  # a linear that is float again may have been multiplied and divided, which rounds
        if not self._writer.path.is_dir():
            return None
        with Checkpoint(self._writer.path, self._writer.stored) as saved:
            edited = {name: self._edited(name, saved) for name in unit.edited}
            kept = {name: tensor for name, tensor in edited.items() if tensor is not None}
            try:
                modules = {name: self._module(name, saved) for name in unit.modules}
                caches = {name: self._cache(name, saved) for name in unit.caches}
                read_small_parts(self._writer.path, index, modules)
            except ModelError:  # the format cannot be read before all of it is there
                return None
        for name, module in modules.items():
            module.spec = unit.modules[name]  # a format may say less of it
        if len(kept) < len(edited) or state_digest(modules, caches) != unit.state:
            return None
        return Standing({**modules, **caches}, kept)

    def _edited(self, name: str, saved: Checkpoint) -> Tensor | None:
        """A changed parameter; None when it is not stored as it was."""
        owner, _, part = name.rpartition(".")
        module = self._model.get_submodule(owner)
        parameter = module._parameters.get(part)
        stored = saved.stored.get(stored_name(name, self._plan.loader.sources))
        if isinstance(module, ExpertLinear) or parameter is None or stored is None:
            return None
        is_same = stored.torch_dtype == parameter.dtype and stored.shape == tuple(parameter.shape)
        return saved.read(stored.name) if is_same else None

    def _module(self, name: str, saved: Checkpoint) -> QuantizedLinear:
        bank = self._plan.info.banks.get(name)
        found: SavedLinear | SavedExperts
        if bank is None:
            found = self._linear(self._plan.info.linears[name].stored)
        else:
            found = SavedExperts([[self._linear(one.stored) for one in row] for row in bank.linears], bank.rows)
        return found.decode({tensor: saved.read(tensor) for tensor in found.tensors})

    def _linear(self, stored: str) -> SavedLinear:
        if stored not in self._layout[0]:
            raise ModelError(f"{stored} cannot be read back")
        return self._layout[0][stored]

    def _cache(self, name: str, saved: Checkpoint) -> QuantizedCache:
        stored = self._plan.planned.caches[name].stored
        if stored not in self._layout[1]:
            raise ModelError(f"the cache {name} cannot be read back")
        found = self._layout[1][stored]
        cache = found.decode({tensor: saved.read(tensor) for tensor in found.tensors})
        cache.spec = self._plan.planned.cache_specs[name]
        return cache

    @cached_property
    def _layout(self) -> tuple[Mapping[str, SavedLinear], Mapping[str, SavedCache]]:
        """What the format says of all tensors that are there, as if there were no more."""
        plan, saver = self._plan, self._plan.saver
        records = [one.record for unit in self._writer.finished for one in unit.tensors]
        shapes = {name: stored.shape for name, stored in self._writer.stored.items()}
        config = saver.edit_config(dict(plan.checkpoint.config), records, plan.planned)
        with TemporaryDirectory() as folder:
            for name, value in {"config.json": config, **saver.finish(records, plan.planned)}.items():
                write_json(Path(folder) / name, value)
            return saver.read_layout(Path(folder), shapes), saver.read_caches(Path(folder), shapes)
