# SPDX-License-Identifier: Apache-2.0
"""Finds by experiment which modules of a tiny model read what another one gives, and proves a scale there harmless.

The output of a source is divided by a scale, channel by channel. A module whose input is then exactly its old
input divided by the scale reads it; its input is put right on the spot. When all outputs of the model are
the old ones to the bit, every reader was found and all between them and the source is linear. Scales are
powers of two, so that no rounding hides or feigns a difference, and large, so that clamps show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from modelslim.api import CapabilityError, ExpertLinear, one_thread

LARGEST = 8
"""Scales go up to this power of two, and down to its inverse."""
STEPS = 64
"""Weights of norms are multiples of one part in so many, so that (1 + weight) / scale - 1 is exact as well."""


@dataclass
class Reaction:
    """What became of the model when the output of a source was divided by a scale.

    Attributes:
        readers: modules that read the output, and nothing else of it.
        others: the first module whose input changed in another way, and those that were given the same.
        is_unchanged: True when all outputs of the model stayed the same to the bit.
    """

    readers: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    is_unchanged: bool = False


@dataclass(frozen=True)
class Fold:
    """A scale in the weights of a subgraph.

    Attributes:
        source: name of the module whose weight and bias are divided.
        targets: by the name of each reader, the scale of its inputs.
        scale: [channels].
        rows: channels of its output that are divided; None for all.
        unit_offset: True to divide (1 + weight).
    """

    source: str
    targets: Mapping[str, Tensor]
    scale: Tensor
    rows: Tensor | None
    unit_offset: bool


class TinyModel:
    """A tiny model with what its modules were given and its units gave in plain calls.

    Args:
        model: in float32; its weights are replaced.
        units: names of its units.
        towers: those of them that give the same whenever they are given the same, and change nothing else.
        inputs: arguments of its forward, one mapping per sample.

    Raises:
        CapabilityError: it computes NaN.
    """

    def __init__(
        self, model: nn.Module, units: Sequence[str], towers: Sequence[str], inputs: Sequence[Mapping[str, Any]]
    ) -> None:
        self.model = model
        self._towers: dict[str, list[tuple[Any, Any]]] = {tower: [] for tower in towers}
        self._units = [model.get_submodule(unit) for unit in units]
        self._inputs = [{key: _in_float32(value) for key, value in sample.items()} for sample in inputs]
        self._weighted = {name: module for name, module in model.named_modules() if _rank(module) > 1}
        self.given: dict[str, list[Tensor]] = {name: [] for name in self._weighted}
        """Copies of the inputs of every module that has a matrix, in the order of its calls."""
        _randomize(model)
        handles = [
            model.get_submodule(tower).register_forward_hook(partial(_keep_call, calls), with_kwargs=True)
            for tower, calls in self._towers.items()
        ]
        with self._watch(self._record), _removed(handles):
            self._outputs = {"": self._run("")}
        for tower in towers:
            self._outputs[tower] = self._run(tower)
        if not all(tensor.isfinite().all() for outputs in self._outputs.values() for tensor in outputs):
            raise CapabilityError("the tiny random model computes NaN")

    def react(self, source: str, scale: Tensor, rows: Tensor | None, fit: Callable[[int], Tensor | None]) -> Reaction:
        """Divide what a module gives by a scale, and see what happens.

        Args:
            source: name of the module.
            scale: [channels].
            rows: channels of its output that are divided; None for all.
            fit: gives, for a number of inputs, the scale of a reader with as many; None when it cannot be one.
        """
        reaction = Reaction()
        strange: list[Tensor] = []
        seen: dict[str, int] = dict.fromkeys(self._weighted, 0)

        def divide(_module: nn.Module, _args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor):  # that of a router, which is a linear by its class alone
                return output
            if rows is None:
                return output / scale
            divided = output.clone()
            divided[..., rows] /= scale
            return divided

        def restore(name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
            calls = self.given[name]
            x, number = _first(args, kwargs), seen[name]
            seen[name] += 1
            before = calls[number] if number < len(calls) else None
            if x is None or (before is not None and x.shape == before.shape and torch.equal(x, before)):
                return None
            is_first = bool(args) and x is args[0] and _inputs(module) == x.shape[-1]
            if before is not None and x.shape == before.shape and is_first:
                factor = fit(x.shape[-1])
                if factor is not None and torch.equal(x * factor, before):
                    _add(reaction.readers, name)
                    return (before, *args[1:]), kwargs
            if not strange:
                strange.append(x.clone())
            if not torch.equal(x, strange[0]):
                raise _ChangedError
            _add(reaction.others, name)
            return None

        handle = self.model.get_submodule(source).register_forward_hook(divide)
        with self._watch(restore), _removed([handle]):
            try:
                reaction.is_unchanged = self._keeps_function(self._tower(source))
            except _ChangedError:  # all that follows would only be later
                reaction.is_unchanged = False
        return reaction

    def read_the_same(self, name: str, other: str) -> bool:
        """True for two modules that got the same inputs in all calls."""
        one, two = self.given[name], self.given[other]
        return len(one) == len(two) and all(map(torch.equal, one, two))

    def are_folds_exact(self, folds: Sequence[Fold]) -> bool:
        """True when all outputs stay the same to the bit with all these scales in the weights; these are put back."""
        modules = {name for fold in folds for name in (fold.source, *fold.targets)}
        tensors = [one for name in modules for one in self.model.get_submodule(name).parameters(recurse=False)]
        kept = [tensor.detach().clone() for tensor in tensors]
        for fold in folds:
            self._fold(fold)
        is_same = all(self._keeps_function(tower) for tower in {self._tower(fold.source) for fold in folds})
        for tensor, old in zip(tensors, kept, strict=True):
            tensor.data.copy_(old)
        return is_same

    def _fold(self, fold: Fold) -> None:
        origin = self.model.get_submodule(fold.source)
        for name in ("weight", "bias"):
            if getattr(origin, name, None) is None:
                continue
            tensor: Tensor = getattr(origin, name).data
            offset = float(fold.unit_offset and name == "weight")
            axis = -2 if name == "weight" and tensor.dim() > 1 else -1
            index = torch.arange(tensor.shape[axis]) if fold.rows is None else fold.rows
            part = tensor.index_select(axis, index)
            divisor = fold.scale if axis == -1 else fold.scale[:, None]
            tensor.index_copy_(axis % tensor.dim(), index, (part + offset) / divisor - offset)
        for target, factor in fold.targets.items():
            weight: Any = self.model.get_submodule(target).weight
            weight.data.mul_(factor)

    def _record(self, name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        x = _first(args, kwargs)
        self.given[name].append(torch.empty(0) if x is None else x.clone())

    @contextmanager
    def _watch(self, watcher: Callable[..., Any]) -> Iterator[None]:
        handles = [
            module.register_forward_pre_hook(partial(watcher, name), with_kwargs=True)
            for name, module in self._weighted.items()
        ]
        with _removed(handles):
            yield

    def _tower(self, source: str) -> str:
        """The tower that holds a module; empty for the language model."""
        return next((tower for tower in self._towers if source.startswith(f"{tower}.")), "")

    def _keeps_function(self, tower: str) -> bool:
        """True when all outputs that a module in a tower may have an effect on are the old ones to the bit."""
        outputs, before = self._run(tower), self._outputs[tower]
        return len(outputs) == len(before) and all(map(torch.equal, outputs, before))

    def _run(self, tower: str) -> list[Tensor]:
        """Copies of what a tower gives; by default of what the units and the model give, towers standing still."""
        if tower:
            module = self.model.get_submodule(tower)
            calls = deepcopy([call for call, _ in self._towers[tower]])
            return [leaf.clone() for args, kwargs in calls for leaf in _tensors(module(*args, **kwargs))]
        outputs: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            # Units may give what the model never uses.
            outputs.extend(leaf.clone() for leaf in _tensors(output))

        with ExitStack() as stack:
            stack.enter_context(_removed([unit.register_forward_hook(keep) for unit in self._units]))
            for name, recorded in self._towers.items():
                if recorded:
                    stack.enter_context(_standing_still(self.model.get_submodule(name), recorded))
            for sample in deepcopy(self._inputs):
                outputs += _tensors(self.model(**sample, use_cache=False).logits)
        return outputs


class _ChangedError(Exception):
    """Ends a pass in which something changed for good."""


@contextmanager
def _removed(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _standing_still(module: Any, calls: Sequence[tuple[Any, Any]]) -> Iterator[None]:
    """Let a module answer its calls with what it gave before."""
    answers = iter(deepcopy([output for _, output in calls]))
    module.forward = lambda *args, **kwargs: next(answers)
    try:
        yield
    finally:
        del module.forward


def _keep_call(calls: list[tuple[Any, Any]], _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    calls.append(deepcopy(((args, kwargs), output)))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@contextmanager
def reproducible() -> Iterator[None]:
    """Draw the same numbers every time, and leave those of others alone."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), one_thread():
        torch.manual_seed(0)
        yield


def draw_scale(count: int) -> Tensor:
    """Random powers of two, none of them 1."""
    powers = torch.randint(1, LARGEST + 1, (count,)) * (torch.randint(2, (count,)) * 2 - 1)
    return torch.exp2(powers.float())


def _randomize(model: nn.Module) -> None:
    """Weights that keep activations near 1; no norm or bias is 0 or 1, which would hide a mistake."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor += torch.randn(tensor.shape) * 0.1
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, (nn.Linear, ExpertLinear)):
            weight.data.normal_(std=weight.shape[-1] ** -0.5)
            if module.bias is not None:
                module.bias.data.normal_(std=0.1)
        elif _rank(module) == 1:
            weight.data.mul_(STEPS).round_().div_(STEPS)


def _add(names: list[str], name: str) -> None:
    if name not in names:
        names.append(name)


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _rank(module: nn.Module) -> int:
    """Dimensions of a module's own weight; 0 where there is none."""
    weight = module._parameters.get("weight")
    return 0 if weight is None else weight.dim()


def _inputs(module: Any) -> int:
    """Inputs that a weight [..., out, in] has; 0 for a convolution, whose weight is none."""
    return 0 if isinstance(module, nn.modules.conv._ConvNd) else int(module.weight.shape[-1])


def _first(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first argument, which is what a linear or a router reads."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
