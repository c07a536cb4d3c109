# SPDX-License-Identifier: Apache-2.0
"""Contracts that the authors of plugins run against their plugins, with pytest.

Each is a class of tests; subclass it in your own tests and supply its fixtures:

- :class:`modelslim.testing.adapter.AdapterContract`
- :class:`modelslim.testing.algorithm.AlgorithmContract`
- :class:`modelslim.testing.saver.SaverContract`

They need pytest, which the core does not install.
"""

import pytest

# Failing asserts then show their values, which pytest does for test files only.
pytest.register_assert_rewrite(f"{__name__}.adapter", f"{__name__}.algorithm", f"{__name__}.saver")
