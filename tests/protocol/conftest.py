# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from modelslim.registry import Registry

DISTRIBUTIONS = "modelslim-algorithm-group,modelslim-algorithm-linear-quant,modelslim-saver-ascendv1"


@pytest.fixture(scope="session")
def registry() -> Registry:
    """The real registry, narrowed so that the expected texts do not depend on what else is installed."""
    return Registry.scan({"MODELSLIM_PLUGINS": DISTRIBUTIONS})
