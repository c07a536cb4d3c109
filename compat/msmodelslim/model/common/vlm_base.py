# SPDX-License-Identifier: Apache-2.0
"""The base class of vision-language adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from msmodelslim.model.common.base import ConfiguredModelAdapter


class VLMBaseModelAdapter(ConfiguredModelAdapter):
    """Helps to turn what a processor gives into inputs."""

    def _collect_inputs_to_device(
        self, inputs: Any, device: Any, keys: Iterable[str], defaults: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Inputs by name, tensors on the device.

        ``mm_token_type_ids``, which transformers 5 wants beside images, comes along where the processor gave
        it, whether it is among the keys or not.

        Args:
            inputs: what the processor gave: a mapping, or an object with attributes.
            device: a device, or a DeviceType.
            keys: names of the inputs.
            defaults: values of those that the processor did not give; None for others.
        """
        target = getattr(device, "value", device)
        given = {key: _find(inputs, key) for key in keys}
        types = _find(inputs, "mm_token_type_ids")
        if types is not None:
            given.setdefault("mm_token_type_ids", types)
        return {
            key: (defaults or {}).get(key) if value is None else self._maybe_to_device(value, target)
            for key, value in given.items()
        }

    @staticmethod
    def _maybe_to_device(value: Any, device: Any) -> Any:
        """The value on the device; what has no device as it is."""
        return value.to(device) if hasattr(value, "to") else value


VlmBaseModelAdapter = VLMBaseModelAdapter


def _find(inputs: Any, key: str) -> Any:
    return inputs.get(key) if isinstance(inputs, Mapping) else getattr(inputs, key, None)
