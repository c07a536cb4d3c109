# SPDX-License-Identifier: Apache-2.0
"""A whole run on a tiny model: every source tensor is copied, or replaced by the ones the format has for it."""

from __future__ import annotations

import errno
import io
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modelslim.dataset import read_samples
from modelslim.errors import ModelError, QuantizationError, SaveError, UsageError
from modelslim.hookspecs import hookimpl
from modelslim.plan import make_plan
from modelslim.run import quantize, run_plan

Protocol = Callable[[str], Path]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def weights(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        held = load_file(file)
        assert not tensors.keys() & held.keys()
        tensors |= held
    return tensors


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def assert_accounted(source: Mapping[str, Tensor], result: Mapping[str, Tensor]) -> None:
    """Copies are the same to the bit; every projection became int8 codes; nothing disappeared."""
    for name, tensor in source.items():
        if name.rpartition(".")[0].endswith(PROJECTIONS):
            assert result[name].dtype == torch.int8 and result[name].shape == tensor.shape
        else:
            assert same(result[name], tensor), name
    added = set(result) - set(source)
    assert all(name.rpartition(".")[0].endswith(PROJECTIONS) for name in added)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_tied", "tiny_llama_sharded"])
@pytest.mark.parametrize("text", ["w8a8_dynamic", "w8a8_static"])
def test_every_source_tensor_is_copied_or_replaced(
    name: str, text: str, request: pytest.FixtureRequest, protocol: Protocol, tmp_path: Path
) -> None:
    model = request.getfixturevalue(name)
    before = files(model)
    report = quantize(model, tmp_path / "out", protocol(request.getfixturevalue(text)), device="cpu")
    source, result = weights(model), weights(tmp_path / "out")
    assert_accounted(source, result)
    assert files(model) == before, "the source is never touched"
    assert report["tensors"] == {
        "source": len(source),
        "replaced": 21,
        "copied": len(source) - 21,
        "written": len(result),
    }
    assert report["bytes_after"] == sum(tensor.nbytes for tensor in result.values())
    assert report["bytes_before"] == sum(tensor.nbytes for tensor in source.values())
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


def test_stored_tensors_that_no_parameter_uses_are_copied_too(
    tiny_llama: Path, protocol: Protocol, w8a8_static: str, tmp_path: Path
) -> None:
    """Layers for multi-token prediction, router biases: transformers drops them, an engine wants them."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    extra = {
        "model.layers.3.mtp.weight": torch.randn(3, 4).to(torch.float8_e4m3fn),
        "model.layers.0.mlp.gate.e_score_correction_bias": torch.randn(7),
        "scalar": torch.tensor(5, dtype=torch.int64),
        "nothing": torch.empty(0, 4),
        "flags": torch.tensor([True, False]),
    }
    save_file({**load_file(model / "model.safetensors"), **extra}, model / "model.safetensors")
    quantize(model, tmp_path / "out", protocol(w8a8_static), device="cpu")
    result = weights(tmp_path / "out")
    assert_accounted(weights(model), result)
    assert set(extra) <= set(result)


def test_experts_that_are_held_fused_and_stay_float_are_copied_one_by_one(
    tiny_moe: Path, protocol: Protocol, w8a8_static: str, tmp_path: Path
) -> None:
    source = weights(tiny_moe)
    assert any(".experts.3.down_proj" in name for name in source)
    text = w8a8_static.replace("  save:", '      exclude: ["*experts*"]\n  save:')
    quantize(tiny_moe, tmp_path / "out", protocol(text), device="cpu")
    result = weights(tmp_path / "out")
    for name, tensor in source.items():
        if "self_attn" not in name or "norm" in name:
            assert same(result[name], tensor), name
    assert {name for name, tensor in result.items() if tensor.dtype == torch.int8 and name.endswith(".weight")} == {
        name for name in source if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"))
    }


def test_sharded_and_single_sources_give_the_same_result(
    tiny_llama: Path, tiny_llama_sharded: Path, protocol: Protocol, w8a8_static: str, tmp_path: Path
) -> None:
    for number, model in enumerate((tiny_llama, tiny_llama_sharded)):
        quantize(model, tmp_path / str(number), protocol(w8a8_static), device="cpu")
    one, other = weights(tmp_path / "0"), weights(tmp_path / "1")
    assert one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)


def test_two_runs_give_the_same_bytes(tiny_llama: Path, protocol: Protocol, w8a8_static: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        quantize(tiny_llama, tmp_path / name, protocol(w8a8_static), device="cpu")
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    for name in ("report.json", "report.html"):
        assert one.pop(name) != two.pop(name)  # they hold times
    assert one == two


def test_weights_may_go_into_many_files_or_one(
    tiny_llama: Path, protocol: Protocol, w8a8_dynamic: str, tmp_path: Path
) -> None:
    sizes = {"4": 1, "0.00005": 2, "0": 1}  # GiB; half of the result is the embedding and the head
    results = []
    for number, (size, least) in enumerate(sizes.items()):
        out = tmp_path / str(number)
        text = w8a8_dynamic.replace("part_file_size: 4", f"part_file_size: {size}")
        quantize(tiny_llama, out, protocol(text), device="cpu")
        shards = sorted(file.name for file in out.glob("*.safetensors"))
        assert len(shards) >= least
        index = out / "quant_model_weights.safetensors.index.json"
        assert index.exists() == (size != "0")
        if index.exists():
            weight_map = json.loads(index.read_text())["weight_map"]
            assert sorted(set(weight_map.values())) == shards and set(weight_map) == set(weights(out))
        results.append(weights(out))
    for result in results[1:]:
        assert result.keys() == results[0].keys()
        assert all(same(result[name], results[0][name]) for name in result)


def test_the_plan_knew_every_tensor_and_its_size(
    tiny_llama: Path, protocol: Protocol, w8a8_static: str, tmp_path: Path
) -> None:
    plan = make_plan(tiny_llama, protocol(w8a8_static), device="cpu")
    planned = plan.result_sizes()
    run_plan(plan, tmp_path / "out")
    assert planned == {name: tensor.nbytes for name, tensor in weights(tmp_path / "out").items()}


def test_the_files_beside_the_weights_come_along(
    tiny_llama: Path, protocol: Protocol, w8a8_dynamic: str, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (model / "LICENSE").write_text("free")
    (model / "pytorch_model.bin").write_text("old weights")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "own key": "größe"}))
    quantize(model, tmp_path / "out", protocol(w8a8_dynamic), device="cpu")
    source, result = files(model), files(tmp_path / "out")
    for name in ("LICENSE", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert result[name] == source[name]
    assert json.loads(result["config.json"]) == {**config, "own key": "größe"}
    assert "pytorch_model.bin" not in result and "model.safetensors" not in result
    assert not any("journal" in name or "unfinished" in name for name in result)


def test_static_ranges_are_those_of_the_float_model(
    tiny_llama: Path, protocol: Protocol, w8a8_static: str, calibration_file: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Against hooks on the whole model, run by transformers alone."""
    from transformers import AutoModelForCausalLM

    quantize(tiny_llama, tmp_path / "out", protocol(w8a8_static), device="cpu")
    result = weights(tmp_path / "out")
    module = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    ranges: dict[str, tuple[float, float]] = {}

    def observe(name: str, x: Tensor) -> None:
        low, high = ranges.get(name, (0.0, 0.0))
        ranges[name] = (min(low, float(x.min())), max(high, float(x.max())))

    for name, linear in module.named_modules():
        if name.endswith(PROJECTIONS):
            linear.register_forward_pre_hook(lambda _, args, name=name: observe(name, args[0]))
    with torch.no_grad():
        for text in read_samples(calibration_file):
            module(torch.tensor([tiny_tokenizer(text)["input_ids"]]))
    assert len(ranges) == 21
    for name, (low, high) in ranges.items():
        scale = result[f"{name}.input_scale"].item()  # bf16, as the engine holds it, and never rounded down
        assert scale == torch.tensor(scale).to(torch.bfloat16).item()
        assert -(2**-22) <= scale / ((high - low) / 255) - 1 <= 2**-7
        assert result[f"{name}.input_offset"].item() == min(max(-128 - round(low / scale), -128), 127)


def test_observers_see_every_unit_and_tensor(
    tiny_llama: Path, protocol: Protocol, w8a8_static: str, tmp_path: Path
) -> None:
    class Observer:
        def __init__(self) -> None:
            self.started: list[tuple[str, int, int]] = []
            self.finished: list[str] = []
            self.written: dict[str, int] = {}
            self.reports: list[Mapping[str, Any]] = []

        @hookimpl
        def unit_started(self, name: str, index: int, total: int) -> None:
            self.started.append((name, index, total))

        @hookimpl
        def unit_finished(self, name: str, record: Mapping[str, Any]) -> None:
            self.finished.append(name)

        @hookimpl
        def tensor_written(self, name: str, nbytes: int) -> None:
            assert name not in self.written
            self.written[name] = nbytes

        @hookimpl
        def run_finished(self, report: Mapping[str, Any]) -> None:
            assert (tmp_path / "out" / "report.json").exists()
            self.reports.append(report)

    observer = Observer()
    report = quantize(
        tiny_llama, tmp_path / "out", protocol(w8a8_static), device="cpu", observers=[("observer", observer)]
    )
    assert observer.started == [(f"model.layers.{index}", index, 3) for index in range(3)]
    assert observer.finished == [name for name, _, _ in observer.started]
    assert observer.written == {name: tensor.nbytes for name, tensor in weights(tmp_path / "out").items()}
    assert observer.reports == [report]


# Failing


@pytest.fixture
def damaged(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the model whose last layer holds a NaN."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, model / "model.safetensors")
    return model


@pytest.mark.parametrize("text", ["w8a8_dynamic", "w8a8_static"])
def test_a_run_that_fails_late_leaves_nothing(
    damaged: Path, text: str, request: pytest.FixtureRequest, protocol: Protocol, tmp_path: Path
) -> None:
    file = protocol(request.getfixturevalue(text))
    before = set(tmp_path.iterdir())
    with pytest.raises(ModelError, match=r"up_proj\.weight holds 1 value that is NaN"):
        quantize(damaged, tmp_path / "out", file, device="cpu")
    assert set(tmp_path.iterdir()) == before


def test_a_copied_tensor_that_is_not_finite_fails_the_run(
    tiny_llama: Path, protocol: Protocol, w8a8_dynamic: str, tmp_path: Path
) -> None:
    """It is read by the writing thread alone."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][0, 0] = torch.inf
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ModelError, match=r"embed_tokens\.weight holds 1 value that is NaN or infinite"):
        quantize(model, tmp_path / "out", protocol(w8a8_dynamic), device="cpu")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(("free", "units"), [(0, 0), (10_000, 0), (150_000, 3)])
def test_a_disk_that_fills_up_during_a_run_leaves_nothing_but_finished_units(
    tiny_llama: Path,
    protocol: Protocol,
    w8a8_static: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    units: int,
) -> None:
    left = free

    class Stream(io.FileIO):
        def write(self, data: Any) -> int:
            nonlocal left
            if not left:
                raise OSError(errno.ENOSPC, "no room")
            count = super().write(data[:left])
            left -= count
            return count

    original = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return Stream(self, "w") if mode == "wb" else original(self, mode, *args, **kwargs)

    file = protocol(w8a8_static)
    before = set(tmp_path.iterdir())
    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(SaveError, match="the disk is full"):
        quantize(tiny_llama, tmp_path / "out", file, device="cpu")
    if not units:
        assert set(tmp_path.iterdir()) == before
        return
    monkeypatch.undo()
    assert (tmp_path / "out.partial" / "journal.jsonl").read_bytes().count(b"\n") == 1 + units
    quantize(tiny_llama, tmp_path / "out", file, device="cpu")
    assert set(tmp_path.iterdir()) == {*before, tmp_path / "out"}


def test_a_result_that_cannot_fit_is_refused_before_a_run(
    tiny_llama: Path, protocol: Protocol, w8a8_dynamic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(SaveError, match="and 100,000 are free"):
        quantize(tiny_llama, tmp_path / "out", protocol(w8a8_dynamic), device="cpu")
    assert not (tmp_path / "out.partial").exists()


def test_a_result_is_never_written_over_something(
    tiny_llama: Path, protocol: Protocol, w8a8_dynamic: str, tmp_path: Path
) -> None:
    file = protocol(w8a8_dynamic)
    quantize(tiny_llama, tmp_path / "out", file, device="cpu")
    before = files(tmp_path / "out")
    with pytest.raises(UsageError, match="is not empty"):
        quantize(tiny_llama, tmp_path / "out", file, device="cpu")
    assert files(tmp_path / "out") == before


def test_activations_that_overflow_are_named_by_their_linear(
    tiny_llama: Path, protocol: Protocol, w8a8_static: str, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    for part in ("gate_proj", "up_proj"):  # their product exceeds what bfloat16 holds
        tensors[f"model.layers.1.mlp.{part}.weight"] *= 1e25
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.mlp\.down_proj: its input holds NaN or infinity"):
        quantize(model, tmp_path / "out", protocol(w8a8_static), device="cpu")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
