# SPDX-License-Identifier: Apache-2.0
"""Warnings: what the format can hold and an engine does not run, by the versions that were tried."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from modelslim.api import PlannedLinear, PlannedModel, Problem, QuantSpec, fusions, listed
from modelslim_compressed_tensors.formats import format_of
from modelslim_compressed_tensors.scales import HELD

TRANSFORMERS = "transformers (5.23 with compressed-tensors 0.20)"
VLLM = "vLLM (0.32)"

_STACKED_EXPERTS = ".experts.gate_up_proj"


def find_warnings(
    linears: Sequence[PlannedLinear], storable: Sequence[PlannedLinear], model: PlannedModel
) -> Iterator[Problem]:
    """All warnings.

    Args:
        linears: all linears of the model.
        storable: those whose scheme the format can hold.
        model: the planned model.
    """
    yield from _zero_points(storable)
    yield from _w4a8(storable)
    yield from _fused_blocks(storable)
    yield from _bfloat16_only(storable, model)
    if storable:
        yield from _fused_experts(linears, model)


def _zero_points(linears: Iterable[PlannedLinear]) -> Iterator[Problem]:
    schemes: dict[str, list[PlannedLinear]] = defaultdict(list)
    for linear in linears:
        assert linear.spec is not None
        if not linear.spec.weight.symmetric:
            schemes[linear.spec.scheme].append(linear)
    for scheme, members in schemes.items():
        yield Problem(
            f"{TRANSFORMERS} expects the zero points of asymmetric {scheme} in another shape than the one in which "
            f"it reads them, and stops with an error; {listed(members)}",
            hint="serve it with vLLM, load it with CompressedTensorsConfig(dequantize=True), or use symmetric: true "
            "for the weight",
            linear=members[0].info.name,
            fatal=False,
        )


def _w4a8(linears: Iterable[PlannedLinear]) -> Iterator[Problem]:
    members = [linear for linear in linears if linear.spec is not None and linear.spec.scheme == "W4A8_DYNAMIC"]
    if members:
        yield Problem(
            f"{VLLM} runs W4A8_DYNAMIC on CPUs only, experts on Arm alone ({listed(members)})",
            hint="see whether your engine has it; W8A8_DYNAMIC and W4A16 run everywhere",
            linear=members[0].info.name,
            fatal=False,
        )


def _fused_blocks(linears: Iterable[PlannedLinear]) -> Iterator[Problem]:
    blocks = [linear for linear in linears if linear.spec is not None and linear.spec.weight.group_rows > 1]
    short = [
        member
        for _, members in fusions(blocks)
        for member in members
        if member.spec is not None and member.info.out_features % member.spec.weight.group_rows
    ]
    if short:
        yield Problem(
            f"{VLLM} fuses linears of float8 blocks only when each has whole blocks of outputs, which "
            f"{short[0].info.out_features} are not; it will not load {listed(short)}",
            hint="use scope per_channel for the weight of these and of those fused with them",
            linear=short[0].info.name,
            fatal=False,
        )


def _bfloat16_only(linears: Iterable[PlannedLinear], model: PlannedModel) -> Iterator[Problem]:
    members = [linear for linear in linears if linear.spec is not None and format_of(linear.spec).scales is not HELD]
    if members and model.dtype != "bfloat16":
        dtypes = sorted({linear.spec.weight.dtype for linear in members if linear.spec is not None})
        yield Problem(
            f"{TRANSFORMERS} makes bfloat16 weights of {' and '.join(dtypes)} whatever the model is, and stops "
            f"in a model of {model.dtype} ({listed(members)})",
            hint="serve the result with vLLM, or set dtype to bfloat16 in config.json of the source",
            linear=members[0].info.name,
            fatal=False,
        )


def _fused_experts(linears: Iterable[PlannedLinear], model: PlannedModel) -> Iterator[Problem]:
    """What transformers does with experts that it holds in one weight per layer, and that are stored one by one."""
    stacked = {name.rpartition(".")[0] for name in model.tensors if name.endswith(_STACKED_EXPERTS)}
    experts = [linear for linear in linears if linear.info.bank]
    quantized = [linear for linear in experts if linear.spec is not None]
    apart = [linear for linear in quantized if linear.moe not in stacked]
    yield from _of_experts(
        [linear for linear in quantized if linear.moe in stacked],
        "knows the experts of this model as one tensor per layer only: it passes over quantized ones and leaves random "
        "weights in their place, without an error",
    )
    yield from _of_experts(
        [linear for linear in apart if linear.spec is not None and linear.spec.weight.dtype == "nvfp4"],
        "reads experts of nvfp4 without the scale of the whole weight: it computes nonsense, without an error",
    )
    yield from _of_experts(
        [linear for linear in apart if linear.spec is not None and _stops_at(linear.spec)],
        "loads experts whose weights alone are quantized, to symmetric integers, fp8_e4m3 per_channel or mxfp4; it "
        "stops with an error at others",
    )
    if any(spec.weight.element != "e4m3" for spec in model.specs.values()):
        yield from _of_experts(
            [linear for linear in experts if linear.spec is None and linear.moe not in stacked],
            "loads float experts only beside linears of float8; it stops with an error at these",
        )


def _of_experts(members: Sequence[PlannedLinear], does: str) -> Iterator[Problem]:
    if members:
        yield Problem(
            f"{TRANSFORMERS} {does} ({listed(members)})",
            hint="serve the result with vLLM, or give the experts another scheme",
            linear=members[0].info.name if members[0].spec is not None else None,
            fatal=False,
        )


def _stops_at(spec: QuantSpec) -> bool:
    weight = spec.weight
    if weight.is_integer:
        return spec.activation.is_integer or not weight.symmetric
    # Inputs of floating experts are not rounded, whatever the scheme says.
    return weight.dtype == "mxfp8" or (weight.dtype == "fp8_e4m3" and weight.scope != "per_channel")
