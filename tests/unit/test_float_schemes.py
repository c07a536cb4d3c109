# SPDX-License-Identifier: Apache-2.0
"""Floating and mixed schemes from the protocol to the checkpoint and back, dense and with experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from modelslim.errors import ProtocolError
from modelslim.evaluation import evaluate
from modelslim.plan import make_plan
from modelslim.run import quantize
from modelslim.verify import verify

YAML = """\
apiversion: modelslim_v1
spec:
  process:
    - type: linear_quant
      qconfig: {{act: {{{act}}}, weight: {{{weight}}}}}
      include: ["*"]
  save:
    - type: ascendv1_saver
  dataset: {dataset}
"""
# scheme: (act, weight, bound of the KL on random weights, which suffer more than trained ones)
SCHEMES = {
    "W8A8_MIX": ("scope: pd_mix", "dtype: int8", 0.02),
    "W4A4_DYNAMIC": ("dtype: int4, scope: per_token", "dtype: int4", 0.6),
    "W8A8FP8_DYNAMIC": ("dtype: fp8_e4m3, scope: per_token", "dtype: fp8_e4m3", 0.08),
    "W8A8_MXFP8": ("dtype: mxfp8, scope: per_block", "dtype: mxfp8, scope: per_block", 0.1),
    "W4A8_MXFP": ("dtype: mxfp8", "dtype: mxfp4, method: fouroversix", 0.3),
    "W4A4_MXFP4": ("dtype: mxfp4", "dtype: mxfp4, method: mse", 0.6),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_moe"])
def test_scheme_goes_through(
    scheme: str,
    model: str,
    request: pytest.FixtureRequest,
    protocol: Callable[[str], Path],
    calibration_file: Path,
    calibration_texts: tuple[str, ...],
    tmp_path: Path,
) -> None:
    path = request.getfixturevalue(model)
    act, weight, bound = SCHEMES[scheme]
    report = quantize(
        path, tmp_path / "out", protocol(YAML.format(act=act, weight=weight, dataset=calibration_file)), device="cpu"
    )
    assert {made for unit in report["units"] for made in unit["linears"].values()} == {scheme}
    result = evaluate(tmp_path / "out", path, " ".join(calibration_texts), window=64, device="cpu")
    assert 0 < result.kl < bound
    assert not [problem for problem in verify(tmp_path / "out", path).problems if problem.fatal]


@pytest.mark.parametrize(
    ("act", "weight", "message"),
    [
        ("scope: per_block", "dtype: int8", "missing key 'dtype'"),
        ("dtype: int4", "dtype: int4", "scope"),
        ("dtype: mxfp8, scope: per_token", "dtype: mxfp8", "a dtype with blocks of its own has scope per_block"),
        ("dtype: fp8_e4m3, symmetric: false", "dtype: fp8_e4m3", "floating codes have no offset"),
        ("dtype: float", "dtype: mxfp4, scope: per_group", "floating codes have scope"),
        ("dtype: float", "dtype: mxfp4, method: gptq", "ssz and gptq are for integers"),
        ("dtype: float", "dtype: int4, method: fouroversix", "this method is for floating codes"),
        ("dtype: float", "dtype: mxfp8, method: ceil_x", "ceil_x is for mxfp4"),
        ("dtype: float", "dtype: mxfp4, ext: {ceil_x_value: 7}", 'ceil_x_value needs method: "ceil_x"'),
        ("dtype: float", "dtype: fp8_e4m3, scope: per_block", "ascendv1 has no type"),
        ("dtype: nvfp4", "dtype: nvfp4", "ascendv1 has no type for nvfp4 weights"),
    ],
)
def test_what_does_not_exist_is_refused_by_the_plan(
    act: str, weight: str, message: str, tiny_llama: Path, protocol: Callable[[str], Path], calibration_file: Path
) -> None:
    with pytest.raises(ProtocolError) as error:
        make_plan(tiny_llama, protocol(YAML.format(act=act, weight=weight, dataset=calibration_file)), device="cpu")
    assert any(message in str(one) for one in error.value.diagnostics), [str(one) for one in error.value.diagnostics]


def test_blocks_that_would_cross_experts_are_refused(
    tiny_moe: Path, protocol: Callable[[str], Path], calibration_file: Path
) -> None:
    text = YAML.format(act="dtype: float", weight="dtype: fp8_e4m3, scope: per_block", dataset=calibration_file)
    with pytest.raises(ProtocolError) as error:
        make_plan(tiny_moe, protocol(text), device="cpu")
    assert any("would cross from one linear to another" in str(one) for one in error.value.diagnostics)
