# SPDX-License-Identifier: Apache-2.0
"""Perplexity and KL of a saved checkpoint equal a direct computation with transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modelslim.errors import DatasetError, ModelError, ModelSlimError
from modelslim.evaluation import Evaluation, evaluate
from modelslim.run import quantize
from modelslim.saved import load_model

WINDOW = 50

Protocol = Callable[[str], Path]
Saved = Callable[[Path, str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Saved:
    """``saved(model, name of a protocol)`` -> the quantized checkpoint, made once."""
    made: dict[tuple[Path, str], Path] = {}

    def make(model: Path, name: str) -> Path:
        if (model, name) not in made:
            folder = tmp_path_factory.mktemp("saved")
            (folder / "protocol.yaml").write_text(request.getfixturevalue(name))
            quantize(model, folder / "out", folder / "protocol.yaml", device="cpu")
            made[model, name] = folder / "out"
        return made[model, name]

    return make


@pytest.fixture(scope="module")
def text(calibration_texts: tuple[str, ...]) -> str:
    return " ".join(reversed(calibration_texts))


class Dynamic(nn.Module):
    """An int8 linear that rounds every token by its own largest value, written out."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight64 = weight.double()

    def forward(self, x: Tensor) -> Any:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return ((x / scale).round().clamp(-128, 127).double() * scale @ self.weight64.t()).float()


def direct_model(model: Path, result: Path | None = None) -> Any:
    """The model in float32 by transformers alone; quantized linears from the tensors of ``result``, by hand."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tensors = {}
    for file in sorted((result or model).glob("*.safetensors")):
        tensors.update(load_file(file))
    for name in [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]:
        codes, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        assert codes.dtype == torch.int8 and scale.shape == (codes.shape[0], 1)
        module.get_submodule(name).weight.data = codes.float() * scale.float()
    return module


def direct(
    model: Path,
    float_module: Any,
    quantized_module: Any,
    text: str,
    window: int = WINDOW,
    max_tokens: int | None = None,
) -> Evaluation:
    """The definitions, with plain torch over the whole windows, summed in float64."""
    from transformers import AutoTokenizer

    ids = torch.tensor([AutoTokenizer.from_pretrained(model)(text)["input_ids"][:max_tokens]])
    kl, losses, agreements = [], [[], []], []  # type: ignore[var-annotated]
    for start in range(0, ids.shape[1], window):
        part = ids[:, start : start + window]
        if part.shape[1] < 2:
            continue
        with torch.no_grad():
            logits = [module(part).logits[0].double() for module in (float_module, quantized_module)]
        log_p, log_q = (values - values.logsumexp(-1, keepdim=True) for values in logits)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        agreements.append(log_p.argmax(-1) == log_q.argmax(-1))
        for column, log in enumerate((log_p, log_q)):
            losses[column] += [-log[position, part[0, position + 1]] for position in range(part.shape[1] - 1)]
    ppl = [float(torch.stack(values).mean().exp()) for values in losses]
    all_kl, agreed = torch.cat(kl), torch.cat(agreements).double()
    return Evaluation(float(all_kl.mean()), ppl[0], ppl[1], len(all_kl), float(agreed.mean()))


def assert_close(ours: Evaluation, expected: Evaluation) -> None:
    assert ours.tokens == expected.tokens
    assert ours.kl == pytest.approx(expected.kl, rel=1e-4, abs=1e-7)  # log-probabilities are float32
    assert ours.float_perplexity == pytest.approx(expected.float_perplexity, rel=1e-5)
    assert ours.quantized_perplexity == pytest.approx(expected.quantized_perplexity, rel=1e-5)
    assert ours.top1_agreement == pytest.approx(expected.top1_agreement)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_tied"])
def test_weight_only_quantization_is_measured_as_transformers_measures_it(
    name: str, request: pytest.FixtureRequest, saved: Saved, text: str
) -> None:
    model = request.getfixturevalue(name)
    result = saved(model, "w8a16")
    expected = direct(model, direct_model(model), direct_model(model, result), text)
    assert expected.kl > 1e-5, "the models must differ, or the test shows nothing"
    assert_close(evaluate(result, model, text, window=WINDOW, device="cpu"), expected)


def test_activations_rounded_per_token_are_measured(tiny_llama: Path, saved: Saved, text: str) -> None:
    result = saved(tiny_llama, "w8a8_dynamic")
    quantized = direct_model(tiny_llama, result)
    for name, module in list(quantized.named_modules()):
        if name.endswith("_proj"):
            quantized.set_submodule(name, Dynamic(module.weight.data))
    expected = direct(tiny_llama, direct_model(tiny_llama), quantized, text)
    ours = evaluate(result, tiny_llama, text, window=WINDOW, device="cpu")
    assert ours.kl > 2 * evaluate(saved(tiny_llama, "w8a16"), tiny_llama, text, window=WINDOW, device="cpu").kl
    # A value near a tie may be rounded the other way, which changes one code in thousands.
    assert ours.kl == pytest.approx(expected.kl, rel=0.02)
    assert ours.quantized_perplexity == pytest.approx(expected.quantized_perplexity, rel=1e-3)


def test_a_model_that_int8_holds_exactly_has_no_divergence(
    tiny_llama: Path, tmp_path: Path, protocol: Protocol, w8a16: str, text: str
) -> None:
    model = tmp_path / "exact"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            codes = torch.randint(-127, 128, tensor.shape, generator=generator)
            codes[:, 0] = 127  # so that the scale is the power of two below
            tensors[name] = (codes * 2.0**-9).to(torch.bfloat16)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    quantize(model, tmp_path / "out", protocol(w8a16), device="cpu")
    result = evaluate(tmp_path / "out", model, text, window=WINDOW, device="cpu")
    assert result.kl == pytest.approx(0, abs=1e-9)
    assert result.quantized_perplexity == pytest.approx(result.float_perplexity, rel=1e-9)
    assert result.top1_agreement == 1
    whole = load_model(tmp_path / "out", model, device="cpu")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(whole(ids).logits, load_model(model, device="cpu")(ids).logits)


def test_the_windows_are_independent_and_a_rest_of_one_token_is_dropped(
    tiny_llama: Path, saved: Saved, text: str, tiny_tokenizer: Any
) -> None:
    result = saved(tiny_llama, "w8a16")
    count = len(tiny_tokenizer(text)["input_ids"])
    for window, tokens in ((count, count), (count - 1, count - 1), (10**6, count)):
        assert evaluate(result, tiny_llama, text, window=window, device="cpu").tokens == tokens
    modules = direct_model(tiny_llama), direct_model(tiny_llama, result)
    for window, max_tokens in ((2, 4), (3, 10)):
        ours = evaluate(result, tiny_llama, text, window=window, max_tokens=max_tokens, device="cpu")
        assert_close(ours, direct(tiny_llama, *modules, text, window, max_tokens))


def test_no_more_than_max_tokens_are_read(tiny_llama: Path, saved: Saved, text: str) -> None:
    result = saved(tiny_llama, "w8a16")
    limited = evaluate(result, tiny_llama, text, window=16, max_tokens=40, device="cpu")
    assert limited.tokens == 40
    assert limited != evaluate(result, tiny_llama, text, window=16, device="cpu")


def test_many_rows_are_compared_in_parts(
    tiny_llama: Path, saved: Saved, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = saved(tiny_llama, "w8a16")
    whole = evaluate(result, tiny_llama, text, window=WINDOW, device="cpu")
    monkeypatch.setattr("modelslim.evaluation._ROWS", 7)
    assert_close(evaluate(result, tiny_llama, text, window=WINDOW, device="cpu"), whole)


def test_the_model_s_own_dtype_can_be_used(tiny_llama: Path, saved: Saved, text: str) -> None:
    result = saved(tiny_llama, "w8a16")
    wide = evaluate(result, tiny_llama, text, window=WINDOW, device="cpu")
    narrow = evaluate(result, tiny_llama, text, window=WINDOW, dtype="model", device="cpu")
    assert narrow != wide
    assert narrow.float_perplexity == pytest.approx(wide.float_perplexity, rel=0.05)


@pytest.mark.parametrize("short", ["", "  \n ", "a"])
def test_a_text_too_short_is_refused(tiny_llama: Path, saved: Saved, short: str) -> None:
    with pytest.raises(DatasetError, match="text"):
        evaluate(saved(tiny_llama, "w8a16"), tiny_llama, short, device="cpu")


def test_a_checkpoint_of_no_installed_format_is_refused(tiny_llama: Path, text: str) -> None:
    with pytest.raises(ModelError, match="no installed saver recognizes this") as caught:
        evaluate(tiny_llama, tiny_llama, text, device="cpu")
    assert "ascendv1_saver" in caught.value.hint


def test_another_float_model_is_refused(
    tiny_llama: Path, llama_factory: Callable[..., Path], saved: Saved, text: str
) -> None:
    for other in (llama_factory(num_hidden_layers=2), llama_factory(num_hidden_layers=4)):
        with pytest.raises(ModelSlimError):
            evaluate(saved(tiny_llama, "w8a16"), other, text, device="cpu")


def test_a_damaged_result_is_refused(tiny_llama: Path, saved: Saved, text: str, tmp_path: Path) -> None:
    copy = tmp_path / "damaged"
    shutil.copytree(saved(tiny_llama, "w8a16"), copy)
    (shard,) = copy.glob("*.safetensors")
    with shard.open("r+b") as stream:
        stream.truncate(shard.stat().st_size - 1)
    with pytest.raises(ModelError, match="truncated"):
        evaluate(copy, tiny_llama, text, device="cpu")
