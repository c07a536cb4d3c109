# SPDX-License-Identifier: Apache-2.0
"""Garbage is collected seldom while a process of ours starts, and as before behind that."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest

from modelslim.cli.main import main
from modelslim.plan import make_plan
from modelslim.start import started, starting


def test_it_ends_with_the_plan(tiny_llama: Path, w8a8_dynamic: str, protocol: Callable[[str], Path]) -> None:
    usual = gc.get_threshold()
    starting()
    assert gc.get_threshold()[0] > 10 * usual[0]
    starting()
    make_plan(tiny_llama, protocol(w8a8_dynamic), device="cpu")
    assert gc.get_threshold() == usual


def test_a_command_that_fails_leaves_all_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    usual = gc.get_threshold()
    assert main(["plan", "--model_path", "/nowhere", "--config_path", "/nowhere"]) != 0
    assert gc.get_threshold() == usual
    assert capsys.readouterr().err


def test_a_process_that_is_not_ours_keeps_its_own() -> None:
    usual = gc.get_threshold()
    gc.set_threshold(123, 4, 5)
    try:
        started()
        assert gc.get_threshold() == (123, 4, 5)
    finally:
        gc.set_threshold(*usual)
