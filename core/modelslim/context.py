# SPDX-License-Identifier: Apache-2.0
"""What the algorithms of one stage hand over to those of later stages: tensors and plain values, by namespace."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from modelslim.errors import PluginError

_VALUES = "values"


class Namespace(MutableMapping[str, Any]):
    """Named values. What is put in is a copy, on the CPU; to change a value, put it in again.

    A value is a tensor, None, a bool, a number or a string, or a list or a mapping of such values with strings for
    keys; a tuple comes back as a list. Tensors that are read must not be changed in place.

    Args:
        name: its name.
        values: what it holds; shared with other views of the same namespace.
        writable: False to refuse changes.
    """

    def __init__(self, name: str, values: dict[str, Any], *, writable: bool) -> None:
        self._name = name
        self._values = values
        self._writable = writable

    def __getitem__(self, key: str) -> Any:
        return _copied(self._values[key], "", tensors=False)

    def __setitem__(self, key: str, value: Any) -> None:
        """Put a value in.

        Raises:
            PluginError: it is of another kind, or what earlier stages handed over can only be read.
        """
        self._require_writable()
        if not isinstance(key, str):
            raise PluginError(f"context {self._name!r}: the key {key!r} is no string", hint="keys are strings")
        self._values[key] = _copied(value, f"context {self._name!r}, {key!r}", tensors=True)

    def __delitem__(self, key: str) -> None:
        self._require_writable()
        del self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def _require_writable(self) -> None:
        if not self._writable:
            raise PluginError(
                f"context {self._name!r} can only be read here", hint="name it in hands_over of the algorithm"
            )


class Context:
    """All namespaces of a run.

    Args:
        values: what they hold.
    """

    def __init__(self, values: Mapping[str, dict[str, Any]] | None = None) -> None:
        self._values: dict[str, dict[str, Any]] = dict(values or {})

    def view(self, hands_over: Iterable[str], takes_over: Iterable[str]) -> dict[str, Namespace]:
        """The namespaces that an algorithm may see.

        Args:
            hands_over: those that it may change.
            takes_over: those that it may read.
        """
        names = {**dict.fromkeys(takes_over, False), **dict.fromkeys(hands_over, True)}
        return {
            name: Namespace(name, self._values.setdefault(name, {}), writable=writable)
            for name, writable in names.items()
        }

    def save(self, file: Path) -> None:
        """Write all of it into a safetensors file, whose metadata hold the plain values as JSON.

        Raises:
            OSError: it could not be written.
        """
        tensors: dict[str, Tensor] = {}

        def encode(value: Any) -> Any:
            if isinstance(value, Tensor):
                tensors[str(len(tensors))] = value
                return {"tensor": str(len(tensors) - 1)}
            if isinstance(value, dict):
                return {"mapping": {key: encode(item) for key, item in value.items()}}
            return [encode(item) for item in value] if isinstance(value, list) else value

        values = {name: {key: encode(item) for key, item in held.items()} for name, held in self._values.items()}
        file.write_bytes(safetensors.torch.save(tensors, {_VALUES: json.dumps(values)}))

    @classmethod
    def load(cls, file: Path) -> Context:
        """The reverse of ``save``."""
        with safe_open(file, "pt") as stored:

            def decode(value: Any) -> Any:
                if isinstance(value, list):
                    return [decode(item) for item in value]
                if not isinstance(value, dict):
                    return value
                if "tensor" in value:
                    return stored.get_tensor(value["tensor"])
                return {key: decode(item) for key, item in value["mapping"].items()}

            values = json.loads(stored.metadata()[_VALUES])
            return cls({name: {key: decode(item) for key, item in held.items()} for name, held in values.items()})


def _copied(value: Any, place: str, *, tensors: bool) -> Any:
    """A value with containers of its own, and tensors of its own if asked for."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) if tensors else value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_copied(item, place, tensors=tensors) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _copied(item, place, tensors=tensors) for key, item in value.items()}
    raise PluginError(
        f"{place}: {type(value).__name__} cannot be handed over",
        hint="tensors, None, bool, int, float, str, and lists and mappings of them with strings for keys",
    )
