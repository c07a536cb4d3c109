# SPDX-License-Identifier: Apache-2.0
"""Fills a model on meta from its checkpoint, part by part, and empties it again."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modelslim.checkpoint import Checkpoint
from modelslim.errors import Diagnostic, ModelError, nearest
from modelslim.transfers import Arrival, Uploads
from modelslim.types import WeightSource

if TYPE_CHECKING:
    from modelslim.overlay import Overlay


class Loader:
    """Knows where every parameter and buffer of a model comes from.

    Args:
        model: the model; what is on meta now is what the loader fills.
        checkpoint: the source.
        sources: stored tensors by parameter name, from the adapter; None when names are the same.
        device: where parameters go.
        overlay: parameters that an earlier stage of the run has changed, which come from there.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        sources: Mapping[str, WeightSource] | None,
        device: str,
        overlay: Overlay | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._uploads = Uploads(device)
        self._overlay = overlay
        self.sources = sources if sources is not None else {name: WeightSource((name,)) for name in checkpoint.tensors}
        self._slots: dict[str, tuple[nn.Module, str]] = {}
        self._meta: dict[str, Tensor] = {}
        shared: dict[int, list[str]] = defaultdict(list)
        for prefix, module in model.named_modules():
            for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
                # No checkpoint holds a non-persistent buffer; the adapter computes it.
                if tensor is not None and tensor.is_meta and attribute not in module._non_persistent_buffers_set:
                    name = f"{prefix}.{attribute}" if prefix else attribute
                    self._slots[name] = (module, attribute)
                    self._meta[name] = tensor
                    shared[id(tensor)].append(name)
        # Tied parameters are one object under several names; filling one name fills them all.
        self._names = {name: group for names in shared.values() for group in self._tied(names) for name in group}
        self._sorted = sorted(self._meta)
        self._filled: set[str] = set()
        self._fills = False

    def _tied(self, names: list[str]) -> list[list[str]]:
        """Names of one parameter, by the tensor that fills them: a checkpoint may store two where the model ties."""
        groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
        common = next((self.sources[name].keys for name in names if name in self.sources), ())
        for name in names:
            groups[self.sources[name].keys if name in self.sources else common].append(name)
        return list(groups.values())

    def names(self, prefix: str = "") -> list[str]:
        """What is filled from the checkpoint under a module path; of tied parameters one name."""
        # Names of one module stand together in sorted order, so that a unit is found without a scan.
        first = bisect_left(self._sorted, f"{prefix}." if prefix else "")
        last = bisect_left(self._sorted, f"{prefix}/") if prefix else len(self._sorted)
        return list({self._names[name][0]: name for name in self._sorted[first:last]}.values())

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """What it fills, parameters and buffers by name, on meta."""
        return self._meta

    def source(self, name: str) -> WeightSource:
        """Where a parameter comes from.

        Raises:
            ModelError: the checkpoint does not hold it.
        """
        for alias in self._names[name]:
            if alias in self.sources:
                return self.sources[alias]
        raise ModelError(
            f"{self._checkpoint.path}: holds no tensor for {name}",
            hint=nearest(name, self._checkpoint.tensors) or "weights and config.json belong to different models",
        )

    def require_fit(self) -> None:
        """Refuse a checkpoint that cannot fill the model.

        Raises:
            ModelError: lists what is wrong.
        """
        lacking = self.check()
        if lacking:
            more = f"; the first 5 of {len(lacking)} are shown" if len(lacking) > 5 else ""
            raise ModelError(
                f"{self._checkpoint.path}: the weights do not fit config.json",
                diagnostics=[Diagnostic(problem) for problem in lacking[:5]],
                hint="weights and config.json belong to different models, the download is incomplete, or the model is "
                f"quantized already{more}",
            )

    def check(self) -> list[str]:
        """What the checkpoint lacks, or holds in another shape or as codes; empty when all can be filled."""
        problems = []
        for name, meta in self._meta.items():
            try:
                source = self.source(name)
            except ModelError as error:
                problems.append(f"{error.message} ({error.hint})")
                continue
            if source.convert is None:
                stored = self._checkpoint.tensors[source.keys[0]]
                is_float = stored.torch_dtype.is_floating_point and stored.torch_dtype.itemsize > 1
                if meta.is_floating_point() and not is_float:
                    problems.append(
                        f"{stored.file}: {stored.name} holds {stored.dtype} codes, as a quantized model does, "
                        "where a float weight is wanted"
                    )
                elif stored.shape != tuple(meta.shape):
                    is_turned = stored.shape == tuple(meta.transpose(-1, -2).shape) if meta.dim() > 1 else False
                    problems.append(
                        f"{stored.file}: {stored.name} has the shape {list(stored.shape)}, "
                        f"config.json asks for {list(meta.shape)}"
                        + (" (turned: get_weight_sources of the adapter must convert it)" if is_turned else "")
                    )
        return problems

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Read parameters.

        Raises:
            ModelError: not in the checkpoint, of another shape, or not finite.
        """
        return self._read(names, lambda tensor: tensor.to(self._device))

    def read_ahead(self, names: Sequence[str]) -> Arrival:
        """Read parameters in a thread of its own, for the one that computes; the model is left alone.

        Raises:
            ModelError: as for ``read``.
        """
        return self._uploads.begin(lambda bring: self._read(names, bring))

    def _read(self, names: Sequence[str], bring: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Read parameters, and have each brought to the device before the next is read."""
        tensors = self._changed(names, bring)
        names = [name for name in names if name not in tensors]
        waiting = Counter(key for name in names for key in self.source(name).keys)
        # Many parameters may be cut out of one stored tensor, which is read once.
        shared: dict[str, Tensor] = {}

        def take(key: str) -> Tensor:
            tensor = shared.pop(key) if key in shared else self._checkpoint.read(key)
            waiting[key] -= 1
            if waiting[key]:
                shared[key] = tensor
            return tensor

        for name in names:
            source, meta = self.source(name), self._meta[name]
            stored = [take(key) for key in source.keys]
            tensor = stored[0] if source.convert is None else source.convert(stored)
            if tensor.shape != meta.shape:
                raise ModelError(
                    f"{self._checkpoint.path}: {source.keys[0]} gives {name} the shape {list(tensor.shape)}, "
                    f"config.json asks for {list(meta.shape)}",
                    hint="weights and config.json belong to different models",
                )
            tensors[name] = bring(tensor.to(meta.dtype))
        return tensors

    def _changed(self, names: Sequence[str], bring: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Those of some parameters that an earlier stage has changed."""
        if self._overlay is None:
            return {}
        known = {name: alias for name in names for alias in self._names[name] if alias in self._overlay}
        return {name: bring(self._overlay.read(alias)) for name, alias in known.items()}

    def install(self, tensors: Mapping[str, Tensor]) -> None:
        """Put parameters into the model, under all names that share them."""
        for name, tensor in tensors.items():
            meta = self._meta[name]
            value = nn.Parameter(tensor, requires_grad=False) if isinstance(meta, nn.Parameter) else tensor
            for alias in self._names[name]:
                self._put(alias, value)

    def release(self, names: Iterable[str]) -> None:
        """Return parameters to meta."""
        for name in names:
            for alias in self._names[name]:
                self._put(alias, self._meta[alias])

    def fill_on_demand(self, units: Sequence[str]) -> None:
        """Fill every module outside the units when it is called, and never if it is not; asked again, do no more."""
        if self._fills:
            return
        self._fills = True
        inside = tuple(f"{unit}." for unit in units)
        waiting: dict[nn.Module, list[str]] = defaultdict(list)
        # The forward of a module around a unit is still on its way when the unit is waited for.
        suspended: set[str] = set()
        for name, (module, _) in self._slots.items():
            if not name.startswith(inside):
                waiting[module].append(name)
                parent = name.rpartition(".")[0]
                if any(unit.startswith(f"{parent}." if parent else "") for unit in units):
                    suspended.add(name)

        def fill(module: nn.Module, _args: Any) -> None:
            empty = [name for name in waiting[module] if self.is_empty(name)]
            self.install(self.read(empty))
            self._filled.update(name for name in empty if name not in suspended)

        for module in waiting:
            module.register_forward_pre_hook(fill)

    def release_filled(self) -> None:
        """Empty what was filled on demand; it is filled again if it is called again."""
        self.release(self._filled)
        self._filled.clear()

    def is_empty(self, name: str) -> bool:
        """True while a parameter is on meta."""
        module, attribute = self._slots[name]
        tensor: Tensor = getattr(module, attribute)
        return tensor.is_meta

    def _put(self, name: str, value: Tensor) -> None:
        module, attribute = self._slots[name]
        table = module._parameters if attribute in module._parameters else module._buffers
        table[attribute] = value  # type: ignore[assignment]


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
