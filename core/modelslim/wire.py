# SPDX-License-Identifier: Apache-2.0
"""Values that hold tensors, taken apart into JSON and tensors, and put together again; nothing is pickled.

It is how ranks hand each other statistics, quantized linears and calls of a unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from modelslim.errors import PluginError
from modelslim.quantized import QuantizedExperts, QuantizedLinear, QuantizedTensor
from modelslim.statistics import Statistic
from modelslim.types import QuantSpec, TensorSpec

_PARTS = ("bias", "input_scale", "input_offset", "input_multiplier")


def take_apart(value: Any, tensors: dict[int, Tensor]) -> Any:
    """A value as JSON in which tensors are numbers.

    Args:
        value: tensors, plain values, and tuples, lists and mappings of them.
        tensors: takes the tensors, each once, by their identity.

    Raises:
        TypeError: the value holds something else; names its class.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors.setdefault(id(value), value)
        return {"tensor": id(value)}
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return {type(value).__name__: [take_apart(one, tensors) for one in value]}
    if type(value) is dict:
        return {"dict": [[take_apart(key, tensors), take_apart(one, tensors)] for key, one in value.items()]}
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__}")


def put_together(value: Any, tensors: Mapping[int, Tensor]) -> Any:
    """The reverse of ``take_apart``."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {put_together(key, tensors): put_together(one, tensors) for key, one in content}
    items = [put_together(one, tensors) for one in content]
    return tuple(items) if kind == "tuple" else items


def statistic_state(statistic: Statistic) -> dict[str, Any]:
    """What a statistic has seen: its attributes."""
    return dict(vars(statistic))


def statistic_from(kind: type[Statistic], state: dict[str, Any]) -> Statistic:
    """The reverse of ``statistic_state``."""
    statistic = kind()
    vars(statistic).update(state)
    return statistic


def linear_state(module: QuantizedLinear) -> dict[str, Any]:
    """A quantized linear, or the quantized linears of fused experts, as a value that can be taken apart.

    Raises:
        PluginError: it is of a class of its own, which no other process can make.
    """
    if type(module) not in (QuantizedLinear, QuantizedExperts):
        raise PluginError(
            f"a {type(module).__name__} cannot be sent to another rank",
            hint="answer with QuantizedLinear or QuantizedExperts, or run on one device",
        )
    return {
        "experts": isinstance(module, QuantizedExperts),
        "spec": asdict(module.spec),
        "notes": list(module.notes),
        **{name: module._buffers[name] for name in ("codes", "scale", "offset", "whole_scale", *_PARTS)},
    }


def linear_from(state: dict[str, Any]) -> QuantizedLinear:
    """The reverse of ``linear_state``."""
    spec = QuantSpec(TensorSpec(**state["spec"]["weight"]), TensorSpec(**state["spec"]["activation"]))
    weight = QuantizedTensor(state["codes"], state["scale"], state["offset"], spec.weight, state["whole_scale"])
    kind = QuantizedExperts if state["experts"] else QuantizedLinear
    return kind(weight, spec, *(state[part] for part in _PARTS), notes=state["notes"])
