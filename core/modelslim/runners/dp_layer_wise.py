# SPDX-License-Identifier: Apache-2.0
"""The runner ``dp_layer_wise``: several ranks, each with samples of its own, one unit at a time."""

from __future__ import annotations

from modelslim.runners.layer_wise import LayerWiseRunner


class DataParallelLayerWiseRunner(LayerWiseRunner):
    """Each rank passes its samples through the unit; statistics, and then the work on weights, are shared."""

    divides_samples = True
