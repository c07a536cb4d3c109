# SPDX-License-Identifier: Apache-2.0
"""What the plan learns of a model on meta: its units, its linears, their stored names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from modelslim.checkpoint import Checkpoint
from modelslim.errors import ModelError
from modelslim.loader import Loader
from modelslim.model_info import Kept, ModelInfo, describe, other_matrices
from modelslim.registry import Registry
from modelslim.types import LinearInfo, ProcessRequest, WeightSource


def describe_checkpoint(path: Path, model_type: str = "llama") -> ModelInfo:
    adapter = Registry.scan().load("adapters", "transformers")(model_type, path)
    model = adapter.init_model("meta")
    checkpoint = Checkpoint(path)
    sources = adapter.get_weight_sources(model, checkpoint.shapes)
    return describe(model, list(adapter.generate_model_visit(model)), Loader(model, checkpoint, sources, "cpu"))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 6)
        self.experts = nn.Parameter(torch.zeros(3, 5, 4))
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.table = nn.Parameter(torch.zeros(2, 2))
        self.head = nn.Linear(4, 10, bias=False)


def describe_own(
    tmp_path: Path,
    units: Sequence[str] = ("layers.0", "layers.1"),
    sources: Mapping[str, WeightSource] | None = None,
    model: nn.Module | None = None,
) -> ModelInfo:
    if model is None:
        with torch.device("meta"):
            model = Model()
    save_file({name: torch.zeros(p.shape) for name, p in model.named_parameters()}, tmp_path / "model.safetensors")
    visit = [ProcessRequest(name, model.get_submodule(name)) for name in units]
    return describe(model, visit, Loader(model, Checkpoint(tmp_path), sources, "cpu"))


def test_a_linear_that_is_cut_out_of_a_stored_tensor_has_the_name_that_its_source_gives(tmp_path: Path) -> None:
    sources = {
        "layers.0.proj.weight": WeightSource(("stacked",), lambda tensors: tensors[0], name="blocks.0.proj"),
        "layers.1.proj.weight": WeightSource(("stacked",), lambda tensors: tensors[0]),
    }
    info = describe_own(tmp_path, sources=sources)
    assert info.linears["layers.0.proj"].stored == "blocks.0.proj"
    assert "layers.1.proj" not in info.linears


def test_a_llama_has_its_layers_and_all_their_linears(tiny_llama: Path) -> None:
    info = describe_checkpoint(tiny_llama)
    assert list(info.units) == ["model.layers.0", "model.layers.1", "model.layers.2"]
    shapes = {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_proj": (96, 64),
        "mlp.up_proj": (96, 64),
        "mlp.down_proj": (64, 96),
    }
    expected = {}
    for unit in info.units:
        for part, (rows, columns) in shapes.items():
            name = f"{unit}.{part}"
            expected[name] = LinearInfo(name, name, unit, rows, columns, False, "bfloat16")
    expected["lm_head"] = LinearInfo("lm_head", "lm_head", "", 512, 64, False, "bfloat16")
    assert dict(info.linears) == expected
    assert list(info.linears) == list(expected), "in the order of the model"
    assert info.dtype == "bfloat16"
    assert {"", "model", "model.layers.1.mlp", "lm_head"} <= info.modules
    assert info.kept == {}


def test_a_tied_head_is_a_linear_without_stored_tensor(tiny_llama_tied: Path) -> None:
    head = describe_checkpoint(tiny_llama_tied).linears["lm_head"]
    assert (head.stored, head.unit) == ("lm_head", "")


def test_biases_are_seen(llama_factory: Any) -> None:
    linears = describe_checkpoint(llama_factory(attention_bias=True, num_hidden_layers=1)).linears
    assert {name.rpartition(".")[2] for name, linear in linears.items() if linear.has_bias} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }


def test_fused_experts_and_routers_are_told_apart_from_linears(tiny_moe: Path) -> None:
    info = describe_checkpoint(tiny_moe, "qwen3_moe")
    shapes = {
        name: (linear.out_features, linear.in_features)
        for name, linear in info.linears.items()
        if linear.unit == info.units[1] and "self_attn" not in name
    }
    assert shapes == {
        f"{info.units[1]}.mlp.experts.{expert}.{part}": shape
        for expert in range(4)
        for part, shape in (("gate_proj", (32, 64)), ("up_proj", (32, 64)), ("down_proj", (64, 32)))
    }
    linear = info.linears[f"{info.units[1]}.mlp.experts.2.up_proj"]
    assert linear.stored == linear.name
    assert (linear.bank, linear.module) == (f"{info.units[1]}.mlp.experts.gate_up_proj",) * 2
    assert dict(info.kept) == {f"{unit}.mlp.gate.weight": Kept((4, 64), "router") for unit in info.units}
    assert info.holders[info.units[0]] == [
        f"{info.units[0]}.{name}"
        for name in (
            *(f"self_attn.{part}_proj" for part in "qkvo"),
            "mlp.experts.gate_up_proj",
            "mlp.experts.down_proj",
        )
    ]


def test_linears_are_grouped_by_unit(tmp_path: Path) -> None:
    info = describe_own(tmp_path)
    groups = {unit: [linear.name for linear in linears] for unit, linears in info.by_unit.items()}
    assert groups == {"": ["head"], "layers.0": ["layers.0.proj"], "layers.1": ["layers.1.proj"]}
    only = describe_own(tmp_path, units=["layers.1"])
    assert [linear.name for linear in only.by_unit[""]] == ["layers.0.proj", "head"]


def test_weights_inside_units_that_no_linear_holds_are_noted_with_their_shapes(tmp_path: Path) -> None:
    kept = describe_own(tmp_path).kept
    assert kept == {
        "layers.0.experts": Kept((3, 5, 4), "stacked experts"),
        "layers.1.experts": Kept((3, 5, 4), "stacked experts"),
    }  # not the norms, nor what is outside


class Choice(nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return tuple(super().forward(x).topk(1))


@pytest.mark.parametrize("kind", ["plain", "subclass", "nested"])
def test_routers_stay_float_whatever_module_holds_them(kind: str, tmp_path: Path) -> None:
    block: Any = nn.Module()
    block.experts = nn.ModuleList(nn.Linear(8, 6) for _ in range(3))
    router = (Choice if kind == "subclass" else nn.Linear)(8, 3, bias=False)
    block.gate = nn.Sequential(router) if kind == "nested" else router
    block.shared = nn.Linear(8, 6)
    model: Any = nn.Module()
    model.layers = nn.ModuleList([block])
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        loader = Loader(model.to("meta"), checkpoint, None, "cpu")
        info = describe(model, [ProcessRequest("layers.0", block)], loader)
    assert set(info.linears) == {"layers.0.shared", *(f"layers.0.experts.{number}" for number in range(3))}
    assert [kept.why for kept in info.kept.values()] == ["router"]


def test_a_unit_may_be_a_linear_itself(tmp_path: Path) -> None:
    info = describe_own(tmp_path, units=["layers.0", "layers.1", "head"])
    assert info.linears["head"].unit == "head"


def test_names_that_begin_alike_are_different_units(tmp_path: Path) -> None:
    model = nn.ModuleDict({f"layer{index}": nn.Linear(2, 2, device="meta") for index in (1, 10)})
    info = describe_own(tmp_path, units=["layer1"], model=model)
    assert {name: linear.unit for name, linear in info.linears.items()} == {"layer1": "layer1", "layer10": ""}


def test_the_dtype_is_that_of_most_parameters(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Model()
    model.to(torch.float16)
    model.layers[0].norm.float()
    info = describe_own(tmp_path, model=model)
    assert info.dtype == "float16" and info.linears["head"].dtype == "float16"


def test_the_stored_name_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    sources = {
        "head.weight": WeightSource(("output.weight",)),
        "layers.0.proj.weight": WeightSource(("blk.0.proj.weight", "blk.0.proj.weight_scale_inv")),
        "layers.1.proj.weight": WeightSource(("blk.1.a.weight", "blk.1.b.weight")),
    }
    info = describe_own(tmp_path, sources=sources)
    assert {name: linear.stored for name, linear in info.linears.items()} == {
        "layers.0.proj": "blk.0.proj",
        "head": "output",
    }
    assert info.kept["layers.1.proj.weight"] == Kept(
        (6, 4), "no linear"
    )  # put together from two: it has no name of its own


def test_unit_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Model()
    save_file({name: torch.zeros(p.shape) for name, p in model.named_parameters()}, tmp_path / "model.safetensors")
    visit = [ProcessRequest("layer.0", model.layers[0])]
    with pytest.raises(ModelError, match=r"visits layer\.0, and the model has no module of that name") as caught:
        describe(model, visit, Loader(model, Checkpoint(tmp_path), None, "cpu"))
    assert "'layers.0'" in caught.value.hint


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([], "visits no unit"),
        (["layers.0", "layers.1", "layers.0"], r"visits layers\.0 twice"),
        (["layers", "layers.1"], r"the unit layers\.1 lies inside the unit layers"),
        (["layers.1", "layers"], r"the unit layers\.1 lies inside the unit layers"),
        (["layers.0", "layers.0.proj"], r"the unit layers\.0\.proj lies inside the unit layers\.0"),
    ],
)
def test_units_that_cannot_be_are_refused(tmp_path: Path, units: list[str], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        describe_own(tmp_path, units=units)
    assert caught.value.hint


def test_other_matrices_are_what_an_engine_may_take_for_linears(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Model()
        model.layers[0].router = nn.Module()
        model.layers[0].router.weight = nn.Parameter(torch.zeros(3, 4))
        model.layers[1].conv = nn.Conv1d(4, 4, 2)
    stored = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    stored |= {"mtp.0.proj.weight": torch.zeros(4, 4), "mtp.0.norm.weight": torch.zeros(4)}
    save_file(stored, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    loader = Loader(model, checkpoint, None, "cpu")
    info = describe(model, [ProcessRequest("layers.0", model.layers[0])], loader)
    found = other_matrices(model, info, loader, checkpoint.shapes)
    assert found == {"layers.0.router", "layers.1.conv", "mtp.0.proj"}
