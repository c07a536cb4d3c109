# SPDX-License-Identifier: Apache-2.0
"""KL per layer is what transformers gives in float64, and nothing that goes wrong with it ends a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from modelslim.run import quantize
from modelslim.runners import lens

WriteProtocol = Callable[[str], Path]


class Rounded(nn.Module):
    """A linear as the result stores it, in float64: codes and scales of the weight, a static range of the input."""

    def __init__(self, linear: nn.Linear, parts: dict[str, Tensor]) -> None:
        super().__init__()
        self.linear = linear
        self.is_rounded = False
        self.scale, self.offset = parts["input_scale"].double(), parts["input_offset"].double()
        # The bits of float32 numbers as int64, since the model is float32.
        both = parts["deq_scale"].to(torch.int32).view(torch.float32)
        self.w = parts["weight"].double() * (both.double() / self.scale).view(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_rounded:
            return self.linear(x)
        codes = ((x / self.scale).round() + self.offset).clamp(-128, 127)
        return (codes - self.offset) * self.scale @ self.w.t()


def brute_force(model_path: Path, result: Path, texts: list[str]) -> list[float]:
    """The KL behind each layer, all states and logits in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    stored = load_file(next(result.glob("*.safetensors")))
    rounded = []
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and ".layers." in name:
            parts = {key.rpartition(".")[2]: value for key, value in stored.items() if key.startswith(f"{name}.")}
            rounded.append(Rounded(linear, parts))
            model.set_submodule(name, rounded[-1])
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, _args, output: seen.append(output))
    totals = [0.0] * len(model.model.layers)
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids[:, :32]
            assert ids.shape[1] == 32
            states = []
            for is_rounded in (False, True):
                for linear in rounded:
                    linear.is_rounded = is_rounded
                seen.clear()
                model(ids)
                states.append([one[0, 16::2] for one in seen])
            for index, pair in enumerate(zip(*states, strict=True)):
                p, q = (model.lm_head(model.model.norm(one)).log_softmax(-1) for one in pair)
                totals[index] += float((p.exp() * (p - q)).sum(-1).mean()) / len(texts)
    return totals


@pytest.mark.parametrize("propagation", ["float", "quantized"])
def test_it_is_what_transformers_gives_in_float64(
    propagation: str,
    tiny_llama: Path,
    w8a8_static: str,
    calibration_file: Path,
    calibration_texts: tuple[str, ...],
    protocol: WriteProtocol,
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exact = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).save_pretrained(exact)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(exact)
    texts = [" ".join(calibration_texts[:3]), " ".join(calibration_texts[3:])]
    data = tmp_path / "two.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    text = w8a8_static.replace(str(calibration_file), str(data)) + f"  propagation: {propagation}\n"
    report = quantize(exact, tmp_path / "out", protocol(text), device="cpu")
    kl = report["kl"]
    assert (kl["texts"], kl["tokens"], kl["positions"], kl["notes"]) == (2, 64, 16, [])
    assert list(kl["units"]) == [f"model.layers.{number}" for number in range(3)]
    expected = brute_force(exact, tmp_path / "out", texts)
    assert list(kl["units"].values()) == pytest.approx(expected, rel=0.01)
    assert min(expected) > 1e-5
    assert all("kl" not in unit for unit in report["units"])


def test_the_head_of_a_short_type_does_not_drown_a_small_difference(
    tiny_llama: Path, protocol: WriteProtocol, calibration_file: Path, tmp_path: Path
) -> None:
    """8-bit weights alone change the model less than bfloat16 logits are rounded."""
    text = f"""\
apiversion: modelslim_v1
spec:
  process:
    - {{type: linear_quant, qconfig: {{act: {{dtype: float}}, weight: {{dtype: int8, method: gptq}}}}}}
  propagation: float
  save: [{{type: ascendv1_saver}}]
  dataset: {calibration_file}
"""
    report = quantize(tiny_llama, tmp_path / "out", protocol(text), device="cpu")
    assert 0 < max(report["kl"]["units"].values()) < 0.01


def test_what_has_no_value_says_why(
    tiny_llama: Path, w8a8_dynamic: str, w8a8_static: str, protocol: WriteProtocol, tmp_path: Path
) -> None:
    free = quantize(tiny_llama, tmp_path / "free", protocol(w8a8_dynamic), device="cpu")["kl"]
    assert (free["units"], free["notes"]) == ({}, ["nothing was calibrated, so no text passed the model"])
    first = w8a8_static.replace('include: ["*"]', 'include: ["*layers.0.*"]')
    part = quantize(tiny_llama, tmp_path / "part", protocol(first), device="cpu")["kl"]
    assert list(part["units"]) == ["model.layers.0"]
    assert part["notes"] == ["nothing is calibrated behind model.layers.0, and no text passes what lies there"]


def test_a_fault_on_the_way_is_a_note_and_no_end(
    tiny_llama: Path, w8a8_static: str, protocol: WriteProtocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> float:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(lens, "kl_sum", fail)
    report = quantize(tiny_llama, tmp_path / "out", protocol(w8a8_static), device="cpu")
    assert (report["kl"]["units"], report["kl"]["notes"]) == ({}, ["RuntimeError: no such kernel"])
    assert report["verified"]


def test_an_output_that_is_no_vocabulary_is_not_taken_for_one(
    tiny_llama: Path, w8a8_static: str, protocol: WriteProtocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lens, "vocabularies", lambda model, config: frozenset({77}))
    report = quantize(tiny_llama, tmp_path / "out", protocol(w8a8_static), device="cpu")
    assert report["kl"]["notes"] == ["the model has no language model head: its output has 512 channels"]
