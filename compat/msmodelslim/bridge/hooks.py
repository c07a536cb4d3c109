# SPDX-License-Identifier: Apache-2.0
"""Makes the methods of an adapter of the existing tool answer the hooks of ModelSlim."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from modelslim.api import ProcessRequest, Topology, WeightSource, hookimpl
from msmodelslim.bridge.forward import mend_rope_index, run_forward
from msmodelslim.bridge.loading import Promises, load
from msmodelslim.bridge.processors import processors_without_torchvision
from msmodelslim.bridge.topology import to_topology
from msmodelslim.core.const import DeviceType

_promises: WeakKeyDictionary[nn.Module, Promises] = WeakKeyDictionary()


class Bridged:
    """Base of the adapters: a subclass that has a method of an interface answers the hook of that name.

    The method itself stays as it is, defaults included, and is called by the function that answers.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for answer in _ANSWERS:
            hook = answer.__name__
            if hook in _NEW or callable(getattr(cls, hook, None)):
                setattr(cls, f"_answer_{hook}", hookimpl(specname=hook)(answer))


def init_model(self: Any, device: str) -> nn.Module:
    """The adapter's model with all its units, on meta; the engine fills it."""
    model, promises = load(self)
    if device != "meta":
        promises.compute_buffers(model, device)
    mend_rope_index(model)
    _promises[model] = promises
    return model


def get_weight_sources(self: Any, model: nn.Module) -> Mapping[str, WeightSource]:
    """What the adapter loaded where, and what it did to it."""
    return _promises[model].sources(model)


def handle_dataset(self: Any, dataset: Sequence[Any], device: str) -> list[Any]:
    """The adapter's inputs, moved to the device of the run."""
    with processors_without_torchvision(self):
        inputs = self.handle_dataset(list(dataset), DeviceType.CPU)
    moved: list[Any] = tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)
    return moved


def generate_model_visit(self: Any, model: nn.Module) -> Generator[ProcessRequest, Any, None]:
    """The adapter's units."""
    visit: Generator[ProcessRequest, Any, None] = self.generate_model_visit(model)
    return visit


def generate_model_forward(self: Any, model: nn.Module, inputs: Any) -> Generator[ProcessRequest, Any, Any]:
    """The adapter's forward."""
    return run_forward(self, model, inputs)


def make_tiny_checkpoint(self: Any, path: Path) -> Sequence[Any]:
    """What the generic adapter makes of the same config.json; of a vision-language model the inputs with an image."""
    from modelslim_transformers.adapter import TransformersAdapter

    generic = TransformersAdapter(self.config.model_type, Path(self.model_path), bool(self.trust_remote_code))
    inputs = [_Collected(sample) for sample in generic.make_tiny_checkpoint(generic.init_model("meta"), path)]
    return [sample for sample in inputs if "pixel_values" in sample] or inputs


class _Collected(dict[str, Any]):
    """Inputs in which absent ones are None, as those are that an adapter collects."""

    def __missing__(self, key: str) -> None:
        return None


def enable_kv_cache(self: Any, model: nn.Module, need_kv_cache: bool) -> None:
    """Switch the cache."""
    self.enable_kv_cache(model, need_kv_cache)


def get_adapter_config_for_subgraph(self: Any, model: nn.Module) -> Topology:
    """The adapter's subgraphs."""
    return to_topology(self.get_adapter_config_for_subgraph(), model, self.config)


def get_ln_fuse_map(self: Any) -> Any:
    """The adapter's map: (before the run, during it)."""
    return self.get_ln_fuse_map()


def get_bake_names(self: Any) -> Any:
    """The adapter's names: (before the run, during it)."""
    return self.get_bake_names()


def get_rotate_map(self: Any, block_size: int) -> Any:
    """The adapter's rotations: (before the run, during it)."""
    return self.get_rotate_map(block_size)


_NEW = ("get_weight_sources", "make_tiny_checkpoint")
"""Hooks that the existing tool does not have."""

_ANSWERS = (
    init_model,
    get_weight_sources,
    handle_dataset,
    generate_model_visit,
    generate_model_forward,
    make_tiny_checkpoint,
    enable_kv_cache,
    get_adapter_config_for_subgraph,
    get_ln_fuse_map,
    get_bake_names,
    get_rotate_map,
)
