# SPDX-License-Identifier: Apache-2.0
"""Inputs that are multiplied at run time: while the model is float, in what is saved, and in what stays float."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from modelslim.errors import ProtocolError
from modelslim.experts import ExpertLinear
from modelslim.multipliers import (
    carry_input_multiplier,
    drop_input_multiplier,
    input_multiplier,
    multiply_inputs,
    undo_input_multiplier,
)
from modelslim.plan import make_plan
from modelslim.plan_table import places
from modelslim.ports import PortCollector
from modelslim.quantized import QuantizedExperts, QuantizedLinear, QuantizedTensor
from modelslim.run import run_plan
from modelslim.saved import load_model
from modelslim.statistics import ChannelRange
from modelslim.types import FLOAT, QuantSpec, TensorSpec

SMOOTH = "- {type: iter_smooth, alpha: 0.5, enable_subgraph_type: [non-fusion]}"
STATIC = "- type: linear_quant\n      qconfig: {act: {scope: per_tensor}, weight: {dtype: int8}}"
DYNAMIC = "- type: linear_quant\n      qconfig: {act: {scope: per_token}, weight: {dtype: int8}}"
WEIGHTS = "- type: linear_quant\n      qconfig: {weight: {dtype: int8}}"
TRAINED = "[{qconfig: {act: {scope: per_token}, weight: {dtype: int8}}}]"
AUTOROUND = f"- type: autoround_quant\n      iters: 8\n      strategies: {TRAINED}"
IDS = torch.arange(3, 40).view(1, -1)
LOUD = (5, 40)
"""Channels of the residual stream that are 100 times as large as the others."""


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def linear(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(16, 8, dtype=dtype)


def bank(parts: Mapping[str, slice] | None = None) -> ExpertLinear:
    torch.manual_seed(1)
    made = ExpertLinear(3, 8, 16, parts or {"down_proj": slice(None)})
    made.weight.normal_()
    return made


def test_linears_give_what_they_gave_and_read_the_product() -> None:
    one, two = linear(0), linear(1)
    x, multiplier = torch.randn(5, 16), torch.rand(16) + 0.1
    expected = one(x), two(x)
    before = one.weight.clone()
    multiply_inputs([one, two], multiplier)
    torch.testing.assert_close(one.weight, before / multiplier)
    torch.testing.assert_close((one(x), two(x)), expected)
    seen: list[Tensor] = []
    one.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    one(x)
    torch.testing.assert_close(seen[0], x * multiplier)


def test_multiplying_again_multiplies_the_product() -> None:
    one, x = linear(), torch.randn(5, 16)
    expected, first, second = one(x), torch.rand(16) + 0.1, torch.rand(16) + 0.1
    multiply_inputs([one], first)
    multiply_inputs([one], second)
    torch.testing.assert_close(one(x), expected)
    found = input_multiplier(one)
    assert found is not None
    torch.testing.assert_close(found, first * second)


def test_what_reads_one_tensor_still_shares_a_port() -> None:
    one, two, x = linear(0), linear(1), torch.randn(5, 16)
    multiply_inputs([one, two], torch.rand(16) + 0.1)
    kinds = frozenset({ChannelRange})
    with PortCollector({"one": one, "two": two}, {"one": kinds, "two": kinds}) as ports:
        one(x), two(x)
        ports.next_sample()
    assert ports.statistics().shares_port("one", "two")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_linear_that_stays_float_gets_its_weight_back(dtype: torch.dtype) -> None:
    one, x = linear(dtype=dtype), torch.randn(5, 16).to(dtype)
    before = one.weight.clone()
    multiply_inputs([one], torch.rand(16) * 30 + 0.1)
    undo_input_multiplier(one)
    torch.testing.assert_close(one.weight, before, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert input_multiplier(one) is None
    assert torch.equal(one(x), nn.functional.linear(x, one.weight, one.bias))


def test_what_stands_in_for_a_linear_reads_what_it_reads() -> None:
    one, x = linear(), torch.randn(5, 16)
    expected = one(x)
    multiply_inputs([one], torch.rand(16) + 0.1)
    other = nn.Linear(16, 8)
    other.weight, other.bias = one.weight, one.bias
    torch.testing.assert_close(carry_input_multiplier(one, other)(x), expected)
    drop_input_multiplier(other)
    assert not torch.allclose(other(x), expected)


@pytest.mark.parametrize("shape", [(16,), (3, 16)])
def test_experts_have_a_multiplier_each(shape: tuple[int, ...]) -> None:
    one, x, counts = bank(), torch.randn(9, 16), [4, 0, 3]
    expected, multiplier = one(x, counts), torch.rand(shape) + 0.1
    before = one.weight.clone()
    multiply_inputs([one], multiplier)
    torch.testing.assert_close(one(x, counts), expected)
    torch.testing.assert_close(one.weight[2], before[2] / multiplier.expand(3, 16)[2])
    found = input_multiplier(one)
    assert found is not None and found.shape == (3, 16)
    scale = torch.full((3, 8, 1), 0.5)
    codes = torch.randint(-128, 128, (3, 8, 16), dtype=torch.int8)
    spec = QuantSpec(TensorSpec("int8", "per_channel"), FLOAT)
    module = QuantizedExperts(QuantizedTensor(codes, scale, None, spec.weight), spec, input_multiplier=found)
    y = module(x, counts)
    for token, expert in ((1, 0), (5, 2)):
        wanted = (x[token] * found[expert]).double() @ (codes[expert].double() * 0.5).t()
        torch.testing.assert_close(y[token].double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("act", [FLOAT, TensorSpec("int8", "per_token"), TensorSpec("int8", "per_tensor")], ids=str)
def test_quantized_linear_multiplies_before_it_rounds(act: TensorSpec) -> None:
    codes = torch.randint(-128, 128, (8, 16), dtype=torch.int8)
    spec = QuantSpec(TensorSpec("int8", "per_channel"), act)
    static = (torch.tensor([0.02]), torch.zeros(1, dtype=torch.int8)) if spec.is_static else (None, None)
    weight = QuantizedTensor(codes, torch.full((8, 1), 0.01), None, spec.weight)
    x, multiplier = torch.randn(5, 16) * 40, torch.rand(16) * 0.05
    plain = QuantizedLinear(weight, spec, None, *static)
    multiplied = QuantizedLinear(weight, spec, None, *static, input_multiplier=multiplier)
    assert torch.equal(multiplied(x), plain(x * multiplier))


@pytest.fixture(scope="module")
def olmo(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """An olmo2, whose norms lie behind the linears, with two loud channels in what its projections read."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    config = Olmo2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
        dtype="bfloat16",
    )
    path = tmp_path_factory.mktemp("olmo")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model: Any = Olmo2ForCausalLM(config)
        model.model.embed_tokens.weight[:, LOUD] *= 100
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                layer.self_attn.get_submodule(name).weight[:, LOUD] /= 100
            for name in ("gate_proj", "up_proj"):
                layer.mlp.get_submodule(name).weight[:, LOUD] /= 100
        model.model.norm.weight[list(LOUD)] /= 100
        model.to(torch.bfloat16).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


Quantize = Callable[..., tuple[dict[str, Tensor], dict[str, Any], Path]]


@pytest.fixture
def quantize(protocol: Callable[[str], Path], calibration_file: Path, tmp_path: Path) -> Quantize:
    """Run these entries on a model; tensors of the result, report and folder."""

    def run(model: Path, *entries: str, more: str = "") -> tuple[dict[str, Tensor], dict[str, Any], Path]:
        process = "".join(f"    {entry}\n" for entry in entries)
        text = f"apiversion: modelslim_v1\nspec:\n  process:\n{process}  save:\n    - type: ascendv1_saver\n"
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        plan = make_plan(model, protocol(f"{text}  dataset: {calibration_file}\n{more}"), device="cpu")
        report = run_plan(plan, out)
        return {k: v for f in out.glob("*.safetensors") for k, v in load_file(f).items()}, report, out

    return run


def error(out: Path, model: Path) -> float:
    """How far the saved model's logits are from the float model's."""
    expected = load_model(model, device="cpu").float()(input_ids=IDS).logits.double()
    got = load_model(out, model, device="cpu").float()(input_ids=IDS).logits.double()
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("entry", "more"),
    [
        (STATIC, ""),
        (DYNAMIC, ""),
        (DYNAMIC, "  propagation: quantized\n"),
        (STATIC.replace("per_tensor", "per_tensor, method: histogram"), ""),  # measured in a pass of its own
        (STATIC.replace("int8}}", "int8, method: gptq}}"), ""),
        (AUTOROUND, ""),
    ],
    ids=["static", "dynamic", "propagated", "histogram", "gptq", "autoround"],
)
def test_loud_channels_behind_what_cannot_be_divided_do_no_harm(
    entry: str, more: str, olmo: Path, quantize: Quantize
) -> None:
    smoothed, report, out = quantize(olmo, SMOOTH, entry, more=more)
    _, _, plain = quantize(olmo, entry, more=more)
    assert error(out, olmo) < 0.5 * error(plain, olmo)
    for unit in report["units"]:
        assert all(quality["relative_error"] < 0.05 for quality in unit["quality"].values())
    names = {name.removesuffix(".div.mul_scale") for name in smoothed if name.endswith(".div.mul_scale")}
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    assert names == {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in projections}
    for layer in (0, 1):
        for group in (projections[:3], projections[3:]):
            first, *others = (smoothed[f"model.layers.{layer}.{name}.div.mul_scale"] for name in group)
            assert all(torch.equal(first, other) for other in others)
            assert first[list(LOUD)].max() < 0.3 * first.median()


def test_saved_model_is_the_function_of_its_tensors(olmo: Path, quantize: Quantize) -> None:
    """A float model of transformers with ``codes * scale * multiplier`` for weights."""
    from transformers import AutoModelForCausalLM

    tensors, report, out = quantize(olmo, SMOOTH, WEIGHTS)
    description = json.loads((out / "quant_model_description.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(olmo, dtype=torch.float32)
    for name in (name for unit in report["units"] for name in unit["linears"]):
        multiplier = tensors.get(f"{name}.div.mul_scale")
        inner = name if multiplier is None else f"{name}.linear"
        weight = tensors[f"{inner}.weight"].float() * tensors[f"{inner}.weight_scale"]
        if multiplier is not None:
            assert (multiplier.dtype, multiplier.shape) == (torch.float32, (64,))
            assert description[f"{name}.div.mul_scale"] == "FLOAT"
            assert description[f"{name}.linear.weight"] == "W8A16"
            weight = weight * multiplier
        model.get_submodule(name).weight.copy_(weight)
    expected = model(input_ids=IDS).logits
    got = load_model(out, olmo, device="cpu").float()(input_ids=IDS).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_linear_that_falls_back_to_float_is_as_it_was(olmo: Path, quantize: Quantize) -> None:
    source = {k: v for f in olmo.glob("*.safetensors") for k, v in load_file(f).items()}
    tensors, report, out = quantize(olmo, SMOOTH, STATIC + "\n      fallback: {above: 1.0e-6}")
    assert report["schemes"].keys() == {"FLOAT"}
    assert tensors.keys() == source.keys()
    for name, tensor in source.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0.01, atol=0)
    assert error(out, olmo) < 0.02


def test_linear_that_falls_back_to_another_scheme_keeps_its_multiplier(olmo: Path, quantize: Quantize) -> None:
    to = "{act: {scope: per_token}, weight: {dtype: int8}}"
    tensors, report, _ = quantize(olmo, SMOOTH, STATIC + f"\n      fallback: {{above: 1.0e-6, to: {to}}}")
    assert report["schemes"].keys() == {"W8A8_DYNAMIC"}
    assert tensors["model.layers.0.mlp.up_proj.linear.weight_scale"].shape == (96, 1)
    assert "model.layers.0.mlp.up_proj.div.mul_scale" in tensors


def test_experts_behind_what_is_not_linear(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any, quantize: Quantize
) -> None:
    """gpt_oss clamps what its experts' second linear reads."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.15,
        sliding_window=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
        dtype="bfloat16",
    )
    path = tmp_path_factory.mktemp("oss")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    exclude = '\n      include: ["*experts*"]'
    tensors, _, out = quantize(path, SMOOTH, DYNAMIC + exclude, more="  experts: all\n")
    multipliers = {name for name in tensors if name.endswith(".div.mul_scale")}
    experts = [f"model.layers.{layer}.mlp.experts.{expert}" for layer in (0, 1) for expert in range(4)]
    assert multipliers == {f"{expert}.down_proj.div.mul_scale" for expert in experts}
    assert len({float(tensors[name].sum()) for name in multipliers}) == 8  # every expert its own
    assert error(out, path) < 0.05


def test_plan_says_what_is_multiplied_at_run_time(
    olmo: Path, protocol: Callable[[str], Path], calibration_file: Path
) -> None:
    head = "apiversion: modelslim_v1\nspec:\n  process:\n"
    tail = f"  save: [{{type: ascendv1_saver}}]\n  dataset: {calibration_file}\n"

    def plan(*entries: str) -> Any:
        return make_plan(olmo, protocol(head + "".join(f"    {one}\n" for one in entries) + tail), device="cpu")

    asked = plan(SMOOTH, DYNAMIC)
    found = {(place.type, place.source, place.targets) for place in places(asked)}
    layers = "model.layers.*"
    projections = tuple(f"{layers}.self_attn.{one}_proj" for one in "qkv")
    assert ("non-fusion", "", projections) in found
    assert ("non-fusion", "", (f"{layers}.mlp.gate_proj", f"{layers}.mlp.up_proj")) in found
    assert not any(type_ == "" for type_, _, _ in found)
    (warning,) = asked.warnings
    assert "vLLM-Ascend has no linear whose input is multiplied first" in warning
    plain = plan("- {type: iter_smooth}", DYNAMIC)
    found = {(place.type, place.source) for place in places(plain)}
    assert not any(type_ == "non-fusion" for type_, _ in found)
    assert ("", f"{layers}.self_attn.q_proj") in found
    assert plain.warnings == []
    part = plan(SMOOTH, DYNAMIC + '\n      include: ["*self_attn*"]')  # the MLP stays float
    targets = {target for place in places(part) if place.type == "non-fusion" for target in place.targets}
    assert targets == set(projections)
    assert ("", f"{layers}.mlp.gate_proj") in {(place.type, place.source) for place in places(part)}


def test_format_without_a_place_is_refused(
    olmo: Path, protocol: Callable[[str], Path], calibration_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelslim_ascendv1.saver import AscendV1Saver

    monkeypatch.setattr(AscendV1Saver, "stores_multipliers", False)
    process = f"    {SMOOTH}\n    {DYNAMIC}\n"
    text = f"apiversion: modelslim_v1\nspec:\n  process:\n{process}  save:\n    - type: ascendv1_saver\n"
    with pytest.raises(ProtocolError) as caught:
        make_plan(olmo, protocol(f"{text}  dataset: {calibration_file}\n"), device="cpu")
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.path == "spec.process[0]"
    assert "multiplies the input of model.layers.0.mlp.gate_proj and 9 others at run time" in diagnostic.message
