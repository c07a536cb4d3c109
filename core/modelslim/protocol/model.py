# SPDX-License-Identifier: Apache-2.0
"""What a validated protocol means, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modelslim.protocol.document import Document, Steps

MULTIMODAL = "multimodal_vlm_modelslim_v1"
"""The apiversion whose calibration samples hold images, audio or video, and which knows one runner."""


@dataclass(frozen=True)
class Processor:
    """One entry of ``process``.

    Attributes:
        type: name of the algorithm.
        config: the entry as written, ``type`` included; the algorithm fills its own defaults.
        path: its place in the document.
    """

    type: str
    config: Mapping[str, Any]
    path: Steps


@dataclass(frozen=True)
class SaverEntry:
    """One entry of ``save``; attributes as of :class:`Processor`."""

    type: str
    config: Mapping[str, Any]
    path: Steps


@dataclass(frozen=True)
class Stage:
    """One entry of ``prior``: processors that run before the main ones.

    Attributes:
        process: its processors, in order.
        dataset: its calibration set; None for that of the protocol.
        path: its place in the document.
    """

    process: tuple[Processor, ...]
    dataset: str | None
    path: Steps


@dataclass(frozen=True)
class Protocol:
    """A protocol that its schema has accepted.

    Attributes:
        apiversion: which schema that was.
        runner: name of the runner, or ``auto``.
        prior: stages before the main one, in order.
        process: the main stage's processors, in order; at least one.
        save: the savers; at least one.
        dataset: name or path of the calibration set.
        propagation: whose outputs calibrate the next unit: ``float``, ``quantized``, or ``auto``, which
            takes the quantized ones when an algorithm compensates errors.
        experts: how experts are calibrated; one of ``modelslim.coverage.POLICIES``.
        default_text: prompt of samples that come without one; None where the apiversion has none.
        metadata: what a practice says about itself; empty when it says nothing.
        document: the document, for the positions of later diagnostics.
    """

    apiversion: str
    runner: str
    prior: tuple[Stage, ...]
    process: tuple[Processor, ...]
    save: tuple[SaverEntry, ...]
    dataset: str
    experts: str
    propagation: str
    default_text: str | None
    metadata: Mapping[str, Any]
    document: Document = field(repr=False)

    @property
    def entries(self) -> tuple[Processor, ...]:
        """The processors of all stages in the order in which they run."""
        return (*(entry for stage in self.prior for entry in stage.process), *self.process)

    @property
    def is_multimodal(self) -> bool:
        """True when calibration samples may hold images, audio or video."""
        return self.apiversion == MULTIMODAL
