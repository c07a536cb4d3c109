# SPDX-License-Identifier: Apache-2.0
"""Runs a saved checkpoint, quantized or float, from its tensors on disk: unit by unit, or whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelslim.activations import Boundary
from modelslim.adapters import choose_adapter, open_session
from modelslim.checkpoint import Checkpoint
from modelslim.devices import resolve_device
from modelslim.edits import with_added_biases
from modelslim.errors import ModelError, PluginError, nearest
from modelslim.kv_cache import find_places, open_places
from modelslim.loader import Loader
from modelslim.model_info import describe
from modelslim.registry import Registry
from modelslim.saved_config import opened_as_float
from modelslim.saved_experts import SavedExperts
from modelslim.saver import SavedCache, SavedLinear, Saver


@dataclass(frozen=True)
class RunOptions:
    """How to run a saved model.

    Attributes:
        registry: the installed plugins.
        device: torch device.
        dtype: ``float32``, ``bfloat16``, ... for all floating computation; None for the model's own.
        trust_remote_code: allow code of the checkpoint to run.
    """

    registry: Registry
    device: str
    dtype: str | None = None
    trust_remote_code: bool = False


Saved = SavedLinear | SavedExperts
"""What makes one module."""


class _Placeholder(nn.Module):
    """Stands where a quantized linear will be while it is resident."""


class SavedModel:
    """A model on meta, the checkpoint that fills it, and the quantized linears among its tensors.

    Args:
        checkpoint: where its tensors are.
        options: how to run it.
        saved: quantized linears, and those of fused experts, by the names of the modules that they make;
            empty for a float model.
        directory: where the adapter opens a quantized checkpoint, from ``opened_as_float``, for as long as the
            model is used; None for a float model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: RunOptions,
        saved: Mapping[str, Saved] | None = None,
        directory: Path | None = None,
    ) -> None:
        kind, name, _ = choose_adapter(checkpoint.config, None, options.registry)
        model_type = checkpoint.config["model_type"]
        self.session = open_session(
            kind, name, model_type, directory or checkpoint.path, options.trust_remote_code, options.registry
        )
        self.module = self.session.init_model(options.device)
        if options.dtype is not None:
            self.module.to(getattr(torch, options.dtype))
        self._checkpoint = checkpoint
        self._device = options.device
        self._saved = saved or {}
        checkpoint.decode(self.session.get_decoded_tensors(checkpoint.stored))
        sources = self.session.get_weight_sources(self.module, checkpoint.shapes)
        if self._saved:
            sources = with_added_biases(self.module, checkpoint, sources)
        for linear in self._saved:
            self.module.set_submodule(linear, _Placeholder())
        self._loader = Loader(self.module, checkpoint, sources, options.device)
        self._loader.require_fit()
        self._visit = list(self.session.generate_model_visit(self.module))
        self.units = [request.name for request in self._visit]
        self._boundary: Boundary | None = None

    def places(self, saved: Mapping[str, SavedLinear]) -> dict[str, Saved]:
        """Saved linears by the names of the modules that they make in the model, which must be the float one.

        Args:
            saved: quantized linears by stored name.

        Raises:
            ModelError: one of them is no linear of this model, or some experts of a layer are missing.
        """
        info = describe(self.module, self._visit, self._loader)
        linears = {linear.stored: linear for linear in info.linears.values()}
        unknown = next((stored for stored in saved if stored not in linears), None)
        if unknown is not None:
            raise ModelError(
                f"{unknown} is quantized and is no linear of the float model", hint=nearest(unknown, linears)
            )
        places: dict[str, Saved] = {}
        for stored, found in saved.items():
            linear = linears[stored]
            if not linear.bank:
                places[linear.name] = found
            elif linear.bank not in places:
                bank = info.banks[linear.bank]
                lacking = next((one.stored for row in bank.linears for one in row if one.stored not in saved), None)
                if lacking is not None:
                    raise ModelError(f"{stored} is quantized, and {lacking} of the same layer is not")
                experts = [[saved[one.stored] for one in row] for row in bank.linears]
                places[linear.bank] = SavedExperts(experts, bank.rows)
        return places

    def cache_places(self, saved: Mapping[str, SavedCache]) -> dict[str, SavedCache]:
        """Saved key/value caches by the names of their places in the model, which must be the float one.

        Args:
            saved: by the stored name of the linear that fills each.

        Raises:
            ModelError: one of these linears fills no cache.
        """
        if not saved:
            return {}
        info = describe(self.module, self._visit, self._loader)
        places = {one.stored: one.name for one in find_places(self.session.get_kv_caches(self.module), info)}
        unknown = next((stored for stored in saved if stored not in places), None)
        if unknown is not None:
            raise ModelError(f"{unknown} has scales of a cache, and fills none", hint=nearest(unknown, places))
        return {places[stored]: found for stored, found in saved.items()}

    def put_caches(self, saved: Mapping[str, SavedCache]) -> None:
        """Let keys and values go through caches of few bits.

        Args:
            saved: what ``cache_places`` of the float model gave.
        """
        open_places(self.module, dict.fromkeys(name.rpartition(".")[0] for name in saved))
        for name, found in saved.items():
            cache = found.decode({tensor: self._checkpoint.read(tensor) for tensor in found.tensors})
            self.module.set_submodule(name, cache.to(self._device))

    def load(self) -> nn.Module:
        """Fill the whole model, to be used as any module."""
        self._loader.install(self._loader.read(self._loader.names()))
        self._decode(self._saved)
        return self.module

    def start(self, inputs: Sequence[Any]) -> None:
        """Run all inputs up to the first unit."""
        inside = tuple(f"{unit}." for unit in self.units)
        self._decode(name for name in self._saved if not name.startswith(inside))
        self._loader.fill_on_demand(self.units)
        self._boundary = Boundary(self.session, self.module, inputs, self.units)
        self._boundary.start()

    def pass_unit(self, unit: str) -> None:
        """Run all inputs through a unit."""
        assert self._boundary is not None
        with self.resident(unit):
            self._boundary.run_unit(unit, lambda: None)

    def finish(self, index: int) -> Tensor:
        """Run one input through the last unit, which must be resident, to the end of the forward."""
        assert self._boundary is not None
        output: Tensor = self._boundary.finish_sample(index, self.units[-1])
        return output

    @contextmanager
    def resident(self, unit: str) -> Iterator[None]:
        """Hold a unit in memory."""
        names = self._loader.names(unit)
        quantized = [name for name in self._saved if name.startswith(f"{unit}.")]
        self._loader.install(self._loader.read(names))
        self._decode(quantized)
        yield
        self._loader.release(names)
        for name in quantized:
            self.module.set_submodule(name, _Placeholder())

    def _decode(self, names: Iterable[str]) -> None:
        for name in names:
            saved = self._saved[name]
            module = saved.decode({tensor: self._checkpoint.read(tensor) for tensor in saved.tensors})
            self.module.set_submodule(name, module.to(self._device))


def find_saver(path: Path, registry: Registry) -> tuple[str, type[Saver]]:
    """Name and class of the saver that writes checkpoints like the one in a directory.

    Raises:
        ModelError: no installed saver knows its format.
    """
    names = registry.names("savers")
    broken = []
    for name in names:
        try:
            saver: type[Saver] = registry.load("savers", name)
        except PluginError as error:  # a saver of another format is no reason to fail
            broken.append(error.message)
            continue
        if saver.recognizes(path):
            return name, saver
    raise ModelError(
        f"{path}: no installed saver recognizes this as its format",
        hint="; ".join([f"installed: {', '.join(names)}", *broken]),
    )


def saved_caches(checkpoint: Checkpoint, registry: Registry) -> Mapping[str, SavedCache]:
    """The quantized key/value caches of a checkpoint, by the stored name of the linear that fills each."""
    _, saver = find_saver(checkpoint.path, registry)
    return saver.read_caches(checkpoint.path, checkpoint.shapes)


def saved_linears(checkpoint: Checkpoint, registry: Registry) -> Mapping[str, SavedLinear]:
    """The quantized linears of a checkpoint, by stored name.

    Raises:
        ModelError: no installed saver knows its format, or it is damaged.
    """
    _, saver = find_saver(checkpoint.path, registry)
    return saver.read_layout(checkpoint.path, {name: stored.shape for name, stored in checkpoint.tensors.items()})


def load_model(
    path: Path, float_path: Path | None = None, *, device: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """A saved model, whole in memory, whose quantized linears compute as an engine does.

    Args:
        path: the checkpoint, quantized or float.
        float_path: the float model that it was made from; None when ``path`` is float.
        device: as for ``quant``.
        trust_remote_code: allow code of the checkpoint to run.

    Raises:
        ModelError: the checkpoint is of no installed format, or damaged.
    """
    options = RunOptions(Registry.scan(), resolve_device(device), None, trust_remote_code)
    with Checkpoint(path) as checkpoint:
        if float_path is None or path == float_path:
            return SavedModel(checkpoint, options).load()
        saved = saved_linears(checkpoint, options.registry)
        with Checkpoint(float_path) as float_checkpoint:
            reference = SavedModel(float_checkpoint, options)
            places, caches = reference.places(saved), reference.cache_places(saved_caches(checkpoint, options.registry))
        with opened_as_float(checkpoint) as directory:
            model = SavedModel(checkpoint, options, places, directory)
            model.put_caches(caches)
            return model.load()
