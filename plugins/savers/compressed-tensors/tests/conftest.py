# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints and their quantized forms, made once, and planned models, for all tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported: tests run on tiny tensors, for which more threads only cost time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from modelslim.api import FLOAT, LinearInfo, PlannedModel, QuantSpec, TensorSpec
from modelslim.run import quantize

TEXTS = ("the river rose in the night and by morning the fields were under water", "seven boats and nine oars")
LETTERS = "abcdefghijklmnopqrstuvwxyzĠ"  # the last one is how byte-level tokenizers write a space

Source = Callable[..., Path]
Result = Callable[..., Path]


def grouped(dtype: str, symmetric: bool = True) -> TensorSpec:
    return TensorSpec(dtype, "per_group", symmetric, 32)


def block(dtype: str, size: int) -> TensorSpec:
    return TensorSpec(dtype, "per_block", group_size=size)


INT8 = TensorSpec("int8", "per_channel")
TOKEN = TensorSpec("int8", "per_token")
SPECS: Mapping[str, QuantSpec] = {
    "static": QuantSpec(INT8, TensorSpec("int8", "per_tensor")),
    "static-asymmetric": QuantSpec(INT8, TensorSpec("int8", "per_tensor", symmetric=False)),
    "dynamic": QuantSpec(INT8, TOKEN),
    "dynamic-asymmetric": QuantSpec(INT8, TensorSpec("int8", "per_token", symmetric=False)),
    "w4a8": QuantSpec(TensorSpec("int4", "per_channel"), TOKEN),
    "w4a8-group": QuantSpec(grouped("int4"), TOKEN),
    "w4a8-float8": QuantSpec(grouped("int4"), TensorSpec("fp8_e4m3", "per_token")),
    "w8a16": QuantSpec(INT8, FLOAT),
    "w8a16-asymmetric": QuantSpec(TensorSpec("int8", "per_channel", symmetric=False), FLOAT),
    "w8a16-group": QuantSpec(grouped("int8"), FLOAT),
    "w4a16": QuantSpec(TensorSpec("int4", "per_channel"), FLOAT),
    "w4a16-asymmetric": QuantSpec(TensorSpec("int4", "per_channel", symmetric=False), FLOAT),
    "w4a16-group": QuantSpec(grouped("int4"), FLOAT),
    "w4a16-group-asymmetric": QuantSpec(grouped("int4", symmetric=False), FLOAT),
    "w3a16": QuantSpec(TensorSpec("int3", "per_channel"), FLOAT),
    "w3a16-group-asymmetric": QuantSpec(grouped("int3", symmetric=False), FLOAT),
    "w2a16-group": QuantSpec(grouped("int2"), FLOAT),
    "fp8": QuantSpec(TensorSpec("fp8_e4m3", "per_channel"), TensorSpec("fp8_e4m3", "per_token")),
    "fp8-static": QuantSpec(TensorSpec("fp8_e4m3", "per_channel"), TensorSpec("fp8_e4m3", "per_tensor")),
    "fp8-block": QuantSpec(
        TensorSpec("fp8_e4m3", "per_block", group_size=128, group_rows=128),
        block("fp8_e4m3", 128),
    ),
    "fp8-weight": QuantSpec(TensorSpec("fp8_e4m3", "per_channel"), FLOAT),
    "mxfp8": QuantSpec(block("mxfp8", 32), block("mxfp8", 32)),
    "mxfp8-weight": QuantSpec(block("mxfp8", 32), FLOAT),
    "mxfp4": QuantSpec(block("mxfp4", 32), block("mxfp4", 32)),
    "mxfp4-weight": QuantSpec(block("mxfp4", 32), FLOAT),
    "nvfp4": QuantSpec(block("nvfp4", 16), block("nvfp4", 16)),
    "nvfp4-weight": QuantSpec(block("nvfp4", 16), FLOAT),
}
"""Every kind of scheme that the format has, under a name for the test's id."""


def leaf(spec: TensorSpec) -> dict[str, Any]:
    """An operand as a protocol describes it."""
    if spec.is_float:
        return {"dtype": "float", "scope": "per_tensor", "symmetric": True, "method": "none"}
    described = {"dtype": spec.dtype, "scope": spec.scope, "symmetric": spec.symmetric, "method": "minmax"}
    return {**described, "group_size": spec.group_size} if spec.scope == "per_group" else described


def entry(name: str, include: Iterable[str] = ("*",), exclude: Iterable[str] = ()) -> dict[str, Any]:
    """An entry of ``process`` that gives linears one of ``SPECS``."""
    spec = SPECS[name]
    qconfig = {"weight": leaf(spec.weight), "act": leaf(spec.activation)}
    return {"type": "linear_quant", "qconfig": qconfig, "include": list(include), "exclude": list(exclude)}


def plan(
    specs: Mapping[str, QuantSpec | None],
    *,
    tensors: tuple[str, ...] = (),
    config: Mapping[str, Any] | None = None,
    matrices: Iterable[str] = (),
    stored: Mapping[str, str] | None = None,
    biased: Iterable[str] = (),
    shapes: Mapping[str, tuple[int, int]] | None = None,
) -> PlannedModel:
    """A planned model with these linears (None: float), 64 x 64, in layers unless their names have no number."""
    linears = {}
    for name in specs:
        unit = name.rpartition(".")[0] if any(part.isdigit() for part in name.split(".")) else ""
        rows, columns = (shapes or {}).get(name, (64, 64))
        linears[name] = LinearInfo(
            name, (stored or {}).get(name, name), unit, rows, columns, name in biased, "bfloat16"
        )
    return PlannedModel(
        config or {},
        "bfloat16",
        linears,
        {name: spec for name, spec in specs.items() if spec is not None},
        frozenset({*tensors, *(f"{linear.stored}.weight" for linear in linears.values())}),
        frozenset(biased),
        frozenset(matrices),
    )


@pytest.fixture(params=SPECS)
def scheme(request: pytest.FixtureRequest) -> str:
    """Name of each scheme that the format has."""
    return str(request.param)


@pytest.fixture(params=[name for name, spec in SPECS.items() if spec.weight.dtype[:3] in ("int", "fp8")])
def plain_scheme(request: pytest.FixtureRequest) -> str:
    """Name of each scheme whose scales have the dtype of the model."""
    return str(request.param)


@pytest.fixture
def specs() -> Mapping[str, QuantSpec]:
    """Every scheme that the format has, by name."""
    return SPECS


@pytest.fixture
def planned() -> Callable[..., PlannedModel]:
    """``plan``."""
    return plan


@pytest.fixture
def process() -> Callable[..., dict[str, Any]]:
    """``entry``."""
    return entry


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    """No progress bars and no reports of loading."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level tokenizer of letters and the space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(("<s>", "</s>", *LETTERS))}
    made = Tokenizer(models.BPE(vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Source:
    """``source("llama" | "qwen3_moe", dtype)`` -> a random checkpoint, made once; leave it alone."""
    made: dict[tuple[str, str, bool], Path] = {}

    def make(kind: str = "llama", dtype: str = "float32", tied: bool = False) -> Path:
        key = (kind, dtype, tied)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(kind)
            write_checkpoint(made[key], kind, dtype, tied)
            tokenizer.save_pretrained(made[key])
        return made[key]

    return make


def write_checkpoint(path: Path, kind: str, dtype: str, tied: bool) -> None:
    """A model with biases in which no norm is 1 and no bias is 0, in several files with an index."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    settings: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "attention_bias": True,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if "moe" in kind:
        settings |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    auto_class = AutoModelForCausalLM
    if "vl" in kind:
        auto_class = AutoModelForImageTextToText
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 128}
        settings = {"text_config": settings, "vision_config": {**vision, "deepstack_visual_indexes": [0]}}
    torch.manual_seed(0)
    model = auto_class.from_config(CONFIG_MAPPING[kind](**settings), dtype=getattr(torch, dtype))
    for name, tensor in model.named_parameters():
        if tensor.dim() == 1:
            tensor.data.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(path, max_shard_size="100KB")


@pytest.fixture(scope="session")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """``result(source, entry, ...)`` -> the quantized checkpoint, made once for equal arguments; leave it alone."""
    made: dict[str, Path] = {}

    def make(model: Path, *entries: Mapping[str, Any], part_file_size: float = 4) -> Path:
        key = json.dumps([str(model), entries, part_file_size])
        if key not in made:
            folder = tmp_path_factory.mktemp("result")
            (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
            spec = {
                "process": entries,
                "save": [{"type": "compressed_tensors_saver", "part_file_size": part_file_size}],
                "dataset": str(folder / "data.jsonl"),
            }
            (folder / "protocol.yaml").write_text(json.dumps({"apiversion": "modelslim_v1", "spec": spec}))
            quantize(model, folder / "out", folder / "protocol.yaml", device="cpu")
            made[key] = folder / "out"
        return made[key]

    return make
