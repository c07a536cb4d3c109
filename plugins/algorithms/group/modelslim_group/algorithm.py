# SPDX-License-Identifier: Apache-2.0
"""``group``: several processors as one entry of ``process``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelslim.api import Entry, Processor


class Group(Processor):
    """Stands for the processors in its ``configs``, in their order.

    The engine makes one calibration pass for all processors of a unit, grouped or not; a group
    says in the protocol that its members belong together.
    """

    @classmethod
    def expand(cls, config: Mapping[str, Any]) -> Sequence[Entry]:
        """The members, each with its place in the group's configuration."""
        return [(("configs", index), member) for index, member in enumerate(config["configs"])]
