# SPDX-License-Identifier: Apache-2.0
"""What reaches the model in calibration: no padding, and no more tokens than the user wants."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modelslim.api import hookimpl
from modelslim.errors import CapabilityError, UsageError
from modelslim.inputs import model_inputs
from modelslim.run import quantize
from modelslim.session import Session
from modelslim.vlm_dataset import VlmCalibSample

WriteProtocol = Callable[[str], Path]
IDS = torch.tensor([[5, 6, 7, 8]])


class Adapter:
    """Hands out what it is given."""

    def __init__(self, *inputs: Any) -> None:
        self.inputs = list(inputs)

    @hookimpl
    def handle_dataset(self, dataset: Sequence[Any], device: str) -> list[Any]:
        return self.inputs


def made(inputs: Any, length: int | None = None, sample: Any = "text") -> Any:
    (one,) = model_inputs(Session(Adapter(inputs)), [sample], "cpu", length)
    return one


def mask(*values: int) -> Tensor:
    return torch.tensor([values])


@pytest.mark.parametrize(
    ("shown", "expected"), [((0, 0, 1, 1), [7, 8]), ((1, 1, 1, 0), [5, 6, 7]), ((0, 1, 1, 0), [6, 7])]
)
def test_padding_on_either_side_is_taken_out(shown: tuple[int, ...], expected: list[int]) -> None:
    turns = torch.arange(12).view(3, 1, 4)
    pixels, grid = torch.rand(7, 4), torch.tensor([[1, 2, 2]])
    inputs = {"input_ids": IDS, "attention_mask": mask(*shown), "position_ids": turns, "pixels": pixels, "grid": grid}
    one = made(inputs)
    assert one["input_ids"].tolist() == [expected]
    assert bool(one["attention_mask"].all()) and one["attention_mask"].shape == one["input_ids"].shape
    assert one["position_ids"].shape == (3, 1, len(expected))
    assert one["pixels"] is pixels and one["grid"] is grid  # what is no token of the text stays
    ids, rest = made([IDS, mask(*shown)])
    assert ids.tolist() == [expected] and bool(rest.all())


def test_what_is_not_padded_is_handed_on_as_it_is() -> None:
    positions = torch.arange(4)[None]
    others: list[Any] = [[IDS, None], [IDS, positions], [IDS[:, :2], positions[:, :2]], [IDS, IDS[:, 1:]], "anything"]
    for inputs in ({"input_ids": IDS}, {"input_ids": IDS, "attention_mask": mask(1, 1, 1, 1)}, *others):
        assert made(inputs) is inputs


@pytest.mark.parametrize(
    "wrong",
    [{"input_ids": IDS, "attention_mask": mask(1, 0, 1, 1)}, {"attention_mask": torch.eye(4, dtype=torch.long)}],
)
def test_a_mask_that_is_no_padding_of_one_row_is_refused(wrong: dict[str, Tensor]) -> None:
    with pytest.raises(CapabilityError, match="calibration sample 1: the attention mask"):
        made(wrong)


def test_an_input_for_each_sample() -> None:
    with pytest.raises(CapabilityError, match="1 inputs of 2 samples"):
        model_inputs(Session(Adapter("one")), ["a", "b"], "cpu")


def test_texts_are_cut_and_samples_with_images_are_not() -> None:
    inputs = {"input_ids": IDS, "attention_mask": mask(0, 1, 1, 1)}
    assert made(inputs, 2)["input_ids"].tolist() == [[6, 7]]  # counted without the padding
    assert made(inputs, 9)["input_ids"].tolist() == [[6, 7, 8]]
    assert made([IDS, None], 1)[0].tolist() == [[5]]
    assert made(inputs, 2, VlmCalibSample("text"))["input_ids"].shape == (1, 2)
    assert made(inputs, 2, VlmCalibSample("text", image="a.png"))["input_ids"].shape == (1, 3)
    with pytest.raises(CapabilityError, match="cannot be cut"):
        made({"hidden": torch.rand(1, 4)}, 2)


class Padding:
    """A vendor's plugin that pads every sample with token 7, as some adapters do."""

    def __init__(self, left: int, right: int) -> None:
        self.left, self.right = left, right

    @hookimpl(wrapper=True)
    def handle_dataset(self) -> Any:
        inputs = yield
        for one in inputs:
            count = one["input_ids"].shape[1]
            one["attention_mask"] = torch.nn.functional.pad(torch.ones(1, count).long(), (self.left, self.right))
            one["input_ids"] = torch.nn.functional.pad(one["input_ids"], (self.left, self.right), value=7)
        return inputs


def scales(directory: Path) -> dict[str, Tensor]:
    """The static activation parameters of a result."""
    tensors = load_file(next(directory.glob("*.safetensors")))
    ends = ("input_scale", "input_offset")
    return {name: tensor for name, tensor in tensors.items() if name.endswith(ends)}


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 40)])
def test_padding_never_enters_statistics(
    left: int, right: int, tiny_llama: Path, protocol: WriteProtocol, w8a8_static: str, tmp_path: Path
) -> None:
    file = protocol(w8a8_static)
    quantize(tiny_llama, tmp_path / "plain", file, device="cpu")
    quantize(tiny_llama, tmp_path / "padded", file, device="cpu", observers=[("padding", Padding(left, right))])
    plain, padded = scales(tmp_path / "plain"), scales(tmp_path / "padded")
    assert len(plain) == 42 and plain.keys() == padded.keys()
    assert all(torch.equal(plain[name], padded[name]) for name in plain)


def test_limits_are_those_of_the_samples_that_calibrate(
    tiny_llama: Path, protocol: WriteProtocol, w8a8_static: str, tmp_path: Path, calibration_texts: tuple[str, ...]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = quantize(
        tiny_llama, tmp_path / "out", protocol(w8a8_static), device="cpu", calib_samples=6, calib_length=5
    )
    assert (report["samples"], report["calib_length"]) == (6, 5)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama)
    seen: list[Tensor] = []
    name = "model.layers.1.mlp.down_proj"
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(torch.stack(args[0].aminmax())))
    with torch.no_grad():
        for text in calibration_texts:
            model(tokenizer(text, return_tensors="pt")["input_ids"][:, :5])
    low, high = (torch.stack(seen)[:, column].double() for column in (0, 1))
    span = high.max().clamp(min=0) - low.min().clamp(max=0)
    found = scales(tmp_path / "out")[f"{name}.input_scale"].double().squeeze()
    torch.testing.assert_close(found, span / 255, rtol=2**-7, atol=0)


def test_a_run_with_another_length_is_another_run(
    tiny_llama: Path, protocol: WriteProtocol, w8a8_static: str, tmp_path: Path
) -> None:
    class Stop:
        @hookimpl
        def unit_finished(self, index: int) -> None:
            if index == 1:
                raise KeyboardInterrupt

    file, out = protocol(w8a8_static), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_llama, out, file, device="cpu", calib_length=5, observers=[("stop", Stop())])
    with pytest.raises(UsageError, match="the length of calibration texts was 5 and is 6"):
        quantize(tiny_llama, out, file, device="cpu", calib_length=6)
    assert quantize(tiny_llama, out, file, device="cpu", calib_length=5)["calib_length"] == 5
    assert json.loads((out / "report.json").read_text())["calib_length"] == 5
