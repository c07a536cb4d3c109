# SPDX-License-Identifier: Apache-2.0
"""Lets an adapter build and load its model on meta: whatever it reads with becomes a promise to read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from modelslim.api import ModelError, ModelSlimError, PluginError, WeightSource
from modelslim_transformers.experts import fuse_experts
from msmodelslim.bridge.recorder import Recorder
from msmodelslim.bridge.stored import Stored
from msmodelslim.core.const import DeviceType


@dataclass(frozen=True)
class Loading:
    """A loading that is being recorded."""

    recorder: Recorder
    stored: Stored

    def tensor(self, name: str, shape: torch.Size | None = None) -> Tensor | None:
        """A promise of a tensor; None when the checkpoint does not hold it."""
        found = self.stored.find(name, shape)
        return None if found is None else self.recorder.stored(*found)

    def fill(self, model: Any, dtype: torch.dtype) -> None:
        """Do what ``from_pretrained`` does once the model is built."""
        float32 = model._get_dtype_plan(dtype)
        for name, tensor in model.state_dict(keep_vars=True).items():
            if any(part.replace("*", "") in name for part in float32):
                tensor.data = tensor.data.to(torch.float32)
            promise = self.tensor(name, tensor.shape)
            if promise is not None:
                tensor.data.copy_(promise)

    def state_dict(self, module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
        """A promise of everything that ``module.load_state_dict`` wants.

        Raises:
            ModelError: the checkpoint lacks a tensor.
        """
        result: dict[str, Tensor] = {}
        by_tensor: dict[int, Tensor] = {}
        state = module.state_dict(keep_vars=True)
        for name, tensor in state.items():
            promise = self.tensor(f"{prefix}.{name}" if prefix else name, tensor.shape)
            if promise is not None:
                result[name] = by_tensor[id(tensor)] = promise
        for name, tensor in state.items():
            if name not in result:
                if id(tensor) not in by_tensor:  # neither stored nor tied to what is
                    raise ModelError(f"{self.stored.path}: holds no tensor for {prefix}.{name}".replace(" .", " "))
                result[name] = by_tensor[id(tensor)]
        return result


_active: ContextVar[Loading] = ContextVar("loading")


def active_loading() -> Loading:
    """The loading that is being recorded.

    Raises:
        PluginError: none is, since the adapter reads weights in another method.
    """
    loading = _active.get(None)
    if loading is None:
        raise PluginError(
            "the adapter reads weights outside init_model and generate_model_visit",
            hint="load each layer in generate_model_visit, and leave a layer alone that the model has; the engine "
            "fills it",
        )
    return loading


@dataclass(frozen=True)
class Promises:
    """Where the tensors come from of a model that an adapter built.

    Attributes:
        recorder: makes them.
        stored: the checkpoint.
    """

    recorder: Recorder
    stored: Stored

    def sources(self, model: nn.Module) -> dict[str, WeightSource]:
        """By name of the parameter or persistent buffer; those that nothing was loaded into are left out."""
        fused = self.stored.fused_experts(model)
        own = {id(tensor): (name, tensor) for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
        found = {name: self.recorder.source(tensor) for name, tensor in own.values() if name not in fused}
        named = {
            name: source if source.convert is None else replace(source, name=self._stored_name(name))
            for name, source in found.items()
            if source is not None
        }
        return {**named, **fused}

    def compute_buffers(self, model: nn.Module, device: str) -> None:
        """Make the buffers that no checkpoint holds (rotary frequencies)."""
        for module in model.modules():
            for name in module._non_persistent_buffers_set:
                buffer = module._buffers[name]
                if buffer is not None:
                    module._buffers[name] = self.recorder.compute(buffer).to(device)

    def _stored_name(self, parameter: str) -> str:
        """The name for a linear that was cut out of a stored tensor."""
        parts = parameter.removesuffix(".weight").split(".")
        for end in range(len(parts) - 1, 0, -1):
            parent = ".".join(parts[:end])
            if parent in self.stored.parents:
                return ".".join([self.stored.parents[parent], *parts[end:]])
        return ".".join(parts)


def load(adapter: Any) -> tuple[nn.Module, Promises]:
    """Run the adapter's own loading on meta, up to its last unit; the model, and where its tensors come from.

    The stacked experts that transformers 5 turns on load are shown as it holds them, and where the adapter
    cannot work with that, as they are stored, which is how transformers 4 held them.

    Raises:
        PluginError: the adapter cannot be run so; says why.
    """
    from transformers import AutoConfig

    path, trust = Path(adapter.model_path), bool(adapter.trust_remote_code)
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust, local_files_only=True)
    stored = Stored.open(path, config, trust)
    layouts = [stored, replace(stored, as_before=True)] if stored.turned else [stored]
    first: Exception | None = None
    for layout in layouts:
        try:
            return _load(adapter, layout, config)
        except ModelSlimError:  # noqa: PERF203 - two turns at most
            raise
        except Exception as error:  # the adapter's code raises what it likes
            first = first or error
    raise PluginError(
        f"{type(adapter).__name__} cannot load its model: {type(first).__name__}: {first}",
        hint="it runs on tensors that have a shape and no values: it may rearrange weights and not look into them",
    ) from first


def _load(adapter: Any, stored: Stored, config: Any) -> tuple[nn.Module, Promises]:
    recorder = Recorder()
    loading = Loading(recorder, stored)
    default = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, default)
        torch.set_default_dtype(_dtype(config, stored))
        for context in (torch.no_grad(), recorder, recorder.factories(), _redirected(adapter, loading)):
            stack.enter_context(context)
        stack.callback(_active.reset, _active.set(loading))
        model: nn.Module = adapter.init_model(DeviceType.CPU)
        units = list(adapter.generate_model_visit(model))
        _turn_back(model, stored)
    _check(type(adapter).__name__, model, units)
    stacked = stored.stacked_experts(model)
    if all(recorder.source(model.get_parameter(name)) == source for name, source in stacked.items()):
        fuse_experts(model)  # otherwise the adapter changed them, and they stay as it left them
    return model.eval(), Promises(recorder, stored)


def _check(who: str, model: nn.Module, units: Iterable[Any]) -> None:
    for unit in units:
        try:
            found = model.get_submodule(unit.name)
        except AttributeError:
            found = None
        if found is not unit.module:
            raise PluginError(
                f"{who} visits {unit.name}, which is not that module of its model",
                hint="put a layer into the model before it is yielded",
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_meta:
            raise PluginError(
                f"{who} reads {name} in a way that cannot be deferred",
                hint="read it with self._get_state_dict, safetensors.safe_open or from_pretrained",
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight.shape != (module.out_features, module.in_features):
            raise RuntimeError(
                f"{name} has out_features {module.out_features}, in_features {module.in_features} and a weight of "
                f"the shape {list(module.weight.shape)}"
            )


def _turn_back(model: nn.Module, stored: Stored) -> None:
    """Give transformers' modules that the adapter left in the model the layout that their forward wants."""
    if stored.as_before:
        for module in model.modules():
            for name in stored.turned.get(type(module), ()):
                weight: Tensor = getattr(module, name)
                setattr(module, name, nn.Parameter(weight.transpose(1, 2).contiguous(), requires_grad=False))


@contextmanager
def _redirected(adapter: Any, loading: Loading) -> Iterator[None]:
    """Replace the functions that read tensors, wherever the adapter has them."""
    import safetensors
    import safetensors.torch
    from transformers import PreTrainedModel

    def from_pretrained(cls: Any, path: Any, /, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        if Path(path).resolve() != loading.stored.path.resolve():
            raise PluginError(f"the adapter loads {path}, which is not the model of this run")
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        if not isinstance(dtype, torch.dtype):
            dtype = torch.get_default_dtype()
        if config is None:
            config = cls.config_class.from_pretrained(path, local_files_only=True)
        options = {name: kwargs[name] for name in ("attn_implementation", "experts_implementation") if name in kwargs}
        model = cls._from_config(config, dtype=dtype, **options)
        loading.fill(model, dtype)
        return model.eval()

    def load_file(filename: Any, device: Any = "cpu") -> dict[str, Tensor]:
        return {name: _require(loading, name) for name in loading.stored.files[Path(filename).name]}

    class SafeOpen(_SafeOpen):
        def __init__(self, filename: Any, framework: str = "pt", device: Any = "cpu") -> None:
            super().__init__(loading, Path(filename).name)

    with ExitStack() as stack:
        stack.enter_context(patch.object(PreTrainedModel, "from_pretrained", classmethod(from_pretrained)))
        for classes, attribute in _turned_inits(loading.stored):
            stack.enter_context(patch.object(classes, "__init__", attribute))
        replaced = {safetensors.safe_open: SafeOpen, safetensors.torch.load_file: load_file}
        for module in [safetensors, safetensors.torch, *own_modules(adapter)]:
            for name, value in list(vars(module).items()):
                if isinstance(value, (type, Callable)) and value in replaced:  # type: ignore[arg-type]
                    stack.enter_context(patch.object(module, name, replaced[value]))
        yield


def _turned_inits(stored: Stored) -> Iterator[tuple[type[nn.Module], Any]]:
    """Constructors that make the stacked weights as they are stored."""
    for kind, names in stored.turned.items() if stored.as_before else ():
        yield kind, _turned_init(kind.__init__, names)


def _turned_init(init: Callable[..., None], names: Iterable[str]) -> Callable[..., None]:
    def construct(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        for name in names:
            weight: Tensor = getattr(self, name)
            setattr(self, name, nn.Parameter(torch.empty_like(weight.transpose(1, 2).contiguous())))

    return construct


class _SafeOpen:
    """Stands for ``safetensors.safe_open``: gives promises."""

    def __init__(self, loading: Loading, file: str) -> None:
        self._loading = loading
        self._names = loading.stored.files[file]

    def __enter__(self) -> _SafeOpen:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def keys(self) -> list[str]:
        return list(self._names)

    def get_tensor(self, name: str) -> Tensor:
        return _require(self._loading, name)

    def get_slice(self, name: str) -> Tensor:
        return _require(self._loading, name)


def _require(loading: Loading, name: str) -> Tensor:
    tensor = loading.tensor(name)
    if tensor is None:
        raise ModelError(f"{loading.stored.path}: holds no tensor {name}")
    return tensor


def own_modules(adapter: object) -> list[Any]:
    """The imported modules of the packages that an adapter's classes come from."""
    packages = {kind.__module__.rpartition(".")[0] or kind.__module__ for kind in type(adapter).__mro__}
    return [
        module
        for name, module in list(sys.modules.items())
        if any(name == package or name.startswith(f"{package}.") for package in packages)
    ]


def _dtype(config: Any, stored: Stored) -> torch.dtype:
    """The model's dtype: as config.json states it, else that of the first floating tensor."""
    stated = config.dtype or config.get_text_config().dtype
    if isinstance(stated, torch.dtype):
        return stated
    return next(tensor.dtype for tensor in stored.tensors.values() if tensor.is_floating_point())
