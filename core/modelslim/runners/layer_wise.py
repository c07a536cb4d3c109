# SPDX-License-Identifier: Apache-2.0
"""The runner ``layer_wise``: one unit at a time."""

from __future__ import annotations

from typing import Any, ClassVar

from modelslim.plan import Plan
from modelslim.ranks import Ranks
from modelslim.result import RunOutput
from modelslim.runners.engine import Engine


class LayerWiseRunner:
    """Holds the parts outside the units, the unit at work, and the next one, which is being read.

    Attributes:
        divides_samples: True for a runner that works on several ranks.
    """

    divides_samples: ClassVar[bool] = False

    def run(self, plan: Plan, writer: RunOutput, ranks: Ranks) -> list[dict[str, Any]]:
        """Run the plan.

        Returns:
            One record per unit, for the report.
        """
        return Engine(plan, writer, ranks).run()
