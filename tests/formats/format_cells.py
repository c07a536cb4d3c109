# SPDX-License-Identifier: Apache-2.0
"""What becomes of each scheme in each format and engine: asked of the savers and the contracts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from format_evidence import EVIDENCE

from modelslim.engine_rules import Target, check_model, find_problems
from modelslim.engines import Contract, read_contracts
from modelslim.registry import Registry
from modelslim.saver import PlannedModel, Saver
from modelslim.types import FLOAT, LinearInfo, QuantSpec, TensorSpec

INT8, INT4 = TensorSpec("int8", "per_channel"), TensorSpec("int4", "per_channel")
GROUPED = replace(INT4, scope="per_group", group_size=32)
TOKEN, STATIC = TensorSpec("int8", "per_token"), TensorSpec("int8", "per_tensor")
FP8, FP8_TOKEN = TensorSpec("fp8_e4m3", "per_channel"), TensorSpec("fp8_e4m3", "per_token")
MXFP8, MXFP4 = (TensorSpec(dtype, "per_block", group_size=32) for dtype in ("mxfp8", "mxfp4"))
NVFP4 = TensorSpec("nvfp4", "per_block", group_size=16)

SPECS: Mapping[str, QuantSpec] = {
    "W8A8": QuantSpec(INT8, STATIC),
    "W8A8 asymmetric input": QuantSpec(INT8, replace(STATIC, symmetric=False)),
    "W8A8_DYNAMIC": QuantSpec(INT8, TOKEN),
    "W8A8_MIX": QuantSpec(INT8, TensorSpec("int8", "pd_mix", symmetric=False)),
    "W8A16": QuantSpec(INT8, FLOAT),
    "W8A16 asymmetric": QuantSpec(replace(INT8, symmetric=False), FLOAT),
    "W8A16 grouped": QuantSpec(replace(GROUPED, dtype="int8"), FLOAT),
    "W4A8_DYNAMIC": QuantSpec(INT4, TOKEN),
    "W4A8_DYNAMIC grouped": QuantSpec(GROUPED, TOKEN),
    "W4A4_DYNAMIC": QuantSpec(INT4, TensorSpec("int4", "per_token")),
    "W4A16": QuantSpec(INT4, FLOAT),
    "W4A16 asymmetric": QuantSpec(replace(INT4, symmetric=False), FLOAT),
    "W4A16 grouped": QuantSpec(GROUPED, FLOAT),
    "W4A16 grouped asymmetric": QuantSpec(replace(GROUPED, symmetric=False), FLOAT),
    "W3A16": QuantSpec(TensorSpec("int3", "per_channel"), FLOAT),
    "W2A16 grouped": QuantSpec(replace(GROUPED, dtype="int2"), FLOAT),
    "W8A8FP8": QuantSpec(FP8, TensorSpec("fp8_e4m3", "per_tensor")),
    "W8A8FP8_DYNAMIC": QuantSpec(FP8, FP8_TOKEN),
    "W8A8FP8_DYNAMIC blocks": QuantSpec(
        TensorSpec("fp8_e4m3", "per_block", group_size=128, group_rows=128),
        TensorSpec("fp8_e4m3", "per_block", group_size=128),
    ),
    "W8A16FP8": QuantSpec(FP8, FLOAT),
    "W4A8FP8_DYNAMIC grouped": QuantSpec(GROUPED, FP8_TOKEN),
    "W8A8_MXFP8": QuantSpec(MXFP8, MXFP8),
    "W8A16_MXFP8": QuantSpec(MXFP8, FLOAT),
    "W4A8_MXFP": QuantSpec(MXFP4, MXFP8),
    "W4A4_MXFP4": QuantSpec(MXFP4, MXFP4),
    "W4A16_MXFP4": QuantSpec(MXFP4, FLOAT),
    "W4A4_NVFP4": QuantSpec(NVFP4, NVFP4),
    "W4A16_NVFP4": QuantSpec(NVFP4, FLOAT),
    "W16A16S": QuantSpec(TensorSpec("float", "per_channel", sparse=True), FLOAT),
    "W8A8S": QuantSpec(replace(INT8, sparse=True), replace(STATIC, symmetric=False)),
}
"""Every scheme that linear_quant, float_sparse and lowbit_sparse make, by name; groups of 32."""

PLACES = ("dense", "experts")


def readers(registry: Registry) -> Iterator[tuple[str, Contract]]:
    """Every format with every engine that reads it and of whose schemes something is known."""
    for saver in registry.names("savers"):
        for contract in read_contracts(registry):
            rules = contract.formats.get(saver)
            if rules is not None and rules.schemes is not None:
                yield saver, contract


def planned(spec: QuantSpec, place: str) -> PlannedModel:
    """Linears of one scheme: an MLP, or two experts of a layer."""
    layer = "model.layers.0.mlp"
    parents = [layer] if place == "dense" else [f"{layer}.experts.{number}" for number in range(2)]
    linears = {}
    for parent in parents:
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = f"{parent}.{part}"
            linears[name] = LinearInfo(name, name, "model.layers.0", 256, 256, False, "bfloat16")
    config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    return PlannedModel(
        config, "bfloat16", linears, dict.fromkeys(linears, spec), frozenset(f"{one}.weight" for one in linears)
    )


def refusal(saver: Saver, spec: QuantSpec, place: str) -> str:
    """Why the format cannot hold the scheme; empty when it can."""
    problems = check_model(saver, "the format", None, planned(spec, place))
    return next((problem.message for problem in problems if problem.fatal), "")


def cell(saver_name: str, saver: Saver, contract: Contract, scheme: str, place: str) -> str:
    """``agrees``, ``loads``, ``contract``, ``refused`` or, where the format has no such scheme, a dash."""
    spec = SPECS[scheme]
    if refusal(saver, spec, place):
        return "-"
    problems = find_problems(Target(contract, asked=True), saver_name, planned(spec, place))
    if problems:
        return "refused"
    shown = [one.shows for one in EVIDENCE.get((contract.name, saver_name, place), ()) if scheme in one.schemes]
    return shown[0] if shown else "contract"
