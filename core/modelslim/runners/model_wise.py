# SPDX-License-Identifier: Apache-2.0
"""The runner ``model_wise``: one device, all units at once."""

from __future__ import annotations

from typing import Any

from modelslim.plan import Plan
from modelslim.ranks import Ranks
from modelslim.result import RunOutput
from modelslim.runners.stages import run_stages


class ModelWiseRunner:
    """Reads the whole model first; a unit is released when it has been written."""

    holds_model = True

    def run(self, plan: Plan, writer: RunOutput, ranks: Ranks) -> list[dict[str, Any]]:
        """Run the plan.

        Returns:
            One record per unit of the main stage, for the report.
        """
        return run_stages(plan, writer, ranks, whole=True)
