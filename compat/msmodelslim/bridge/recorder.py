# SPDX-License-Identifier: Apache-2.0
"""Runs code on meta and remembers how each tensor came about, so that one tensor alone can be made later.

An adapter of the existing tool builds and loads its model in one go, layer after layer, and may rearrange
weights on the way. Here that code runs once with tensors that have a shape and no memory. Every operation
that writes is kept; a parameter is then made by repeating those operations on which it depends, on the
stored tensors themselves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from modelslim.api import PluginError, WeightSource

_FILLS = ("aten::copy_", "aten::fill_", "aten::zero_")
_FROM_VALUES = (torch.tensor, torch.as_tensor, torch.asarray)


@dataclass(frozen=True)
class _Step:
    """Something that wrote to memory.

    Attributes:
        run: the operation, called on real tensors; None for a stored tensor or a value.
        args, kwargs: its arguments, tensors on meta.
        outputs: its results, tensors on meta.
        reads: memory that it needs.
        overwrites: memory of which nothing from before is left.
        is_random: True when it draws numbers, as a fresh initialization does.
        source: the stored tensor that this is; None for others.
        value: the value that this is; None for others.
    """

    run: Callable[..., Any] | None
    args: Sequence[Any]
    kwargs: dict[str, Any]
    outputs: Sequence[Tensor]
    reads: frozenset[int]
    overwrites: frozenset[int]
    is_random: bool = False
    source: WeightSource | None = None
    value: Tensor | None = None


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, records what happens on meta; enter :meth:`factories` too, so that all happens there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._steps: list[_Step] = []
        self._writers: dict[int, list[int]] = defaultdict(list)
        # What recipes of one reading share, by its first stored tensor: gone with that tensor.
        self._shared = WeakIdKeyDictionary()

    def factories(self) -> TorchFunctionMode:
        """Context in which new tensors are on meta, those made of given values included."""
        return _OnMeta(self)

    def stored(self, source: WeightSource, like: Tensor) -> Tensor:
        """A tensor on meta that stands for a stored one of that shape and dtype."""
        return self._root(like, source=source)

    def value(self, value: Tensor) -> Tensor:
        """A tensor on meta that stands for a value."""
        return self._root(value, value=value)

    def source(self, tensor: Tensor) -> WeightSource | None:
        """Where a tensor comes from; None when random numbers are in it, since nothing was loaded there."""
        recipe = self._recipe(tensor)
        steps = [self._steps[index] for index in recipe]
        last = self._steps[self._writers[_memory(tensor)][-1]]
        if any(step.is_random for step in steps) or _is_named(last, "aten::empty"):
            return None
        plain = _plain(steps, tensor)
        if plain is not None:
            return plain
        keys = tuple(dict.fromkeys(key for step in steps if step.source for key in step.source.keys))
        return WeightSource(keys, lambda tensors: self._replay(recipe, tensor, dict(zip(keys, tensors, strict=True))))

    def compute(self, tensor: Tensor) -> Tensor:
        """The value of a tensor that no stored one is needed for.

        Raises:
            PluginError: it needs one.
        """
        recipe = self._recipe(tensor)
        keys = [key for index in recipe if (source := self._steps[index].source) for key in source.keys]
        if keys:
            raise PluginError(
                f"a buffer that is not stored is computed from the stored tensor {keys[0]}",
                hint="register it with persistent=True; the engine fills it then",
            )
        return self._replay(recipe, tensor, {})

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and any(tensor.is_meta for tensor in _tensors((args, kwargs))):
            kwargs["device"] = torch.device("meta")  # what has no memory stays so, wherever it is sent
        result = func(*args, **kwargs)
        outputs = list(_tensors(result))
        if not any(tensor.is_meta for tensor in outputs):
            return result
        reads = {_memory(tensor) for tensor in _tensors((args, kwargs)) if tensor.is_meta}
        written = [value for value in _written(func, args, kwargs) if value.is_meta]
        made = {_memory(tensor) for tensor in outputs if tensor.is_meta} - reads
        if not made and not written:
            return result  # a view
        filled = func._schema.name in _FILLS and bool(written) and _covers_its_memory(written[0])
        overwrites = made | ({_memory(written[0])} if filled else set())
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        step = _Step(func, args, kwargs, outputs, frozenset(reads), frozenset(overwrites), is_random)
        self._keep(step, made.union(map(_memory, written)))
        return result

    def _keep(self, step: _Step, written: set[int]) -> None:
        for memory in written:
            self._writers[memory].append(len(self._steps))
        self._steps.append(step)

    def _root(self, like: Tensor, **origin: Any) -> Tensor:
        root = torch.empty_strided(like.size(), like.contiguous().stride(), dtype=like.dtype, device="meta")
        memory = frozenset({_memory(root)})
        self._keep(_Step(None, (), {}, [root], frozenset(), memory, **origin), set(memory))
        return root

    def _recipe(self, tensor: Tensor) -> list[int]:
        """Numbers of the steps that made a tensor, in order."""
        needed: set[int] = set()
        done: dict[int, int] = {}
        waiting = [(_memory(tensor), len(self._steps))]
        while waiting:
            memory, before = waiting.pop()
            if done.get(memory, -1) >= before:
                continue
            done[memory] = before
            for index in reversed([index for index in self._writers[memory] if index < before]):
                step = self._steps[index]
                needed.add(index)
                waiting.extend((read, index) for read in step.reads if read != memory or memory not in step.overwrites)
                if memory in step.overwrites:
                    break
        return sorted(needed)

    def _replay(self, recipe: Sequence[int], target: Tensor, stored: dict[str, Tensor]) -> Tensor:
        """Repeat steps on real tensors."""
        first = next(iter(stored.values()), None)
        shared: dict[int, torch.UntypedStorage] = {}
        if first is not None:
            shared = self._shared.setdefault(first, shared)  # type: ignore[no-untyped-call]
        real: dict[int, torch.UntypedStorage] = {}

        def lookup(tensor: Tensor) -> Tensor:
            if not tensor.is_meta:
                return tensor
            memory = real.get(_memory(tensor))
            if memory is None:
                memory = real[_memory(tensor)] = torch.UntypedStorage(tensor.untyped_storage().nbytes())  # type: ignore[no-untyped-call]
            view = torch.empty(0, dtype=tensor.dtype)
            return view.set_(memory, tensor.storage_offset(), tensor.size(), tensor.stride())

        with torch.no_grad():
            for index in recipe:
                step = self._steps[index]
                memory = next(iter(step.overwrites), 0)
                # Many weights may be cut from one tensor: it is rearranged once.
                is_last = len(step.overwrites) == 1 and self._writers[memory][-1] == index
                is_shared = is_last and memory != _memory(target)
                if is_shared and index in shared:
                    real[memory] = shared[index]
                    continue
                self._repeat(step, lookup, real, stored)
                if is_shared:
                    shared[index] = real[memory]
            return lookup(target).clone(memory_format=torch.contiguous_format)

    def _repeat(
        self,
        step: _Step,
        lookup: Callable[[Tensor], Tensor],
        real: dict[int, torch.UntypedStorage],
        stored: dict[str, Tensor],
    ) -> None:
        if step.source is not None:
            tensors = [stored[key] for key in step.source.keys]
            results = [tensors[0] if step.source.convert is None else step.source.convert(tensors)]
        elif step.run is None:
            assert step.value is not None
            results = [step.value]
        else:
            kwargs = {name: _off_meta(value) for name, value in step.kwargs.items()}
            args, kwargs = tree_map_only(Tensor, lookup, (step.args, kwargs))
            results = list(_tensors(step.run(*args, **kwargs)))
        for meta, result in zip(step.outputs, results, strict=True):
            if meta.is_meta and _memory(meta) in step.overwrites and _memory(meta) not in real:
                if meta.shape != result.shape:
                    raise PluginError(f"a stored tensor has the shape {list(result.shape)}, not {list(meta.shape)}")
                exact = torch.empty_strided(meta.size(), meta.stride(), dtype=meta.dtype)
                same = result.dtype == meta.dtype and result.stride() == meta.stride() and not result.storage_offset()
                real[_memory(meta)] = (result if same else exact.copy_(result)).untyped_storage()


class _OnMeta(DeviceContext):
    """Puts new tensors on meta, and keeps the values of those that are given some."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(torch.device("meta"))
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FROM_VALUES and not any(tensor.is_meta for tensor in _tensors(args)):
            return self._recorder.value(func(*args, **{**kwargs, "device": "cpu"}))
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


def _plain(steps: Sequence[_Step], tensor: Tensor) -> WeightSource | None:
    """The stored tensor that a tensor is a copy of."""
    roots = [step for step in steps if step.source is not None]
    last = steps[-1] if steps else None
    if len(roots) != 1 or last is None:
        return None
    (root,) = roots[0].outputs
    if not _covers_its_memory(tensor) or not tensor.is_contiguous() or root.shape != tensor.shape:
        return None
    if last is roots[0]:
        return last.source if len(steps) == 1 and _memory(root) == _memory(tensor) else None
    if len(steps) != 2 or not _is_named(last, "aten::copy_") or _memory(tensor) not in last.overwrites:
        return None
    to, origin = last.args[:2]
    same_order = to.is_contiguous() and origin.is_contiguous() and to.shape == origin.shape == root.shape
    return roots[0].source if same_order and _memory(origin) == _memory(root) else None


def _is_named(step: _Step, prefix: str) -> bool:
    return step.run is not None and step.run._schema.name.startswith(prefix)  # type: ignore[attr-defined]


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_iter(values) if isinstance(value, Tensor))


def _memory(tensor: Tensor) -> int:
    """Identity of the memory behind a tensor, which its views share."""
    memory: int = tensor.untyped_storage()._cdata
    return memory


def _covers_its_memory(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.itemsize == tensor.untyped_storage().nbytes()


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Arguments that an operation changes."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[index] if index < len(args) else kwargs.get(argument.name))


def _off_meta(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "meta" else value
