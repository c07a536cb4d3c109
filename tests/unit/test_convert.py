# SPDX-License-Identifier: Apache-2.0
"""Conversions between formats: to the bit and back, or refused in words before anything is written."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modelslim.checkpoint import Checkpoint
from modelslim.convert import convert
from modelslim.errors import CapabilityError, ModelError, UsageError
from modelslim.run import quantize
from modelslim.verify import verify

Make = Callable[..., Path]

ASCEND, COMPRESSED, GPTQ, AWQ = "ascendv1_saver", "compressed_tensors_saver", "gptq_saver", "awq_saver"
STATIC = "{scope: per_tensor, dtype: int8, symmetric: false, method: minmax}"
DYNAMIC = "{scope: per_token, dtype: int8, symmetric: true, method: minmax}"
INT8 = "{scope: per_channel, dtype: int8, symmetric: true, method: minmax}"
INT4 = "{scope: per_channel, dtype: int4, symmetric: true, method: minmax}"
GROUPED = "{scope: per_group, dtype: int4, symmetric: true, group_size: 32, method: minmax}"
ZEROS = "{scope: per_group, dtype: int4, symmetric: false, group_size: 32, method: minmax}"
DOWN = "model.layers.1.mlp.down_proj"
INDEX = "quant_model_weights.safetensors"
QUERY = "model.layers.0.self_attn.q_proj"


def entry(weight: str, act: str = "", include: str = "*", exclude: str = "") -> str:
    inputs = f"act: {act}, " if act else ""
    left = f'      exclude: ["{exclude}"]\n' if exclude else ""
    return (
        f'    - type: linear_quant\n      qconfig: {{{inputs}weight: {weight}}}\n      include: ["{include}"]\n{left}'
    )


SCHEMES: Mapping[str, tuple[str, ...]] = {
    "dynamic": (entry(INT8, DYNAMIC),),
    "static": (entry(INT8, STATIC),),
    "w8a16": (entry(INT8),),
    "w4a16": (entry(GROUPED),),
    "w4a16_zeros": (entry(ZEROS),),
    "w4a8": (entry(INT4, DYNAMIC),),
    "fp8": (entry("{scope: per_channel, dtype: fp8_e4m3}", "{scope: per_token, dtype: fp8_e4m3}"),),
    "mxfp8": (entry("{scope: per_block, dtype: mxfp8}", "{scope: per_block, dtype: mxfp8}"),),
    "mxfp4": (entry("{scope: per_block, dtype: mxfp4}", "{scope: per_block, dtype: mxfp4}"),),
    "mixed": (entry(INT8, DYNAMIC, "*self_attn*"), entry(INT8, "", "*gate_proj"), entry(INT8, "", "*up_proj")),
}


@pytest.fixture(scope="session")
def biased(llama_factory: Callable[..., Path]) -> Path:
    """A llama with biases in its attentions, in two shards."""
    return llama_factory(attention_bias=True, intermediate_size=128, num_hidden_layers=2, max_shard_size="200KB")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, biased: Path, calibration_file: Path) -> Make:
    """``made(scheme, saver, source=...)`` -> Path of a quantized checkpoint, made once."""
    root = tmp_path_factory.mktemp("made")

    def make(scheme: str, saver: str, source: Path = biased) -> Path:
        path = root / f"{scheme}-{saver}-{source.name}"
        if not path.exists():
            protocol = root / f"{path.name}.yaml"
            protocol.write_text(
                f"apiversion: modelslim_v1\nspec:\n  process:\n{''.join(SCHEMES[scheme])}  save:\n    - type: {saver}\n"
                f"  dataset: {calibration_file}\n",
                encoding="utf-8",
            )
            quantize(source, path, protocol, device="cpu")
        return path

    return make


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(one: Path, other: Path) -> None:
    """The same tensors to the bit, and the same config.json."""
    ours, theirs = tensors_of(one), tensors_of(other)
    assert sorted(ours) == sorted(theirs)
    different = [
        name
        for name, tensor in ours.items()
        if tensor.dtype != theirs[name].dtype
        or tensor.shape != theirs[name].shape
        or not torch.equal(
            tensor.contiguous().view(-1).view(torch.uint8), theirs[name].contiguous().view(-1).view(torch.uint8)
        )
    ]
    assert not different, different[:3]
    first, second = (json.loads((path / "config.json").read_text()) for path in (one, other))
    assert first == second


@pytest.mark.parametrize(
    ("scheme", "first", "second", "is_held_by_both"),
    [
        ("dynamic", ASCEND, COMPRESSED, True),
        ("w4a16", ASCEND, COMPRESSED, True),
        ("mixed", ASCEND, COMPRESSED, True),
        ("static", COMPRESSED, ASCEND, False),
        ("w4a8", COMPRESSED, ASCEND, False),
        ("fp8", COMPRESSED, ASCEND, False),
        ("mxfp8", ASCEND, COMPRESSED, True),
        ("mxfp4", ASCEND, COMPRESSED, True),
        ("w4a16_zeros", ASCEND, COMPRESSED, True),
        ("w4a16", COMPRESSED, GPTQ, True),
        ("w4a16_zeros", COMPRESSED, AWQ, True),
    ],
)
def test_there_and_back_to_the_bit(
    scheme: str, first: str, second: str, is_held_by_both: bool, made: Make, tmp_path: Path
) -> None:
    source = made(scheme, first)
    there, back = tmp_path / "there", tmp_path / "back"
    report = convert(source, there, second)
    convert(there, back, first)
    assert_same(source, back)
    if is_held_by_both:  # scales in one type: as if it had been quantized for that format
        assert_same(made(scheme, second), there)
    assert verify(there).format == second
    assert report["bytes_after"] == sum(tensor.nbytes for tensor in tensors_of(there).values())
    assert {file.name for file in there.glob("tokenizer*")} == {file.name for file in source.glob("tokenizer*")}


def test_experts_one_by_one(tiny_moe: Path, made: Make, tmp_path: Path) -> None:
    source = made("dynamic", ASCEND, tiny_moe)
    convert(source, tmp_path / "there", COMPRESSED, part_file_size=0.0001)
    convert(tmp_path / "there", tmp_path / "back", ASCEND)
    assert_same(source, tmp_path / "back")
    assert len(list((tmp_path / "there").glob("*.safetensors"))) == 3


def test_holds_a_few_tensors_at_a_time(made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made("dynamic", ASCEND)
    read, alive, most = Checkpoint.read, list[weakref.ref[Tensor]](), 0

    def counted(checkpoint: Checkpoint, name: str) -> Tensor:
        nonlocal most
        alive.append(weakref.ref(tensor := read(checkpoint, name)))
        most = max(most, sum(one.nbytes for one in (ref() for ref in alive) if one is not None))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counted)
    convert(source, tmp_path / "out", COMPRESSED, check=False)
    largest = max(tensor.nbytes for name, tensor in tensors_of(source).items() if "_proj" in name)
    assert len(alive) > 80  # each is read twice
    assert most < 2.5 * largest  # one linear, and that before it


def refusal(source: Path, to: str, save_path: Path, **options: Any) -> str:
    """What is said, once it is sure that nothing was left."""
    with pytest.raises(CapabilityError) as caught:
        convert(source, save_path, to, **options)
    assert not list(save_path.parent.iterdir())
    return str(caught.value)


def test_refuses_scales_that_would_be_rounded(made: Make, tmp_path: Path) -> None:
    text = refusal(made("static", ASCEND), COMPRESSED, tmp_path / "out")
    # Three kinds of linears in two layers make one message.
    assert text.count("weight scales are no bfloat16 numbers") == 1
    assert f"{QUERY} and 13 more" in text
    assert "of 64, rounded by up to 0.00" in text


def test_rounds_scales_when_asked(made: Make, tmp_path: Path) -> None:
    source = made("static", ASCEND)
    report = convert(source, tmp_path / "out", COMPRESSED, round_scales=True)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    exact = before[f"{QUERY}.deq_scale"] / before[f"{QUERY}.input_scale"]
    assert torch.equal(after[f"{QUERY}.weight_scale"].view(-1), exact.bfloat16())
    assert torch.equal(after[f"{QUERY}.weight"], before[f"{QUERY}.weight"])
    assert any(re.search(r"rounded .* by up to 0\.[1-3]\d%", warning) for warning in report["warnings"])


def test_refuses_a_bias_that_only_quant_bias_holds(made: Make, tmp_path: Path) -> None:
    def fold(tensors: dict[str, Tensor], types: dict[str, Any]) -> None:
        tensors[f"{QUERY}.quant_bias"][3] += 1

    source = change(made("static", ASCEND), tmp_path / "source", fold)
    save_path = tmp_path / "place" / "out"
    save_path.parent.mkdir()
    text = refusal(source, "float", save_path)
    assert f"{QUERY}: quant_bias is not what the linear's other tensors give (1 of 64 values differ)" in text


def test_scales_that_another_tool_stored_in_more_bits(made: Make, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(made("w4a16", GPTQ), source)
    tensors = tensors_of(source)
    name = f"{QUERY}.scales"
    tensors[name] = tensors[name].half() * 1.001
    for file in source.glob("model*"):
        file.unlink()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CapabilityError) as caught:
        convert(source, tmp_path / "out", COMPRESSED)
    (told,) = caught.value.diagnostics
    assert told.message.startswith(f"{QUERY}: its weight scales are no bfloat16 numbers")
    convert(source, tmp_path / "out", "float")
    words = tensors[f"{QUERY}.qweight"]
    codes = torch.stack([words >> 4 * place & 15 for place in range(8)], 1).flatten(0, 1).double() - 8
    exact = (codes * tensors[name].double().repeat_interleave(32, 0)).t()
    assert torch.equal(tensors_of(tmp_path / "out")[f"{QUERY}.weight"], exact.float().bfloat16())


def test_refuses_what_the_format_or_the_engine_has_not(made: Make, tmp_path: Path) -> None:
    text = refusal(made("dynamic", ASCEND), GPTQ, tmp_path / "out")
    assert f"GPTQ has no int8 activations ({QUERY} and 13 more)" in text
    text = refusal(made("w4a16", COMPRESSED), ASCEND, tmp_path / "out", engine="vllm-ascend")
    assert "W4A16" in text and "[vllm-ascend" in text


def test_packed_int4_to_float(made: Make, biased: Path, tmp_path: Path) -> None:
    source = made("w4a16", COMPRESSED)
    convert(source, tmp_path / "out", "float")
    stored, result, origin = tensors_of(source), tensors_of(tmp_path / "out"), tensors_of(biased)
    assert {name: (one.dtype, one.shape) for name, one in result.items()} == {
        name: (one.dtype, one.shape) for name, one in origin.items()
    }
    words = stored[f"{QUERY}.weight_packed"]
    codes = torch.stack([words >> 4 * place & 15 for place in range(8)], -1).flatten(1).double() - 8
    exact = codes * stored[f"{QUERY}.weight_scale"].double().repeat_interleave(32, 1)
    assert torch.equal(result[f"{QUERY}.weight"], exact.float().bfloat16())
    assert torch.equal(result[f"{QUERY}.bias"], origin[f"{QUERY}.bias"])
    config, before = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", biased))
    assert config == before


def change(source: Path, path: Path, edit: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """A copy of an ascendv1 checkpoint in which tensors and description are not what they were."""
    shutil.copytree(source, path)
    (file,) = path.glob("*.safetensors")
    index, description = path / f"{INDEX}.index.json", path / "quant_model_description.json"
    tensors, types = tensors_of(path), json.loads(description.read_text())
    edit(tensors, types)
    file.unlink()
    index.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    description.write_text(json.dumps(types))
    return path


def test_caches_and_multipliers(made: Make, biased: Path, tmp_path: Path) -> None:
    """What only some formats have a place for is kept there, refused elsewhere, and leaves a float model."""
    generator = torch.Generator().manual_seed(0)
    multiplier = torch.rand(64, generator=generator) + 0.5

    def add(tensors: dict[str, Tensor], types: dict[str, Any]) -> None:
        for layer in range(2):
            for name in ("k_proj", "v_proj"):
                cache = f"model.layers.{layer}.self_attn.{name}.kv_cache"
                tensors[f"{cache}_scale"] = (torch.rand(32, generator=generator) / 64).bfloat16().float()
                tensors[f"{cache}_offset"] = torch.randint(-9, 9, (32,), generator=generator).float()
                types |= {f"{cache}_scale": "C8", f"{cache}_offset": "C8"}
        types |= {"kv_cache_type": "C8", "kv_quant_type": "C8"}
        for name in [name for name in tensors if name.startswith(f"{DOWN}.")]:
            inner = name.replace(DOWN, f"{DOWN}.linear")
            tensors[inner], types[inner] = tensors.pop(name), types.pop(name)
        tensors[f"{DOWN}.div.mul_scale"], types[f"{DOWN}.div.mul_scale"] = multiplier.repeat(2), "FLOAT"

    source = change(made("dynamic", ASCEND), tmp_path / "source", add)
    convert(source, tmp_path / "same", ASCEND)
    assert_same(source, tmp_path / "same")
    with pytest.raises(CapabilityError) as caught:
        convert(source, tmp_path / "out", GPTQ)
    assert f"{DOWN}: its input is multiplied, and the format has no place for that" in str(caught.value)
    assert "k_proj and 3 more: it fills a quantized key/value cache, which the format has no place" in str(caught.value)
    report = convert(source, tmp_path / "float", "float")
    assert report["warnings"] == ["the scales of 4 key/value caches are left out: the cache becomes float"]
    stored, result = tensors_of(source), tensors_of(tmp_path / "float")
    assert sorted(result) == sorted(tensors_of(biased))
    exact = stored[f"{DOWN}.linear.weight"].double() * stored[f"{DOWN}.linear.weight_scale"].double()
    torch.testing.assert_close(
        result[f"{DOWN}.weight"].double(), exact * multiplier.repeat(2).double(), rtol=2**-8, atol=0
    )


def test_float8_caches(biased: Path, calibration_file: Path, protocol: Callable[[str], Path], tmp_path: Path) -> None:
    cache = "    - type: dynamic_cache\n      qconfig: {scope: per_tensor, dtype: fp8_e4m3, symmetric: true}\n"
    head, tail = (
        f"apiversion: modelslim_v1\nspec:\n  process:\n{SCHEMES['dynamic'][0]}{cache}",
        f"  dataset: {calibration_file}\n",
    )
    quantize(biased, tmp_path / "source", protocol(f"{head}  save: [{{type: {COMPRESSED}}}]\n{tail}"), device="cpu")
    convert(tmp_path / "source", tmp_path / "same", COMPRESSED)
    assert_same(tmp_path / "source", tmp_path / "same")
    with pytest.raises(CapabilityError, match="ascendv1 has no type for fp8_e4m3 caches"):
        convert(tmp_path / "source", tmp_path / "out", ASCEND)


@pytest.fixture(scope="session")
def float8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deepseek_v3 of one layer whose linears are stored in float8 blocks that do not divide their sizes."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    path = tmp_path_factory.mktemp("float8")
    config = DeepseekV3Config(
        vocab_size=64,
        hidden_size=40,
        intermediate_size=56,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(config).bfloat16().save_pretrained(path)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if name.endswith("proj.weight"):
            rows, columns = (-(-size // 16) for size in tensor.shape)
            tensors[name] = (tensor.float() * 900).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.rand(rows, columns) / 900 + 1e-4
        else:
            tensors[name] = tensor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((path / "config.json").read_text())
    written["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16], "fmt": "e4m3"}
    (path / "config.json").write_text(json.dumps(written))
    return path


def test_float8_blocks_to_float(float8: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    report = convert(float8, tmp_path / "out", "float")
    stored, result = tensors_of(float8), tensors_of(tmp_path / "out")
    weights = [name for name in stored if f"{name}_scale_inv" in stored]
    assert len(weights) > 20 and report["decoded"] == len(weights)
    for name in weights:
        scale = stored[f"{name}_scale_inv"].repeat_interleave(16, 0).repeat_interleave(16, 1)
        rows, columns = stored[name].shape
        assert torch.equal(result[name], (stored[name].float() * scale[:rows, :columns]).bfloat16()), name
    copied = set(stored) - set(weights) - {f"{name}_scale_inv" for name in weights}
    assert set(result) == copied | set(weights)
    assert all(torch.equal(result[name], stored[name]) for name in copied)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    name = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(model.get_parameter(name), result[name])


def test_says_what_cannot_be_converted(biased: Path, float8: Path, made: Make, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no quantized checkpoint that something installed reads"):
        convert(biased, tmp_path / "out", COMPRESSED)
    with pytest.raises(UsageError, match="--to float"):
        convert(float8, tmp_path / "out", COMPRESSED)
    with pytest.raises(UsageError, match="did you mean 'ascendv1_saver'"):
        convert(made("dynamic", ASCEND), tmp_path / "out", "ascendv1")
    with pytest.raises(UsageError, match="--engine"):
        convert(float8, tmp_path / "out", "float", engine="vllm")
