# SPDX-License-Identifier: Apache-2.0
"""How many passes over the calibration data a run takes: one, unless a statistic cannot follow what was folded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from modelslim.plan import Plan, make_plan
from modelslim.plan_table import forward_passes
from modelslim.run import run_plan
from modelslim.saved import load_model

QUANT = "{type: linear_quant, qconfig: {act: {scope: per_tensor}, weight: {dtype: int8}}}"
SHIFT = "{type: iter_smooth, symmetric: false, alpha: 0.5}"
SCALE = "{type: iter_smooth, alpha: 0.5}"
AWQ = "{type: awq, weight_qconfig: {dtype: int8}}"
SSZ = "{type: flex_awq_ssz, qconfig: {act: {scope: per_tensor}, weight: {dtype: int8, method: ssz}}}"
FLEX = "{type: flex_smooth_quant, qconfig: {act: {scope: per_tensor}, weight: {dtype: int8}}}"
GPTQ = QUANT.replace("int8}}}", "int8, method: gptq}}}")
HISTOGRAM = QUANT.replace("per_tensor", "per_tensor, method: histogram")

Planned = Callable[..., Plan]


@pytest.fixture
def plan(tiny_llama: Path, protocol: Callable[[str], Path], calibration_file: Path) -> Planned:
    """A plan for these entries on the tiny model; outputs of float layers calibrate the next."""

    def make(*entries: str) -> Plan:
        process = "".join(f"    - {entry}\n" for entry in entries)
        tail = f"  save: [{{type: ascendv1_saver}}]\n  dataset: {calibration_file}\n  propagation: float\n"
        text = f"apiversion: modelslim_v1\nspec:\n  process:\n{process}{tail}"
        return make_plan(tiny_llama, protocol(text), device="cpu")

    return make


@pytest.mark.parametrize(
    ("entries", "passes"),
    [
        ((QUANT,), 1),
        ((SCALE, QUANT), 1),
        ((SHIFT, QUANT), 1),
        ((SCALE, AWQ, QUANT), 1),  # mean magnitudes follow a scale
        ((SHIFT, AWQ, QUANT), 2),  # and no shift
        ((SHIFT, SSZ, QUANT), 2),
        ((AWQ, SHIFT, QUANT), 1),
        ((SHIFT, FLEX, QUANT), 1),  # ranges and rows follow both
        ((SHIFT, GPTQ), 1),  # so do Gram matrices
        ((SHIFT.replace("0.5", "0.5, enable_subgraph_type: [up-down]"), AWQ, QUANT), 1),  # no norm, no shift
        ((SCALE, HISTOGRAM), 2),
        ((SHIFT, AWQ, HISTOGRAM), 3),
    ],
    ids=str,
)
def test_passes_are_those_of_the_plan(entries: tuple[str, ...], passes: int, plan: Planned) -> None:
    assert forward_passes(plan(*entries)) == passes


@pytest.mark.parametrize("behind", [AWQ, SSZ])
def test_what_stands_behind_a_shift_sees_shifted_inputs(
    behind: str, plan: Planned, tiny_llama: Path, tmp_path: Path
) -> None:
    """The result is the float model's function, as it is without the second entry."""
    ids = torch.arange(3, 40).view(1, -1)

    def error(*entries: str) -> float:
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        run_plan(plan(*entries), out)
        with torch.no_grad():
            expected = load_model(tiny_llama, device="cpu").float()(input_ids=ids).logits.double()
            got = load_model(out, tiny_llama, device="cpu").float()(input_ids=ids).logits.double()
        return float((got - expected).norm() / expected.norm())

    assert error(SHIFT, behind, QUANT) < 1.3 * error(SHIFT, QUANT)
