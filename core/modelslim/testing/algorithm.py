# SPDX-License-Identifier: Apache-2.0
"""What the engine expects of every algorithm.

Install your distribution, editable or not, and give the contract entries of ``process``::

    from modelslim.testing.algorithm import AlgorithmContract

    class TestMyQuant(AlgorithmContract):
        @pytest.fixture(params=[{"type": "my_quant", "bits": 8}, {"type": "my_quant", "bits": 4}])
        def config(self, request):
            return request.param
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from hashlib import sha256
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from modelslim.algorithm import Algorithm, Unit
from modelslim.coverage import cover
from modelslim.errors import QuantizationError
from modelslim.experts import ExpertLinear
from modelslim.loader import dtype_name
from modelslim.patterns import matches
from modelslim.ports import PortCollector
from modelslim.protocol.compose import apiversions, compose
from modelslim.quantized import QuantizedExperts, QuantizedLinear
from modelslim.registry import Registry
from modelslim.statistics import UnitStatistics
from modelslim.types import LinearInfo, ProcessRequest, QuantSpec

UNIT = "model.layers.0"


class AlgorithmContract:
    """Subclass it and supply ``config``; override ``linears`` where the algorithm needs others.

    Attributes:
        edits_weights: True for an algorithm whose ``apply`` changes weights in place.
    """

    edits_weights: ClassVar[bool] = False

    @pytest.fixture
    def config(self) -> Mapping[str, Any]:
        """An entry of ``process``, ``type`` included."""
        raise NotImplementedError("supply the fixture `config`: an entry of `process`")

    @pytest.fixture
    def algorithm_class(self, config: Mapping[str, Any]) -> type[Algorithm]:
        """The class behind the entry's ``type``, from the installed plugins."""
        found: type[Algorithm] = Registry.scan().load("algorithms", config["type"])
        return found

    @pytest.fixture
    def linears(self) -> Mapping[str, nn.Linear]:
        """Linears of one unit by name, weights loaded."""
        return random_linears()

    @pytest.fixture(autouse=True)
    def without_gradients(self) -> Iterator[None]:
        """As the engine has it."""
        with torch.no_grad():
            yield

    def test_schema_accepts_the_entry(self, config: Mapping[str, Any]) -> None:
        """The schema fragment of the installed distribution is usable and accepts the entry."""
        from jsonschema import Draft7Validator

        for apiversion in apiversions():
            schema = compose(apiversion, Registry.scan(), types={config["type"]})
            entry = {"$ref": "#/definitions/processor", "definitions": schema["definitions"]}
            assert [error.message for error in Draft7Validator(entry).iter_errors(config)] == []

    def test_entry_expands_into_entries_with_a_type(
        self, config: Mapping[str, Any], algorithm_class: type[Algorithm]
    ) -> None:
        """``expand`` gives what the plan can look up."""
        entries = algorithm_class.expand(config)
        assert entries
        assert all(isinstance(entry["type"], str) for _, entry in entries)

    def test_chosen_linears_are_linears_of_the_model_that_the_patterns_name(
        self, config: Mapping[str, Any], algorithm_class: type[Algorithm], linears: Mapping[str, nn.Linear]
    ) -> None:
        """``select`` keeps to ``include`` and ``exclude``, where ``patterns`` reports such."""
        algorithm = algorithm_class.from_config(config)
        infos = {info.name: info for info in _describe(linears)}
        specs = algorithm.select(list(infos.values()))
        assert specs.keys() <= infos.keys()
        assert all(isinstance(spec, QuantSpec) for spec in specs.values())
        for wanted, key in ((True, "include"), (False, "exclude")):
            patterns = [pattern for place, pattern in algorithm.patterns() if place[0] == key]
            for name in specs if patterns else ():
                assert any(matches(infos[name], pattern) for pattern in patterns) is wanted, (name, key)

    def test_model_of_the_contract_is_not_refused(
        self, config: Mapping[str, Any], algorithm_class: type[Algorithm], linears: Mapping[str, nn.Linear]
    ) -> None:
        """``check`` has no fatal problem with the linears of the contract."""
        problems = algorithm_class.from_config(config).check(_describe(linears))
        assert [problem.message for problem in problems if problem.fatal] == []

    def test_statistics_are_asked_for_linears_of_the_unit(
        self, config: Mapping[str, Any], algorithm_class: type[Algorithm], linears: Mapping[str, nn.Linear]
    ) -> None:
        """``needs`` names linears that can be measured."""
        algorithm = algorithm_class.from_config(config)
        assert algorithm.needs(_unit(algorithm, linears)).keys() <= linears.keys()

    def test_replacements_are_what_the_plan_promised(
        self, config: Mapping[str, Any], algorithm_class: type[Algorithm], linears: Mapping[str, nn.Linear]
    ) -> None:
        """With exactly the statistics that were declared, which raise KeyError for any other."""
        algorithm = algorithm_class.from_config(config)
        unit = _unit(algorithm, linears)
        modules = algorithm.apply(unit, _measure(algorithm, unit))
        assert modules.keys() == unit.specs.keys()
        for name, module in modules.items():
            assert isinstance(module, QuantizedLinear), name
            assert module.spec == unit.specs[name]
            _check_linear(module, linears[name])

    def test_fused_experts_become_as_many_linears(
        self, config: Mapping[str, Any], algorithm_class: type[Algorithm]
    ) -> None:
        """An algorithm that takes fused experts answers with all of them; one of them saw no token."""
        algorithm = algorithm_class.from_config(config)
        name, bank = f"{UNIT}.mlp.experts.down_proj", _random_experts()
        dtype = dtype_name(bank.weight.dtype)
        infos = [
            LinearInfo(one, one, UNIT, bank.out_features, bank.in_features, False, dtype, name)
            for one in (f"{UNIT}.mlp.experts.{number}.down_proj" for number in range(bank.experts))
        ]
        specs = algorithm.select(infos)
        if not algorithm.takes_experts or len(specs) < len(infos):
            pytest.skip("the algorithm takes no fused experts, or the entry does not select them")
        unit = Unit(UNIT, {name: bank}, {name: specs[infos[0].name]})
        generator = torch.Generator().manual_seed(1)
        with PortCollector(unit.linears, algorithm.needs(unit)) as ports:
            bank(torch.randn((8, bank.in_features), generator=generator).to(bank.weight.dtype), [5, 0, 3])
        cover(ports, list(algorithm.needs(unit)), "fallback")
        module = algorithm.apply(unit, ports.statistics())[name]
        assert isinstance(module, QuantizedExperts)
        assert (module.experts, module.spec) == (bank.experts, unit.specs[name])
        for number in range(bank.experts):
            alone = nn.Linear(bank.in_features, bank.out_features, bias=False)
            alone.weight = nn.Parameter(bank.weight[number], requires_grad=False)
            _check_linear(module.linear(number), alone)

    def test_linears_of_other_entries_are_left_alone(
        self, config: Mapping[str, Any], algorithm_class: type[Algorithm], linears: Mapping[str, nn.Linear]
    ) -> None:
        """What the plan gave to another entry is neither measured nor replaced."""
        algorithm = algorithm_class.from_config(config)
        unit = _unit(algorithm, linears)
        for name, spec in unit.specs.items():
            alone = replace(unit, specs={name: spec})
            assert algorithm.needs(alone).keys() <= {name}
            assert algorithm.apply(alone, _measure(algorithm, alone)).keys() == {name}

    def test_same_input_gives_the_same_bytes(
        self, config: Mapping[str, Any], algorithm_class: type[Algorithm], linears: Mapping[str, nn.Linear]
    ) -> None:
        """From a fresh instance, and from one that has worked before."""
        results = []
        algorithm = algorithm_class.from_config(config)
        for instance in (algorithm, algorithm, algorithm_class.from_config(config)):
            unit = _unit(instance, deepcopy(linears))
            modules = instance.apply(unit, _measure(instance, unit))
            results.append({(name, key): value for name, module in modules.items() for key, value in _state(module)})
        assert results[0] == results[1] == results[2]

    def test_weights_are_left_alone(
        self, config: Mapping[str, Any], algorithm_class: type[Algorithm], linears: Mapping[str, nn.Linear]
    ) -> None:
        """The engine may still need them, to run the unit again."""
        if self.edits_weights:
            pytest.skip("the algorithm edits weights")
        before = {name: list(_state(linear)) for name, linear in linears.items()}
        algorithm = algorithm_class.from_config(config)
        unit = _unit(algorithm, linears)
        algorithm.apply(unit, _measure(algorithm, unit))
        assert {name: list(_state(linear)) for name, linear in linears.items()} == before

    def test_linear_that_saw_no_token_is_quantized_or_named(
        self, config: Mapping[str, Any], algorithm_class: type[Algorithm], linears: Mapping[str, nn.Linear]
    ) -> None:
        """An expert to which no token was routed either works without statistics or is named in the error."""
        algorithm = algorithm_class.from_config(config)
        for name, spec in _unit(algorithm, linears).specs.items():
            unit = Unit(UNIT, linears, {name: spec})
            try:
                algorithm.apply(unit, _measure(algorithm, unit, batches=0))
            except QuantizationError as error:
                assert name in str(error)


def random_linears() -> Mapping[str, nn.Linear]:
    """Three linears of a decoder layer in bfloat16, by name; their inputs divide by 128."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"self_attn.q_proj": (256, 128), "self_attn.k_proj": (256, 64), "mlp.down_proj": (384, 256)}
    linears = {}
    for name, (columns, rows) in shapes.items():
        linear = nn.Linear(columns, rows, bias=name.endswith("q_proj"), dtype=torch.bfloat16).requires_grad_(False)
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        linears[f"{UNIT}.{name}"] = linear
    return linears


def _random_experts() -> ExpertLinear:
    """One linear of three experts in bfloat16."""
    bank = ExpertLinear(3, 64, 128, {"down_proj": slice(None)}, dtype=torch.bfloat16)
    bank.weight.copy_(torch.randn(bank.weight.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    return bank


def _describe(linears: Mapping[str, nn.Linear]) -> list[LinearInfo]:
    """What the plan tells of the linears, and of one outside the units."""
    infos = [
        LinearInfo(
            name,
            name,
            UNIT,
            linear.out_features,
            linear.in_features,
            linear.bias is not None,
            dtype_name(linear.weight.dtype),
        )
        for name, linear in linears.items()
    ]
    return [*infos, LinearInfo("lm_head", "lm_head", "", 512, 256, False, "bfloat16")]


def _unit(algorithm: Algorithm, linears: Mapping[str, nn.Linear]) -> Unit:
    """The unit as the engine shows it, for a saver whose engine holds scales in bfloat16."""
    specs = {
        name: QuantSpec(
            replace(spec.weight, scale_dtype="bfloat16"),
            replace(spec.activation, scale_dtype="bfloat16"),
        )
        for name, spec in algorithm.select(_describe(linears)).items()
        if name in linears
    }
    if not algorithm.replays:
        return Unit(UNIT, linears, specs)
    module = _SideBySide(linears)
    generator = torch.Generator().manual_seed(4)
    inputs = [
        {
            name: torch.randn((1, 9, linear.in_features), generator=generator).to(linear.weight.dtype)
            for name, linear in linears.items()
        }
        for _ in range(3)
    ]
    calls = [ProcessRequest(UNIT, module, (one,), {}) for one in inputs]
    return Unit(UNIT, linears, specs, module=module, calls=calls)


class _SideBySide(nn.Module):
    """A unit that does nothing but apply its linears, each to an input of its own."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        for name, linear in linears.items():
            *path, last = name.removeprefix(f"{UNIT}.").split(".")
            parent: nn.Module = self
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, linear)

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Inputs by the full name of the linear; outputs in their order."""
        return tuple(self.get_submodule(name.removeprefix(f"{UNIT}."))(x) for name, x in inputs.items())


def _measure(algorithm: Algorithm, unit: Unit, batches: int = 3) -> UnitStatistics:
    """The statistics that the algorithm declares, of random activations."""
    generator = torch.Generator().manual_seed(1)
    with PortCollector(unit.linears, algorithm.needs(unit)) as ports:
        for _ in range(batches):
            for linear in unit.linears.values():
                assert isinstance(linear, nn.Linear)
                linear(torch.randn(1, 7, linear.in_features, generator=generator).to(linear.weight.dtype))
            ports.next_sample()
    return ports.statistics()


def _state(module: nn.Module) -> Iterator[tuple[str, tuple[torch.dtype, torch.Size, str]]]:
    """Digests, not bytes: pytest would work for hours on the difference of two long byte strings."""
    for name, tensor in module.state_dict().items():
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        yield name, (tensor.dtype, tensor.shape, sha256(data).hexdigest())


def _check_linear(module: QuantizedLinear, linear: nn.Linear) -> None:
    """The invariants on which savers rely."""
    weight, spec = module.weight, module.spec
    groups = linear.in_features // (spec.weight.group_size or linear.in_features)
    assert (weight.codes.dtype, weight.codes.shape) == (torch.int8, linear.weight.shape)
    assert spec.weight.qmin <= int(weight.codes.min())
    assert int(weight.codes.max()) <= spec.weight.qmax
    _check_scale(weight.scale, (linear.out_features, groups), spec.weight.scale_dtype)
    assert (weight.offset is None) is spec.weight.symmetric
    assert weight.offset is None or (weight.offset.dtype, weight.offset.shape) == (torch.int8, weight.scale.shape)
    assert (module.bias is None) is (linear.bias is None)
    if module.input_scale is not None:
        assert module.input_offset is not None
        _check_scale(module.input_scale, (1,), spec.activation.scale_dtype)
        assert (module.input_offset.dtype, module.input_offset.shape) == (torch.int8, (1,))
        assert not spec.activation.symmetric or not module.input_offset.any()
    x = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(2)).to(linear.weight.dtype)
    y = module(x)
    assert (y.dtype, y.shape) == (x.dtype, (5, linear.out_features))
    assert y.isfinite().all()


def _check_scale(scale: torch.Tensor, shape: Sequence[int], scale_dtype: str) -> None:
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, tuple(shape))
    assert (scale > 0).all()
    assert scale.isfinite().all()
    engine: torch.dtype = getattr(torch, scale_dtype)
    assert torch.equal(scale.to(engine).to(torch.float32), scale), f"the scale is not representable in {scale_dtype}"
