# SPDX-License-Identifier: Apache-2.0
"""The runner ``layer_wise``: one device, one unit at a time."""

from __future__ import annotations

from typing import Any

from modelslim.plan import Plan
from modelslim.result import ResultWriter
from modelslim.runners.stages import run_stages


class LayerWiseRunner:
    """Holds the parts outside the units, the unit at work, and the next one, which is being read."""

    def run(self, plan: Plan, writer: ResultWriter) -> list[dict[str, Any]]:
        """Run the plan.

        Returns:
            One record per unit of the main stage, for the report.
        """
        return run_stages(plan, writer)
