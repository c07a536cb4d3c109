# SPDX-License-Identifier: Apache-2.0
"""Prior stages: the next stage begins with what the last one made of the model, wherever the run is interrupted."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

from modelslim.api import hookimpl
from modelslim.cli.main import main
from modelslim.context import Context
from modelslim.errors import (
    ModelSlimError,
    PluginError,
    ProtocolError,
    QuantizationError,
    RankError,
    SaveError,
    UsageError,
)
from modelslim.journal import FinishedStage
from modelslim.overlay import Overlay, StageWriter
from modelslim.plan import make_plan
from modelslim.quantized import QuantizedLinear, QuantizedTensor
from modelslim.run import quantize, run_plan
from modelslim.runners.engine import Engine
from modelslim.saved import load_model
from modelslim.scales import range_to_scale
from modelslim.session import Session
from modelslim.types import QuantSpec, TensorSpec

SMOOTH = "{type: iter_smooth, alpha: 0.5}"
SHIFT = "{type: iter_smooth, symmetric: false, alpha: 0.5, enable_subgraph_type: [norm-linear]}"
MULTIPLY = "{type: iter_smooth, alpha: 0.5, enable_subgraph_type: [non-fusion]}"
FLEX = "{type: flex_smooth_quant, qconfig: {act: {scope: per_tensor}, weight: {dtype: int8}}}"
DYNAMIC = "{type: linear_quant, qconfig: {act: {scope: per_token}, weight: {dtype: int8}}}"
STATIC = "{type: linear_quant, qconfig: {act: {scope: per_tensor}, weight: {dtype: int8}}}"
GPTQ = "{type: linear_quant, qconfig: {act: {scope: per_token}, weight: {dtype: int8, method: gptq}}}"
CACHE = "{type: dynamic_cache, qconfig: {dtype: int8, scope: per_channel}}"
FALLBACK = STATIC.removesuffix("}") + ", fallback: {metric: relative_error, above: 0.0001}}"
SHARDED = "{type: ascendv1_saver, part_file_size: 0.00006}"
TEXTS = ("One sentence of another kind, 17 words or so, about a harbour.", "def f(x):\n    return x + 1", "12 34 56")

Protocol = Callable[[str], Path]


def only(entry: str, *patterns: str) -> str:
    return entry.removesuffix("}") + f", include: {json.dumps(list(patterns))}" + "}"


def text(prior: Iterable[tuple[Iterable[str], Path | str | None]], *entries: str, more: str = "") -> str:
    """A protocol: stages as entries and dataset, and the entries of the main one."""
    lines = ["apiversion: modelslim_v1", "spec:"]
    stages = list(prior)
    lines += ["  prior:"] if stages else []
    for process, dataset in stages:
        lines += [f"    - process: [{', '.join(process)}]"]
        lines += [f"      dataset: {dataset}"] if dataset else []
    lines += ["  process:", *(f"    - {entry}" for entry in entries)]
    save = "" if "save:" in more else f"  save: [{SHARDED}]\n"
    return "\n".join(lines) + "\n" + save + more


def run(model: Path, out: Path, config: Path, *observers: Any) -> dict[str, Any]:
    named = [(f"observer{number}", observer) for number, observer in enumerate(observers)]
    return quantize(model, out, config, device="cpu", observers=named)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file() and file.name not in ("report.html", "report.json")
    }


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def differing(one: Path, other: Path) -> list[str]:
    """Names of the tensors that are not the same in both."""
    ours, theirs = tensors(one), tensors(other)
    return [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
    ]


@pytest.fixture
def other_texts(tmp_path: Path) -> Path:
    """A calibration set of its own for a stage."""
    file = tmp_path / "other.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXTS), encoding="utf-8")
    return file


def smoothed_by_hand(model: Path, dataset: Path, smooth: str, protocol: Protocol, tmp_path: Path) -> Path:
    """A float checkpoint as smoothing makes it, put together from runs that each leave other layers float."""
    parts: dict[str, Tensor] = {}
    for quantized, kept in ((1, (0,)), (0, (1, 2))):
        quant = only(DYNAMIC, f"*layers.{quantized}.mlp.down_proj")
        out = tmp_path / f"part{quantized}"
        run(model, out, protocol(text([], smooth, quant, more=f"  dataset: {dataset}\n")))
        parts |= {
            name: tensor
            for name, tensor in tensors(out).items()
            if "layers." not in name or any(f"layers.{layer}." in name for layer in kept)
        }
    result = tmp_path / "smoothed"
    shutil.copytree(model, result)
    for file in result.glob("*.safetensors*"):
        file.unlink()
    save_file(parts, result / "model.safetensors", {"format": "pt"})
    return result


# Floats


@pytest.mark.parametrize("smooth", [SMOOTH, FLEX], ids=["iter_smooth", "flex_smooth_quant"])
def test_a_stage_that_smooths_equals_a_run_on_the_smoothed_model(
    smooth: str, tiny_llama: Path, protocol: Protocol, calibration_file: Path, other_texts: Path, tmp_path: Path
) -> None:
    smoothed = smoothed_by_hand(tiny_llama, other_texts, smooth, protocol, tmp_path)
    assert any("layers" in name for name in differing(tiny_llama, smoothed))
    tail = f"  dataset: {calibration_file}\n"
    run(smoothed, tmp_path / "expected", protocol(text([], STATIC, more=tail)))
    report = run(tiny_llama, tmp_path / "out", protocol(text([([smooth], other_texts)], STATIC, more=tail)))
    assert differing(tmp_path / "out", tmp_path / "expected") == []
    assert not (tmp_path / "out" / "prior").exists()
    (stage,) = report["prior"]
    assert (stage["entry"], stage["dataset"], stage["samples"]) == ("spec.prior[0]", str(other_texts), len(TEXTS))
    assert [unit["unit"] for unit in stage["units"]] == [unit["unit"] for unit in report["units"]]
    assert {len(unit["linears"]) for unit in stage["units"]} == {0}
    # Both data sets were passed, each by its stage.
    assert stage["units"][0]["tokens"] != report["units"][0]["tokens"] != 0


@pytest.fixture(scope="module")
def tiny_olmo(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """An olmo2, whose norms lie behind the linears: what q, k and v read cannot be divided before they run."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    path = tmp_path_factory.mktemp("olmo")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Olmo2Config(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            initializer_range=0.15,
            tie_word_embeddings=False,
            dtype="bfloat16",
        )
        Olmo2ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def equal_to_one_stage(
    model: Path, prior: str, entry: str, protocol: Protocol, data: Path, tmp_path: Path, more: str = ""
) -> dict[str, Any]:
    """A stage and the main one on the same data give the bytes of one stage; the report of the two."""
    tail = f"  dataset: {data}\n{more}"
    run(model, tmp_path / "one", protocol(text([], prior, entry, more=tail)))
    report = run(model, tmp_path / "two", protocol(text([([prior], None)], entry, more=tail)))
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
    return report


@pytest.mark.parametrize(
    ("smooth", "entry"),
    [(SMOOTH, DYNAMIC), (FLEX, only(DYNAMIC, "*self_attn*"))],
    ids=["smooth", "some stay float"],
)
def test_on_the_same_data_two_stages_are_one(
    smooth: str, entry: str, tiny_llama: Path, protocol: Protocol, calibration_file: Path, tmp_path: Path
) -> None:
    equal_to_one_stage(tiny_llama, smooth, entry, protocol, calibration_file, tmp_path)


def test_biases_that_a_stage_adds_are_part_of_the_model_from_then_on(
    tiny_llama: Path, protocol: Protocol, calibration_file: Path, tmp_path: Path
) -> None:
    tail = f"  dataset: {calibration_file}\n"
    run(tiny_llama, tmp_path / "one", protocol(text([], SHIFT, STATIC, more=tail)))
    run(tiny_llama, tmp_path / "two", protocol(text([([SHIFT], None)], STATIC, more=tail)))
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    assert {name for name in two if name.endswith("norm.bias")} and two["model.layers.0.input_layernorm.bias"].any()
    for name, tensor in two.items():
        if name.endswith(("input_scale", "deq_scale")):  # rescaled in one stage, measured in two
            torch.testing.assert_close(tensor, one[name], rtol=0.02, atol=0, msg=name)
        elif not name.endswith(("input_offset", "quant_bias")):
            assert torch.equal(tensor, one[name]), name


@pytest.mark.parametrize("entry", [DYNAMIC, STATIC, FALLBACK], ids=["data-free", "calibrated", "back to float"])
def test_inputs_that_are_multiplied_stay_so_until_the_linear_has_its_form(
    entry: str, tiny_olmo: Path, protocol: Protocol, calibration_file: Path, tmp_path: Path
) -> None:
    tail = f"  dataset: {calibration_file}\n"
    run(tiny_olmo, tmp_path / "one", protocol(text([], MULTIPLY, entry, more=tail)))
    report = run(tiny_olmo, tmp_path / "two", protocol(text([([MULTIPLY], None)], entry, more=tail)))
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    multipliers = {name: tensor for name, tensor in two.items() if name.endswith(".div.mul_scale")}
    if entry == FALLBACK:
        assert {fate["to"] for unit in report["units"] for fate in unit["fell_back"].values()} == {"FLOAT"}
        assert not multipliers
    else:
        assert multipliers and all(torch.equal(one[name], tensor) for name, tensor in multipliers.items())
    if entry == STATIC:  # what was rescaled in one stage is measured in two, behind the rounding of the inputs
        shared = [two[f"model.layers.0.self_attn.{name}_proj.linear.input_scale"] for name in "qkv"]
        assert all(torch.equal(shared[0], other) for other in shared)
        for name in one:
            if name.endswith(("input_scale", "deq_scale")):
                torch.testing.assert_close(two[name], one[name], rtol=0.02, atol=0, msg=name)
            elif not name.endswith(("input_offset", "quant_bias")):
                assert torch.equal(two[name], one[name]), name
    else:
        assert differing(tmp_path / "one", tmp_path / "two") == []


def check_parts(
    model: Path, first: tuple[str, ...], rest: str, is_first: str, protocol: Protocol, data: Path, tmp_path: Path
) -> dict[str, Any]:
    """What each stage quantizes is, to the bit, what a run with nothing else makes of it; the report of the whole."""
    report = run(model, tmp_path / "out", protocol(text([(first, data)], rest)))
    run(model, tmp_path / "first", protocol(text([], *first, more=f"  dataset: {data}\n")))
    run(model, tmp_path / "rest", protocol(text([], rest)))
    out, ours, others = (tensors(tmp_path / name) for name in ("out", "first", "rest"))
    kept = {name for name in out if is_first in name and "layernorm" not in name}
    assert kept and all(torch.equal(tensor, (ours if name in kept else others)[name]) for name, tensor in out.items())
    return report


def test_fused_experts_may_stand_in_a_stage(
    tiny_moe: Path, protocol: Protocol, other_texts: Path, tmp_path: Path
) -> None:
    entries = (only(STATIC, "*experts*"),)
    rest = only(DYNAMIC, "*self_attn*")
    report = check_parts(tiny_moe, entries, rest, "experts", protocol, other_texts, tmp_path)
    assert report["schemes"] == {"W8A8": 24, "W8A8_DYNAMIC": 8}


def test_key_value_caches_may_stand_in_a_stage(
    tiny_llama: Path, protocol: Protocol, other_texts: Path, tmp_path: Path
) -> None:
    report = check_parts(tiny_llama, (CACHE,), only(DYNAMIC, "*mlp*"), "kv_cache", protocol, other_texts, tmp_path)
    assert [len(unit["caches"]) for unit in report["prior"][0]["units"]] == [2, 2, 2]


# Quantized linears


def test_later_stages_calibrate_behind_what_a_stage_has_quantized(
    tiny_llama: Path, protocol: Protocol, calibration_file: Path, other_texts: Path, tmp_path: Path
) -> None:
    attention, mlp = only(STATIC, "*self_attn*"), only(STATIC, "*mlp*")
    tail = f"  dataset: {calibration_file}\n"
    report = run(tiny_llama, tmp_path / "out", protocol(text([([attention], other_texts)], mlp, more=tail)))
    run(tiny_llama, tmp_path / "first", protocol(text([], attention, more=f"  dataset: {other_texts}\n")))
    out, first = tensors(tmp_path / "out"), tensors(tmp_path / "first")
    assert all(torch.equal(tensor, first[name]) for name, tensor in out.items() if "mlp" not in name)
    assert report["schemes"] == {"W8A8": 21}
    # The inputs of the mlp, as the model computes them whose attention is quantized.
    model = load_model(tmp_path / "first", tiny_llama, device="cpu")
    ranges: dict[str, list[float]] = {}

    def watch(name: str) -> Callable[..., None]:
        def see(_module: Any, args: tuple[Tensor, ...]) -> None:
            low, high = ranges.setdefault(name, [0.0, 0.0])
            ranges[name] = [min(low, float(args[0].min())), max(high, float(args[0].max()))]

        return see

    names = [f"model.layers.{layer}.mlp.{part}" for layer in range(3) for part in ("gate_proj", "up_proj", "down_proj")]
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(watch(name))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    for line in calibration_file.read_text(encoding="utf-8").splitlines():
        model(input_ids=tokenizer(json.loads(line)["text"], return_tensors="pt").input_ids)
    run(tiny_llama, tmp_path / "plain", protocol(text([], mlp, more=tail)))
    plain = tensors(tmp_path / "plain")
    specs = make_plan(tiny_llama, protocol(text([], mlp, more=tail)), device="cpu").specs
    for name in names:
        low, high = ranges[name]
        expected, _ = range_to_scale(torch.tensor(low), torch.tensor(high), specs[name].activation)
        assert float(out[f"{name}.input_scale"]) == float(expected)
    assert any(not torch.equal(out[f"{name}.input_scale"], plain[f"{name}.input_scale"]) for name in names)


def test_a_linear_outside_the_units_may_stand_in_a_stage(
    tiny_llama: Path, protocol: Protocol, calibration_file: Path, other_texts: Path, tmp_path: Path
) -> None:
    head = only(STATIC, "lm_head")
    tail = f"  dataset: {calibration_file}\n"
    report = run(tiny_llama, tmp_path / "out", protocol(text([([head], other_texts)], STATIC, more=tail)))
    run(tiny_llama, tmp_path / "first", protocol(text([], head, more=f"  dataset: {other_texts}\n")))
    run(tiny_llama, tmp_path / "second", protocol(text([], STATIC, more=tail)))
    out, first, second = (tensors(tmp_path / name) for name in ("out", "first", "second"))
    for name, tensor in out.items():
        assert torch.equal(tensor, (first if name.startswith("lm_head") else second)[name]), name
    assert [unit["unit"] for unit in report["prior"][0]["units"]][-1] == ""


# Interruptions


class Snapshots:
    """Copies what lies on the disk after each unit of a prior stage and each few tensors of the main one.

    So a process killed there leaves it: at these moments no other thread writes.
    """

    def __init__(self, partial: Path, folder: Path, before: int) -> None:
        self._partial = partial
        self._before = before
        self._folder = folder
        self._tensors = 0
        self.taken: list[Path] = []
        self.seen: list[tuple[str, int, int]] = []

    def _take(self) -> None:
        target = self._folder / f"snapshot{len(self.taken)}"
        shutil.copytree(self._partial, target)
        self.taken.append(target)

    @hookimpl
    def unit_started(self, name: str, index: int, total: int) -> None:
        self.seen.append((name, index, total))
        if index <= self._before:
            self._take()

    @hookimpl
    def tensor_written(self) -> None:
        self._tensors += 1
        if not self._tensors % 12:
            self._take()


@pytest.mark.parametrize(
    ("stages", "entry", "more"),
    [
        ([SHIFT], STATIC, ""),
        ([SMOOTH, only(GPTQ, "*self_attn*")], only(GPTQ, "*mlp*"), ""),
        ([only(GPTQ, "*mlp*", "lm_head")], only(STATIC, "*self_attn*"), "  propagation: quantized\n"),
    ],
    ids=["added biases", "two stages", "quantized twice"],
)
def test_a_run_continues_to_the_same_bytes_wherever_it_was_killed(
    stages: list[str],
    entry: str,
    more: str,
    tiny_llama: Path,
    protocol: Protocol,
    calibration_file: Path,
    other_texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = protocol(
        text([([stage], other_texts) for stage in stages], entry, more=f"  dataset: {calibration_file}\n{more}")
    )
    snapshots = Snapshots(tmp_path / "whole.partial", tmp_path, 3 * len(stages))
    expected_report = run(tiny_llama, tmp_path / "whole", config, snapshots)
    expected = digests(tmp_path / "whole")
    ran: list[int | None] = []
    engine = Engine.run

    def watched(self: Engine) -> Any:
        ran.append(self._plan.stage)
        return engine(self)

    monkeypatch.setattr(Engine, "run", watched)
    every = [*range(len(stages)), None]
    orders = []
    for snapshot in snapshots.taken:
        ran.clear()
        snapshot.rename(tmp_path / "out.partial")
        again = run(tiny_llama, tmp_path / "out", config)
        assert digests(tmp_path / "out") == expected, snapshot.name
        assert without_measurements(again) == without_measurements(expected_report)
        assert ran == every[len(every) - len(ran) :]
        orders.append(len(ran))
        shutil.rmtree(tmp_path / "out")
    assert sorted(set(orders)) == [*range(1, len(every) + 1)] and orders == sorted(orders, reverse=True)
    total = snapshots.seen[-1][2]
    assert [index for _, index, _ in snapshots.seen] == list(range(total))


def without_measurements(report: dict[str, Any]) -> Any:
    report = json.loads(json.dumps(report))
    del report["save_path"], report["peak_memory_bytes"], report["phases"], report["provenance"]["finished"]
    del report["memory"]["peak_bytes"], report["memory"]["estimated_seconds"]
    for unit in (*report["units"], *(unit for stage in report["prior"] for unit in stage["units"])):
        del unit["seconds"], unit["peak_memory_bytes"]
    return report


def test_other_data_of_a_stage_are_another_run(
    tiny_llama: Path, protocol: Protocol, calibration_file: Path, other_texts: Path, tmp_path: Path
) -> None:
    config = protocol(text([([SMOOTH], other_texts)], DYNAMIC, more=f"  dataset: {calibration_file}\n"))
    snapshots = Snapshots(tmp_path / "whole.partial", tmp_path, 3)
    run(tiny_llama, tmp_path / "whole", config, snapshots)
    snapshots.taken[4].rename(tmp_path / "out.partial")
    other_texts.write_text('{"text": "Something else."}\n', encoding="utf-8")
    with pytest.raises(UsageError, match="was not the same") as error:
        run(tiny_llama, tmp_path / "out", config)
    assert [str(one) for one in error.value.diagnostics] == ["the calibration data have changed"]


@pytest.mark.parametrize(("journal", "error"), [(lambda line: None, SaveError), (None, RankError)])
def test_files_of_a_stage_that_are_gone_are_missed(journal: Any, error: type[ModelSlimError], tmp_path: Path) -> None:
    with pytest.raises(error, match="prior/0: "):
        Overlay(tmp_path / "prior", [FinishedStage(0, {}, [])], journal)


def test_only_linears_of_the_core_can_be_handed_to_the_next_stage(tmp_path: Path) -> None:
    class Special(QuantizedLinear):
        pass

    spec = QuantSpec(TensorSpec("int8", "per_channel"))
    weight = QuantizedTensor(torch.zeros(2, 4, dtype=torch.int8), torch.ones(2, 1), None, spec.weight)
    with pytest.raises(QuantizationError, match=r"unit\.q: a Special cannot be handed to the next stage"):
        StageWriter(tmp_path).put("unit", {"unit.q": Special(weight, spec)}, {}, {}, [])


# What is handed over

ALGORITHMS = '''
import torch
from PIL import Image, ImageDraw

from modelslim.api import Algorithm, ChannelRange


def norm(unit):
    return unit.modules[f"{unit.name}.input_layernorm"]


class Measure(Algorithm):
    """Hands over the largest magnitude of every channel that q_proj reads."""

    hands_over = frozenset({"acme"})

    @classmethod
    def from_config(cls, config):
        return cls()

    def needs(self, unit):
        return {name: frozenset({ChannelRange}) for name in unit.linears if name.endswith("q_proj")}

    def apply(self, unit, statistics):
        acme = unit.context["acme"]
        for name in self.needs(unit):
            found = statistics.get(name, ChannelRange)
            acme[unit.name] = torch.maximum(found.maximum, -found.minimum)
            acme["units"] = [*acme.get("units", []), unit.name]
        return {}


class Use(Algorithm):
    """Writes what was handed over where it can be seen."""

    takes_over = frozenset({"acme"})

    @classmethod
    def from_config(cls, config):
        return cls()

    def edits(self, unit):
        return frozenset({f"{unit.name}.input_layernorm.weight"} if unit.name else ())

    def apply(self, unit, statistics):
        if unit.name:
            acme = unit.context["acme"]
            assert acme["units"] == [f"model.layers.{layer}" for layer in range(3)]
            norm(unit).weight.copy_(acme[unit.name])
        return {}


class Write(Use):
    """Changes what it may only read."""

    def apply(self, unit, statistics):
        unit.context["acme"]["units"] = []
'''


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The algorithms above, installed."""
    site = tmp_path / "site"
    info, package = site / "acme_stages-1.dist-info", site / "acme_stages"
    info.mkdir(parents=True)
    package.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-stages\nVersion: 1\n")
    (package / "__init__.py").write_text(ALGORITHMS)
    lines = ["[modelslim.algorithms]"]
    for name in ("measure", "use", "write"):
        lines.append(f"acme_{name} = acme_stages:{name.title()}")
        schema = {
            "type": "object",
            "required": ["type"],
            "additionalProperties": False,
            "properties": {"type": {"const": f"acme_{name}", "description": "Its name."}},
        }
        (package / f"acme_{name}.schema.json").write_text(json.dumps(schema))
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(site)
    yield import_module("acme_stages")
    del sys.modules["acme_stages"]


def largest_inputs(model: Path, texts: Iterable[str]) -> dict[str, Tensor]:
    """The largest magnitude of each channel that the q_proj of each layer reads, in transformers itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def see(_module: Any, args: tuple[Tensor, ...]) -> None:
            seen = args[0].abs().amax((0, 1))
            found[name] = torch.maximum(found.get(name, seen), seen)

        return see

    for number, layer in enumerate(whole.model.layers):
        layer.self_attn.q_proj.register_forward_pre_hook(watch(f"model.layers.{number}"))
    with torch.no_grad():
        for line in texts:
            whole(input_ids=tokenizer(line, return_tensors="pt").input_ids)
    return found


def test_a_stage_hands_over_to_the_next_also_after_an_interruption(
    tiny_llama: Path, protocol: Protocol, other_texts: Path, tmp_path: Path, acme: Any
) -> None:
    config = protocol(text([(["{type: acme_measure}"], other_texts)], "{type: acme_use}", DYNAMIC))
    snapshots = Snapshots(tmp_path / "out.partial", tmp_path, 3)
    run(tiny_llama, tmp_path / "out", config, snapshots)
    out = tensors(tmp_path / "out")
    for name, expected in largest_inputs(tiny_llama, TEXTS).items():
        assert torch.equal(out[f"{name}.input_layernorm.weight"], expected), name
    for number in (2, 3, len(snapshots.taken) - 1):
        snapshots.taken[number].rename(tmp_path / f"again{number}.partial")
        run(tiny_llama, tmp_path / f"again{number}", config)
        assert digests(tmp_path / f"again{number}") == digests(tmp_path / "out"), number


def test_what_was_handed_over_can_only_be_read(
    tiny_llama: Path, protocol: Protocol, other_texts: Path, tmp_path: Path, acme: Any
) -> None:
    config = protocol(text([(["{type: acme_measure}"], other_texts)], "{type: acme_write}", DYNAMIC))
    with pytest.raises(PluginError, match="context 'acme' can only be read here"):
        run(tiny_llama, tmp_path / "out", config)


def test_what_nobody_hands_over_and_what_nobody_could_read_is_refused(
    tiny_llama: Path, protocol: Protocol, calibration_file: Path, acme: Any
) -> None:
    stages = [(["{type: acme_use}"], None)]
    file = protocol(text(stages, "{type: acme_measure}", DYNAMIC, more=f"  dataset: {calibration_file}\n"))
    assert [(problem.path, problem.message) for problem in refused(tiny_llama, file)] == [
        ("spec.prior[0].process[0]", "needs 'acme' of the context, which no earlier stage hands over"),
        ("spec.process[0]", "hands over 'acme' to later stages, and there is none behind the main one"),
    ]


def test_a_context_comes_back_from_the_disk_as_it_was(tmp_path: Path) -> None:
    context = Context()
    tensor = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    space = context.view({"one"}, ())["one"]
    space["tensor"] = tensor.t()
    space["plain"] = {"a": [1, 2.5, None, True, "x", (tensor[0], {})], "tensor": "a word", "inf": float("inf")}
    tensor.zero_()
    space["gone"] = 1
    del space["gone"]
    context.save(tmp_path / "context")
    for held in (context, Context.load(tmp_path / "context")):
        seen = held.view((), {"one"})["one"]
        assert list(seen) == ["tensor", "plain"] and len(seen) == 2
        assert torch.equal(seen["tensor"], torch.tensor([[0, 3], [1, 4], [2, 5]], dtype=torch.bfloat16))
        plain = seen["plain"]
        row = plain["a"][5].pop(0)
        assert torch.equal(row, torch.tensor([0, 1, 2], dtype=torch.bfloat16))
        assert plain == {"a": [1, 2.5, None, True, "x", [{}]], "tensor": "a word", "inf": float("inf")}
        assert len(seen["plain"]["a"][5]) == 2
        with pytest.raises(PluginError, match="only be read"):
            seen["tensor"] = 1
        with pytest.raises(PluginError, match="only be read"):
            del seen["tensor"]
    for value in ({1, 2}, {1: 2}, [object()], b"bytes"):
        with pytest.raises(PluginError, match=r"context 'one', 'bad': .* cannot be handed over"):
            space["bad"] = value
    with pytest.raises(PluginError, match="is no string"):
        space[1] = 2  # type: ignore[index]


# The plan


def refused(model: Path, file: Path) -> list[Any]:
    with pytest.raises(ProtocolError) as caught:
        make_plan(model, file, device="cpu")
    return list(caught.value.diagnostics)


def test_mistakes_in_stages_are_told_with_their_places(
    tiny_llama: Path, protocol: Protocol, calibration_file: Path
) -> None:
    stages = [
        ([DYNAMIC], "nowhere.jsonl"),
        ([only(STATIC, "*mpl*"), only(STATIC, "*self_attn*"), SMOOTH], "there.jsonl"),
    ]
    file = protocol(text(stages, only(STATIC, "*mlp*"), more=f"  dataset: {calibration_file}\n"))
    found = [(problem.path, problem.line, problem.message) for problem in refused(tiny_llama, file)]
    changed = "changes model.layers.0.input_layernorm.weight"
    places = [(path, line) for path, line, _ in found]
    assert places == [
        ("spec.prior[0].dataset", 5),
        ("spec.prior[1].process[0].include[0]", 6),
        ("spec.prior[1].process[1]", 6),
        ("spec.prior[1].process[2]", 6),
        ("spec.prior[1].dataset", 7),
        ("spec.process[0]", 9),
    ]
    words = [message for _, _, message in found]
    assert "'nowhere.jsonl': no such file" in words[0] and "'there.jsonl': no such file" in words[4]
    assert "matches no linear" in words[1]
    assert "which spec.prior[0].process[0] quantizes already" in words[2]
    assert changed not in words[3] and "which spec.prior[0].process[0] has quantized by then" in words[3]
    assert "which spec.prior[0].process[0] quantizes already" in words[5]


def test_plan_shows_the_stages(
    tiny_llama: Path,
    protocol: Protocol,
    calibration_file: Path,
    other_texts: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stages = [([SMOOTH], other_texts), ([only(GPTQ, "*self_attn*")], None), ([only(DYNAMIC, "*down_proj")], None)]
    rest = only(STATIC, "*gate_proj", "*up_proj")
    file = protocol(text(stages, rest, more=f"  dataset: {calibration_file}\n"))
    options = ["plan", "--model_path", str(tiny_llama), "--config_path", str(file), "--device", "cpu"]
    assert main([*options, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [(one["entry"], one["samples"], one["forward_passes"]) for one in data["prior"]] == [
        ("spec.prior[0], line 4", 3, 1),
        ("spec.prior[1], line 6", 6, 2),
        ("spec.prior[2], line 7", 0, 0),
    ]
    assert [one["dataset"] and Path(one["dataset"]).name for one in data["prior"]] == [
        "other.jsonl",
        "calibration.jsonl",
        None,
    ]
    assert data["prior"][0]["algorithms"] == ["spec.prior[0].process[0], line 4"]
    why = {row["pattern"].rpartition(".")[2]: row["why"] for row in data["weights"] if row["scheme"] != "FLOAT"}
    assert why["q_proj"] == "spec.prior[1].process[0], line 6"
    assert why["gate_proj"] == "spec.process[0], line 9"
    assert main(options) == 0
    shown = capsys.readouterr().out
    assert "one pass over 3 samples of other.jsonl" in shown and "2 passes over 6 samples of calibration.jsonl" in shown


def test_stages_work_on_one_instance_of_the_model(
    tiny_llama: Path,
    protocol: Protocol,
    calibration_file: Path,
    other_texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []
    init = Session.init_model

    def watched(self: Session, device: str) -> Any:
        made.append(device)
        return init(self, device)

    file = protocol(text([([SMOOTH], other_texts)], STATIC, more=f"  dataset: {calibration_file}\n"))
    plan = make_plan(tiny_llama, file, device="cpu")
    monkeypatch.setattr(Session, "init_model", watched)
    run_plan(plan, tmp_path / "out")
    assert made == ["cpu"]


# Images

VISION = Path(__file__).parents[1] / "models" / "qwen3-vl-moe-tiny"


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Two sets of images."""
    folders = []
    for number, colours in enumerate((["red", "green"], ["blue", "white", "black"])):
        folder = tmp_path / f"images{number}"
        folder.mkdir()
        for width, colour in enumerate(colours, start=2):
            image = Image.new("RGB", (32 * width, 64), colour)
            ImageDraw.Draw(image).ellipse((4, 8, 40, 50), fill="yellow", outline="purple")
            image.save(folder / f"{colour}.png")
        folders.append(folder)
    return folders


def test_stages_of_a_multimodal_model_see_images_of_their_own(
    protocol: Protocol, images: list[Path], tmp_path: Path
) -> None:
    tower, language = only(STATIC, "*visual*"), only(STATIC, "*language_model*self_attn*")
    smooth = only(SMOOTH, "*language_model*")
    tail = f"  dataset: {images[1]}\n  default_text: What is this?\n"

    def config(prior: Iterable[tuple[Iterable[str], Path]], *entries: str, more: str = tail) -> Path:
        return protocol(text(prior, *entries, more=more).replace("modelslim_v1", "multimodal_vlm_modelslim_v1"))

    stages = config([([smooth], images[0]), ([tower], images[0])], language)
    snapshots = Snapshots(tmp_path / "out.partial", tmp_path, 0)
    report = run(VISION, tmp_path / "out", stages, snapshots)
    first = tail.replace(str(images[1]), str(images[0]))
    run(VISION, tmp_path / "tower", config([], smooth, tower, more=first))
    run(VISION, tmp_path / "smoothed", config([([smooth], images[0])], language))
    out, alone, smoothed = (tensors(tmp_path / name) for name in ("out", "tower", "smoothed"))
    kept = {name for name in out if "visual" in name}
    assert kept and all(torch.equal(out[name], alone[name]) for name in kept)
    scales = {name for name in out if name.endswith("input_scale")} - kept
    assert scales and any(not torch.equal(out[name], smoothed[name]) for name in scales)
    assert all(torch.equal(out[name], smoothed[name]) for name in out.keys() - kept if name.endswith("weight"))
    assert [stage["samples"] for stage in report["prior"]] == [2, 2] and report["samples"] == 3
    assert report["prior"][0]["units"][0]["tokens"] != report["units"][0]["tokens"]
    # What was interrupted in the main stage goes on behind both.
    snapshots.taken[-2].rename(tmp_path / "again.partial")
    run(VISION, tmp_path / "again", stages)
    assert digests(tmp_path / "again") == digests(tmp_path / "out")
