# SPDX-License-Identifier: Apache-2.0
"""The smoothing topology of any architecture: found and proven on a tiny model, then carried over to the real one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modelslim.api import ExpertLinear, Subgraph, Topology
from modelslim_transformers.structure import outermost_lists
from modelslim_transformers.tiny import structure
from modelslim_transformers.topology_layouts import head_size, layouts, spread
from modelslim_transformers.topology_proof import Fold, Reaction, TinyModel, draw_scale

NO_TWIN = "the tiny model, on which subgraphs are proven, has no layer like it"
NO_CALL = "the tiny model, on which subgraphs are proven, never calls it"
NO_SOURCE = "no norm and no linear of its layer makes its input"
NO_LINEAR = "it holds no linear"
SHARED = "its weight, or that of its source, is used in other layers as well"


@dataclass(frozen=True)
class Block:
    """A layer, or a block of a tower, whose modules subgraphs connect.

    Attributes:
        group: path of the list that holds it.
        index: its place in the list.
        module: itself.
    """

    group: str
    index: int
    module: nn.Module

    @property
    def name(self) -> str:
        """Its full name."""
        return f"{self.group}.{self.index}"

    @property
    def kind(self) -> tuple[Any, ...]:
        """What it has in common with blocks of the same subgraphs."""
        return (self.group, structure(self.module))


@dataclass(frozen=True)
class Pattern:
    """A subgraph by names relative to its block, with the layout of the source, if there is one, instead of rows."""

    type: str
    source: str
    targets: tuple[str, ...]
    layout: str = "all"
    unit_offset: bool = False

    def apply(self, block: Block) -> Subgraph:
        """The subgraph of a block."""
        targets = tuple(f"{block.name}.{name}" for name in self.targets)
        if not self.source:
            return Subgraph(self.type, "", targets)
        source, target = (block.module.get_submodule(name) for name in (self.source, self.targets[0]))
        rows, heads = None, None
        if self.type != "norm-linear":
            parent = _parent(block.module, self.source)
            rows = dict(layouts(source, parent))[self.layout]
            if self.type == "ov" and (size := head_size(parent)):
                count = _width(source, -2) if rows is None else len(rows)
                heads = (_width(target, -1) // size, count // size)
        return Subgraph(self.type, f"{block.name}.{self.source}", targets, heads, rows, self.unit_offset)


def blocks(layers: tuple[str, nn.ModuleList], towers: Sequence[tuple[str, nn.Module]]) -> Iterator[Block]:
    """The language layers, and the blocks of every tower."""
    lists = [layers]
    for name, tower in towers:
        lists += outermost_lists(tower, f"{name}.")
    for group, members in lists:
        for index, module in enumerate(members):
            yield Block(group, index, module)


def derive(real: Sequence[Block], tiny: Sequence[Block], model: TinyModel) -> Topology:
    """The topology of the real model.

    Args:
        real: its blocks, on meta.
        tiny: those of the tiny model.
        model: the tiny model.
    """
    patterns: dict[Any, list[Pattern]] = {}
    reasons: dict[Any, dict[str, str]] = {}
    alike: list[Block] = []
    for block in tiny:
        if block.kind in patterns:
            alike.append(block)
        else:
            patterns[block.kind], reasons[block.kind] = _Search(block, model).run()
    # Blocks that look alike may be used differently; what holds for all of them is taken.
    folds = [_Search(block, model).fold(pattern) for block in alike for pattern in patterns[block.kind]]
    if not model.are_folds_exact(folds):
        for block in alike:
            known = patterns[block.kind]
            found, why = _Search(block, model).run(known)
            patterns[block.kind] = [pattern for pattern in known if pattern in found]
            reasons[block.kind] = {**why, **reasons[block.kind]}
    for kind, block in {block.kind: block for block in tiny}.items():
        patterns[kind] += _alone(block, patterns[kind], model)
    subgraphs: list[Subgraph] = []
    left_out: dict[tuple[str, str], list[tuple[Block, str]]] = defaultdict(list)
    holders: dict[tuple[str, str], int] = defaultdict(int)
    shared = _shared(real)
    for block in real:
        for name in ("", *_linears(block.module)):
            holders[block.group, name] += 1
        if block.kind not in patterns:
            left_out[block.group, ""].append((block, NO_TWIN))
            continue
        covered: set[str] = set()
        for pattern in patterns[block.kind]:
            modules = [block.module.get_submodule(name) for name in (pattern.source, *pattern.targets) if name]
            if shared.isdisjoint(id(parameter) for module in modules for parameter in module.parameters()):
                subgraphs.append(pattern.apply(block))
                covered.update(pattern.targets if pattern.source else ())
        lost = {name: SHARED for name in _linears(block.module) if name not in covered}
        for name, why_not in {**lost, **reasons[block.kind]}.items():
            left_out[block.group, name].append((block, why_not))
    return Topology(tuple(subgraphs), dict(_summary(left_out, holders)))


def _shared(blocks: Sequence[Block]) -> set[int]:
    """Identities of the parameters that several blocks hold: what one of them folds, the others would read."""
    holders: dict[int, set[str]] = defaultdict(set)
    for block in blocks:
        for parameter in block.module.parameters():
            holders[id(parameter)].add(block.name)
    return {parameter for parameter, names in holders.items() if len(names) > 1}


def _alone(block: Block, patterns: Sequence[Pattern], model: TinyModel) -> Iterator[Pattern]:
    """Linears that are no target, those of one input together: what they read can only be divided at run time."""
    covered = {target for pattern in patterns for target in pattern.targets}
    groups: list[list[str]] = []
    for name in _linears(block.module):
        if name in covered or not model.given[f"{block.name}.{name}"]:
            continue
        fused = isinstance(block.module.get_submodule(name), ExpertLinear)
        same = (group for group in groups if model.read_the_same(f"{block.name}.{name}", f"{block.name}.{group[0]}"))
        group = None if fused else next(same, None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    return (Pattern("non-fusion", "", tuple(group)) for group in groups)


def _summary(
    left_out: Mapping[tuple[str, str], Sequence[tuple[Block, str]]], holders: Mapping[tuple[str, str], int]
) -> Iterator[tuple[str, str]]:
    """One line for all layers where none has a subgraph there."""
    for (group, name), places in left_out.items():
        ending = f".{name}" if name else ""
        if len(places) == holders[group, name]:
            yield f"{group}.*{ending}", "; or ".join(dict.fromkeys(reason for _, reason in places))
        else:
            yield from ((f"{block.name}{ending}", reason) for block, reason in places)


class _Search:
    """Tries every norm and every linear of a block as a source."""

    def __init__(self, block: Block, model: TinyModel) -> None:
        self._block = block
        self._model = model
        self._reactions: dict[str, list[Reaction]] = defaultdict(list)

    def run(self, known: Sequence[Pattern] | None = None) -> tuple[list[Pattern], dict[str, str]]:
        """What was proven, and why linears are no target of it, by their names.

        Args:
            known: what was proven for a block that looks the same; nothing else is tried then.
        """
        tried = None if known is None else {pattern.source for pattern in known}
        found: dict[tuple[str, tuple[str, ...]], Pattern] = {}
        for name, module in self._block.module.named_modules():
            pattern = None
            if tried is not None and name not in tried:
                continue
            if isinstance(module, (nn.Linear, ExpertLinear)):
                pattern = self._try_linear(name, module)
            elif _is_norm(module):
                pattern = self._try_norm(name, module)
            if pattern is not None:
                # With a gate that is linear too (ReLU), both could be divided; one is enough.
                key = ("norm" if pattern.type == "norm-linear" else "linear", pattern.targets)
                if key not in found or "gate" in found[key].source.rpartition(".")[2]:
                    found[key] = pattern
        covered = {target for pattern in found.values() for target in pattern.targets}
        linears = _linears(self._block.module)
        reasons = {name: self._reason(name) for name in linears if name not in covered}
        return list(found.values()), reasons or ({} if linears else {"": NO_LINEAR})

    def fold(self, pattern: Pattern) -> Fold:
        """A random scale in the weights of a subgraph of this block."""
        source = self._block.module.get_submodule(pattern.source)
        if pattern.type == "norm-linear":
            return self._draw_fold(pattern.source, pattern.targets, _width(source, 0), None, None, pattern.unit_offset)
        parent = _parent(self._block.module, pattern.source)
        numbers = dict(layouts(source, parent))[pattern.layout]
        rows = None if numbers is None else torch.tensor(numbers)
        count = _width(source, -2) if rows is None else len(rows)
        return self._draw_fold(pattern.source, pattern.targets, count, rows, head_size(parent), pattern.unit_offset)

    def _try_norm(self, name: str, module: Any) -> Pattern | None:
        channels = len(module.weight)
        targets = self._prove(name, channels, None, None)
        for unit_offset in (False, True):
            fold = self._draw_fold(name, targets, channels, None, None, unit_offset)
            if targets and self._model.are_folds_exact([fold]):
                return Pattern("norm-linear", name, targets, unit_offset=unit_offset)
        return None

    def _try_linear(self, name: str, module: nn.Module) -> Pattern | None:
        parent = _parent(self._block.module, name)
        size = head_size(parent)
        for layout, numbers in layouts(module, parent):
            rows = None if numbers is None else torch.tensor(numbers)
            channels = _width(module, -2) if rows is None else len(rows)
            targets = self._prove(name, channels, rows, size)
            if targets and self._model.are_folds_exact([self._draw_fold(name, targets, channels, rows, size, False)]):
                inside = name.rpartition(".")[0] == targets[0].rpartition(".")[0]
                kind = "ov" if size else "up-down" if inside else "linear-linear"
                return Pattern(kind, name, targets, layout)
        return None

    def _prove(self, name: str, channels: int, rows: torch.Tensor | None, size: int | None) -> tuple[str, ...]:
        """All readers of a source, relative to the block; none when something else reads it, or not linearly."""
        scale = draw_scale(channels)
        reaction = self._model.react(self._full(name), scale, rows, lambda count: spread(scale, count, size))
        self._reactions[name].append(reaction)
        prefix = f"{self._block.name}."
        if not reaction.is_unchanged or not all(reader.startswith(prefix) for reader in reaction.readers):
            return ()
        return tuple(reader.removeprefix(prefix) for reader in reaction.readers)

    def _draw_fold(
        self,
        name: str,
        targets: Sequence[str],
        channels: int,
        rows: torch.Tensor | None,
        size: int | None,
        unit_offset: bool,
    ) -> Fold:
        scale = draw_scale(channels)
        factors = {}
        for target in targets:
            reader = self._model.model.get_submodule(self._full(target))
            factor = spread(scale, _width(reader, -1), size)
            assert factor is not None  # it was one when the reader was found
            factors[self._full(target)] = factor
        return Fold(self._full(name), factors, scale, rows, unit_offset)

    def _full(self, name: str) -> str:
        return f"{self._block.name}.{name}"

    def _reason(self, linear: str) -> str:
        full = self._full(linear)
        if not self._model.given[full]:
            return NO_CALL
        for source, reactions in self._reactions.items():
            for reaction in reactions:
                if full in reaction.readers:
                    return f"{source} feeds it, and not linears alone"
        sources = [name for name, tried in self._reactions.items() if any(full in one.others for one in tried)]
        return f"no scale passes from {' or '.join(sources)} to it, channel by channel" if sources else NO_SOURCE


def _linears(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, (nn.Linear, ExpertLinear))]


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1


def _parent(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _width(module: Any, axis: int) -> int:
    """Outputs (-2) or inputs (-1) of a weight [..., out, in]."""
    return int(module.weight.shape[axis])
