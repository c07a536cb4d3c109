# SPDX-License-Identifier: Apache-2.0
"""The contracts for third parties accept plugins that keep to them, and notice those that do not."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from modelslim.api import (
    FLOAT,
    Algorithm,
    CapabilityError,
    ChannelRange,
    LinearInfo,
    ModelError,
    PlannedModel,
    PluginError,
    Problem,
    ProcessRequest,
    QuantizedLinear,
    QuantizedTensor,
    QuantSpec,
    SavedLinear,
    SaveError,
    Saver,
    Selector,
    Statistic,
    Subgraph,
    TensorRange,
    TensorRecord,
    TensorSpec,
    TokenCount,
    Unit,
    UnitStatistics,
    hookimpl,
    range_to_scale,
)
from modelslim.checkpoint import Checkpoint
from modelslim.testing.adapter import AdapterContract, OpenModel
from modelslim.testing.algorithm import AlgorithmContract
from modelslim.testing.saver import SaverContract, random_linear
from modelslim.testing.units import random_layer, random_linears

PROOF = "test_plan_proves_the_forward_on_a_tiny_model_of_the_adapter"
FUNCTION = "test_function_stays_and_statistics_follow"
HALVES = "test_statistics_of_halves_give_what_those_of_the_whole_give"


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, factor: float) -> Tensor:
        return x + torch.tanh(self.linear(x)) * factor


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(8, 32, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, factor=0.5)
        logits: Tensor = self.head(x)
        return logits


class HandWritten:
    """An adapter as the integration guide shows it: the forward is written out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @hookimpl
    def init_model(self, device: str) -> nn.Module:
        with torch.device("meta"):
            return Model().eval()

    @hookimpl
    def handle_dataset(self, dataset: Sequence[Any], device: str) -> list[Any]:
        return [torch.tensor([[ord(letter) % 32 for letter in text]], device=device) for text in dataset]

    @hookimpl
    def generate_model_visit(self, model: Any) -> Iterator[ProcessRequest]:
        for index, layer in enumerate(model.layers):
            yield ProcessRequest(f"layers.{index}", layer)

    @hookimpl
    def generate_model_forward(self, model: Any, inputs: Any) -> Any:
        x = model.embed(inputs)
        for request in self.generate_model_visit(model):
            x = yield ProcessRequest(request.name, request.module, (x,), {"factor": 0.5})
        return model.head(x)


class SkipsAUnit(HandWritten):
    @hookimpl
    def generate_model_visit(self, model: Any) -> Iterator[ProcessRequest]:
        yield ProcessRequest("layers.0", model.layers[0])
        yield ProcessRequest("layers.2", model.layers[2])

    @hookimpl
    def generate_model_forward(self, model: Any, inputs: Any) -> Any:
        return HandWritten(self.path).generate_model_forward(model, inputs)


class TurnsTheVisitAround(SkipsAUnit):
    @hookimpl
    def generate_model_visit(self, model: Any) -> Iterator[ProcessRequest]:
        for index in (2, 1, 0):
            yield ProcessRequest(f"layers.{index}", model.layers[index])


class PassesAnotherArgument(HandWritten):
    @hookimpl
    def generate_model_forward(self, model: Any, inputs: Any) -> Any:
        x = model.embed(inputs)
        for request in self.generate_model_visit(model):
            x = yield ProcessRequest(request.name, request.module, (x,), {"factor": 0.25})
        return model.head(x)


class Shrinks(HandWritten):
    def __init__(self, model_type: str, path: Path, trust_remote_code: bool = False) -> None:
        super().__init__(path)

    @hookimpl
    def make_tiny_checkpoint(self, path: Path) -> Sequence[Any]:
        save_file(Model().state_dict(), path / "model.safetensors")
        (path / "config.json").write_text('{"model_type": "own"}', encoding="utf-8")
        return [torch.randint(32, (1, length)) for length in (5, 7)]


class ShrinksAndPassesAnotherArgument(Shrinks):
    @hookimpl
    def generate_model_forward(self, model: Any, inputs: Any) -> Any:
        return PassesAnotherArgument(self.path).generate_model_forward(model, inputs)


class MisnamesUnits(HandWritten):
    @hookimpl
    def generate_model_visit(self, model: Any) -> Iterator[ProcessRequest]:
        for index, layer in enumerate(model.layers):
            yield ProcessRequest(f"layers.{(index + 1) % 3}", layer)


class LeavesTrainingModeOn(HandWritten):
    @hookimpl
    def init_model(self, device: str) -> nn.Module:
        return super().init_model(device).train()


class LoadsAUnitItself(HandWritten):
    @hookimpl
    def init_model(self, device: str) -> nn.Module:
        model = super().init_model(device)
        if device != "meta":
            model.get_submodule("layers.0").to_empty(device=device)
        return model


class TakesMemoryForThePlan(HandWritten):
    @hookimpl
    def init_model(self, device: str) -> nn.Module:
        return super().init_model(device) if device != "meta" else Model().eval()


class HasAParameterThatIsNotStored(HandWritten):
    @hookimpl
    def init_model(self, device: str) -> nn.Module:
        model = super().init_model(device)
        model.register_parameter("extra", nn.Parameter(torch.empty(3, device="meta")))
        return model


class DropsASample(HandWritten):
    @hookimpl
    def handle_dataset(self, dataset: Sequence[Any], device: str) -> list[Any]:
        return super().handle_dataset(dataset[1:], device)


class LacksAHook:
    def __init__(self, path: Path) -> None:
        self.init_model = HandWritten(path).init_model


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file(Model().state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def call(contract: object, test: str, **fixtures: Any) -> None:
    method = getattr(contract, test)
    method(**{name: fixtures[name] for name in inspect.signature(method).parameters})


def names_of_tests(contract: type) -> list[str]:
    return [name for name in dir(contract) if name.startswith("test_")]


def run_adapter(adapter: object, checkpoint: Path, test: str) -> None:
    samples = ("short", "somewhat longer")
    with Checkpoint(checkpoint) as source, torch.no_grad():
        fixtures: dict[str, Any] = {"adapter": adapter, "checkpoint": checkpoint, "samples": samples}
        if "opened" in inspect.signature(getattr(AdapterContract, test)).parameters:
            fixtures["opened"] = OpenModel.of(adapter, source)
        call(AdapterContract(), test, **fixtures)


@pytest.mark.parametrize("test", sorted({*names_of_tests(AdapterContract)} - {PROOF}))
def test_hand_written_adapter_keeps_the_contract(test: str, tiny: Path) -> None:
    run_adapter(HandWritten(tiny), tiny, test)


def test_forward_is_proven_on_the_tiny_model_that_the_adapter_makes(tiny: Path) -> None:
    run_adapter(Shrinks("own", tiny), tiny, PROOF)
    with pytest.raises(
        CapabilityError, match=r"first unit that differs is layers\.0: .*; of its arguments, factor differ"
    ):
        run_adapter(ShrinksAndPassesAnotherArgument("own", tiny), tiny, PROOF)
    with pytest.raises(pytest.skip.Exception, match="no make_tiny_checkpoint"):
        run_adapter(HandWritten(tiny), tiny, PROOF)


@pytest.mark.parametrize(
    ("adapter", "test"),
    [
        (SkipsAUnit, "test_unit_by_unit_gives_what_the_whole_forward_gives"),
        (TurnsTheVisitAround, "test_unit_by_unit_gives_what_the_whole_forward_gives"),
        (PassesAnotherArgument, "test_unit_by_unit_gives_what_the_whole_forward_gives"),
        (MisnamesUnits, "test_visit_names_modules_of_the_model"),
        (LeavesTrainingModeOn, "test_model_is_in_eval_mode"),
        (LoadsAUnitItself, "test_parameters_of_units_wait_on_meta"),
        (TakesMemoryForThePlan, "test_model_for_planning_holds_no_memory"),
        (HasAParameterThatIsNotStored, "test_checkpoint_fills_every_parameter_and_buffer"),
        (DropsASample, "test_every_sample_becomes_one_input"),
        (LacksAHook, "test_hooks_obey_their_specifications"),
    ],
)
def test_adapter_that_breaks_the_contract_is_noticed(adapter: type, test: str, tiny: Path) -> None:
    with pytest.raises((AssertionError, ModelError, PluginError)):
        run_adapter(adapter(tiny), tiny, test)


SPEC = QuantSpec(TensorSpec("int8", "per_channel"), TensorSpec("int8", "per_tensor"))


FRAGMENT: Mapping[str, Any] = {
    "type": "object",
    "required": ["type"],
    "additionalProperties": False,
    "properties": {
        "type": {"const": "nearest"},
        "share": {"type": "number", "default": 1.0},
        "more": {"type": "object", "properties": {"nearest": {"type": "boolean", "default": True}}},
    },
}


class Nearest(Algorithm):
    """Static int8 on a share of the range of the weight, in a few lines."""

    kind: type[TensorRange] = TensorRange

    def __init__(self, share: float, nearest: bool) -> None:
        self.share = share
        self.nearest = nearest

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Nearest:
        return cls(config.get("share", 1.0), config.get("more", {}).get("nearest", True))

    def select(self, linears: Sequence[LinearInfo]) -> Mapping[str, QuantSpec]:
        return {linear.name: SPEC for linear in Selector().select(linears)}

    def patterns(self) -> Sequence[Any]:
        return Selector().patterns()

    def needs(self, unit: Unit) -> Mapping[str, Any]:
        return {name: frozenset({self.kind}) for name in unit.specs}

    def apply(self, unit: Unit, statistics: UnitStatistics) -> Mapping[str, nn.Module]:
        return {name: self.quantize(unit.linears[name], spec, statistics, name) for name, spec in unit.specs.items()}

    def quantize(self, linear: Any, spec: QuantSpec, statistics: UnitStatistics, name: str) -> QuantizedLinear:
        seen = statistics.get(name, self.kind)
        low, high = (torch.zeros(()) if value is None else value for value in (seen.minimum, seen.maximum))
        input_scale, _ = range_to_scale(low.view(1), high.view(1), spec.activation)
        rows = linear.weight.float() * self.share
        scale, _ = range_to_scale(rows.amin(1, True), rows.amax(1, True), spec.weight)
        values = linear.weight.float() / scale
        codes = (values.round() if self.nearest else values.trunc()).clamp(-128, 127).to(torch.int8)
        weight = QuantizedTensor(codes, scale, None, spec.weight)
        return QuantizedLinear(weight, spec, linear.bias, input_scale, torch.zeros(1, dtype=torch.int8))


class IgnoresTheScaleType(Nearest):
    def quantize(self, linear: Any, spec: QuantSpec, statistics: UnitStatistics, name: str) -> QuantizedLinear:
        result = super().quantize(linear, spec, statistics, name)
        result.scale.mul_(1.0001)
        return result


class PromisesAnotherSpec(Nearest):
    def quantize(self, linear: Any, spec: QuantSpec, statistics: UnitStatistics, name: str) -> QuantizedLinear:
        result = super().quantize(linear, spec, statistics, name)
        result.spec = SPEC
        return result


class AsksForWhatItDidNotDeclare(Nearest):
    def quantize(self, linear: Any, spec: QuantSpec, statistics: UnitStatistics, name: str) -> QuantizedLinear:
        statistics.get(name, TokenCount)
        return super().quantize(linear, spec, statistics, name)


class EditsWeights(Nearest):
    def quantize(self, linear: Any, spec: QuantSpec, statistics: UnitStatistics, name: str) -> QuantizedLinear:
        linear.weight.mul_(0.5)
        return super().quantize(linear, spec, statistics, name)


class Rolls(Nearest):
    def quantize(self, linear: Any, spec: QuantSpec, statistics: UnitStatistics, name: str) -> QuantizedLinear:
        result = super().quantize(linear, spec, statistics, name)
        result.codes.copy_(torch.randint(-9, 9, result.codes.shape))
        return result


class TakesAll(Nearest):
    def select(self, linears: Sequence[LinearInfo]) -> Mapping[str, QuantSpec]:
        return {linear.name: SPEC for linear in linears}

    def apply(self, unit: Unit, statistics: UnitStatistics) -> Mapping[str, nn.Module]:
        whole = Unit(unit.name, unit.linears, dict.fromkeys(unit.linears, SPEC))
        return super().apply(whole, statistics)


class MeasuresOthers(Nearest):
    def needs(self, unit: Unit) -> Mapping[str, Any]:
        return dict.fromkeys([*unit.linears, "model.norm"], frozenset({TensorRange}))


class RefusesAll(Nearest):
    def check(self, linears: Sequence[LinearInfo]) -> Sequence[Problem]:
        return [Problem("not today")]


class TripsOverUnseenLinears(Nearest):
    def quantize(self, linear: Any, spec: QuantSpec, statistics: UnitStatistics, name: str) -> QuantizedLinear:
        assert statistics.get(name, TensorRange).minimum is not None
        return super().quantize(linear, spec, statistics, name)


class ReadsNothing(Nearest):
    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Nearest:
        return cls(1.0, nearest=True)


class ReadsWhatCannotBeWritten(Nearest):
    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Nearest:
        return cls(config.get("share", 1.0), config.get("more", {}).get("tie", True))


class HasAnotherDefault(Nearest):
    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Nearest:
        return cls(config.get("share", 1.0), config.get("more", {}).get("nearest", False))


class MeasuresInVain(Nearest):
    def needs(self, unit: Unit) -> Mapping[str, Any]:
        return {name: kinds | {TokenCount} for name, kinds in super().needs(unit).items()}


class OwnRange(TensorRange):
    def merge(self, other: Statistic) -> None:
        """Of two devices the first one counts."""


class ForgetsTheOthers(Nearest):
    kind = OwnRange


class IsCoarse(Nearest):
    def quantize(self, linear: Any, spec: QuantSpec, statistics: UnitStatistics, name: str) -> QuantizedLinear:
        result = super().quantize(linear, spec, statistics, name)
        result.codes.bitwise_and_(~7)
        return result


class Halves(Algorithm):
    """Divides what comes out of norms by 2."""

    rescales = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Halves:
        return cls()

    def needs(self, unit: Unit) -> Mapping[str, Any]:
        return {subgraph.targets[0]: frozenset({ChannelRange}) for subgraph in self.subgraphs(unit)}

    def edits(self, unit: Unit) -> frozenset[str]:
        return frozenset(f"{name}.weight" for one in self.subgraphs(unit) for name in (one.source, *one.targets))

    def apply(self, unit: Unit, statistics: UnitStatistics) -> Mapping[str, nn.Module]:
        for subgraph in self.subgraphs(unit):
            minimum = statistics.get(subgraph.targets[0], ChannelRange).minimum
            assert minimum is not None
            for name, factor in ((subgraph.source, 0.5), *((name, 2.0) for name in self.targets(subgraph))):
                unit.modules[name].get_parameter("weight").mul_(factor)
            self.tell(statistics, subgraph, torch.full_like(minimum, 2.0))
        return {}

    def subgraphs(self, unit: Unit) -> Sequence[Subgraph]:
        return [one for one in unit.subgraphs if one.type == "norm-linear"]

    def targets(self, subgraph: Subgraph) -> Sequence[str]:
        return subgraph.targets

    def tell(self, statistics: UnitStatistics, subgraph: Subgraph, scale: Tensor) -> None:
        statistics.rescale(subgraph.targets, scale)


class ForgetsATarget(Halves):
    def targets(self, subgraph: Subgraph) -> Sequence[str]:
        return subgraph.targets[:-1]


class TellsNobody(Halves):
    def tell(self, statistics: UnitStatistics, subgraph: Subgraph, scale: Tensor) -> None:
        pass


class EditsInSecret(Halves):
    def edits(self, unit: Unit) -> frozenset[str]:
        return frozenset()


def run_algorithm(algorithm: type[Algorithm], test: str) -> None:
    fixtures = {
        "config": {"type": "nearest", "share": 1.0, "more": {}},
        "algorithm_class": algorithm,
        "linears": random_linears(),
        "layer": random_layer(),
        "fragment": FRAGMENT,
        "promises_output": True,
    }
    with torch.no_grad():
        call(AlgorithmContract(), test, **fixtures)


ALGORITHM_TESTS = sorted({*names_of_tests(AlgorithmContract)} - {"test_schema_accepts_the_entry"})


@pytest.mark.parametrize("test", ALGORITHM_TESTS)
def test_plain_algorithm_keeps_the_contract(test: str) -> None:
    skips = {FUNCTION: "does not rescale", "test_fused_experts_become_as_many_linears": "takes no fused experts"}
    with pytest.raises(pytest.skip.Exception, match=skips[test]) if test in skips else nullcontext():
        run_algorithm(Nearest, test)


@pytest.mark.parametrize("test", [FUNCTION, "test_statistics_that_are_asked_for_are_read", HALVES])
def test_rescaling_algorithm_keeps_the_contract(test: str) -> None:
    run_algorithm(Halves, test)


@pytest.mark.parametrize(
    ("algorithm", "test"),
    [
        (IgnoresTheScaleType, "test_replacements_are_what_the_plan_promised"),
        (PromisesAnotherSpec, "test_replacements_are_what_the_plan_promised"),
        (AsksForWhatItDidNotDeclare, "test_replacements_are_what_the_plan_promised"),
        (EditsWeights, "test_weights_are_left_alone"),
        (Rolls, "test_same_input_gives_the_same_bytes"),
        (TakesAll, "test_chosen_linears_are_linears_of_the_model_that_the_patterns_name"),
        (TakesAll, "test_linears_of_other_entries_are_left_alone"),
        (MeasuresOthers, "test_statistics_are_asked_for_linears_of_the_unit"),
        (MeasuresOthers, "test_linears_of_other_entries_are_left_alone"),
        (RefusesAll, "test_model_of_the_contract_is_not_refused"),
        (TripsOverUnseenLinears, "test_linear_that_saw_no_token_is_quantized_or_named"),
        (ReadsNothing, "test_keys_of_the_entry_are_those_that_are_read"),
        (ReadsWhatCannotBeWritten, "test_keys_of_the_entry_are_those_that_are_read"),
        (HasAnotherDefault, "test_defaults_are_those_that_the_fragment_states"),
        (MeasuresInVain, "test_statistics_that_are_asked_for_are_read"),
        (ForgetsTheOthers, HALVES),
        (IsCoarse, "test_outputs_are_no_worse_than_those_of_rounding_to_nearest"),
        (ForgetsATarget, FUNCTION),
        (TellsNobody, FUNCTION),
        (EditsInSecret, FUNCTION),
    ],
)
def test_algorithm_that_breaks_the_contract_is_noticed(algorithm: type[Algorithm], test: str) -> None:
    with pytest.raises((AssertionError, KeyError)):
        run_algorithm(algorithm, test)


class PlainSaver(Saver):
    """Codes and scales as they are."""

    max_shard_bytes = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PlainSaver:
        return cls()

    def weights_name(self, model: PlannedModel) -> str:
        return "plain"

    def check(self, model: PlannedModel) -> Sequence[Problem]:
        return [Problem("no int4", linear=name) for name, spec in model.specs.items() if spec.weight.dtype == "int4"]

    def encode(self, name: str, module: QuantizedLinear, model_dtype: str) -> Iterator[tuple[str, Tensor]]:
        if module.input_multiplier is not None:
            raise SaveError(f"{name} has a multiplier")
        yield f"{name}.codes", module.codes
        yield f"{name}.scale", module.scale
        if module.bias is not None:
            yield f"{name}.bias", module.bias

    def encoded_sizes(self, linear: LinearInfo, spec: QuantSpec, model_dtype: str) -> Mapping[str, int]:
        rows, columns = linear.out_features, linear.in_features
        sizes = {f"{linear.stored}.codes": rows * columns, f"{linear.stored}.scale": rows * 4}
        return sizes | ({f"{linear.stored}.bias": rows * 2} if linear.has_bias else {})

    def finish(self, records: Sequence[TensorRecord], model: PlannedModel) -> Mapping[str, Any]:
        return {"plain.json": [record.name for record in records if record.spec is not None]}

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        return (path / "plain.json").is_file()

    @classmethod
    def read_layout(cls, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, SavedLinear]:
        names = json.loads((path / "plain.json").read_text(encoding="utf-8"))
        spec = QuantSpec(TensorSpec("int8", "per_channel"), FLOAT)

        def decode(tensors: Mapping[str, Tensor]) -> QuantizedLinear:
            parts = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
            weight = QuantizedTensor(parts["codes"], parts["scale"], None, spec.weight)
            return QuantizedLinear(weight, spec, parts.get("bias"))

        return {names[0].rpartition(".")[0]: SavedLinear(spec, tuple(names), decode)}


class ChangesTheModule(PlainSaver):
    def encode(self, name: str, module: QuantizedLinear, model_dtype: str) -> Iterator[tuple[str, Tensor]]:
        module.codes.add_(1)
        return super().encode(name, module, model_dtype)


class RollsWhatItStores(PlainSaver):
    def encode(self, name: str, module: QuantizedLinear, model_dtype: str) -> Iterator[tuple[str, Tensor]]:
        for key, tensor in super().encode(name, module, model_dtype):
            yield key, torch.rand_like(tensor) if key.endswith("scale") else tensor


class MisjudgesSizes(PlainSaver):
    def encoded_sizes(self, linear: LinearInfo, spec: QuantSpec, model_dtype: str) -> Mapping[str, int]:
        return {name: size + 1 for name, size in super().encoded_sizes(linear, spec, model_dtype).items()}


class TakesEverything(PlainSaver):
    def check(self, model: PlannedModel) -> Sequence[Problem]:
        return [Problem("int4 may be slow", fatal=False)]


class RefusesInt8(PlainSaver):
    def check(self, model: PlannedModel) -> Sequence[Problem]:
        return [Problem("no", linear=name) for name in model.specs]


class LosesTheBias(PlainSaver):
    def encode(self, name: str, module: QuantizedLinear, model_dtype: str) -> Iterator[tuple[str, Tensor]]:
        return ((key, tensor) for key, tensor in super().encode(name, module, model_dtype) if "bias" not in key)


class RecognizesEverything(PlainSaver):
    @classmethod
    def recognizes(cls, path: Path) -> bool:
        return True


class StoresHalfTheScale(PlainSaver):
    """And doubles it when it reads its own files."""

    def encode(self, name: str, module: QuantizedLinear, model_dtype: str) -> Iterator[tuple[str, Tensor]]:
        for key, tensor in super().encode(name, module, model_dtype):
            yield key, tensor / 2 if key.endswith("scale") else tensor

    @classmethod
    def read_layout(cls, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, SavedLinear]:
        ((name, saved),) = super().read_layout(path, shapes).items()

        def decode(tensors: Mapping[str, Tensor]) -> QuantizedLinear:
            return saved.decode({key: tensor * 2 if "scale" in key else tensor for key, tensor in tensors.items()})

        return {name: SavedLinear(saved.spec, saved.tensors, decode)}


class WritesItsFilesAtOnce(PlainSaver):
    def encode(self, name: str, module: QuantizedLinear, model_dtype: str) -> Iterator[tuple[str, Tensor]]:
        Path("plain.json").write_text(f'["{name}.codes", "{name}.scale"]', encoding="utf-8")
        return super().encode(name, module, model_dtype)


class LosesTheMultiplier(PlainSaver):
    def encode(self, name: str, module: QuantizedLinear, model_dtype: str) -> Iterator[tuple[str, Tensor]]:
        return super().encode(name, QuantizedLinear(module.weight, module.spec, module.bias), model_dtype)


def run_saver(saver: Saver, test: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    int8, int4 = (QuantSpec(TensorSpec(dtype, "per_channel"), FLOAT) for dtype in ("int8", "int4"))
    fixtures = {
        "saver": saver,
        "spec": int8,
        "refused": int4,
        "module": random_linear(saver, int8, "bfloat16"),
        "dequantize": lambda tensors, spec: tensors["codes"].double() * tensors["scale"].double(),
        "name": "model.layers.0.mlp.down_proj",
        "model_dtype": "bfloat16",
        "tmp_path": path,
        "monkeypatch": monkeypatch,
    }
    call(SaverContract(), test, **fixtures)


@pytest.mark.parametrize("test", names_of_tests(SaverContract))
def test_plain_saver_keeps_the_contract(test: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_saver(PlainSaver(), test, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("saver", "test"),
    [
        (ChangesTheModule, "test_module_is_left_alone"),
        (RollsWhatItStores, "test_encoding_again_gives_the_same_bytes"),
        (RollsWhatItStores, "test_saved_linear_decodes_to_the_module"),
        (MisjudgesSizes, "test_planned_sizes_are_those_of_the_tensors"),
        (TakesEverything, "test_scheme_that_the_format_has_not_is_refused"),
        (RefusesInt8, "test_scheme_is_accepted"),
        (LosesTheBias, "test_saved_linear_decodes_to_the_module"),
        (RecognizesEverything, "test_saved_linear_decodes_to_the_module"),
        (RecognizesEverything, "test_killed_run_leaves_nothing_that_looks_complete"),
        (StoresHalfTheScale, "test_decoder_that_is_not_the_savers_reads_the_weight"),
        (WritesItsFilesAtOnce, "test_killed_run_leaves_nothing_that_looks_complete"),
        (LosesTheMultiplier, "test_multiplier_of_the_input_comes_back"),
    ],
)
def test_saver_that_breaks_the_contract_is_noticed(
    saver: type[Saver], test: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run_saver(saver(), test, tmp_path, monkeypatch)


def test_half_the_scale_comes_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_saver(StoresHalfTheScale(), "test_saved_linear_decodes_to_the_module", tmp_path, monkeypatch)
