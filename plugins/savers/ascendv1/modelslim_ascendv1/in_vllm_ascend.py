# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's own scheme classes make the parameters of every linear, which are compared with what is stored."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from modelslim.api import EngineAnswer, PlannedLinear, PlannedModel, Problem, listed, planned_linears
from modelslim_ascendv1.layout import DESCRIPTION, is_row_parallel

NOT_LOADED: Mapping[str, frozenset[str]] = {
    "W8A8": frozenset({"weight_scale", "weight_offset"}),
    "W4A16": frozenset({"weight_offset"}),
}
"""Parameters that a class makes and need not find: not used, or zero when a weight is symmetric."""

STACKS: Mapping[str, tuple[str, ...]] = {"w13": ("gate_proj", "up_proj", "w1", "w3"), "w2": ("down_proj", "w2")}
"""Linears of an expert, by the parameter that the engine makes of those of all experts."""

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_HINT = "it would stop while it loads; quantize again with --engine vllm-ascend"
_APART = ("weight_shape",)  # of one linear, so that those of gate and up are no halves of a parameter

Parameters = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape by the last part of the name."""


def ask_vllm_ascend(path: Path, model: PlannedModel, tensors: Mapping[str, Tensor]) -> EngineAnswer:
    """What the scheme classes of vllm-ascend make of the linears of a checkpoint.

    Args:
        path: the directory, for the description file.
        model: the model as it was read from the checkpoint.
        tensors: every tensor on meta, by name.
    """
    try:
        import vllm
        from vllm_ascend.quantization.methods.registry import get_scheme_class
    except ImportError as error:
        return EngineAnswer(reason=f"vllm_ascend cannot be imported: {error}")
    asked = f"vllm-ascend {version('vllm-ascend')} with vllm {vllm.__version__}"
    description = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
    problems: list[Problem] = []
    unasked: dict[str, str] = {}
    for (type_, place), linears in _by_type(model).items():
        kind = get_scheme_class(type_, place)
        if kind is None:
            message = f"{asked} has no class for {type_} of {_WORDS[place]}; it will not load {listed(linears)}"
            problems.append(Problem(message, _HINT, linear=linears[0].info.name))
            continue
        with _surroundings(kind, description):
            try:
                scheme = kind()
                made = [_parameters(scheme, linear, model, place) for linear in linears]
            except Exception as error:  # it may want a device, or what only a running engine has
                unasked[f"{type_} of {_WORDS[place]}"] = f"{type(error).__name__}: {error}"
                continue
        for linear, parameters in zip(linears, made, strict=True):
            problems += _compare(asked, linear, parameters, tensors, NOT_LOADED.get(type_, frozenset()))
    others = [one for one in planned_linears(model) if one.spec is not None and one.info.has_multiplier]
    if others:
        unasked[f"linears whose input is multiplied, such as {others[0].info.name}"] = "they are made by the model"
    reason = "; ".join(f"{what} ({why})" for what, why in unasked.items())
    return EngineAnswer(asked if len(unasked) < len(_by_type(model)) else "", problems, reason)


_WORDS = {"linear": "dense linears", "moe": "experts"}


def _by_type(model: PlannedModel) -> Mapping[tuple[str, str], list[PlannedLinear]]:
    """The quantized linears by type, and by kind of layer in the engine's words."""
    groups: dict[tuple[str, str], list[PlannedLinear]] = defaultdict(list)
    for linear in planned_linears(model):
        if linear.spec is not None and not linear.info.has_multiplier:
            groups[linear.spec.scheme, "moe" if linear.moe else "linear"].append(linear)
    return groups


def _parameters(scheme: Any, linear: PlannedLinear, model: PlannedModel, place: str) -> Parameters | str:
    """What a linear becomes in the engine on one rank; or why it cannot."""
    dtype: torch.dtype = getattr(torch, model.dtype)
    rows, columns = linear.info.out_features, linear.info.in_features
    try:
        with torch.device("meta"):
            if place == "moe":
                inner, outer = (columns, rows) if linear.last in STACKS["w2"] else (rows, columns)
                return _of_expert(linear, {
                    **scheme.get_weight(1, inner, outer, dtype),
                    **scheme.get_dynamic_quant_param(1, inner, outer, dtype),
                })  # fmt: skip
            layer = "row" if is_row_parallel(linear.info.stored) else "others"
            made = {
                **scheme.get_weight(columns, rows, dtype),
                **scheme.get_pertensor_param(dtype, layer_type=layer),
                **scheme.get_perchannel_param(rows, dtype),
                **scheme.get_pergroup_param(columns, rows, dtype, layer_type=layer),
            }
    except (ArithmeticError, AssertionError, NotImplementedError, ValueError) as error:
        return str(error)
    return {name: (one.dtype, tuple(one.shape)) for name, one in made.items() if isinstance(one, Tensor)}


def _of_expert(linear: PlannedLinear, made: Mapping[str, Any]) -> Parameters:
    """One linear's part of the parameters of a layer with one expert."""
    stack = next(name for name, lasts in STACKS.items() if linear.last in lasts)
    found = {}
    for name, one in made.items():
        start, _, part = name.partition("_")
        if start == stack and isinstance(one, Tensor):
            shape = tuple(one.shape[1:])
            halved = stack == "w13" and part not in _APART
            found[part] = one.dtype, (shape[0] // 2, *shape[1:]) if halved else shape
    return found


def _compare(
    asked: str,
    linear: PlannedLinear,
    made: Parameters | str,
    tensors: Mapping[str, Tensor],
    not_loaded: Iterable[str],
) -> Iterator[Problem]:
    stored = linear.info.stored

    def problem(message: str) -> Problem:
        return Problem(f"{asked} {message}", _HINT, linear=linear.info.name)

    if isinstance(made, str):
        yield problem(f"cannot make {stored}: {made}")
        return
    held = {name.removeprefix(f"{stored}."): one for name, one in tensors.items() if name.startswith(f"{stored}.")}
    for part in sorted(held.keys() - made.keys() - {"bias"}):  # biases belong to the model, not to the scheme
        if "." not in part and not part.startswith("kv_cache_"):
            yield problem(f"has no place for {stored}.{part}")
    for part, (dtype, shape) in made.items():
        if part not in held:
            if part not in not_loaded:
                yield problem(f"wants {stored}.{part}, which is missing")
        elif tuple(held[part].shape) != shape:
            yield problem(f"wants {stored}.{part} in the shape {list(shape)}, and it is {list(held[part].shape)}")
        elif not _fits(part, held[part].dtype, dtype):
            names = [str(one).removeprefix("torch.") for one in (dtype, held[part].dtype)]
            yield problem(f"wants {stored}.{part} in {names[0]}, and it is {names[1]}")


def _fits(part: str, stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether the loader, which copies into any dtype without a word, loses nothing that counts."""
    kinds = [torch.float32 if one.is_floating_point and one not in _FLOAT8 else one for one in (stored, wanted)]
    # The offset of inputs is an integer in the engine, and a float that holds an integer on the disk.
    return kinds[0] == kinds[1] or (part == "input_offset" and kinds == [torch.float32, torch.int8])


@contextmanager
def _surroundings(kind: type, description: Mapping[str, Any]) -> Iterator[None]:
    """What a scheme class asks of the engine around it when it is made, without an engine that runs."""
    config = SimpleNamespace(
        quant_config=SimpleNamespace(quant_description=description),
        parallel_config=SimpleNamespace(enable_expert_parallel=False),
        compilation_config=SimpleNamespace(mode=None),
        model_config=SimpleNamespace(enforce_eager=True, dtype=None),
        kv_transfer_config=None,
    )
    ascend = SimpleNamespace(eplb_config=SimpleNamespace(dynamic_eplb=False), multistream_overlap_gate=False)
    answers = {
        "get_current_vllm_config": config,
        "get_ascend_config": ascend,
        "get_tensor_model_parallel_world_size": 1,
        "get_ep_group": SimpleNamespace(),
        "get_mc2_group": SimpleNamespace(),
    }
    modules = {sys.modules[one.__module__] for one in kind.__mro__}
    with ExitStack() as stack:
        for module in modules:
            for name, answer in answers.items():
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, lambda answer=answer: answer))
        yield
