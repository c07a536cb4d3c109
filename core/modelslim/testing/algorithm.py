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
from torch import Tensor, nn

from modelslim.algorithm import Algorithm, Unit
from modelslim.coverage import cover
from modelslim.errors import QuantizationError
from modelslim.loader import dtype_name
from modelslim.patterns import matches
from modelslim.ports import PortCollector
from modelslim.protocol.compose import apiversions, compose
from modelslim.quantized import QuantizedExperts, QuantizedLinear
from modelslim.registry import Registry
from modelslim.row_sample import RowSample
from modelslim.statistics import ChannelEnergy, ChannelRange, Gram
from modelslim.testing import fragments
from modelslim.testing.rounding import round_to_nearest
from modelslim.testing.units import UNIT, Bench, describe, random_experts, random_layer, random_linears, side_by_side
from modelslim.types import MICROSCALING, LinearInfo, QuantSpec
from modelslim.unit_statistics import UnitStatistics

TOLERANCE = 1e-4
"""Relative to the largest value, of what is equal but for rounding in float32."""


class AlgorithmContract:
    """Subclass it and supply ``config``; override ``linears`` or ``layer`` where the algorithm needs others.

    An algorithm that ``rescales`` is put to work on ``layer``, which has subgraphs, any other on ``linears``.

    Attributes:
        edits_weights: True for an algorithm whose ``apply`` changes weights in place.
        ignored_keys: keys that the fragment takes and the algorithm need not read, as dotted paths.
        reads_all_statistics: False for an algorithm that asks for statistics which it may not read.
    """

    edits_weights: ClassVar[bool] = False
    ignored_keys: ClassVar[frozenset[str]] = frozenset()
    reads_all_statistics: ClassVar[bool] = True

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

    @pytest.fixture
    def layer(self) -> Bench:
        """A unit with subgraphs, for algorithms that rescale."""
        return random_layer()

    @pytest.fixture
    def fragment(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The JSON Schema fragment of the entry."""
        found = Registry.scan().schema("algorithms", config["type"])
        assert found is not None
        return found

    @pytest.fixture
    def promises_output(self, config: Mapping[str, Any]) -> bool:
        """True for an entry that promises outputs no worse than rounding to nearest, on what calibrated it."""
        return False

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
        infos = {info.name: info for info in describe(linears)}
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
        problems = algorithm_class.from_config(config).check(describe(linears))
        assert [problem.message for problem in problems if problem.fatal] == []

    def test_statistics_are_asked_for_linears_of_the_unit(
        self, config: Mapping[str, Any], algorithm_class: type[Algorithm], linears: Mapping[str, nn.Linear]
    ) -> None:
        """``needs`` names linears that can be measured."""
        algorithm = algorithm_class.from_config(config)
        assert algorithm.needs(side_by_side(linears).unit(algorithm)).keys() <= linears.keys()

    def test_replacements_are_what_the_plan_promised(
        self, config: Mapping[str, Any], algorithm_class: type[Algorithm], linears: Mapping[str, nn.Linear]
    ) -> None:
        """With exactly the statistics that were declared, which raise KeyError for any other."""
        algorithm, bench = algorithm_class.from_config(config), side_by_side(linears)
        unit = bench.unit(algorithm)
        modules = algorithm.apply(unit, bench.measure(algorithm.needs(unit)))
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
        name, bank = f"{UNIT}.mlp.experts.down_proj", random_experts()
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
        algorithm, bench = algorithm_class.from_config(config), side_by_side(linears)
        unit = bench.unit(algorithm)
        for name, spec in unit.specs.items():
            alone = replace(unit, specs={name: spec})
            assert algorithm.needs(alone).keys() <= {name}
            assert algorithm.apply(alone, bench.measure(algorithm.needs(alone))).keys() == {name}

    def test_same_input_gives_the_same_bytes(
        self,
        config: Mapping[str, Any],
        algorithm_class: type[Algorithm],
        linears: Mapping[str, nn.Linear],
        layer: Bench,
    ) -> None:
        """From a fresh instance, and from one that has worked before."""
        algorithm = algorithm_class.from_config(config)
        instances = (algorithm, algorithm, algorithm_class.from_config(config))
        results = [_work(instance, _bench(instance, linears, layer)) for instance in instances]
        assert results[0] == results[1] == results[2]

    def test_weights_are_left_alone(
        self, config: Mapping[str, Any], algorithm_class: type[Algorithm], linears: Mapping[str, nn.Linear]
    ) -> None:
        """The engine may still need them, to run the unit again."""
        if self.edits_weights:
            pytest.skip("the algorithm edits weights")
        algorithm, bench = algorithm_class.from_config(config), side_by_side(linears)
        before, unit = dict(_state(bench.module)), bench.unit(algorithm)
        algorithm.apply(unit, bench.measure(algorithm.needs(unit)))
        assert dict(_state(bench.module)) == before

    def test_linear_that_saw_no_token_is_quantized_or_named(
        self, config: Mapping[str, Any], algorithm_class: type[Algorithm], linears: Mapping[str, nn.Linear]
    ) -> None:
        """An expert to which no token was routed either works without statistics or is named in the error."""
        algorithm, bench = algorithm_class.from_config(config), side_by_side(linears, samples=0)
        for name, spec in bench.unit(algorithm).specs.items():
            unit = replace(bench.unit(algorithm), specs={name: spec})
            try:
                algorithm.apply(unit, bench.measure(algorithm.needs(unit)))
            except QuantizationError as error:
                assert name in str(error)

    def test_keys_of_the_entry_are_those_that_are_read(
        self, config: Mapping[str, Any], algorithm_class: type[Algorithm], fragment: Mapping[str, Any]
    ) -> None:
        """What is read can be written, and what is written is read: fragment and parser are of one mind."""
        entry = fragments.Recorder(config)
        algorithm_class.expand(entry)
        algorithm_class.from_config(entry)
        assert fragments.unknown(fragment, entry.asked) == set(), "read, but the fragment has no such key"
        ignored = {tuple(key.split(".")) for key in self.ignored_keys}
        unread = set(fragments.given(fragment, config)) - entry.asked - ignored
        assert unread == set(), "the fragment takes it, but nothing reads it"

    def test_defaults_are_those_that_the_fragment_states(
        self,
        config: Mapping[str, Any],
        algorithm_class: type[Algorithm],
        fragment: Mapping[str, Any],
        linears: Mapping[str, nn.Linear],
        layer: Bench,
    ) -> None:
        """An entry with a default written out does what it does without, also in objects that it leaves out."""
        from jsonschema import Draft7Validator

        known = Draft7Validator(fragment)
        for path, default in fragments.defaults(fragment, config, [fragment]):
            short, long = fragments.without(config, path), fragments.replaced(config, path, default)
            if known.is_valid(short) and known.is_valid(long):
                one, other = (_behaviour(algorithm_class.from_config(each), linears, layer) for each in (short, long))
                assert one == other, f"{path}: {default!r} differs from leaving it out"

    def test_statistics_that_are_asked_for_are_read(
        self,
        config: Mapping[str, Any],
        algorithm_class: type[Algorithm],
        linears: Mapping[str, nn.Linear],
        layer: Bench,
    ) -> None:
        """Measuring what nobody reads costs every run."""
        if not self.reads_all_statistics:
            pytest.skip("the algorithm asks for statistics that it may not read")
        algorithm = algorithm_class.from_config(config)
        bench = _bench(algorithm, linears, layer)
        unit = bench.unit(algorithm)
        statistics = bench.measure(algorithm.needs(unit))
        algorithm.apply(unit, statistics)
        assert statistics.unread == set()

    def test_statistics_of_halves_give_what_those_of_the_whole_give(
        self,
        config: Mapping[str, Any],
        algorithm_class: type[Algorithm],
        linears: Mapping[str, nn.Linear],
        layer: Bench,
    ) -> None:
        """As when devices measure a part of the samples each; edited weights may differ by rounding in float32."""
        algorithm = algorithm_class.from_config(config)
        if algorithm.replays:
            pytest.skip("the algorithm runs the unit itself, on the calls of all ranks")
        benches = [_bench(algorithm, linears, layer) for _ in range(2)]
        results = []
        for bench, parts in zip(benches, ((slice(None),), (slice(1), slice(1, None))), strict=True):
            unit = bench.unit(algorithm)
            statistics, *others = (bench.measure(algorithm.needs(unit), part) for part in parts)
            for other in others:
                statistics.merge(other)
            modules = algorithm.apply(unit, statistics)
            results.append({(name, key): one for name, module in modules.items() for key, one in _state(module)})
        assert results[0] == results[1]
        for one, other in zip(*(bench.module.parameters() for bench in benches), strict=True):
            assert _apart(one, other) <= TOLERANCE

    def test_linears_of_one_input_can_be_worked_on_apart(
        self, config: Mapping[str, Any], algorithm_class: type[Algorithm], linears: Mapping[str, nn.Linear]
    ) -> None:
        """As ranks do that share the work on a unit, when the algorithm says that it is separable."""
        algorithm = algorithm_class.from_config(config)
        if not algorithm.separable:
            pytest.skip("the algorithm is not separable: every rank does its work")
        bench = side_by_side(linears)
        unit = bench.unit(algorithm)
        whole = algorithm.apply(unit, bench.measure(algorithm.needs(unit)))
        for name, spec in unit.specs.items():
            part = algorithm.apply(replace(unit, specs={name: spec}), bench.measure(algorithm.needs(unit)))
            assert part.keys() == {name}
            assert dict(_state(part[name])) == dict(_state(whole[name]))

    def test_outputs_are_no_worse_than_those_of_rounding_to_nearest(
        self,
        config: Mapping[str, Any],
        algorithm_class: type[Algorithm],
        linears: Mapping[str, nn.Linear],
        promises_output: bool,
    ) -> None:
        """On the inputs that calibrated it, and with the same activations."""
        if not promises_output:
            pytest.skip("the entry promises nothing about outputs")
        algorithm, bench = algorithm_class.from_config(config), side_by_side(linears)
        unit = bench.unit(algorithm)
        modules = algorithm.apply(unit, bench.measure(algorithm.needs(unit)))
        errors = [0.0, 0.0]
        for name, module in modules.items():
            assert isinstance(module, QuantizedLinear)
            linear = linears[name]
            x = torch.cat([inputs[name][0] for (inputs,) in bench.calls]).to(torch.float32)
            bias = None if linear.bias is None else linear.bias.to(torch.float32)
            y = nn.functional.linear(x, linear.weight.to(torch.float32), bias)
            for index, one in enumerate((module, _nearest(linear, module))):
                errors[index] += float((one(x) - y).double().square().sum())
        assert errors[0] <= 1.01 * errors[1]

    def test_function_stays_and_statistics_follow(
        self, config: Mapping[str, Any], algorithm_class: type[Algorithm], layer: Bench
    ) -> None:
        """A rescaling changes neither outputs nor parameters that ``edits`` does not name; what it says of the
        inputs afterwards is what measuring them again finds."""
        algorithm = algorithm_class.from_config(config)
        if not algorithm.rescales:
            pytest.skip("the algorithm does not rescale")
        followed = (ChannelEnergy, ChannelRange, Gram, RowSample)
        bench = layer.copy()
        unit = bench.unit(algorithm)
        edits, needs = algorithm.edits(unit), algorithm.needs(unit)
        every = {name: frozenset(followed) | needs.get(name, frozenset()) for name in {*bench.linears, *needs}}
        statistics = bench.measure(every)
        before, outputs = _parameters(bench.module), bench.run()
        algorithm.apply(unit, statistics)
        assert {name for name, one in _parameters(bench.module).items() if one != before.get(name)} <= edits
        for one, other in zip(bench.run(), outputs, strict=True):
            assert _apart(one, other) <= TOLERANCE, "the unit computes something else"
        fresh = bench.measure(every)
        for name in bench.linears:
            for one, other in zip(_summary(statistics, name), _summary(fresh, name), strict=True):
                assert _apart(one, other) <= TOLERANCE, f"{name}: its statistics did not follow"


def _bench(algorithm: Algorithm, linears: Mapping[str, nn.Linear], layer: Bench) -> Bench:
    """A unit that suits the algorithm, whose weights may be changed."""
    return layer.copy() if algorithm.rescales else side_by_side(deepcopy(linears))


def _work(algorithm: Algorithm, bench: Bench) -> Mapping[Any, Any]:
    """Digests of what the algorithm answers, and of the unit afterwards."""
    unit = bench.unit(algorithm)
    modules = algorithm.apply(unit, bench.measure(algorithm.needs(unit)))
    made = {(name, key): value for name, module in modules.items() for key, value in _state(module)}
    return made | {("", key): value for key, value in _state(bench.module)}


def _behaviour(algorithm: Algorithm, linears: Mapping[str, nn.Linear], layer: Bench) -> Sequence[Any]:
    """All that tells two configurations apart, of the smallest linear."""
    infos = describe(layer.linears if algorithm.rescales else linears)
    specs = dict(algorithm.select(infos))
    chosen = sorted(specs.keys() & linears.keys(), key=lambda name: linears[name].weight.numel())[:1]
    few = {name: linears[name] for name in chosen or linears}
    fallback, problems = algorithm.fallback, list(algorithm.check(infos))
    refused = any(problem.fatal for problem in problems)
    return (
        list(algorithm.patterns()),
        specs,
        problems,
        (algorithm.rescales, algorithm.compensates, algorithm.replays, algorithm.samples),
        fallback and (fallback.metric, fallback.above, fallback.spec),
        None if refused else _work(algorithm, _bench(algorithm, few, layer)),
    )


def _nearest(linear: nn.Linear, module: QuantizedLinear) -> QuantizedLinear:
    """The linear rounded to nearest on the whole range, inputs as those of ``module``."""
    weight = round_to_nearest(linear.weight, module.spec.weight)
    return QuantizedLinear(weight, module.spec, linear.bias, module.input_scale, module.input_offset)


def _apart(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert one.shape == other.shape
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))


def _parameters(module: nn.Module) -> dict[str, Any]:
    """Digests by full name."""
    return {f"{UNIT}.{name}": digest for name, digest in _state(module)}


def _summary(statistics: UnitStatistics, linear: str) -> Iterator[Tensor]:
    """What is known of an input."""
    ranges, rows = statistics.get(linear, ChannelRange), statistics.get(linear, RowSample).rows
    energy, gram = statistics.get(linear, ChannelEnergy), statistics.get(linear, Gram)
    for one in (ranges.minimum, ranges.maximum, rows, energy.squares, energy.total, gram.matrix, gram.total):
        assert one is not None
        yield one


def _state(module: nn.Module) -> Iterator[tuple[str, tuple[torch.dtype, torch.Size, str]]]:
    """Digests, not bytes: pytest would work for hours on the difference of two long byte strings."""
    for name, tensor in module.state_dict().items():
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        yield name, (tensor.dtype, tensor.shape, sha256(data).hexdigest())


def _check_linear(module: QuantizedLinear, linear: nn.Linear) -> None:
    """The invariants on which savers rely."""
    weight, spec = module.weight, module.spec
    groups = -(-linear.in_features // (spec.weight.group_size or linear.in_features))
    held = {"e4m3": torch.float8_e4m3fn, "float": linear.weight.dtype}.get(spec.weight.element, torch.int8)
    assert (weight.codes.dtype, weight.codes.shape) == (held, linear.weight.shape)
    if spec.weight.is_integer:
        assert spec.weight.qmin <= int(weight.codes.min())
        assert int(weight.codes.max()) <= spec.weight.qmax
    elif spec.weight.element == "e2m1":
        assert set(weight.codes.abs().flatten().tolist()) <= {0, 1, 2, 3, 4, 6, 8, 12}
    rows = -(-linear.out_features // spec.weight.group_rows)
    # Scales of blocks that the dtype defines are numbers of a type of their own.
    _check_scale(
        weight.scale, (rows, groups), "float32" if spec.weight.dtype in MICROSCALING else spec.weight.scale_dtype
    )
    assert (weight.whole_scale is None) is (spec.weight.dtype != "nvfp4")
    assert (weight.offset is None) is spec.weight.symmetric
    assert weight.offset is None or (weight.offset.dtype, weight.offset.shape) == (torch.int8, weight.scale.shape)
    assert (module.bias is None) is (linear.bias is None)
    if module.input_scale is not None:
        assert module.input_offset is not None
        _check_scale(
            module.input_scale,
            (1,),
            "float32" if spec.activation.dtype in MICROSCALING else spec.activation.scale_dtype,
        )
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
