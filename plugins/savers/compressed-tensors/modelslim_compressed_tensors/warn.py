# SPDX-License-Identifier: Apache-2.0
"""Warnings: what the format can hold and one of its engines does not run, by the versions that were tried or read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from modelslim.api import PlannedModel, Problem
from modelslim_compressed_tensors.formats import format_of
from modelslim_compressed_tensors.planned import Linear, listed
from modelslim_compressed_tensors.scales import HELD

TRANSFORMERS = "transformers (5.23 with compressed-tensors 0.20)"
VLLM = "vLLM (0.32)"

_STACKED_EXPERTS = ".experts.gate_up_proj"


def find_warnings(linears: Sequence[Linear], storable: Sequence[Linear], model: PlannedModel) -> Iterator[Problem]:
    """All warnings.

    Args:
        linears: all linears of the model.
        storable: those whose scheme the format can hold.
        model: the planned model.
    """
    yield from _zero_points(storable)
    yield from _w4a8(storable)
    yield from _bfloat16_only(storable, model)
    yield from _static_experts(storable)
    if storable:
        yield from _fused_experts(linears, model)


def _zero_points(linears: Iterable[Linear]) -> Iterator[Problem]:
    schemes: dict[str, list[Linear]] = defaultdict(list)
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


def _w4a8(linears: Iterable[Linear]) -> Iterator[Problem]:
    members = [linear for linear in linears if linear.spec is not None and linear.spec.scheme == "W4A8_DYNAMIC"]
    if members:
        yield Problem(
            f"{VLLM} runs W4A8_DYNAMIC on CPUs only, experts on Arm alone ({listed(members)})",
            hint="see whether your engine has it; W8A8_DYNAMIC and W4A16 run everywhere",
            linear=members[0].info.name,
            fatal=False,
        )


def _bfloat16_only(linears: Iterable[Linear], model: PlannedModel) -> Iterator[Problem]:
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


def _static_experts(linears: Iterable[Linear]) -> Iterator[Problem]:
    members = [linear for linear in linears if linear.moe and linear.spec is not None and linear.spec.is_static]
    if members:
        yield Problem(
            f"{VLLM} runs no experts with static activations; it will not load {listed(members)}",
            hint="use scope per_token for the activation, or leave it float",
            linear=members[0].info.name,
            fatal=False,
        )


def _fused_experts(linears: Iterable[Linear], model: PlannedModel) -> Iterator[Problem]:
    """What transformers does with experts that it holds in one weight per layer, and that are stored one by one."""
    stacked = {name.rpartition(".")[0] for name in model.tensors if name.endswith(_STACKED_EXPERTS)}
    experts = [linear for linear in linears if linear.info.bank]
    at_random = [linear for linear in experts if linear.spec is not None and linear.moe in stacked]
    if at_random:
        yield Problem(
            f"{TRANSFORMERS} knows the experts of this model as one tensor per layer only: it passes over quantized "
            f"ones and leaves random weights in their place, without an error ({listed(at_random)})",
            hint="serve the result with vLLM, or leave the experts in float",
            linear=at_random[0].info.name,
            fatal=False,
        )
    refused = [linear for linear in experts if linear.moe not in stacked and not _is_packed(linear)]
    if refused:
        quantized = [linear for linear in refused if linear.spec is not None]
        how = "quantized in another way" if quantized else "left in float"
        yield Problem(
            f"{TRANSFORMERS} loads experts of a quantized model only when their weights alone are quantized, and "
            f"symmetric; it stops with an error at those {how} ({listed(quantized or refused)})",
            hint="serve the result with vLLM, or give the experts such a scheme",
            linear=quantized[0].info.name if quantized else None,
            fatal=False,
        )


def _is_packed(linear: Linear) -> bool:
    """True for an expert that transformers can take apart."""
    return linear.spec is not None and linear.spec.activation.is_float and linear.spec.weight.symmetric
