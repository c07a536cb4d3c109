# SPDX-License-Identifier: Apache-2.0
"""A float model opened to be measured: its units come and go, and nothing is written."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modelslim.activations import Boundary
from modelslim.adapters import choose_adapter, open_session
from modelslim.batches import batched
from modelslim.checkpoint import Checkpoint
from modelslim.dataset import find_dataset, read_samples
from modelslim.devices import resolve_device, synchronize, work_alone
from modelslim.errors import CapabilityError, DatasetError
from modelslim.guard import prove_forward
from modelslim.loader import Loader
from modelslim.model_info import describe
from modelslim.registry import Registry
from modelslim.vlm_dataset import INDEXES, read_vlm_samples

DEFAULT_TEXT = "Describe this image in detail."
"""Prompt of an image that comes without one."""


class FloatModel:
    """A model on meta, filled unit by unit from its checkpoint.

    Attributes:
        checkpoint: the source, open; use the object as a context manager.
        session: the adapter and the other plugins.
        model: the model.
        info: its structure.
        device: torch device of the computation.
        warnings: what the user should know.

    Args:
        model_path: directory of the float model.
        registry: the installed plugins.
        device: as for ``quant``.
        model_type: published model name or model_type; None to go by config.json.
        trust_remote_code: allow code of the checkpoint to run.
        dtype: type of all floating computation, such as ``float32``; None for the model's own.
        observers: further plugins, by name, told of every unit that is started and finished.
    """

    def __init__(
        self,
        model_path: Path,
        registry: Registry,
        *,
        device: str | None = None,
        model_type: str | None = None,
        trust_remote_code: bool = False,
        dtype: str | None = None,
        observers: Sequence[tuple[str, object]] = (),
    ) -> None:
        self.device = resolve_device(device)
        self.checkpoint = Checkpoint(model_path)
        kind, name, remark = choose_adapter(self.checkpoint.config, model_type, registry)
        stated = self.checkpoint.config["model_type"]
        self.session = open_session(kind, name, stated, model_path, trust_remote_code, registry, observers)
        missing = self.session.missing({"generate_model_forward", "handle_dataset"})
        if missing:
            raise CapabilityError(
                f"the adapter {name!r} does not implement {', '.join(missing)}, so nothing can be measured"
            )
        self.checkpoint.decode(self.session.get_decoded_tensors(self.checkpoint.stored))
        self.model = self.session.init_model(self.device)
        sources = self.session.get_weight_sources(self.model, self.checkpoint.shapes)
        self._loader = Loader(self.model, self.checkpoint, sources, self.device)
        self._loader.require_fit()
        self.info = describe(self.model, list(self.session.generate_model_visit(self.model)), self._loader)
        if dtype is not None:  # behind the description, which tells the types that are stored
            self.model.to(getattr(torch, dtype))
            self._loader = Loader(self.model, self.checkpoint, sources, self.device)
        self.warnings = [remark] if remark else []
        self._proof = partial(
            prove_forward, self.session, self.model, self.checkpoint, kind, name, trust_remote_code, registry
        )

    def __enter__(self) -> FloatModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpoint.__exit__(*_)

    def inputs(self, samples: Sequence[Any], *, together: bool = True) -> Sequence[Any]:
        """Calibration samples as model inputs; the forward is proven first, as for ``quant``.

        Args:
            samples: the samples.
            together: True to let texts of equal length pass as one input.
        """
        self.warnings += self._proof()
        self._loader.fill_on_demand(self.info.units)
        if self.session.has("enable_kv_cache"):
            self.session.enable_kv_cache(self.model, False)
        inputs = self.session.handle_dataset(samples, self.device)
        return batched(inputs) if together else inputs

    def start(self, inputs: Sequence[Any]) -> Boundary:
        """Let every input run to its first unit; what was filled for it is emptied again."""
        boundary = Boundary(self.session, self.model, inputs, list(self.info.units))
        boundary.start()
        self._loader.release_filled()
        return boundary

    def release_filled(self) -> None:
        """Empty what lies outside the units and was filled because a forward passed it."""
        self._loader.release_filled()

    def each_unit(self) -> Iterator[str]:
        """Each unit in the order of the forward, resident while the loop is at it; the next one is being read."""
        units = list(self.info.units)
        with ThreadPoolExecutor(1, "reader", work_alone, (self.device,)) as reader:
            ahead = reader.submit(self._loader.read_ahead, self._loader.names(units[0]))
            for index, unit in enumerate(units):
                begin = time.perf_counter()
                self.session.unit_started(unit, index, len(units))
                self._loader.install(ahead.result().take())
                if index + 1 < len(units):
                    ahead = reader.submit(self._loader.read_ahead, self._loader.names(units[index + 1]))
                yield unit
                synchronize(self.device)
                self._loader.release(self._loader.names(unit))
                linears = {linear.name: "FLOAT" for linear in self.info.by_unit[unit]}
                record = {"unit": unit, "linears": linears, "seconds": {"measure": time.perf_counter() - begin}}
                self.session.unit_finished(unit, index, len(units), record)


def find_set(value: str, registry: Registry, base: Path | None = None) -> tuple[Path, bool]:
    """Where a calibration set lies, and True when it is one of images, audio and video.

    Raises:
        DatasetError: there is no such set.
    """
    try:
        found = find_dataset(value, registry, base)
    except DatasetError as error:
        try:
            found = find_dataset(value, registry, base, directories=True)
        except DatasetError:
            raise error from None
    return found, found.is_dir() or found.name in INDEXES


def find_samples(
    value: str, registry: Registry, base: Path | None = None, text: str = DEFAULT_TEXT
) -> tuple[Path, list[Any], list[str]]:
    """A calibration set of texts, or of images, audio and video: what it is, is told by its form.

    Args:
        value: a path, or the name of a set that is shipped.
        registry: the installed plugins.
        base: where relative paths are tried, too.
        text: prompt of an image that comes without one.

    Returns:
        Where it lies, its samples, and what the user should know about them.

    Raises:
        DatasetError: there is no such set, or it is broken.
    """
    found, is_multimodal = find_set(value, registry, base)
    if is_multimodal:
        samples, remarks = read_vlm_samples(found, text)
        return found, list(samples), remarks
    return found, read_samples(found), []
