# SPDX-License-Identifier: Apache-2.0
"""The loader fills a model on meta with what transformers itself would load, and empties it again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modelslim.checkpoint import Checkpoint
from modelslim.errors import ModelError
from modelslim.loader import Loader, dtype_name
from modelslim.registry import Registry
from modelslim.types import WeightSource


@contextmanager
def opened(path: Path, device: str = "cpu") -> Iterator[tuple[Any, Loader]]:
    """The model of a checkpoint on meta, and its loader."""
    adapter = Registry.scan().load("adapters", "transformers")("llama", path)
    model = adapter.init_model(device)
    with Checkpoint(path) as checkpoint:
        yield model, Loader(model, checkpoint, adapter.get_weight_sources(model, checkpoint.shapes), "cpu")


def reference(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


class Tiny(nn.Module):
    """Two linears, one buffer that is stored and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.ab = nn.Linear(2, 2, bias=False)
        self.count: Tensor
        self.register_buffer("count", torch.zeros(1))
        self.angles: Tensor
        self.register_buffer("angles", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Any:
        return self.ab(self.a(x)) + self.count


def tiny(
    path: Path, stored: Mapping[str, Tensor], sources: Mapping[str, WeightSource] | None = None
) -> tuple[Tiny, Loader]:
    save_file(dict(stored), path / "model.safetensors")
    with torch.device("meta"):
        model = Tiny()
    return model, Loader(model, Checkpoint(path), sources, "cpu")


WHOLE = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.bias": torch.tensor([1.0, 2.0]),
    "ab.weight": torch.tensor([[3.0, 4.0], [5.0, 6.0]]),
    "count": torch.tensor([9.0]),
}


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_tied", "tiny_llama_sharded"])
def test_a_filled_model_equals_what_transformers_loads(name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    with opened(path) as (model, loader):
        assert loader.check() == []
        loader.install(loader.read(loader.names()))
    expected = reference(path)
    assert_same(model, expected)
    ids = torch.arange(17)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_tied_parameters_stay_one_tensor(tiny_llama_tied: Path) -> None:
    with opened(tiny_llama_tied) as (model, loader):
        assert len([name for name in loader.names() if "embed_tokens" in name or "lm_head" in name]) == 1
        loader.install(loader.read(loader.names()))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        loader.release(loader.names())
        assert model.lm_head.weight.is_meta and model.model.embed_tokens.weight.is_meta
        for alone in ("lm_head", "model.embed_tokens"):  # either name fills both
            loader.install(loader.read(loader.names(alone)))
            assert model.lm_head.weight is model.model.embed_tokens.weight and not model.lm_head.weight.is_meta
            loader.release(loader.names(alone))
            assert model.model.embed_tokens.weight.is_meta and model.lm_head.weight.is_meta


def test_untied_parameters_stay_two_tensors(tiny_llama: Path) -> None:
    with opened(tiny_llama) as (model, loader):
        loader.install(loader.read(loader.names()))
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


def test_filling_a_unit_leaves_the_others_on_meta_and_release_empties_it(tiny_llama: Path) -> None:
    with opened(tiny_llama) as (model, loader):
        before = dict(model.named_parameters())
        names = loader.names("model.layers.1")
        assert sorted(names) == sorted(name for name in before if name.startswith("model.layers.1."))
        loader.install(loader.read(names))
        filled = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
        assert filled == set(names)
        assert not any(loader.is_empty(name) for name in names)
        loader.release(names)
        after = dict(model.named_parameters())
        assert all(after[name] is parameter for name, parameter in before.items())
        assert all(loader.is_empty(name) for name in loader.names())


def test_reading_leaves_the_model_alone(tiny_llama: Path) -> None:
    with opened(tiny_llama) as (model, loader):
        tensors = loader.read(loader.names("model.layers.0"))
        assert all(parameter.is_meta for parameter in model.parameters())
    stored = load_file(tiny_llama / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in tensors.items())


def test_a_module_is_not_taken_for_another_whose_name_it_begins(tmp_path: Path) -> None:
    _, loader = tiny(tmp_path, WHOLE)
    assert sorted(loader.names("a")) == ["a.bias", "a.weight"]
    assert loader.names("ab") == ["ab.weight"]
    assert sorted(loader.names()) == ["a.bias", "a.weight", "ab.weight", "count"]
    assert loader.names("absent") == []


def test_stored_buffers_are_filled_and_computed_ones_left_alone(tmp_path: Path) -> None:
    model, loader = tiny(tmp_path, WHOLE)
    loader.install(loader.read(loader.names()))
    assert model.count.tolist() == [9.0] and not isinstance(model.count, nn.Parameter)
    assert model.angles.is_meta
    assert isinstance(model.a.weight, nn.Parameter)


def test_what_is_not_on_meta_belongs_to_the_adapter(tmp_path: Path) -> None:
    save_file(WHOLE, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Tiny()
    own = nn.Parameter(torch.full((2,), 7.0))
    model.a.bias = own
    loader = Loader(model, Checkpoint(tmp_path), None, "cpu")
    loader.install(loader.read(loader.names()))
    assert model.a.bias is own


def test_values_take_the_dtype_of_the_model(tmp_path: Path) -> None:
    model, loader = tiny(tmp_path, {name: tensor.to(torch.bfloat16) for name, tensor in WHOLE.items()})
    loader.install(loader.read(loader.names()))
    assert model.a.weight.dtype == torch.float32 and torch.equal(model.a.weight, WHOLE["a.weight"])


def test_sources_rename_and_convert(tmp_path: Path) -> None:
    parts = {"up": torch.tensor([[0.0, 1.0, 2.0]]), "down": torch.tensor([[3.0, 4.0, 5.0]])}
    stored = {**parts, "b": WHOLE["a.bias"], "w": WHOLE["ab.weight"], "n": WHOLE["count"]}
    sources = {
        "a.weight": WeightSource(("up", "down"), lambda tensors: torch.cat(list(tensors))),
        "a.bias": WeightSource(("b",)),
        "ab.weight": WeightSource(("w",)),
        "count": WeightSource(("n",)),
    }
    model, loader = tiny(tmp_path, stored, sources)
    assert loader.check() == []
    loader.install(loader.read(loader.names()))
    for name, tensor in WHOLE.items():
        assert torch.equal(model.get_parameter(name) if name != "count" else model.count, tensor)


def test_what_several_parameters_are_cut_out_of_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = torch.randn(3, 3)
    sources = {
        "a.weight": WeightSource(("both",), lambda tensors: tensors[0][:2]),
        "a.bias": WeightSource(("bias",)),
        "ab.weight": WeightSource(("both",), lambda tensors: tensors[0][1:, :2]),
        "count": WeightSource(("count",)),
    }
    model, loader = tiny(tmp_path, {"both": both, "bias": torch.ones(2), "count": torch.ones(1)}, sources)
    reads: list[str] = []
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: [reads.append(name), read(self, name)][1])
    loader.install(loader.read(loader.names()))
    assert sorted(reads) == ["bias", "both", "count"]
    assert torch.equal(model.a.weight, both[:2])
    assert torch.equal(model.ab.weight, both[1:, :2])


def test_check_names_what_is_missing_and_what_has_another_shape(tmp_path: Path) -> None:
    stored = {**WHOLE, "a.weight": torch.zeros(3, 2), "AB.weight": torch.zeros(2, 2)}
    del stored["ab.weight"]
    _, loader = tiny(tmp_path, stored)
    shape, missing = loader.check()
    assert "model.safetensors: a.weight has the shape [3, 2], config.json asks for [2, 3]" in shape
    assert shape.endswith("(turned: get_weight_sources of the adapter must convert it)")
    assert "holds no tensor for ab.weight (did you mean 'AB.weight'?)" in missing
    with pytest.raises(ModelError, match=r"holds no tensor for ab\.weight"):
        loader.read(["ab.weight"])
    with pytest.raises(ModelError, match=r"a\.weight the shape \[3, 2\], config.json asks for \[2, 3\]"):
        loader.read(["a.weight"])


def _transposed(tensors: list[Tensor]) -> Tensor:
    return tensors[0].t()


def test_a_conversion_of_another_shape_is_refused_when_it_is_read(tmp_path: Path) -> None:
    sources = {name: WeightSource((name,)) for name in WHOLE}
    sources["a.weight"] = WeightSource(("a.weight",), _transposed)
    _, loader = tiny(tmp_path, WHOLE, sources)
    with pytest.raises(ModelError, match=r"a\.weight gives a\.weight the shape \[3, 2\]"):
        loader.read(["a.weight"])


def test_a_layer_too_many_in_config_json_is_found(tiny_llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_llama, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with opened(copy) as (_, loader):
        problems = loader.check()
    assert len(problems) == 9  # the parameters of a llama layer
    assert all("holds no tensor for model.layers.3." in problem for problem in problems)


def test_fill_on_demand_fills_what_is_called_and_nothing_else(tiny_llama: Path) -> None:
    with opened(tiny_llama, device="cpu") as (model, loader):
        units = [f"model.layers.{index}" for index in range(3)]
        loader.fill_on_demand(units)
        assert all(loader.is_empty(name) for name in loader.names())
        reads = record_reads(loader)
        loader.install(loader.read(loader.names("model.layers.0")))

        class StopError(Exception):
            pass

        def stop(*_: Any) -> None:
            raise StopError

        handle = model.model.layers[1].register_forward_pre_hook(stop)
        ids = torch.arange(5)[None]
        with pytest.raises(StopError), torch.no_grad():
            model(ids)
        filled = {name for name in loader.names() if not loader.is_empty(name)}
        assert filled == {"model.embed_tokens.weight", *loader.names("model.layers.0")}

        handle.remove()
        for unit in units[1:]:
            loader.install(loader.read(loader.names(unit)))
        with torch.no_grad():
            first, second = model(ids).logits, model(ids).logits
        assert sum("lm_head.weight" in names for names in reads) == 1  # filled once, not at every call
        expected = reference(tiny_llama)
        assert_same(model, expected)
        with torch.no_grad():
            assert torch.equal(first, expected(ids).logits) and torch.equal(second, first)


def test_fill_on_demand_reads_a_tied_weight_once(tiny_llama_tied: Path) -> None:
    with opened(tiny_llama_tied, device="cpu") as (model, loader):
        loader.fill_on_demand([f"model.layers.{index}" for index in range(3)])
        reads = record_reads(loader)
        for index in range(3):
            loader.install(loader.read(loader.names(f"model.layers.{index}")))
        with torch.no_grad():
            model(torch.arange(5)[None])
        assert model.lm_head.weight is model.model.embed_tokens.weight
    read = [name for names in reads for name in names]
    assert len([name for name in read if "lm_head" in name or "embed_tokens" in name]) == 1
    assert len(read) == len(set(read))


def test_what_was_filled_on_demand_can_be_emptied_and_is_filled_again(tiny_llama_tied: Path) -> None:
    with opened(tiny_llama_tied) as (model, loader):
        units = [f"model.layers.{index}" for index in range(3)]
        loader.fill_on_demand(units)
        for unit in units:
            loader.install(loader.read(loader.names(unit)))
        ids = torch.arange(5)[None]
        with torch.no_grad():
            first = model(ids).logits
            loader.release_filled()
            empty = {name for name, parameter in model.named_parameters() if parameter.is_meta}
            assert empty == {"model.embed_tokens.weight", "model.norm.weight"}, "and lm_head, which is the embedding"
            assert model.lm_head.weight is model.model.embed_tokens.weight
            assert torch.equal(model(ids).logits, first)
        loader.release_filled()
        loader.release_filled()  # there is nothing left to empty
        assert model.lm_head.weight.is_meta


def test_what_a_module_around_a_unit_holds_stays_while_its_forward_waits_at_the_unit(tmp_path: Path) -> None:
    """Such as a row that a vision model puts between the features of its tower."""
    model, loader = tiny(tmp_path, WHOLE)
    loader.fill_on_demand(["a"])
    loader.install(loader.read(loader.names("a")))
    model.a.register_forward_pre_hook(lambda *_: loader.release_filled())
    x = torch.tensor([[1.0, 2.0, 3.0]])
    with torch.no_grad():
        y = model(x)
    hidden = x @ WHOLE["a.weight"].T + WHOLE["a.bias"]
    assert torch.equal(y, hidden @ WHOLE["ab.weight"].T + WHOLE["count"])
    assert not loader.is_empty("count")
    loader.release_filled()
    assert loader.is_empty("ab.weight")


def record_reads(loader: Loader) -> list[Sequence[str]]:
    """Every later ``loader.read`` notes here what it was asked for."""
    reads: list[Sequence[str]] = []
    original = loader.read

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        reads.append(list(names))
        return original(names)

    loader.read = read  # type: ignore[method-assign]
    return reads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_have_the_names_of_config_json(dtype: torch.dtype) -> None:
    assert getattr(torch, dtype_name(dtype)) is dtype
    assert "torch" not in dtype_name(dtype)
