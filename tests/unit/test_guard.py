# SPDX-License-Identifier: Apache-2.0
"""The guard lets through what is the model's own forward, and names the unit where another one begins to differ."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from modelslim import guard
from modelslim.api import CapabilityError, ModelError, ProcessRequest, drive, hookimpl
from modelslim.checkpoint import Checkpoint
from modelslim.guard import Guard, prove_forward
from modelslim.registry import Entry, Registry
from modelslim.session import Session

WIDTH = 8


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None, factor: float = 1.0) -> Tensor:
        return torch.tanh(self.linear(x if mask is None else mask @ x)) * factor


class Model(nn.Module):
    """Odd layers see all tokens before, even ones the last two; between the layers something is added."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH)
        self.tower = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.head = nn.Linear(WIDTH, 32, bias=False)

    def masks(self, ids: Tensor) -> list[Tensor]:
        ones = torch.ones(ids.shape[1], ids.shape[1])
        return [ones.tril().triu(-1), ones.tril()]

    def forward(self, ids: Tensor) -> Tensor:
        masks, x = self.masks(ids), self.embed(ids)
        for index, layer in enumerate(self.layers):
            x = x + layer(x, masks[index % 2], factor=0.5)
        logits: Tensor = self.head(x)
        return logits


class Correct:
    """An adapter that writes its forward by hand."""

    def __init__(self, model_type: str = "own", path: Path = Path(), trust_remote_code: bool = False) -> None:
        self.path = path

    @hookimpl
    def init_model(self, device: str) -> nn.Module:
        with torch.device("meta"):
            return Model().eval()

    @hookimpl
    def handle_dataset(self, dataset: Sequence[Any], device: str) -> list[Any]:
        raise AssertionError("the guard has no samples")

    @hookimpl
    def generate_model_visit(self, model: Any) -> Iterator[ProcessRequest]:
        for index, layer in enumerate(model.layers):
            yield ProcessRequest(f"layers.{index}", layer)

    @hookimpl
    def generate_model_forward(self, model: Any, inputs: Any) -> Any:
        masks, x = model.masks(inputs), model.embed(inputs)
        for index, layer in enumerate(model.layers):
            x = x + (yield ProcessRequest(f"layers.{index}", layer, (x,), {"mask": masks[index % 2], "factor": 0.5}))
        return model.head(x)

    @hookimpl
    def make_tiny_checkpoint(self, path: Path) -> Sequence[Any] | None:
        state = {name: torch.randn(tensor.shape) for name, tensor in Model().state_dict().items()}
        save_file(state, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({"model_type": "own", "architectures": ["Model"]}))
        return [torch.randint(32, (1, length)) for length in (5, 7)]


class Driven(Correct):
    @hookimpl
    def generate_model_forward(self, model: Any, inputs: Any) -> Any:
        return drive(self.generate_model_visit(model), model, inputs)


class EndsAtTheLastUnit(Correct):
    @hookimpl
    def generate_model_forward(self, model: Any, inputs: Any) -> Any:
        yield from super().generate_model_forward(model, inputs)


class ReplaysTheFirstMask(Correct):
    @hookimpl
    def generate_model_forward(self, model: Any, inputs: Any) -> Any:
        masks, x = model.masks(inputs), model.embed(inputs)
        for index, layer in enumerate(model.layers):
            x = x + (yield ProcessRequest(f"layers.{index}", layer, (x, masks[0]), {"factor": 0.5}))
        return model.head(x)


class LeavesOutAnArgument(Correct):
    @hookimpl
    def generate_model_forward(self, model: Any, inputs: Any) -> Any:
        masks, x = model.masks(inputs), model.embed(inputs)
        for index, layer in enumerate(model.layers):
            mask = {} if index == 2 else {"mask": masks[index % 2]}
            x = x + (yield ProcessRequest(f"layers.{index}", layer, (x,), {**mask, "factor": 0.5}))
        return model.head(x)


class ForgetsAResidual(Correct):
    behind = 1

    @hookimpl
    def generate_model_forward(self, model: Any, inputs: Any) -> Any:
        masks, x = model.masks(inputs), model.embed(inputs)
        for index, layer in enumerate(model.layers):
            y = yield ProcessRequest(f"layers.{index}", layer, (x, masks[index % 2], 0.5))
            x = y if index == self.behind else x + y
        return model.head(x)


class ForgetsTheLastResidual(ForgetsAResidual):
    behind = 3


class SkipsAUnit(Correct):
    @hookimpl
    def generate_model_forward(self, model: Any, inputs: Any) -> Any:
        masks, x = model.masks(inputs), model.embed(inputs)
        for index in (0, 2, 3):
            x = x + (yield ProcessRequest(f"layers.{index}", model.layers[index], (x, masks[index % 2], 0.5)))
        return model.head(x)


class SkipsTheLastUnit(Correct):
    @hookimpl
    def generate_model_forward(self, model: Any, inputs: Any) -> Any:
        masks, x = model.masks(inputs), model.embed(inputs)
        for index in (0, 1, 2):
            x = x + (yield ProcessRequest(f"layers.{index}", model.layers[index], (x, masks[index % 2], 0.5)))
        return model.head(x)


class KeepsTheMaskOfTheLastSample(Correct):
    """Right for one sample alone; the engine runs them in turns."""

    @hookimpl
    def generate_model_forward(self, model: Any, inputs: Any) -> Any:
        self.masks, x = model.masks(inputs), model.embed(inputs)
        for index, layer in enumerate(model.layers):
            mask = self.masks[index % 2][: x.shape[1], : x.shape[1]] * (self.masks[0].shape[0] / x.shape[1])
            x = x + (yield ProcessRequest(f"layers.{index}", layer, (x, mask, 0.5)))
        return model.head(x)


class CallsWithTooMuch(Correct):
    @hookimpl
    def generate_model_forward(self, model: Any, inputs: Any) -> Any:
        masks, x = model.masks(inputs), model.embed(inputs)
        for index, layer in enumerate(model.layers):
            more = {"cache_position": 0} if index == 2 else {}
            x = x + (yield ProcessRequest(f"layers.{index}", layer, (x, masks[index % 2], 0.5), more))
        return model.head(x)


class NeedsMoreThanTheModel(Correct):
    @hookimpl
    def generate_model_forward(self, model: Any, inputs: Any) -> Any:
        raise KeyError("attention_mask")
        yield


class WantsUnitsTwice(Correct):
    @hookimpl
    def generate_model_forward(self, model: Any, inputs: Any) -> Any:
        masks, x = model.masks(inputs), model.embed(inputs)
        for index, layer in enumerate(model.layers):
            for _ in range(1 + (index == 1)):
                y = yield ProcessRequest(f"layers.{index}", layer, (x, masks[index % 2], 0.5))
            x = x + y
        return model.head(x)


class MakesNaN(Correct):
    @hookimpl
    def make_tiny_checkpoint(self, path: Path) -> Sequence[Any] | None:
        inputs = Correct.make_tiny_checkpoint(self, path)
        state = {name: 1e38 * torch.randn(tensor.shape).sign() for name, tensor in Model().state_dict().items()}
        save_file(state, path / "model.safetensors")
        return inputs


class HasAnIdleTower(Driven):
    @hookimpl
    def generate_model_visit(self, model: Any) -> Iterator[ProcessRequest]:
        yield ProcessRequest("tower", model.tower)
        yield from super().generate_model_visit(model)


class CannotShrink(Correct):
    @hookimpl
    def make_tiny_checkpoint(self, path: Path) -> Sequence[Any] | None:
        raise CapabilityError("its experts are too many")


class LeavesItToOthers(Correct):
    @hookimpl
    def make_tiny_checkpoint(self, path: Path) -> Sequence[Any] | None:
        return None


def check(adapter: type[Correct], **options: Any) -> list[str]:
    session = Session(adapter())
    reopen = options.pop("reopen", lambda model_type, path: Session(adapter(model_type, path)))
    return Guard("acme", reopen, **options).check(session, session.init_model("meta"))


@pytest.mark.parametrize("adapter", [Correct, Driven, EndsAtTheLastUnit])
def test_forward_of_the_model_passes(adapter: type[Correct]) -> None:
    assert check(adapter) == []


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (ReplaysTheFirstMask, r"first unit that differs is layers\.1: .*; of its arguments, mask differ$"),
        (LeavesOutAnArgument, r"first unit that differs is layers\.2: .*; of its arguments, mask differ$"),
        (ForgetsAResidual, r"first unit that differs is layers\.2: differs by up to \d.*; of its arguments, x differ$"),
        (ForgetsTheLastResidual, "all units agree and what the forward returns does not: differs by up to"),
        (SkipsAUnit, r"the unit layers\.1 is called 0 times, and 2 times by the model's own forward"),
        (SkipsTheLastUnit, r"it fails behind layers\.2: the forward ends before layers\.3, the last unit of the visit"),
        (WantsUnitsTwice, r"the unit layers\.1 is called 4 times, and 2 times by"),
        (KeepsTheMaskOfTheLastSample, r"first unit that differs is layers\.1: .*; of its arguments, mask differ$"),
        (CallsWithTooMuch, r"it fails in layers\.2: TypeError: .*cache_position"),
        (NeedsMoreThanTheModel, "it fails before the first unit: KeyError: 'attention_mask'"),
    ],
)
def test_another_forward_is_refused_with_the_first_unit_that_differs(adapter: type[Correct], message: str) -> None:
    with pytest.raises(CapabilityError) as caught:
        check(adapter)
    assert re.search(message, caught.value.message)
    assert "the adapter 'acme'" in caught.value.message
    assert "generate_model_forward must hand" in caught.value.hint


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        (MakesNaN, "computes NaN"),
        (CannotShrink, "its experts are too many"),
        (LeavesItToOthers, "no tiny model of its architecture can be made"),
    ],
)
def test_what_cannot_be_proven_is_said_in_one_line(adapter: type[Correct], reason: str) -> None:
    (line,) = check(adapter)
    assert line.startswith("the forward of the adapter 'acme' is not proven: ")
    assert reason in line
    assert "AdapterContract" in line
    assert "make_tiny_checkpoint" in line
    assert "\n" not in line


def test_unit_that_no_input_enters_is_named() -> None:
    (line,) = check(HasAnIdleTower)
    assert line == (
        "the forward of the adapter 'acme' is not proven for tower: no input of its tiny model enters there"
    )


def shrink(path: Path) -> Sequence[Any] | None:
    return Correct().make_tiny_checkpoint(path)


class NoHook:
    """A hand-written adapter that leaves the tiny model to the generic one."""

    init_model = Correct.init_model
    handle_dataset = Correct.handle_dataset
    generate_model_visit = Correct.generate_model_visit

    def __init__(self, forward: type[Correct] = Correct) -> None:
        self.forward = forward()

    @hookimpl
    def generate_model_forward(self, model: Any, inputs: Any) -> Any:
        return self.forward.generate_model_forward(model, inputs)


def check_without_hook(forward: type[Correct]) -> list[str]:
    session = Session(NoHook(forward))
    model = session.init_model("meta")
    return Guard("acme", lambda model_type, path: Session(NoHook(forward)), shrink).check(session, model)


def test_adapter_without_the_hook_is_proven_on_what_the_generic_one_makes() -> None:
    assert check_without_hook(Correct) == []
    with pytest.raises(CapabilityError, match=r"layers\.1"):
        check_without_hook(ReplaysTheFirstMask)
    with pytest.raises(CapabilityError, match=r"it fails in layers\.2"):
        check_without_hook(CallsWithTooMuch)


def test_adapter_that_wants_other_inputs_than_the_generic_ones_is_not_refused() -> None:
    (line,) = check_without_hook(NeedsMoreThanTheModel)
    assert "is not proven: KeyError: 'attention_mask'" in line


def test_generator_of_random_numbers_and_gradient_mode_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    check(Correct)
    assert torch.equal(torch.rand(4), expected)
    assert torch.is_grad_enabled()


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    state = {"embed.weight": torch.zeros(2)}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "architectures": ["Model"]}))
    return Checkpoint(tmp_path)


@pytest.mark.parametrize("generic_is_there", [True, False])
def test_generic_adapter_is_asked_if_it_is_installed(
    generic_is_there: bool, source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def open_session(kind: str, name: str, model_type: str, path: Path, trust: bool, registry: Registry) -> Session:
        asked.append((name, model_type))
        return Session(Correct() if name == "transformers" else NoHook())

    monkeypatch.setattr(guard, "open_session", open_session)
    names = ["acme", *(["transformers"] if generic_is_there else [])]
    registry = Registry(tuple(Entry("adapters", name, "x:Y", name, "1") for name in names))
    session = Session(NoHook())
    lines = prove_forward(session, session.init_model("meta"), source, "adapters", "acme", False, registry)
    if generic_is_there:
        assert (lines, asked) == ([], [("transformers", "own"), ("acme", "own"), ("acme", "own")])
    else:
        assert (len(lines), asked) == (1, [])
        assert "no tiny model of its architecture can be made" in lines[0]


def test_adapter_of_the_family_is_asked_before_the_generic_one(
    source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def open_session(kind: str, name: str, model_type: str, path: Path, trust: bool, registry: Registry) -> Session:
        asked.append((kind, name))
        return Session({"transformers": Correct, "own": LeavesItToOthers, "Acme-7B": NoHook}[name]())

    monkeypatch.setattr(guard, "open_session", open_session)
    rows = [("adapters", "own"), ("adapters", "transformers"), ("models", "Acme-7B")]
    registry = Registry(tuple(Entry(kind, name, "x:Y", name, "1") for kind, name in rows))
    session = Session(NoHook())
    assert prove_forward(session, session.init_model("meta"), source, "models", "Acme-7B", False, registry) == []
    assert asked == [*rows, rows[-1]]


def test_generic_adapter_that_does_not_know_the_family_leaves_it_unproven(
    source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unknowing(Correct):
        @hookimpl
        def init_model(self, device: str) -> nn.Module:
            raise ModelError("transformers cannot use it", hint="another version")

    monkeypatch.setattr(guard, "open_session", lambda *arguments: Session(Unknowing()))
    registry = Registry((Entry("adapters", "transformers", "x:Y", "generic", "1"),))
    session = Session(NoHook())
    lines = prove_forward(session, session.init_model("meta"), source, "adapters", "acme", False, registry)
    assert len(lines) == 1
    assert "'acme' is not proven: transformers cannot use it;" in lines[0]
