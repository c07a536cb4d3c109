# SPDX-License-Identifier: Apache-2.0
"""Every difference between what an engine's scheme class makes and what is stored is named.

The engine is one of two classes that make what those of vllm-ascend make; tests/engines asks the real ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from modelslim.api import LinearInfo, PlannedModel, QuantSpec, TensorSpec
from modelslim_ascendv1 import in_vllm_ascend
from modelslim_ascendv1.in_vllm_ascend import ask_vllm_ascend
from modelslim_ascendv1.saver import AscendV1Saver

DYNAMIC = QuantSpec(TensorSpec("int8", "per_channel"), TensorSpec("int8", "per_token"))
LINEAR = "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.0.mlp.experts.3"
Tensors = dict[str, Tensor]


def get_ascend_config() -> Any:
    raise RuntimeError("no engine runs")  # as in the engine, unless somebody answers in its place


class Dense:
    """W8A8_DYNAMIC of dense linears."""

    def get_weight(self, inputs: int, outputs: int, dtype: torch.dtype) -> dict[str, Any]:
        assert outputs % 4 == 0, "outputs in fours"
        return {"weight": torch.empty(outputs, inputs, dtype=torch.int8), "_packed_dim": 0}

    def get_pertensor_param(self, dtype: torch.dtype, **_: Any) -> dict[str, Any]:
        return {}

    def get_perchannel_param(self, outputs: int, dtype: torch.dtype) -> dict[str, Any]:
        return {f"weight_{part}": torch.empty(outputs, 1, dtype=dtype) for part in ("scale", "offset")}

    def get_pergroup_param(self, inputs: int, outputs: int, dtype: torch.dtype, **_: Any) -> dict[str, Any]:
        return {}


class Experts:
    """The same of experts."""

    def __init__(self) -> None:
        self.balanced = get_ascend_config().eplb_config.dynamic_eplb

    def get_weight(self, experts: int, inner: int, hidden: int, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "w13_weight": torch.empty(experts, 2 * inner, hidden, dtype=torch.int8),
            "w2_weight": torch.empty(experts, hidden, inner, dtype=torch.int8),
        }

    def get_dynamic_quant_param(self, experts: int, inner: int, hidden: int, dtype: torch.dtype) -> dict[str, Any]:
        sizes = {"w13": 2 * inner, "w2": hidden}
        parts = ("weight_scale", "weight_offset")
        return {f"{stack}_{part}": torch.empty(experts, sizes[stack], 1) for stack in sizes for part in parts}


CLASSES = {("W8A8_DYNAMIC", "linear"): Dense, ("W8A8_DYNAMIC", "moe"): Experts}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vllm-ascend 9.9 with vllm 8.8."""
    registry = SimpleNamespace(get_scheme_class=lambda type_, place: CLASSES.get((type_, place)))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="8.8"))
    for name in ("vllm_ascend", "vllm_ascend.quantization", "vllm_ascend.quantization.methods"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm_ascend.quantization.methods.registry", registry)
    monkeypatch.setattr(in_vllm_ascend, "version", lambda name: "9.9")
    yield


def plan(spec: QuantSpec = DYNAMIC, **sizes: int) -> PlannedModel:
    """A dense linear of 16 x 32, and an expert of 32 inputs and 8 inside."""
    rows = {LINEAR: (16, 32), f"{EXPERT}.gate_proj": (8, 32), f"{EXPERT}.up_proj": (8, 32)}
    rows[f"{EXPERT}.down_proj"] = (32, 8)
    rows = {name: (sizes.get("rows", one[0]), one[1]) for name, one in rows.items()}
    linears = {name: LinearInfo(name, name, "", *one, False, "bfloat16") for name, one in rows.items()}
    return PlannedModel({}, "bfloat16", linears, dict.fromkeys(linears, spec), frozenset())


def stored(model: PlannedModel) -> Tensors:
    """Its tensors on meta, as the saver would write them."""
    found = {}
    for linear in model.linears.values():
        shape = (linear.out_features, linear.in_features)
        found[f"{linear.stored}.weight"] = torch.empty(shape, dtype=torch.int8, device="meta")
        for part in ("scale", "offset"):
            found[f"{linear.stored}.weight_{part}"] = torch.empty(shape[0], 1, device="meta")
    return found


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., Any]:
    """``ask(model, tensors)`` -> the answer of the engine."""
    (tmp_path / "quant_model_description.json").write_text(json.dumps({"group_size": 0}), encoding="utf-8")
    return lambda model, tensors: ask_vllm_ascend(tmp_path, model, tensors)


@pytest.mark.usefixtures("engine")
def test_what_the_classes_make_is_what_is_stored(ask: Callable[..., Any]) -> None:
    answer = ask(plan(), stored(plan()))
    assert (answer.asked, answer.reason, answer.problems) == ("vllm-ascend 9.9 with vllm 8.8", "", [])
    with pytest.raises(RuntimeError, match="no engine runs"):  # what was answered in the engine's place is gone
        get_ascend_config()


def drop(tensors: Tensors, name: str) -> None:
    del tensors[name]


def more(tensors: Tensors, name: str) -> None:
    tensors[f"{name}_second"] = tensors[name]


def turn(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].t()


def widen(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].to(torch.int32)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("linear", [LINEAR, f"{EXPERT}.up_proj", f"{EXPERT}.down_proj"])
@pytest.mark.parametrize(
    ("change", "part", "says"),
    [
        (drop, "weight_scale", "wants {}, which is missing"),
        (more, "weight_scale", "has no place for {}_second"),
        (turn, "weight", "wants {} in the shape ["),
        (turn, "weight_scale", "wants {} in the shape ["),
        (widen, "weight", "wants {} in int8, and it is int32"),
        (widen, "weight_scale", "wants {} in "),
    ],
)
def test_every_difference_is_named(
    change: Callable[[Tensors, str], None], part: str, says: str, linear: str, ask: Callable[..., Any]
) -> None:
    tensors = stored(plan())
    change(tensors, f"{linear}.{part}")
    (problem,) = ask(plan(), tensors).problems
    assert problem.message.startswith("vllm-ascend 9.9 with vllm 8.8 " + says.format(f"{linear}.{part}"))
    assert problem.fatal and problem.linear == linear


@pytest.mark.usefixtures("engine")
def test_sizes_that_a_class_refuses_and_types_without_a_class(ask: Callable[..., Any]) -> None:
    odd = plan(rows=6)
    assert "cannot make model.layers.0.self_attn.q_proj: outputs in fours" in ask(odd, stored(odd)).problems[0].message
    other = plan(QuantSpec(TensorSpec("int8", "per_channel"), TensorSpec("float", "per_tensor")))
    messages = [problem.message for problem in ask(other, stored(other)).problems]
    assert [message.partition(" has no class for ")[2] for message in messages] == [
        f"W8A16 of dense linears; it will not load {LINEAR}",
        f"W8A16 of experts; it will not load {EXPERT}.gate_proj and 2 more",
    ]


@pytest.mark.usefixtures("engine")
def test_a_class_that_needs_more_of_the_engine_is_told_and_the_others_are_asked(
    ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(self: Any) -> None:
        raise RuntimeError("no NPU")

    monkeypatch.setattr(Experts, "__init__", made)
    tensors = stored(plan())
    drop(tensors, f"{LINEAR}.weight_scale")
    answer = ask(plan(), tensors)
    assert answer.reason == "W8A8_DYNAMIC of experts (RuntimeError: no NPU)"
    assert answer.asked and len(answer.problems) == 1


def test_without_the_engine_the_answer_is_the_reason(ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm_ascend", None)
    answer = ask(plan(), stored(plan()))
    assert (answer.asked, answer.problems) == ("", ())
    assert answer.reason.startswith("vllm_ascend cannot be imported: ")


def test_another_engine_cannot_be_asked_about_this_format(tmp_path: Path) -> None:
    answer = AscendV1Saver.ask_engine("mindie", tmp_path, plan(), {})
    assert (answer.asked, answer.reason) == ("", "there is no way to ask mindie about this format")
