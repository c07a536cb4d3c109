# SPDX-License-Identifier: Apache-2.0
"""Sparse weights from the protocol to the checkpoint, back, and into other formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modelslim.cli.main import main
from modelslim.errors import ProtocolError
from modelslim.evaluation import evaluate
from modelslim.plan import make_plan
from modelslim.run import quantize
from modelslim.types import QuantSpec, TensorSpec
from modelslim.verify import verify

YAML = """\
apiversion: modelslim_v1
spec:
  process:
    - {{{entry}}}
  save:
    - type: {saver}
  dataset: {dataset}
"""
# scheme: (entry, KL of random weights, which suffer more than trained ones)
SCHEMES = {
    "W16A16S": ("type: float_sparse, sparse_ratio: 0.3", 0.3),
    "W8A8S": ("type: lowbit_sparse, fraction: 0.05", 0.1),
}


@pytest.fixture
def text(calibration_file: Path) -> Callable[[str, str], str]:
    """A protocol with this entry and this saver."""
    return lambda entry, saver: YAML.format(entry=entry, saver=saver, dataset=calibration_file)


@pytest.mark.parametrize(
    ("model", "scheme"), [("tiny_llama", "W16A16S"), ("tiny_moe", "W16A16S"), ("tiny_llama", "W8A8S")]
)
def test_scheme_goes_through(
    scheme: str,
    model: str,
    request: pytest.FixtureRequest,
    protocol: Callable[[str], Path],
    text: Callable[[str, str], str],
    calibration_texts: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, out = request.getfixturevalue(model), tmp_path / "out"
    entry, bound = SCHEMES[scheme]
    report = quantize(path, out, protocol(text(entry, "ascendv1_saver")), device="cpu")
    assert {made for unit in report["units"] for made in unit["linears"].values()} == {scheme}
    result = evaluate(out, path, " ".join(calibration_texts), window=64, device="cpu")
    assert 0 < result.kl < bound
    assert main(["verify", str(out), "--float", str(path), "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)
    assert verified["schemes"].keys() == {scheme}
    assert all(0 < one["relative"] < one["limit"] for one in verified["errors"].values())


def test_stored_weights_are_zero_or_short(
    tiny_llama: Path, protocol: Callable[[str], Path], text: Callable[[str, str], str], tmp_path: Path
) -> None:
    entry = "type: float_sparse, sparse_ratio: 0.5, exclude: ['*down_proj']"
    quantize(tiny_llama, tmp_path / "out", protocol(text(entry, "ascendv1_saver")), device="cpu")
    source = load_file(tiny_llama / "model.safetensors")
    types = json.loads((tmp_path / "out" / "quant_model_description.json").read_text(encoding="utf-8"))
    (file,) = (tmp_path / "out").glob("*.safetensors")
    for name, tensor in load_file(file).items():
        assert tensor.dtype is source[name].dtype
        if types[name] != "W16A16S":
            assert torch.equal(tensor, source[name])
            continue
        assert int((tensor == 0).sum()) == tensor.numel() - round(0.5 * tensor.numel())
        long = tensor.float().view(torch.int32) & 0x1FFFFF != 0  # what is set behind two bits of mantissa
        assert int(long.sum()) <= 0.021 * tensor.numel()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("saver", ["compressed_tensors_saver", "mindie_format_saver", "gptq_saver", "awq_saver"])
def test_formats_without_a_type_are_refused_by_the_plan(
    scheme: str, saver: str, tiny_llama: Path, protocol: Callable[[str], Path], text: Callable[[str, str], str]
) -> None:
    with pytest.raises(ProtocolError) as error:
        make_plan(tiny_llama, protocol(text(SCHEMES[scheme][0], saver)), device="cpu")
    (problem,) = error.value.diagnostics
    assert f"{saver} has no type for sparse weights, here {scheme} (model.layers.0" in problem.message
    assert "ascendv1_saver" in problem.hint


def test_fused_experts_are_no_w8a8s(
    tiny_moe: Path, protocol: Callable[[str], Path], text: Callable[[str, str], str]
) -> None:
    with pytest.raises(ProtocolError) as error:
        make_plan(tiny_moe, protocol(text("type: lowbit_sparse", "ascendv1_saver")), device="cpu")
    assert any("does not quantize fused experts" in str(one) for one in error.value.diagnostics)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("type: float_sparse, sparse_ratio: 1.5", "sparse_ratio"),
        ("type: float_sparse, include: []", "no linear would be pruned"),
        ("type: lowbit_sparse, fraction: -1", "fraction"),
        ("type: lowbit_sparse, sparse_ratio: 0.3", "sparse_ratio"),
    ],
)
def test_wrong_fields_are_refused(
    entry: str, message: str, tiny_llama: Path, protocol: Callable[[str], Path], text: Callable[[str, str], str]
) -> None:
    with pytest.raises(ProtocolError) as error:
        make_plan(tiny_llama, protocol(text(entry, "ascendv1_saver")), device="cpu")
    assert any(message in str(one) for one in error.value.diagnostics)


def test_converted_to_float_the_sparse_weights_stay(
    tiny_llama: Path, protocol: Callable[[str], Path], text: Callable[[str, str], str], tmp_path: Path
) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    quantize(tiny_llama, out, protocol(text(SCHEMES["W16A16S"][0], "ascendv1_saver")), device="cpu")
    assert main(["convert", str(out), "--save_path", str(back), "--to", "float"]) == 0
    (file,), (plain,) = out.glob("*.safetensors"), back.glob("*.safetensors")
    stored = load_file(file)
    for name, tensor in load_file(plain).items():
        assert torch.equal(tensor, stored[name])


def test_another_weight_is_not_taken_for_a_pruned_one(
    tiny_llama: Path, protocol: Callable[[str], Path], text: Callable[[str, str], str], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    out = tmp_path / "out"
    quantize(tiny_llama, out, protocol(text(SCHEMES["W16A16S"][0], "ascendv1_saver")), device="cpu")
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    tensors[first], tensors[second] = tensors[second], tensors[first]
    save_file(tensors, file)
    problems = [problem for problem in verify(out, tiny_llama).problems if problem.fatal]
    assert {problem.linear for problem in problems} == {first.removesuffix(".weight"), second.removesuffix(".weight")}


def test_names_of_schemes() -> None:
    sparse, static = TensorSpec("float", "per_channel", sparse=True), TensorSpec("int8", "per_tensor")
    assert QuantSpec(sparse).scheme == "W16A16S"
    assert QuantSpec(TensorSpec("int8", "per_channel", sparse=True), static).scheme == "W8A8S"
    assert QuantSpec(TensorSpec("int8", "per_channel"), static).scheme == "W8A8"
