# SPDX-License-Identifier: Apache-2.0
"""The option that rewrites the table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this file belong to no package


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-formats", action="store_true", help="rewrite docs/formats.md instead of comparing it")
