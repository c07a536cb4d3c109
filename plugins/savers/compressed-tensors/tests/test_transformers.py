# SPDX-License-Identifier: Apache-2.0
"""transformers and the compressed-tensors package load what was written, and compute what our forward computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization.lifecycle import forward as engine
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from modelslim.api import QuantSpec
from modelslim.saved import load_model

Source = Callable[..., Path]
Result = Callable[..., Path]
Process = Callable[..., dict[str, Any]]

BFLOAT16_ONLY = ("mxfp8", "mxfp4", "nvfp4")
TOKENS = torch.tensor([[5, 9, 3, 17, 22, 8, 2, 28, 11, 6, 25, 14, 19, 4, 7, 13]])


def load(path: Path, **settings: Any) -> Any:
    """The model as transformers loads it; nothing may be missing or left over."""
    model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **settings)
    assert {key: value for key, value in report.items() if value} == {}
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS).logits
    return found


def divergence(one: Tensor, other: Tensor) -> float:
    p, q = one.float().log_softmax(-1), other.float().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def assert_like(ours: Tensor, found: Tensor, lost: float, spec: QuantSpec) -> None:
    """Fail unless weights are the same, and rounded inputs as near to ours as two roundings are to each other.

    Args:
        lost: how far ours is from the float model.
    """
    # Engines divide by scales in the dtype of the model, so that inputs near a tie go here or there.
    assert divergence(ours, found) < (1e-4 if spec.activation.is_float else 2 * lost)


@pytest.fixture
def same_dynamic_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """For int8 the package divides a token's largest value by 127.5; vLLM, and our forward, divide it by 127."""
    theirs = engine.compute_dynamic_scales_and_zp

    def ours(value: Tensor, args: Any, module: Any, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scale, zero_point = theirs(value, args, module, global_scale)
        return scale * (127.5 / 127 if args.symmetric and args.type == "int" else 1), zero_point

    monkeypatch.setattr(engine, "compute_dynamic_scales_and_zp", ours)


@pytest.mark.usefixtures("same_dynamic_scale")
def test_logits_are_those_of_our_forward(
    plain_scheme: str, specs: Mapping[str, QuantSpec], source: Source, result: Result, process: Process
) -> None:
    path = result(source(), process(plain_scheme))
    if specs[plain_scheme].weight.symmetric:
        found = logits(load(path))
    else:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # what the plan warns of
            load(path)
        with pytest.warns(UserWarning, match="already has a `quantization_config`"):
            found = logits(load(path, quantization_config=CompressedTensorsConfig(dequantize=True)))
    ours = logits(load_model(path, source(), device="cpu"))
    assert divergence(logits(load(source())), ours) > 1e-4, "the models must differ, or the test shows nothing"
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [f"{dtype}{suffix}" for dtype in BFLOAT16_ONLY for suffix in ("", "-weight")])
def test_floats_with_scales_of_a_type_of_their_own(
    name: str, specs: Mapping[str, QuantSpec], source: Source, result: Result, process: Process
) -> None:
    model = source(dtype="bfloat16")
    path = result(model, process(name))
    ours = logits(load_model(path, model, device="cpu"))
    lost = divergence(logits(load(model)), ours)
    assert lost > 1e-4, "the models must differ, or the test shows nothing"
    assert_like(ours, logits(load(path)), lost, specs[name])
    with pytest.raises(RuntimeError, match="same dtype"):  # what the plan warns of
        logits(load(result(source(), process(name))))


@pytest.mark.parametrize("name", ["dynamic", "w4a8-group"])
def test_dynamic_scales_of_the_package_make_no_more_difference_than_rounding(
    name: str, specs: Mapping[str, QuantSpec], source: Source, result: Result, process: Process
) -> None:
    path = result(source(), process(name))
    ours = logits(load_model(path, source(), device="cpu"))
    assert_like(ours, logits(load(path)), divergence(logits(load(source())), ours), specs[name])


@pytest.mark.parametrize("name", ["static-asymmetric", "dynamic", "w4a16-group", "w3a16", "fp8", "fp8-block"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models_load_and_generate(
    name: str, dtype: str, specs: Mapping[str, QuantSpec], source: Source, result: Result, process: Process
) -> None:
    model = load(result(source(dtype=dtype), process(name)))
    found = logits(model)
    assert found.dtype == getattr(torch, dtype) and found.isfinite().all()
    ours = logits(load_model(result(source(dtype=dtype), process(name)), source(dtype=dtype), device="cpu"))
    lost = divergence(logits(load(source(dtype=dtype))), ours)
    assert_like(ours, found, lost, specs[name])
    generated = model.generate(TOKENS, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=1)
    assert generated.shape == (1, TOKENS.shape[1] + 8)


def test_single_file_and_several_shards_hold_the_same(source: Source, result: Result, process: Process) -> None:
    one = result(source(), process("w4a16"), part_file_size=0)
    several = result(source(), process("w4a16"), part_file_size=2e-5)
    assert {file.name for file in one.glob("model*")} == {"model.safetensors"}
    assert len(list(several.glob("model-*-of-*.safetensors"))) > 2
    assert (several / "model.safetensors.index.json").is_file()
    assert torch.equal(logits(load(one)), logits(load(several)))


def test_several_schemes_in_one_model(source: Source, result: Result, process: Process) -> None:
    first, second = ["*layers.0.*"], ["*layers.1.*"]
    path = result(
        source(),
        process("w4a16-group", include=first, exclude=["*mlp*"]),
        process("static", include=["*layers.0.mlp*"]),
        process("dynamic-asymmetric", include=["*layers.1.mlp.down_proj"]),
        process("w8a16", include=second, exclude=["*mlp*"]),
    )
    torch.testing.assert_close(
        logits(load(path)), logits(load_model(path, source(), device="cpu")), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("part", ["*self_attn*", "*mlp*"])
def test_what_is_not_quantized_stays_float(part: str, source: Source, result: Result, process: Process) -> None:
    path = result(source(), process("static-asymmetric", include=[part]))
    torch.testing.assert_close(
        logits(load(path)), logits(load_model(path, source(), device="cpu")), rtol=1e-4, atol=1e-4
    )


def test_quantized_head(source: Source, result: Result, process: Process) -> None:
    path = result(source(), process("w8a16", include=["*", "lm_head"]))
    model = load(path)
    assert hasattr(model.lm_head, "weight_packed")
    torch.testing.assert_close(logits(model), logits(load_model(path, source(), device="cpu")), rtol=1e-4, atol=1e-4)


def test_head_that_shares_the_weight_of_the_embedding(source: Source, result: Result, process: Process) -> None:
    model = source(tied=True)
    path = result(model, process("w4a16"))
    torch.testing.assert_close(logits(load(path)), logits(load_model(path, model, device="cpu")), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["w4a16-group", "w8a16", "w3a16"])
def test_fused_experts_with_quantized_weights(name: str, source: Source, result: Result, process: Process) -> None:
    model = source("qwen3_moe")
    path = result(model, process(name))
    torch.testing.assert_close(logits(load(path)), logits(load_model(path, model, device="cpu")), rtol=1e-4, atol=1e-4)


def test_fused_experts_beside_static_attention(source: Source, result: Result, process: Process) -> None:
    model = source("qwen3_moe")
    attention = process("static-asymmetric", include=["*self_attn*"])
    path = result(model, process("w4a16", include=["*experts*"]), attention)
    torch.testing.assert_close(logits(load(path)), logits(load_model(path, model, device="cpu")), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["fp8-weight", "mxfp4-weight"])
def test_fused_experts_with_floating_weights(name: str, source: Source, result: Result, process: Process) -> None:
    model = source("qwen3_moe", "bfloat16")
    path = result(model, process(name, include=["*experts*"]))
    assert divergence(logits(load_model(path, model, device="cpu")), logits(load(path))) < 1e-4


def test_float_experts_beside_float8(source: Source, result: Result, process: Process) -> None:
    model = source("qwen3_moe")
    path = result(model, process("fp8", include=["*self_attn*"]))
    torch.testing.assert_close(logits(load(path)), logits(load_model(path, model, device="cpu")), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "include"),
    [
        ("dynamic", "*experts*"),
        ("w4a16-asymmetric", "*experts*"),
        ("mxfp8-weight", "*experts*"),
        ("w4a16", "*self_attn*"),
        ("mxfp4", "*self_attn*"),
    ],
)
def test_fused_experts_in_another_way_do_not_load(
    name: str, include: str, source: Source, result: Result, process: Process
) -> None:
    path = result(source("qwen3_moe", "bfloat16"), process(name, include=[include]))
    with pytest.raises(RuntimeError, match="conversion of the weights"):  # what the plan warns of
        load(path)


def test_fused_experts_of_nvfp4_are_read_wrongly(source: Source, result: Result, process: Process) -> None:
    model = source("qwen3_moe", "bfloat16")
    path = result(model, process("nvfp4-weight", include=["*experts*"]))
    ours = logits(load_model(path, model, device="cpu"))
    lost = divergence(logits(load(model)), ours)
    assert divergence(ours, logits(load(path))) > 10 * lost, "the plan warns of this; transformers has learned it"


def test_fused_experts_that_the_engine_knows_stacked_are_left_at_random(
    source: Source, result: Result, process: Process
) -> None:
    from transformers import AutoModelForImageTextToText

    path = result(source("qwen3_vl_moe"), process("w4a16", include=["*experts*"]))
    _, report = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True)
    missing = {name for name in report["missing_keys"] if "experts" in name}
    assert missing, "the plan warns of this; transformers has learned it"
