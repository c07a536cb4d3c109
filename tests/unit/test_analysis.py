# SPDX-License-Identifier: Apache-2.0
"""Analysis: moments against float64, scores against the model run whole, patterns that name what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modelslim.analysis.moments import Moments
from modelslim.analysis.run import analyze
from modelslim.analysis.scores import Analysis, Score, as_patterns, rank, worst
from modelslim.dataset import read_samples
from modelslim.errors import ProtocolError, UsageError
from modelslim.patterns import matches_name


def _excess(x: Tensor) -> float:
    distance = x.double().flatten() - x.double().mean()
    return float(distance.pow(4).mean() / distance.square().mean() ** 2 - 3)


def _parts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    far = 1000 + torch.randn(40, 64, generator=generator)  # a mean that would cancel sums of plain powers
    heavy = torch.randn(7, 64, generator=generator) ** 5
    return [far.bfloat16(), heavy.bfloat16(), torch.randn(301, 64, generator=generator).exp().bfloat16()]


def test_moments_of_batches_and_of_merged_parts_are_those_of_all_values() -> None:
    parts, whole, merged = _parts(), Moments(), Moments()
    for part in parts:
        whole.update(part)
        other = Moments()
        other.update(part)
        merged.merge(other)
    values = torch.cat([part.flatten() for part in parts]).double()
    for one in (whole, merged):
        assert one.kurtosis == pytest.approx(_excess(values), rel=1e-6)
        assert one.std == pytest.approx(float(values.std(correction=0)), rel=1e-7)
        assert one.peak is not None and float(one.peak) == float(values.abs().max())
        assert one.count == len(values)


def test_moments_do_not_lose_a_spread_beside_a_large_mean() -> None:
    x = (4096 + torch.randn(512, 16, generator=torch.Generator().manual_seed(1))).float()
    moments = Moments()
    moments.update(x)
    assert moments.std == pytest.approx(float(x.double().std(correction=0)), rel=1e-5)
    assert moments.kurtosis == pytest.approx(_excess(x), abs=1e-4)


def test_moments_of_nothing_and_of_equal_values_have_no_kurtosis() -> None:
    empty, equal = Moments(), Moments()
    empty.update(torch.zeros(0, 4))
    equal.update(torch.full((3, 4), 2.0))
    for one in (empty, equal):
        assert one.kurtosis != one.kurtosis  # NaN


def _inputs(path: Path, texts: Path) -> dict[str, list[Tensor]]:
    """Inputs of every linear, by transformers itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(path)
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda _module, args: seen.setdefault(name, []).append(args[0].detach().flatten())

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(keep(name))
    with torch.no_grad():
        for text in read_samples(texts):
            model(**tokenizer(text, return_tensors="pt"))
    return seen


def _brute(metric: str, values: Tensor) -> float:
    values = values.double()
    if metric == "kurtosis":
        return _excess(values)
    if metric == "std":
        return float(values.abs().max() / values.std(correction=0))
    low, high = (float(values.quantile(share)) for share in (0.25, 0.75))
    return 2 * float(values.abs().max()) / 254 / (high - low)


@pytest.mark.parametrize("metric", ["kurtosis", "std", "quantile"])
def test_scores_of_linears_are_those_of_their_inputs_in_transformers(
    metric: str, tiny_llama: Path, calibration_file: Path
) -> None:
    result = analyze(
        tiny_llama, "linear", metric=metric, dataset=str(calibration_file), device="cpu", pattern=["*", "lm_head"]
    )
    seen = _inputs(tiny_llama, calibration_file)
    assert {one.name for one in result.scores} == set(seen)
    for one in result.scores:
        # Quartiles are those of a sample of the tokens.
        accuracy = 0.05 if metric == "quantile" else 1e-5
        assert one.score == pytest.approx(_brute(metric, torch.cat(seen[one.name])), rel=accuracy), one.name
    scores = [one.score for one in result.scores]
    assert scores == sorted(scores, key=lambda score: -(score or 0))
    assert result.samples == len(read_samples(calibration_file))


def test_every_expert_has_its_own_score(tiny_moe: Path, calibration_file: Path) -> None:
    result = analyze(tiny_moe, "linear", dataset=str(calibration_file), device="cpu", pattern=["*experts*"])
    assert len(result.scores) == 2 * 4 * 3
    by_name = {one.name: one.score for one in result.scores}
    expert = "model.layers.0.mlp.experts.{}.{}"
    assert by_name[expert.format(1, "gate_proj")] == by_name[expert.format(1, "up_proj")]
    assert by_name[expert.format(1, "gate_proj")] != by_name[expert.format(2, "gate_proj")]


def _mxfp4(x: Tensor) -> Tensor:
    """Rounding to float4 in blocks of 32 with a power of two for a scale, by a search over all values."""
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    grid = torch.cat([-grid.flip(0), grid])
    blocks = x.double().reshape(-1, 32)
    peak = blocks.abs().amax(1, keepdim=True)
    scale = torch.where(peak > 0, 2.0 ** (peak.log2().floor() - 2), torch.ones_like(peak))
    steps = (blocks / scale).unsqueeze(-1)
    return (grid[(steps - grid).abs().argmin(-1)] * scale).reshape(x.shape).float()


@pytest.mark.parametrize("metric", ["mse_layer_wise", "mse_model_wise"])
def test_scores_of_layers_are_what_one_quantized_layer_does(
    metric: str, tiny_llama: Path, calibration_file: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = analyze(
        tiny_llama, "layer", metric=metric, dataset=str(calibration_file), device="cpu", quant_modules=["*down_proj"]
    )
    found = {one.name: one.score for one in result.scores}
    assert set(found) == {f"model.layers.{index}" for index in range(3)}
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    sums = {name: [0.0, 0] for name in found}

    def outputs(layer: int, text: str) -> Tensor:
        seen: list[Tensor] = []
        hook = model.model.layers[layer].register_forward_hook(lambda _m, _a, output: seen.append(output))
        logits = model(**tokenizer(text, return_tensors="pt")).logits
        hook.remove()
        return seen[0] if metric == "mse_layer_wise" else logits

    with torch.no_grad():
        for text in read_samples(calibration_file):
            for index in range(3):
                expected = outputs(index, text)
                linear = model.model.layers[index].mlp.down_proj
                weight = linear.weight.data
                linear.weight.data = _mxfp4(weight).bfloat16()
                hook = linear.register_forward_pre_hook(lambda _m, args: (_mxfp4(args[0]).bfloat16(),))
                y = outputs(index, text)
                hook.remove()
                linear.weight.data = weight
                total = sums[f"model.layers.{index}"]
                total[0] += float((y.double() - expected.double()).square().sum())
                total[1] += y.numel()
    for name, (noise, count) in sums.items():
        assert found[name] == pytest.approx(noise / count, rel=0.1), name  # bfloat16 adds noise of its own


def test_attentions_are_scored_by_what_rounded_keys_and_values_do(tiny_llama: Path, calibration_file: Path) -> None:
    result = analyze(tiny_llama, "attn", dataset=str(calibration_file), device="cpu", topk=1)
    assert {one.name for one in result.scores} == {f"model.layers.{index}.self_attn" for index in range(3)}
    assert all(one.score is not None and 0 < one.score < 1e-2 for one in result.scores)
    assert result.exclude == [f"{result.scores[0].name}.*"]


@pytest.mark.parametrize("metric", ["mse_layer_wise", "mse_model_wise"])
def test_layers_of_experts_are_scored(metric: str, tiny_moe: Path, calibration_file: Path) -> None:
    result = analyze(tiny_moe, "layer", metric=metric, dataset=str(calibration_file), device="cpu")
    assert {one.name for one in result.scores} == {"model.layers.0", "model.layers.1"}
    alone = analyze(
        tiny_moe, "layer", metric=metric, dataset=str(calibration_file), device="cpu", quant_modules=["*experts*"]
    )
    for whole, experts in zip(*(sorted(one.scores, key=lambda s: s.name) for one in (result, alone)), strict=True):
        assert whole.score is not None and experts.score is not None and 0 < experts.score < whole.score


def test_what_does_not_fit_is_refused(tiny_llama: Path, calibration_file: Path, llama_factory: Any) -> None:
    with pytest.raises(UsageError, match="'\\*dwon_proj' matches no linear"):
        analyze(tiny_llama, "linear", dataset=str(calibration_file), device="cpu", pattern=["*dwon_proj"])
    with pytest.raises(UsageError, match="has no metric 'mse'"):
        analyze(tiny_llama, "linear", metric="mse", dataset=str(calibration_file), device="cpu")
    odd = llama_factory(intermediate_size=80)
    with pytest.raises(ProtocolError, match="80 inputs"):
        analyze(odd, "layer", dataset=str(calibration_file), device="cpu")


def test_equal_scores_share_a_rank_and_are_taken_together() -> None:
    scores = rank([Score("a", 1.0), Score("q", 3.0), Score("k", 3.0), Score("n", None), Score("b", float("nan"))])
    assert [one.name for one in scores] == ["q", "k", "a", "n", "b"]
    analysis = Analysis("linear", "std", "", 1, scores, [], [])
    assert [rank for rank, _ in analysis.ranked()] == [1, 1, 2, 3, 3]
    assert worst(scores, 1) == ["q", "k"]
    assert worst(scores, 9) == ["q", "k", "a"]


def test_patterns_match_what_is_meant_and_nothing_else() -> None:
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    names = [f"model.layers.{index}.{part}" for index in range(13) for part in parts]
    experts = [f"model.layers.{index}.mlp.experts.{one}.up_proj" for index in (13, 14) for one in range(3)]
    everything = [*names, *experts, "lm_head", "visual.blocks.1.qkv"]
    chosen = [*names[4:7], names[3], names[47], *experts[:3], experts[4], "lm_head", *names[44:47]]
    patterns = as_patterns(chosen, everything)
    matched = {name for name in everything if any(matches_name(name, pattern) for pattern in patterns)}
    assert matched == set(chosen)
    assert "model.layers.{1,11}.self_attn.{q_proj,k_proj,v_proj}" in patterns
    assert "model.layers.13.mlp.experts.*" in patterns
    assert len(patterns) == 5


def test_patterns_of_very_many_layers_stay_within_what_braces_can_hold() -> None:
    names = [f"model.layers.{index}.mlp.{part}" for index in range(700) for part in ("up_proj", "gate_proj")]
    patterns = as_patterns(names, names)
    assert {name for name in names if any(matches_name(name, pattern) for pattern in patterns)} == set(names)
