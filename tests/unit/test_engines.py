# SPDX-License-Identifier: Apache-2.0
"""Engine contracts are data of one form, found by name; their rules refuse what the engine does not load."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path

import pytest
from jsonschema import Draft7Validator

from modelslim.engine_rules import Target, find_problems
from modelslim.engines import Contract, find_contract, read_contracts
from modelslim.errors import PluginError, ProtocolError, UsageError
from modelslim.plan import make_plan
from modelslim.planned import FUSED
from modelslim.registry import Registry
from modelslim.saver import PlannedModel
from modelslim.types import FLOAT, LinearInfo, Problem, QuantSpec, TensorSpec

ROOT = files("modelslim.schemas").joinpath("engines")
FILES = sorted(Path(str(ROOT)).glob("*.json"))
SCHEMA = json.loads(files("modelslim.schemas").joinpath("engine_contract.json").read_text(encoding="utf-8"))

INT8, INT4 = TensorSpec("int8", "per_channel"), TensorSpec("int4", "per_channel")
GROUPS = TensorSpec("int4", "per_group", group_size=32)
TOKEN, STATIC = TensorSpec("int8", "per_token"), TensorSpec("int8", "per_tensor", symmetric=False)
W8A8, W8A8_DYNAMIC, W4A8_DYNAMIC = QuantSpec(INT8, STATIC), QuantSpec(INT8, TOKEN), QuantSpec(INT4, TOKEN)
W4A16 = QuantSpec(GROUPS, FLOAT)
LAYER = "model.layers.0"
EXPERT = f"{LAYER}.mlp.experts.0"


def planned(
    specs: Mapping[str, QuantSpec | None], shape: tuple[int, int] = (64, 64), tensors: tuple[str, ...] = ()
) -> PlannedModel:
    """A model with these linears; None leaves one float."""
    linears = {name: LinearInfo(name, name, "unit", *shape, False, "bfloat16") for name in specs}
    names = frozenset({*tensors, *(f"{name}.weight" for name in specs)})
    return PlannedModel({}, "bfloat16", linears, {name: spec for name, spec in specs.items() if spec}, names)


def check(
    engine: str, model: PlannedModel, *, saver: str = "ascendv1_saver", tp: int = 1, asked: bool = True
) -> list[Problem]:
    return find_problems(Target(find_contract(engine, Registry.scan()), tp, asked), saver, model)


def only(engine: str, model: PlannedModel, **options: object) -> str:
    (problem,) = check(engine, model, **options)  # type: ignore[arg-type]
    assert problem.fatal and problem.hint
    return problem.message


# The files


def test_schema_is_one() -> None:
    Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_contract_keeps_to_the_schema_and_says_where_it_comes_from(file: Path) -> None:
    value = json.loads(file.read_text(encoding="utf-8"))
    assert list(Draft7Validator(SCHEMA).iter_errors(value)) == []
    assert file.stem in (f"{value['engine']}-{value.get('version')}", value["engine"])
    assert "run" in value["evidence"] or "read" in value["evidence"]


@pytest.mark.parametrize("contract", read_contracts(Registry.scan()), ids=lambda contract: contract.name)
def test_facts_of_a_contract_fit_together(contract: Contract) -> None:
    for rules in contract.formats.values():
        # The names of fused linears are known to the core, which makes ignore lists and messages of them.
        assert rules.fused.items() <= {name: list(members) for name, members in FUSED.items()}.items()
        for scheme in rules.schemes or ():
            weight, activation = (
                TensorSpec(
                    one.dtype,
                    one.scope[0] if one.scope else "per_block",
                    one.symmetric is not False,
                    one.group_size[0] if one.group_size else None,
                )
                for one in (scheme.weight, scheme.activation)
            )
            spec = QuantSpec(weight, FLOAT if activation.dtype == "float" else activation)
            assert spec.scheme == scheme.name, "the name in the file is not that of its operands"
            assert scheme.misfits(spec) == []


def test_newest_version_serves_who_names_none() -> None:
    registry = Registry.scan()
    assert find_contract("vllm-ascend", registry).version.startswith("0.24")
    assert find_contract("vllm-ascend-0.23", registry).version == "0.23.0"
    assert find_contract("vLLM-Ascend-0.23.0", registry).version == "0.23.0"
    assert find_contract("MindIE", registry).name == "mindie"


def test_unknown_engine_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError) as caught:
        find_contract("vllm-asend", Registry.scan())
    assert "did you mean 'vllm-ascend'?" in caught.value.hint


def test_vendor_adds_an_engine_with_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "acme_engines"
    package.mkdir()
    (package / "__init__.py").touch()
    info = tmp_path / "acme_engines-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-engines\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[modelslim.engines]\nacme = acme_engines\n")
    contract = {"engine": "acme", "version": "7", "title": "Acme", "evidence": "run", "formats": {"a_saver": {}}}
    file = package / "acme-7.json"
    file.write_text(json.dumps(contract))
    monkeypatch.syspath_prepend(tmp_path)
    assert find_contract("acme", Registry.scan()).file == file
    assert check("acme", planned({"a.o_proj": W8A8}), saver="a_saver") == []
    assert "Acme does not read what b_saver writes" in only("acme", planned({"a.o_proj": W8A8}), saver="b_saver")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("acme-7.json", "{", "cannot be read as JSON"),
        ("acme-7.json", '{"engine": "acme"}', "is no contract of an engine"),
        (
            "acme.json",
            '{"engine": "acme", "version": "7", "title": "", "evidence": "", "formats": {"a": {}}}',
            "is called",
        ),
        (
            "a-x.json",
            '{"engine": "a", "version": "x", "title": "", "evidence": "", "formats": {"a": {}}}',
            "no version",
        ),
    ],
)
def test_damaged_contract_is_named(name: str, text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    from modelslim.engines import _read_folder

    with pytest.raises(PluginError, match=says) as caught:
        _read_folder(tmp_path)
    assert str(tmp_path / name) in caught.value.message


# The rules


@pytest.mark.parametrize(
    ("engine", "name", "spec", "says"),
    [
        ("vllm-ascend", f"{LAYER}.mlp.down_proj", W4A8_DYNAMIC, "runs W4A8_DYNAMIC for experts only"),
        ("vllm-ascend-0.23", f"{LAYER}.mlp.down_proj", W4A8_DYNAMIC, "with weight per_group, not per_channel"),
        ("vllm-ascend", f"{EXPERT}.down_proj", W8A8, "runs W8A8 for dense linears only"),
        ("vllm-ascend", f"{LAYER}.mlp.down_proj", W4A16, "runs W4A16 for experts only"),
        ("vllm-ascend", f"{EXPERT}.down_proj", QuantSpec(INT4, FLOAT), "for experts with weight per_group, not"),
        ("vllm-ascend", "a.o_proj", QuantSpec(TensorSpec("int3", "per_channel"), FLOAT), "has no W3A16"),
        ("vllm-ascend", "a.kv_b_proj", W8A8_DYNAMIC, "takes kv_b_proj in float only"),
        ("vllm-ascend", "a.indexer.weights_proj", W8A8_DYNAMIC, "takes indexer.weights_proj in float only"),
    ],
)
def test_what_an_engine_has_not_is_refused(engine: str, name: str, spec: QuantSpec, says: str) -> None:
    message = only(engine, planned({name: spec}))
    assert says in message and name in message
    assert "[vllm-ascend-0.2" in message


@pytest.mark.parametrize(
    ("engine", "saver", "name", "spec"),
    [
        ("vllm-ascend", "ascendv1_saver", f"{LAYER}.mlp.down_proj", W8A8),
        ("vllm-ascend", "ascendv1_saver", f"{EXPERT}.down_proj", W4A8_DYNAMIC),
        ("vllm-ascend", "ascendv1_saver", f"{EXPERT}.down_proj", W4A16),
        ("vllm", "compressed_tensors_saver", f"{LAYER}.mlp.down_proj", W4A16),
        ("vllm", "compressed_tensors_saver", f"{EXPERT}.down_proj", W8A8_DYNAMIC),
        ("vllm", "gptq_saver", f"{LAYER}.mlp.down_proj", W4A16),
        ("sglang", "ascendv1_saver", f"{EXPERT}.down_proj", W8A8),
    ],
)
def test_what_an_engine_has_passes(engine: str, saver: str, name: str, spec: QuantSpec) -> None:
    assert check(engine, planned({name: spec}), saver=saver) == []


def test_engine_that_was_not_asked_for_warns_of_schemes_and_refuses_structure() -> None:
    (scheme,) = check("vllm-ascend", planned({f"{EXPERT}.down_proj": W8A8}), asked=False)
    assert not scheme.fatal
    (fused,) = check("vllm-ascend", planned({"a.q_proj": W8A8, "a.k_proj": None}), asked=False)
    assert fused.fatal and "q_proj W8A8" in fused.message and "[vllm-ascend-0.24" in fused.message


def test_experts_of_a_layer_must_agree() -> None:
    assert "runs all experts of a layer with one scheme" in only(
        "vllm",
        planned({f"{EXPERT}.gate_proj": W8A8_DYNAMIC, f"{LAYER}.mlp.experts.1.gate_proj": None}),
        saver="compressed_tensors_saver",
    )


@pytest.mark.parametrize(
    ("name", "spec", "shape", "tp", "says"),
    [
        ("a.down_proj", W4A16, (64, 96), 2, "parts of whole groups of 32, which 96 inputs do not give"),
        ("a.up_proj", W4A16, (64, 96), 2, ""),
        ("a.down_proj", W4A16, (64, 128), 4, ""),
        (
            "a.up_proj",
            QuantSpec(
                TensorSpec("fp8_e4m3", "per_block", group_size=128, group_rows=128),
                TensorSpec("fp8_e4m3", "per_block", group_size=128),
            ),
            (384, 256),
            2,
            "parts of whole blocks of 128, which 384 outputs do not give",
        ),
    ],
)
def test_groups_and_blocks_are_not_cut_between_ranks(
    name: str, spec: QuantSpec, shape: tuple[int, int], tp: int, says: str
) -> None:
    problems = check("vllm", planned({name: spec}, shape), saver="compressed_tensors_saver", tp=tp)
    assert len(problems) == bool(says)
    assert all(says in problem.message for problem in problems)


def test_inputs_of_a_rank_must_fill_the_kernels_blocks() -> None:
    spec = QuantSpec(TensorSpec("mxfp8", "per_block", group_size=32), TensorSpec("mxfp8", "per_block", group_size=32))
    assert check("vllm-ascend", planned({f"{EXPERT}.down_proj": spec}, (64, 128)), tp=2) == []
    assert "a multiple of 64 inputs on each rank" in only(
        "vllm-ascend", planned({f"{EXPERT}.down_proj": spec}, (64, 192)), tp=2
    )
    assert "a multiple of 2 outputs" in only("vllm-ascend", planned({f"{EXPERT}.up_proj": W4A8_DYNAMIC}, (63, 64)))


def test_stacked_float_experts_beside_quantized_linears() -> None:
    stacked = (f"{LAYER}.mlp.experts.gate_up_proj", f"{LAYER}.mlp.experts.down_proj")
    assert "one linear per expert" in only("vllm-ascend", planned({"a.o_proj": W8A8}, tensors=stacked))
    assert check("vllm-ascend", planned({f"{EXPERT}.up_proj": W8A8_DYNAMIC}, tensors=stacked)) == []
    assert check("vllm-ascend", planned({"a.o_proj": None}, tensors=stacked)) == []


# In a plan

PROTOCOL = """\
apiversion: modelslim_v1
spec:
  process:
    - type: linear_quant
      qconfig:
        act: {scope: per_token, dtype: int8, symmetric: true, method: minmax}
        weight: {scope: per_channel, dtype: int4, symmetric: true, method: minmax}
      include: ["*"]
  save:
    - type: ascendv1_saver
"""


def test_plan_refuses_for_an_engine_that_was_named(tiny_llama: Path, protocol: Callable[[str], Path]) -> None:
    file = protocol(PROTOCOL)
    with pytest.raises(ProtocolError) as caught:
        make_plan(tiny_llama, file, device="cpu", engine="vllm-ascend")
    (mistake,) = caught.value.diagnostics
    assert (mistake.file, mistake.line, mistake.path) == (str(file), 6, "spec.process[0].qconfig")
    assert "runs W4A8_DYNAMIC for experts only" in mistake.message


def test_plan_refuses_an_engine_that_is_not_known(tiny_llama: Path, protocol: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="no contract is known"):
        make_plan(tiny_llama, protocol(PROTOCOL), device="cpu", engine="tensorrt")
