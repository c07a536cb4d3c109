# SPDX-License-Identifier: Apache-2.0
"""The families' runs, which all tests here share, and the option that rewrites the table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this file belong to no package

if TYPE_CHECKING:
    from cells import FamilyRun


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-models", action="store_true", help="rewrite docs/models.md instead of comparing it")


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    """No progress bars and no reports of loading."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FamilyRun]:
    """Every family by name; what is asked of it is computed once."""
    from cells import make_runs

    return make_runs(tmp_path_factory.mktemp("models"))
