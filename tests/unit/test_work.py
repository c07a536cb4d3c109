# SPDX-License-Identifier: Apache-2.0
"""The work on a unit: statistics that follow a rescaling, passes, edited weights, propagation, quality, fallback."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from modelslim import activations
from modelslim.cli.quant import notes as said_by_the_command
from modelslim.errors import ProtocolError
from modelslim.plan import make_plan
from modelslim.plan_table import forward_passes
from modelslim.run import run_plan
from modelslim.sampling import choose_samples
from modelslim.saved import load_model
from modelslim.types import ProcessRequest

PLUGIN = '''
from collections import Counter
from modelslim.api import Algorithm, Fallback, Statistic
from modelslim_linear_quant.algorithm import LinearQuant

SCALE = 4.0  # a power of two: exact in every floating type
seen = Counter()

class Seen(Statistic):
    """Counts what passes; cannot follow a rescaling."""
    def __init__(self): self.sum = None
    def update(self, x):
        seen[x.shape[-1]] += 1
        total = x.double().sum()
        self.sum = total if self.sum is None else self.sum + total
    def merge(self, other): raise NotImplementedError

class Fold(Algorithm):
    """Divides the first norm of each layer and multiplies what reads it."""
    rescales = True
    @classmethod
    def from_config(cls, config): return cls()
    def names(self, unit):
        return [n for n in unit.linears if n.endswith(("q_proj", "k_proj", "v_proj"))]
    def edits(self, unit):
        if not unit.name: return frozenset()
        return frozenset([f"{unit.name}.input_layernorm.weight", *(f"{n}.weight" for n in self.names(unit))])
    def apply(self, unit, statistics):
        if not unit.name: return {}
        norm = unit.modules[f"{unit.name}.input_layernorm"]
        norm.weight.data = norm.weight / SCALE
        for name in self.names(unit):
            unit.linears[name].weight.data = unit.linears[name].weight * SCALE
        statistics.rescale(self.names(unit), norm.weight.new_full((norm.weight.shape[0],), SCALE))
        return {}

class Count(Algorithm):
    """Looks at what reaches the first projection."""
    sums = {}
    @classmethod
    def from_config(cls, config): return cls()
    def needs(self, unit):
        return {n: frozenset({Seen}) for n in unit.linears if n.endswith("q_proj")}
    def apply(self, unit, statistics):
        for name in self.needs(unit):
            self.sums[name] = float(statistics.get(name, Seen).sum)
        return {}

class Watch(LinearQuant):
    """linear_quant that keeps what it is shown of every unit: calls, targets, and the outputs on the calls."""
    replays = True
    units = {}
    @classmethod
    def from_config(cls, config):
        return super().from_config({**config, "type": "linear_quant"})
    def apply(self, unit, statistics):
        outputs = [call.module.forward(*call.args, **call.kwargs) for call in unit.calls]
        self.units[unit.name] = unit.calls, unit.targets, outputs
        return super().apply(unit, statistics)

class Falls(LinearQuant):
    """linear_quant, of which everything beyond a bound falls back."""
    @classmethod
    def from_config(cls, config):
        made = super().from_config({k: v for k, v in config.items() if k != "above"} | {"type": "linear_quant"})
        made.fallback = Fallback("relative_error", config["above"])
        return made

class Says(LinearQuant):
    """linear_quant with something to say."""
    @classmethod
    def from_config(cls, config): return super().from_config({**config, "type": "linear_quant"})
    def apply(self, unit, statistics):
        made = super().apply(unit, statistics)
        for name, module in made.items():
            if name.endswith("down_proj"): module.notes = ("it is heavy", "it is wide")
        return made
'''
FIELDS: dict[str, dict[str, Any]] = {
    "fold": {},
    "count": {},
    "watch": {"qconfig": {"type": "object", "description": "x"}, "include": {"type": "array", "description": "x"}},
    "falls": {"above": {"type": "number", "description": "x"}, "qconfig": {"type": "object", "description": "x"}},
    "says": {"qconfig": {"type": "object", "description": "x"}},
}
"""Names of the algorithms, with what they take."""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The plugin above, found as if it were installed."""
    site = tmp_path / "site"
    package = site / "acme_work"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PLUGIN)
    for name, fields in FIELDS.items():
        schema = {
            "type": "object",
            "description": "x",
            "required": ["type"],
            "additionalProperties": False,
            "properties": {"type": {"const": name, "description": "x"}, **fields},
        }
        (package / f"{name}.schema.json").write_text(json.dumps(schema))
    info = site / "acme_work-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-work\nVersion: 1\n")
    entries = "\n".join(f"{name} = acme_work:{name.capitalize()}" for name in FIELDS)
    (info / "entry_points.txt").write_text(f"[modelslim.algorithms]\n{entries}\n")
    monkeypatch.syspath_prepend(str(site))
    import acme_work  # type: ignore[import-not-found]

    yield acme_work
    del sys.modules["acme_work"]


STATIC = """\
    - type: linear_quant
      qconfig:
        act: {scope: per_tensor, dtype: int8, symmetric: False, method: minmax}
        weight: {scope: per_channel, dtype: int8, symmetric: True, method: minmax}
"""
Run = Callable[..., tuple[dict[str, Tensor], dict[str, Any], Path]]


@pytest.fixture
def run(tiny_llama: Path, protocol: Callable[[str], Path], calibration_file: Path, tmp_path: Path) -> Run:
    """Quantize the tiny model with these processors; tensors of the result, report and folder."""

    def quantize(process: str, more: str = "") -> tuple[dict[str, Tensor], dict[str, Any], Path]:
        text = f"apiversion: modelslim_v1\nspec:\n  process:\n{process}  save:\n    - type: ascendv1_saver\n"
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        plan = make_plan(tiny_llama, protocol(f"{text}  dataset: {calibration_file}\n{more}"), device="cpu")
        assert plan.warnings == []
        report = run_plan(plan, out)
        return {k: v for f in out.glob("*.safetensors") for k, v in load_file(f).items()}, report, out

    return quantize


def source(model: Path) -> dict[str, Tensor]:
    return {k: v for f in model.glob("*.safetensors") for k, v in load_file(f).items()}


def test_statistics_follow_a_fold_and_edited_weights_are_written(plugin: Any, run: Run, tiny_llama: Path) -> None:
    plain, _, _ = run(STATIC)
    folded, report, _ = run("    - type: fold\n" + STATIC)
    original = source(tiny_llama)
    for layer in range(len(report["units"])):
        prefix = f"model.layers.{layer}"
        norm = f"{prefix}.input_layernorm.weight"
        assert torch.equal(folded[norm], original[norm] / plugin.SCALE)
        for part in ("q_proj", "k_proj", "v_proj"):
            name = f"{prefix}.self_attn.{part}"
            assert torch.equal(folded[f"{name}.weight"], plain[f"{name}.weight"])
            assert torch.equal(folded[f"{name}.input_scale"], plain[f"{name}.input_scale"] / plugin.SCALE)
            assert torch.equal(folded[f"{name}.input_offset"], plain[f"{name}.input_offset"])
            assert torch.equal(folded[f"{name}.deq_scale"], plain[f"{name}.deq_scale"])
    assert folded.keys() == plain.keys()


def test_linears_that_stay_float_are_written_as_they_were_edited(plugin: Any, run: Run, tiny_llama: Path) -> None:
    folded, _, out = run("    - type: fold\n" + STATIC + '      include: ["*mlp*"]\n')
    original = source(tiny_llama)
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(folded[name], original[name] * plugin.SCALE)
    model, float_model = load_model(out, tiny_llama, device="cpu"), load_model(tiny_llama, device="cpu")
    ids = torch.arange(3, 20).view(1, -1)
    with torch.no_grad():
        near = model(input_ids=ids).logits - float_model(input_ids=ids).logits
    assert near.abs().max() < 0.1 * float_model(input_ids=ids).logits.abs().max()


def test_smoothing_and_quantization_share_one_pass(plugin: Any, run: Run) -> None:
    run("    - type: count\n    - type: fold\n" + STATIC)
    once = dict(plugin.seen)
    plugin.seen.clear()
    run("    - type: count\n" + STATIC)
    assert dict(plugin.seen) == once  # the fold costs no pass
    assert once


def test_what_cannot_follow_a_fold_is_measured_behind_it(plugin: Any, run: Run) -> None:
    run("    - type: count\n" + STATIC)
    before = dict(plugin.Count.sums)
    run("    - type: fold\n    - type: count\n" + STATIC)
    after = plugin.Count.sums
    assert before.keys() == after.keys()
    for name, total in before.items():
        assert after[name] == pytest.approx(total / plugin.SCALE, rel=1e-6, abs=1e-6)


def ranges_at(model: nn.Module, name: str, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1)))
    with torch.no_grad():
        for ids in inputs:
            model(input_ids=ids)
    handle.remove()
    values = torch.cat(seen).float()
    return values.min(), values.max()


@pytest.mark.parametrize("propagation", ["float", "quantized"])
def test_the_next_layer_is_calibrated_on_the_outputs_that_the_protocol_says(
    propagation: str, run: Run, tiny_llama: Path, calibration_texts: tuple[str, ...]
) -> None:
    from transformers import AutoTokenizer

    result, _, out = run(STATIC, f"  propagation: {propagation}\n")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    inputs = [torch.tensor([tokenizer(text)["input_ids"]]) for text in calibration_texts]
    model = load_model(*((out, tiny_llama) if propagation == "quantized" else (tiny_llama,)), device="cpu")
    other = load_model(*((tiny_llama,) if propagation == "quantized" else (out, tiny_llama)), device="cpu")
    differ = 0
    for layer in (1, 2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        expected = [(high.clamp(min=0) - low.clamp(max=0)) / 255 for low, high in [ranges_at(model, name, inputs)]]
        found = result[f"{name}.input_scale"]
        assert torch.allclose(found, expected[0].view(1), rtol=1e-2)
        low, high = ranges_at(other, name, inputs)
        differ += int(abs(found - (high - low) / 255) > abs(found - expected[0]))
    assert differ


WATCHED = """\
    - type: watch
      qconfig: {act: {dtype: float}, weight: {scope: per_channel, dtype: int8}}
"""


def outputs_at(model: nn.Module, inputs: list[Tensor]) -> dict[str, list[Tensor]]:
    """What every decoder layer returns for each input, from a plain call of the model."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: seen.setdefault(name, []).append(first(output))
        )
        for name in (f"model.layers.{layer}" for layer in range(3))
    ]
    with torch.no_grad():
        for ids in inputs:
            model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen


def first(value: Any) -> Tensor:
    found: Tensor = value if isinstance(value, Tensor) else value[0]
    return found


@pytest.fixture
def token_ids(tiny_llama: Path, calibration_texts: tuple[str, ...]) -> list[Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    return [torch.tensor([tokenizer(text)["input_ids"]]) for text in calibration_texts]


@pytest.mark.parametrize("before", ["", "    - type: fold\n"], ids=["alone", "smoothed"])
@pytest.mark.parametrize("propagation", ["float", "quantized"])
def test_targets_are_what_the_float_model_gives(
    propagation: str, before: str, plugin: Any, run: Run, tiny_llama: Path, token_ids: list[Tensor]
) -> None:
    """To the bit, whatever flows into the unit."""
    _, _, out = run(before + WATCHED, f"  propagation: {propagation}\n")
    expected = outputs_at(load_model(tiny_llama, device="cpu"), token_ids)
    quantized = outputs_at(load_model(out, tiny_llama, device="cpu"), token_ids)
    for layer, (name, (calls, targets, outputs)) in enumerate(plugin.Watch.units.items()):
        if not name:
            continue
        assert len(calls) == len(targets) == len(token_ids)
        for sample, target in enumerate(targets):
            assert torch.equal(first(target), expected[name][sample])
            if propagation == "float":
                assert torch.equal(first(outputs[sample]), first(target)) or before
            if layer:
                shown = first((*calls[sample].args, *calls[sample].kwargs.values()))
                previous = f"model.layers.{layer - 1}"
                right, wrong = (one[previous][sample] for one in (expected, quantized))
                if propagation == "quantized":
                    right, wrong = wrong, right
                assert (shown - right).norm() < 0.2 * (shown - wrong).norm()


@pytest.mark.parametrize(("propagation", "passes"), [("float", 1), ("quantized", 3)])
def test_passes_of_what_replays_are_those_of_the_plan(
    propagation: str,
    passes: int,
    plugin: Any,
    tiny_llama: Path,
    protocol: Callable[[str], Path],
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Float outputs come from the pass that measures, or from one of their own beside the quantized units."""
    text = f"apiversion: modelslim_v1\nspec:\n  process:\n{WATCHED}  save:\n    - type: ascendv1_saver\n"
    more = f"  dataset: {calibration_file}\n  propagation: {propagation}\n"
    plan = make_plan(tiny_llama, protocol(text + more), device="cpu")
    assert forward_passes(plan) == passes
    computed: Counter[str] = Counter()

    def compute(request: ProcessRequest) -> Any:
        computed[request.name] += 1
        return request.module.forward(*request.args, **request.kwargs)

    monkeypatch.setattr(activations, "compute", compute)
    run_plan(plan, tmp_path / "out")
    assert computed["model.layers.1"] == passes * len(plan.samples)


def test_an_algorithm_that_replays_changes_nothing_for_others(plugin: Any, run: Run) -> None:
    """Neither what they measure, outside the units too, nor what is handed on."""
    static = STATIC.replace("include", "") + '      include: ["lm_head"]\n'
    propagation = "  propagation: quantized\n"
    watched, _, _ = run(WATCHED + static, propagation)
    plain, _, _ = run(WATCHED.replace("watch", "linear_quant") + static, propagation)
    assert watched.keys() == plain.keys()
    assert "lm_head.input_scale" in plain
    assert [name for name, tensor in plain.items() if not torch.equal(tensor, watched[name])] == []
    assert {name for name, (calls, _, _) in plugin.Watch.units.items() if calls} == {
        f"model.layers.{layer}" for layer in range(3)
    }


def test_samples_are_as_many_as_are_wanted_evenly_spread(
    plugin: Any, run: Run, monkeypatch: pytest.MonkeyPatch, token_ids: list[Tensor]
) -> None:
    assert len(token_ids) > 3
    monkeypatch.setattr(plugin.Watch, "samples", 2)
    _, report, _ = run(WATCHED)
    assert report["samples"] == 2
    lengths = [first((*call.args, *call.kwargs.values())).shape[1] for call in plugin.Watch.units["model.layers.0"][0]]
    assert lengths == [ids.shape[1] for ids in choose_samples(token_ids, 2)]
    _, report, _ = run(
        WATCHED.replace("    - type: watch\n", '    - type: watch\n      include: ["*mlp*"]\n') + "    - type: count\n"
    )
    assert report["samples"] == len(token_ids)


def test_quality_is_that_of_the_outputs_on_calibration_data(run: Run, tiny_llama: Path) -> None:
    result, report, _ = run(STATIC)
    original = source(tiny_llama)
    for unit in report["units"]:
        assert unit["quality"].keys() == unit["linears"].keys()
        for name, quality in unit["quality"].items():
            weight = original[f"{name}.weight"].double()
            scale = (result[f"{name}.deq_scale"] / result[f"{name}.input_scale"]).double().view(-1, 1)
            rounding = (weight - result[f"{name}.weight"] * scale).norm() / weight.norm()
            assert 0.3 * rounding < quality["relative_error"] < 0.2
            assert quality["snr_db"] == pytest.approx(-20 * math.log10(quality["relative_error"]), abs=0.01)
            assert quality["clipped"] == 0  # the range is that of the same tokens
            assert 0 < quality["tokens"] <= 256


def test_linears_that_come_out_badly_fall_back_together_with_those_of_their_input(
    plugin: Any, run: Run, tiny_llama: Path
) -> None:
    falls = STATIC.replace("linear_quant", "falls")
    result, report, _ = run(falls + "      above: 0.0\n")
    original = source(tiny_llama)
    assert result.keys() == original.keys()
    assert all(torch.equal(result[name], tensor) for name, tensor in original.items())
    assert report["schemes"] == {"FLOAT": sum(len(unit["fell_back"]) for unit in report["units"])}
    _, plain_report, _ = run(STATIC)
    errors = {name: q["relative_error"] for unit in plain_report["units"] for name, q in unit["quality"].items()}
    worst = max((name for name in errors if "k_proj" in name), key=lambda name: errors[name])
    bound = errors[worst] - 1e-6
    result, report, _ = run(falls + f"      above: {bound}\n")
    fallen = {name for unit in report["units"] for name in unit.get("fell_back", {})}
    expected = {name for name, error in errors.items() if error > bound}
    for name in list(expected):
        parent, _, part = name.rpartition(".")
        groups = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("o_proj",), ("down_proj",)]
        expected |= {f"{parent}.{one}" for group in groups if part in group for one in group}
    assert fallen == expected and worst in fallen
    for name in errors:
        assert (result[f"{name}.weight"].dtype == torch.int8) is (name not in fallen)


UP_DOWN = "- {type: iter_smooth, alpha: 0.7, enable_subgraph_type: [up-down, ov]}"


def test_quality_is_that_of_the_linear_as_it_was_when_it_was_quantized(run: Run) -> None:
    """Smoothing divides the outputs of up_proj and v_proj; that is no error of theirs."""
    _, report, _ = run(f"    {UP_DOWN}\n{STATIC}")
    for unit in report["units"]:
        for name, quality in unit.get("quality", {}).items():
            assert quality["relative_error"] < 0.05, name


def test_smoothing_behind_what_quantizes_is_refused(run: Run) -> None:
    with pytest.raises(ProtocolError, match=r"changes .*, which spec\.process\[0\] has quantized by then"):
        run(f"{STATIC}    {UP_DOWN}\n")


SHIFT = "    - {type: iter_smooth, symmetric: false, alpha: 0.5}\n"


def test_bias_that_smoothing_adds_to_a_norm_is_written_and_comes_back(run: Run, tiny_llama: Path) -> None:
    tensors, _, out = run(f"{SHIFT}{STATIC}")
    norms = [key for key in tensors if key.endswith("layernorm.bias")]
    assert norms and all(tensors[key].any() for key in norms)
    ids = torch.arange(1, 40).view(1, -1)
    expected = load_model(tiny_llama, device="cpu")(input_ids=ids).logits.double()

    def error(model: nn.Module) -> float:
        return float((model(input_ids=ids).logits.double() - expected).norm() / expected.norm())

    shifted = load_model(out, tiny_llama, device="cpu")
    plain = load_model(run(f"{SHIFT.replace('false', 'true')}{STATIC}")[2], tiny_llama, device="cpu")
    with torch.no_grad():
        found = error(shifted)
        assert found < 1.5 * error(plain)
        for name, parameter in shifted.named_parameters():
            if name.endswith("layernorm.bias"):
                parameter.zero_()
        assert error(shifted) > 3 * found


def test_added_bias_is_refused_where_the_engine_would_drop_it(run: Run) -> None:
    with pytest.raises(ProtocolError) as caught:
        run(f"{SHIFT}{STATIC.replace('per_tensor', 'per_token').replace('symmetric: False', 'symmetric: True')}")
    (diagnostic,) = caught.value.diagnostics
    assert "smoothing adds one to model.layers.0.self_attn.q_proj" in diagnostic.message
    assert diagnostic.path == "spec.process[1].qconfig"


def test_linear_quant_falls_back_to_another_scheme(run: Run) -> None:
    _, plain, _ = run(STATIC)
    errors = {name: q["relative_error"] for unit in plain["units"] for name, q in unit["quality"].items()}
    worst = max((name for name in errors if "down_proj" in name), key=lambda name: errors[name])
    bound = errors[worst] - 1e-6
    fallback = f"      fallback: {{above: {bound}, to: {{act: {{scope: per_token}}, weight: {{dtype: int8}}}}}}\n"
    result, report, _ = run(STATIC + '      include: ["*down_proj"]\n' + fallback)
    fallen = {name: fate for unit in report["units"] for name, fate in unit.get("fell_back", {}).items()}
    assert fallen == {worst: {"from": "W8A8", "to": "W8A8_DYNAMIC", "relative_error": errors[worst]}}
    assert f"{worst}.weight_scale" in result and f"{worst}.deq_scale" not in result
    assert report["schemes"] == {"W8A8": 2, "W8A8_DYNAMIC": 1}


def test_a_fallback_that_cannot_be_written_is_refused(
    tiny_llama: Path, protocol: Callable[[str], Path], calibration_file: Path
) -> None:
    fallback = "      fallback: {above: 0.1, to: {act: {scope: per_tensor}, weight: {dtype: int4}}}\n"
    text = f"apiversion: modelslim_v1\nspec:\n  process:\n{STATIC}{fallback}  save:\n    - type: ascendv1_saver\n"
    with pytest.raises(ProtocolError) as caught:
        make_plan(tiny_llama, protocol(f"{text}  dataset: {calibration_file}\n"), device="cpu")
    assert [problem.path for problem in caught.value.diagnostics] == ["spec.process[0].fallback.to"]
    assert "int4 weights with static int8 activations" in caught.value.diagnostics[0].message


def test_what_an_algorithm_says_about_a_linear_is_in_the_report(plugin: Any, run: Run) -> None:
    _, report, _ = run(STATIC.replace("linear_quant", "says"))
    said = {name: notes for unit in report["units"] for name, notes in unit.get("notes", {}).items()}
    assert said == {f"model.layers.{layer}.mlp.down_proj": ["it is heavy", "it is wide"] for layer in range(3)}
    assert said_by_the_command(report)[:2] == [
        "model.layers.0.mlp.down_proj: it is heavy",
        "model.layers.0.mlp.down_proj: it is wide",
    ]
    _, report, _ = run(STATIC)
    assert said_by_the_command(report) == []
