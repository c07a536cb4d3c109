# SPDX-License-Identifier: Apache-2.0
"""The devices of a run; imports no torch for those that are the CPU, so that further ranks can start at once."""

from __future__ import annotations

from pathlib import Path

from modelslim.devices import resolve_devices
from modelslim.errors import ModelSlimError
from modelslim.protocol.validate import read_protocol
from modelslim.registry import Registry


def devices_of(device: str | None, workers: int | None, config_path: Path) -> list[str]:
    """The devices of a run, see ``resolve_devices``; mistakes of the protocol are told together with theirs.

    Raises:
        UsageError, PluginError: as there.
    """
    try:
        return resolve_devices(device, workers)
    except ModelSlimError as error:
        _, mistakes = read_protocol(config_path, Registry.scan())
        error.diagnostics = [*error.diagnostics, *mistakes]
        raise
