# SPDX-License-Identifier: Apache-2.0
"""One run's hooks: a plugin manager with exactly the participants of that run, behind typed methods.

pluggy ignores what it does not recognise: a function without the marker, an argument with a default.
Here every such slip is an error when the participant joins, before anything was computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import pluggy

from modelslim import hookspecs
from modelslim.errors import CapabilityError, PluginError, nearest
from modelslim.types import AttentionCache, DecodedTensor, ProcessRequest, Topology, WeightSource

if TYPE_CHECKING:
    from torch import Tensor, nn

    from modelslim.checkpoint import StoredTensor

ADAPTER = "adapter"


class Session:
    """The adapter, the vendor plugins and the observers of one run.

    Args:
        adapter: instance of the adapter class; the only one that answers the hooks of the model.
        vendors: vendor plugins by name, instances or modules; they may wrap and observe.

    Raises:
        PluginError: a participant implements a hook wrongly.
    """

    def __init__(self, adapter: object, vendors: Sequence[tuple[str, object]] = ()) -> None:
        self._manager = _Manager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._specs = _read_specs(self._manager)
        self._adapter = type(adapter).__name__
        self._register(ADAPTER, adapter)
        for name, plugin in vendors:
            self._register(name, plugin)

    def observe(self, name: str, plugin: object) -> None:
        """Let one more participant observe the run, such as a progress bar.

        Raises:
            PluginError: it implements a hook wrongly, or the name is taken.
        """
        self._register(name, plugin)

    def has(self, hook_name: str) -> bool:
        """True when the adapter answers the hook; for hooks of observers, when there is an observer.

        Raises:
            PluginError: there is no such hook.
        """
        if hook_name not in self._specs:
            raise PluginError(f"there is no hook {hook_name!r}", hint=nearest(hook_name, self._specs))
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook_name)
        return any(not (impl.wrapper or impl.hookwrapper) for impl in caller.get_hookimpls())

    def missing(self, hooks: Iterable[str]) -> list[str]:
        """Those of the hooks that nobody answers, sorted.

        Raises:
            PluginError: there is no such hook.
        """
        return sorted(hook for hook in hooks if not self.has(hook))

    def init_model(self, device: str) -> nn.Module:
        """The model; see :func:`modelslim.hookspecs.init_model`.

        Raises:
            PluginError: it holds weights although the device is meta, or lacks a buffer that no checkpoint holds
                although it is not.
        """
        model: nn.Module = self._demand("init_model", device=device)
        if device == "meta":
            loaded = [name for name, tensor in model.state_dict().items() if not tensor.is_meta]
            if loaded:
                raise PluginError(
                    f'init_model("meta") of adapter {self._adapter} gives a model that holds {loaded[0]}',
                    hint='build it in `with torch.device("meta"):`; the engine reads the weights',
                )
            return model
        empty = [name for name, buffer in _unstored_buffers(model) if buffer.is_meta]
        if empty:
            raise PluginError(
                f"init_model of adapter {self._adapter} leaves the buffer {empty[0]} on meta",
                hint="no checkpoint holds it (it is not persistent), so init_model must compute it",
            )
        return model

    def handle_dataset(self, dataset: Sequence[Any], device: str) -> list[Any]:
        """Inputs of the model; see :func:`modelslim.hookspecs.handle_dataset`."""
        return list(self._demand("handle_dataset", dataset=dataset, device=device))

    def generate_model_visit(self, model: nn.Module) -> Iterator[ProcessRequest]:
        """The units without data; see :func:`modelslim.hookspecs.generate_model_visit`."""
        return iter(self._demand("generate_model_visit", model=model))

    def generate_model_forward(self, model: nn.Module, inputs: Any) -> Generator[ProcessRequest, Any, Any]:
        """The units with their arguments; see :func:`modelslim.hookspecs.generate_model_forward`."""
        forward = self._demand("generate_model_forward", model=model, inputs=inputs)
        if not isinstance(forward, Generator):
            raise PluginError(
                f"generate_model_forward of adapter {self._adapter} returned {type(forward).__name__}, not a generator",
                hint="write it with yield, or return what modelslim.api.drive gives",
            )
        return forward

    def make_tiny_checkpoint(self, model: nn.Module, path: Path) -> Sequence[Any] | None:
        """Inputs for the tiny checkpoint now at ``path``; None when the adapter does not make one."""
        inputs: Sequence[Any] | None = self._ask("make_tiny_checkpoint", model=model, path=path)
        return inputs

    def enable_kv_cache(self, model: nn.Module, need_kv_cache: bool) -> None:
        """Switch the cache; does nothing when the adapter has no cache to switch."""
        self._ask("enable_kv_cache", model=model, need_kv_cache=need_kv_cache)

    def get_decoded_tensors(self, tensors: Mapping[str, StoredTensor]) -> Mapping[str, DecodedTensor]:
        """Float tensors that are stored in quantized form; empty when the adapter knows of none."""
        decoded: Mapping[str, DecodedTensor] | None = self._ask("get_decoded_tensors", tensors=tensors)
        return decoded or {}

    def get_weight_sources(
        self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]
    ) -> Mapping[str, WeightSource] | None:
        """Where parameters are stored; None when the adapter leaves each under its own name."""
        sources: Mapping[str, WeightSource] | None = self._ask("get_weight_sources", model=model, shapes=shapes)
        return sources

    def get_adapter_config_for_subgraph(self, model: nn.Module) -> Topology | None:
        """What smoothing may rescale; None when the adapter does not say."""
        topology: Topology | None = self._ask("get_adapter_config_for_subgraph", model=model)
        return topology

    def get_kv_caches(self, model: nn.Module) -> Sequence[AttentionCache]:
        """Attentions with a cache; the hook must be implemented."""
        caches: Sequence[AttentionCache] = self._demand("get_kv_caches", model=model)
        return caches

    def get_ln_fuse_map(self, model: nn.Module) -> Any:
        """Which norms feed which linears; None when the adapter does not say."""
        return self._ask("get_ln_fuse_map", model=model)

    def get_bake_names(self, model: nn.Module) -> Any:
        """Linears that take in a LayerNorm's mean subtraction; None when there are none."""
        return self._ask("get_bake_names", model=model)

    def get_rotate_map(self, model: nn.Module, block_size: int) -> Any:
        """Which weights turn on which side; None when the adapter does not say."""
        return self._ask("get_rotate_map", model=model, block_size=block_size)

    def unit_started(self, name: str, index: int, total: int) -> None:
        """Tell the observers that the engine begins with a unit."""
        self._ask("unit_started", name=name, index=index, total=total)

    def unit_finished(self, name: str, index: int, total: int, record: Mapping[str, Any]) -> None:
        """Tell the observers that a unit is done."""
        self._ask("unit_finished", name=name, index=index, total=total, record=record)

    def tensor_written(self, name: str, nbytes: int) -> None:
        """Tell the observers that a tensor lies in a weight file."""
        self._ask("tensor_written", name=name, nbytes=nbytes)

    def run_finished(self, report: Mapping[str, Any]) -> None:
        """Tell the observers that the result lies under its final name."""
        self._ask("run_finished", report=report)

    def _ask(self, hook_name: str, **arguments: Any) -> Any:
        return getattr(self._manager.hook, hook_name)(**arguments)

    def _demand(self, hook_name: str, **arguments: Any) -> Any:
        if not self.has(hook_name):
            raise CapabilityError(
                f"adapter {self._adapter} does not implement {hook_name}",
                hint=f"add `@hookimpl def {hook_name}(self, {', '.join(arguments)})` to it",
            )
        answer = self._ask(hook_name, **arguments)
        if answer is None:
            raise PluginError(
                f"{hook_name} of adapter {self._adapter} returned None", hint="the implementation must return a value"
            )
        return answer

    def _register(self, name: str, plugin: object) -> None:
        who = f"adapter {self._adapter}" if name == ADAPTER else f"plugin {name!r}"
        if self._manager.has_plugin(name):
            raise PluginError(f"two participants of the run are called {name!r}", hint="rename one of them")
        if inspect.isclass(plugin):
            raise PluginError(f"{who} is the class {plugin.__name__}", hint="give an instance of it, or a module")
        other_name = self._manager.get_name(plugin)
        if other_name is not None:
            raise PluginError(f"{who} takes part already, as {other_name!r}", hint="name it only once")
        functions = {name: self._manager.parse_hookimpl_opts(plugin, name) for name in _functions(plugin)}
        answered = {options["specname"] for options in functions.values() if options is not None}
        for attribute, options in functions.items():
            # A function without the marker may keep a hook's name when another one answers that hook for it.
            if options is not None or attribute not in answered:
                self._inspect(who, plugin, attribute, options)
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(f"{who} implements a hook wrongly: {error}", hint="see modelslim.hookspecs") from error

    def _inspect(self, who: str, plugin: object, attribute: str, options: Any) -> None:
        """Refuse what pluggy would ignore or explain badly about one function of a participant."""
        if options is None:
            if attribute in self._specs:
                raise PluginError(
                    f"{who}: {attribute} is not marked as a hook and would never be called",
                    hint="decorate it with @hookimpl (an override needs it again), or give it another name",
                )
            return
        hook = options.get("specname") or attribute
        if hook not in self._specs:
            if options.get("optionalhook"):
                return
            raise PluginError(f"{who} implements the unknown hook {hook!r}", hint=nearest(hook, self._specs))
        spec = self._specs[hook]
        is_wrapper = options.get("wrapper") or options.get("hookwrapper")
        if spec.is_firstresult and not is_wrapper and self._manager.has_plugin(ADAPTER):
            raise PluginError(
                f"{who} answers {hook}, which only the adapter may", hint="wrap the hook: @hookimpl(wrapper=True)"
            )
        for parameter in inspect.signature(getattr(plugin, attribute)).parameters.values():
            place = f"{who}: argument {parameter.name!r} of {hook}"
            if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                raise PluginError(f"{place} is never filled by pluggy", hint="name plain arguments of the hook instead")
            if parameter.name not in spec.arguments:
                raise PluginError(f"{place} is unknown", hint=nearest(parameter.name, spec.arguments))
            if parameter.default is not parameter.empty:
                raise PluginError(
                    f"{place} has a default, and pluggy never fills an argument that has one",
                    hint=f"write {parameter.name!r} without a default",
                )


def _unstored_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that no checkpoint holds, by name."""
    for prefix, module in model.named_modules():
        for name in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers.get(name)
            if buffer is not None:
                yield f"{prefix}.{name}" if prefix else name, buffer


class _Manager(pluggy.PluginManager):
    """A plugin manager that runs no property while it looks for hooks, as pluggy before 1.7 does."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        return super().parse_hookimpl_opts(plugin, name) if _is_function(plugin, name) else None


@dataclass(frozen=True)
class _Spec:
    """A hook: its arguments, and whether one participant answers for all."""

    arguments: tuple[str, ...]
    is_firstresult: bool


def _read_specs(manager: pluggy.PluginManager) -> dict[str, _Spec]:
    specs = {}
    for name in dir(hookspecs):
        options = manager.parse_hookspec_opts(hookspecs, name)
        if options is not None:
            arguments = tuple(inspect.signature(getattr(hookspecs, name)).parameters)
            specs[name] = _Spec(arguments, options["firstresult"])
    return specs


def _functions(plugin: object) -> list[str]:
    return [name for name in dir(plugin) if _is_function(plugin, name)]


def _is_function(plugin: object, name: str) -> bool:
    attribute = inspect.getattr_static(plugin, name, None)
    return isinstance(attribute, (FunctionType, MethodType, classmethod, staticmethod))
