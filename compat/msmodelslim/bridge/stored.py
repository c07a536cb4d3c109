# SPDX-License-Identifier: Apache-2.0
"""A checkpoint by the names and in the layouts in which an adapter asks for its tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelslim.api import ExpertLinear, WeightSource
from modelslim_transformers.sources import weight_sources


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds, and how transformers would load it.

    Attributes:
        path: its directory.
        tensors: every stored tensor on meta, by name.
        files: names of the tensors in each file.
        known: where the parameters of transformers' own model come from, by name, with their shapes.
        turned: names of stacked weights that transformers 4 held as [experts, in, out] and 5 turns on load, by
            the class of their module.
        as_before: True to show those weights as transformers 4 held them.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    files: Mapping[str, list[str]]
    known: Mapping[str, tuple[WeightSource, torch.Size]]
    turned: Mapping[type[nn.Module], tuple[str, ...]]
    as_before: bool = False

    @classmethod
    def open(cls, path: Path, config: Any, trust_remote_code: bool) -> Stored:
        """Read the headers; no tensor."""
        from transformers.modeling_utils import load_state_dict

        files = {file.name: load_state_dict(str(file), map_location="meta") for file in sorted(_files(path))}
        tensors = {name: tensor for content in files.values() for name, tensor in content.items()}
        reference = _reference(config, trust_remote_code)
        known: dict[str, tuple[WeightSource, torch.Size]] = {}
        turned: dict[type[nn.Module], tuple[str, ...]] = {}
        if reference is not None:
            sources = weight_sources(reference, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
            state = reference.state_dict()
            known = {name: (source, state[name].shape) for name, source in sources.items()}
            turned = _find_turned(reference, known, tensors)
        names = {file: list(content) for file, content in files.items()}
        return cls(path, tensors, names, known, turned)

    @cached_property
    def parents(self) -> Mapping[str, str]:
        """Names of modules in the checkpoint, by their names in the model, where they differ."""
        pairs = {name.rpartition(".")[0]: source.keys[0].rpartition(".")[0] for name, (source, _) in self.known.items()}
        return {name: stored for name, stored in pairs.items() if name != stored}

    def stacked_experts(self, model: nn.Module) -> dict[str, WeightSource]:
        """Sources of the stacked weights of transformers' own experts that a model still has."""
        return {
            name: self.known[name][0]
            for path, module in model.named_modules()
            if hasattr(module, "_is_expert_parallel")
            for name, _ in module.named_parameters(path, recurse=False)
            if name in self.known
        }

    def fused_experts(self, model: nn.Module) -> dict[str, WeightSource]:
        """Sources of the experts that the adapter left as transformers holds them."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        experts = {name for name, module in model.named_modules() if isinstance(module, ExpertLinear)}
        if not experts:
            return {}
        sources = weight_sources(model, shapes)
        return {name: source for name, source in sources.items() if name.rpartition(".")[0] in experts}

    def find(self, name: str, shape: torch.Size | None = None) -> tuple[WeightSource, Tensor] | None:
        """Where a tensor comes from, and one on meta of its shape and dtype.

        Args:
            name: a parameter of transformers' model, or a stored tensor.
            shape: of the parameter that it is for; None for the tensor as stored.

        Returns:
            None when the checkpoint does not hold it.
        """
        if name in self.known and shape is not None:
            source, real = self.known[name]
            dtype = self.tensors[source.keys[0]].dtype
            if self.as_before and any(name.rpartition(".")[2] in names for names in self.turned.values()):
                before = torch.empty(real, dtype=dtype, device="meta").transpose(1, 2)
                return _turned(source), before.contiguous()
            if real == shape or name not in self.tensors:
                return source, torch.empty(real, dtype=dtype, device="meta")
        if name in self.tensors:
            return WeightSource((name,)), self.tensors[name]
        return None


def _files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [path / name for name in set(weight_map.values())]
    single = path / "model.safetensors"
    return [single] if single.is_file() else list(path.glob("*.safetensors"))


def _reference(config: Any, trust_remote_code: bool) -> Any:
    """The model as transformers builds it, on meta; None for a class that it does not know."""
    import transformers

    model_class = getattr(transformers, (config.architectures or [""])[0], None)
    if model_class is None:
        return None
    with torch.device("meta"):
        return model_class._from_config(config)


def _find_turned(
    model: nn.Module, known: dict[str, tuple[WeightSource, torch.Size]], tensors: Mapping[str, Tensor]
) -> dict[type[nn.Module], tuple[str, ...]]:
    """Classes whose stacked weights transformers turns on load; their sources are corrected on the way.

    transformers turns a weight only where the shapes differ, so that a square one stays as it was; another
    one of the same module, which cannot be square too, tells.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    converters = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightConverter)]
    patterns = [
        pattern
        for converter in converters
        if any(isinstance(operation, Transpose) for operation in converter.operations)
        for pattern in converter.target_patterns
    ]
    turned: dict[type[nn.Module], tuple[str, ...]] = {}
    for path, module in model.named_modules():
        stacked = [name for name, tensor in module.named_parameters(path, recurse=False) if tensor.dim() == 3]
        found = [name for name in stacked if name in known and any(re.search(pattern, name) for pattern in patterns)]
        if found:
            turned[type(module)] = tuple(name.rpartition(".")[2] for name in found)
            is_turned = any(tensors[known[name][0].keys[0]].shape != known[name][1] for name in found)
            for name in found:
                source, shape = known[name]
                known[name] = (WeightSource(source.keys[:1], _turn if is_turned else None), shape)
    return turned


def _turned(source: WeightSource) -> WeightSource:
    return WeightSource(source.keys, _turn if source.convert is None else None)


def _turn(tensors: list[Tensor]) -> Tensor:
    return tensors[0].transpose(1, 2).contiguous()
