# SPDX-License-Identifier: Apache-2.0
"""Proves a smoothing topology by doing it: random scales in every subgraph, and the same outputs in float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modelslim.open_model import call_model, tensors_in
from modelslim.types import Subgraph, Topology

TOLERANCE = 1e-9
"""Relative to the largest output. Rounding in float64 gives 1e-13; a mistake shows in the first digits."""
VISIBLE = 1e-7
"""What dividing a source alone must change, or the model does not show what happens in the subgraph."""


def check_topology(model: nn.Module, units: Sequence[str], topology: Topology, inputs: Sequence[Any]) -> None:
    """Assert that every subgraph keeps what the model computes, all at once, and that undoing half of it would show.

    Args:
        model: small, with weights that are neither 0 nor 1; it is converted to float64.
        units: names of its units; what they give is compared, too.
        topology: of the model.
        inputs: arguments of its forward, one mapping per sample.

    Raises:
        AssertionError: names the subgraphs that change the function, that no output depends on, or that are
            not what a subgraph must be.
    """
    for subgraph in topology.subgraphs:
        _check_form(model, units, subgraph)
    with torch.no_grad(), _Float64():
        proof = _Proof(model.double(), units, inputs)
        if (error := proof.error(topology.subgraphs)) > TOLERANCE:
            wrong = [one for one in topology.subgraphs if proof.error([one]) > TOLERANCE]
            raise AssertionError(f"the outputs change by {error:.1e} with scales in {wrong or topology.subgraphs}")
        hidden = [one for one in topology.subgraphs if one.source and proof.error([one], with_targets=False) < VISIBLE]
        assert not hidden, f"no output depends on the source of {hidden}"


def _check_form(model: nn.Module, units: Sequence[str], subgraph: Subgraph) -> None:
    """Names, shapes and places."""
    assert subgraph.type in {"norm-linear", "ov", "up-down", "linear-linear", "non-fusion"}, subgraph
    names = [*([subgraph.source] if subgraph.source else []), *subgraph.targets]
    assert subgraph.targets and len(set(names)) == len(names), subgraph
    assert any(all(name.startswith(f"{unit}.") for name in names) for unit in units), f"{subgraph}: not in one unit"
    channels = _weight(model, subgraph.targets[0]).shape[-1]
    assert all(_weight(model, target).shape[-1] == channels for target in subgraph.targets), subgraph
    assert bool(subgraph.source) == (subgraph.type != "non-fusion"), subgraph
    if not subgraph.source:
        assert (subgraph.heads, subgraph.rows, subgraph.unit_offset) == (None, None, False), subgraph
        return
    count = _channels(model, subgraph)
    if subgraph.type != "ov":
        assert (subgraph.heads, count) == (None, channels), subgraph
        return
    assert subgraph.heads is not None, subgraph
    heads, groups = subgraph.heads
    assert heads % groups == 0 and channels % heads == 0 and count == channels // heads * groups, subgraph


class _Proof:
    def __init__(self, model: nn.Module, units: Iterable[str], inputs: Sequence[Any]) -> None:
        self._model = model
        self._units = [model.get_submodule(unit) for unit in units]
        self._inputs = inputs
        self._generator = torch.Generator().manual_seed(0)
        self._expected = self._run()
        assert all(tensor.isfinite().all() for tensor in self._expected), "the model computes NaN"

    def error(self, subgraphs: Iterable[Subgraph], with_targets: bool = True) -> float:
        """How far the outputs are from the old ones with scales in the weights, which are put back."""
        state = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        for subgraph in subgraphs:
            self._fold(subgraph, with_targets)
        outputs = self._run()
        for name, tensor in self._model.state_dict().items():
            tensor.copy_(state[name])
        pairs = zip(outputs, self._expected, strict=True)
        return max(float((one - other).abs().max() / other.abs().max().clamp(min=1e-9)) for one, other in pairs)

    def _fold(self, subgraph: Subgraph, with_targets: bool) -> None:
        count = _channels(self._model, subgraph) if subgraph.source else 0
        if not count:
            return
        exponents = torch.rand(count, generator=self._generator, dtype=torch.float64) * 4 - 2
        scale = torch.exp2(exponents)
        source: Any = self._model.get_submodule(subgraph.source)
        rows = slice(None) if subgraph.rows is None else list(subgraph.rows)
        weight, bias = source.weight.data, getattr(source, "bias", None)
        if weight.dim() == 1:
            offset = float(subgraph.unit_offset)
            weight[rows] = (weight[rows] + offset) / scale - offset
        else:
            weight[..., rows, :] /= scale[:, None]
        if bias is not None:
            bias.data[..., rows] /= scale
        if subgraph.heads is not None:
            heads, groups = subgraph.heads
            scale = scale.view(groups, 1, -1).expand(-1, heads // groups, -1).reshape(-1)
        for target in subgraph.targets if with_targets else ():
            _weight(self._model, target).mul_(scale)

    def _run(self) -> list[Tensor]:
        outputs: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs.extend(tensor.clone() for tensor in tensors_in(output))

        handles = [unit.register_forward_hook(keep) for unit in self._units]
        try:
            for sample in deepcopy(self._inputs):
                outputs += tensors_in(call_model(self._model, _double(sample)))
        finally:
            for handle in handles:
                handle.remove()
        return [tensor for tensor in outputs if tensor.is_floating_point()]


class _Float64(TorchFunctionMode):
    """Computes in float64 what a model asks for in a narrower type, such as its norms in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        return func(*(_wide(value) for value in args), **{key: _wide(value) for key, value in (kwargs or {}).items()})

    def __enter__(self) -> Any:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.set_default_dtype(self._default)


def _wide(value: Any) -> Any:
    narrow = isinstance(value, torch.dtype) and value.is_floating_point
    return torch.float64 if narrow else value


def _double(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _double(one) for key, one in value.items()}
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _channels(model: nn.Module, subgraph: Subgraph) -> int:
    weight = _weight(model, subgraph.source)
    return len(subgraph.rows) if subgraph.rows is not None else weight.shape[-2 if weight.dim() > 1 else 0]


def _weight(model: nn.Module, name: str) -> Tensor:
    module: Any = model.get_submodule(name)
    weight: Tensor = module.weight.data
    return weight
