# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from modelslim.errors import ProtocolError
from modelslim.protocol.document import parse_document
from modelslim.protocol.model import Protocol
from modelslim.protocol.validate import load_document, load_protocol, read_protocol
from modelslim.registry import Registry

HERE = Path(__file__).parent
GOOD = sorted((HERE / "good").glob("*.yaml"))
BAD = sorted((HERE / "bad").glob("*.yaml"))
MARK = "# expect: "

W8A8_STATIC = {
    "act": {"scope": "per_tensor", "dtype": "int8", "symmetric": False, "method": "minmax"},
    "weight": {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"},
}
W8A8_DYNAMIC = {
    "act": {"scope": "per_token", "dtype": "int8", "symmetric": True, "method": "minmax"},
    "weight": {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"},
}


def name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", BAD, ids=name)
def test_a_bad_protocol_gives_exactly_the_expected_diagnostics(path: Path, registry: Registry) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    expected = [f"{path}:{line.removeprefix(MARK)}" for line in lines if line.startswith(MARK)]
    assert expected
    with pytest.raises(ProtocolError) as caught:
        load_protocol(path, registry)
    assert [str(diagnostic) for diagnostic in caught.value.diagnostics] == expected


@pytest.mark.parametrize("path", GOOD, ids=name)
def test_a_good_protocol_is_accepted(path: Path, registry: Registry) -> None:
    protocol = load_protocol(path, registry)
    assert protocol.document.file == str(path)
    assert protocol.process
    assert protocol.save


def test_the_static_example_of_the_guide_means_what_it_says(registry: Registry) -> None:
    protocol = load_protocol(HERE / "good" / "guide_static.yaml", registry)
    assert protocol.apiversion == "modelslim_v1"
    assert (protocol.runner, protocol.prior, protocol.dataset) == ("auto", (), "mix_calib.jsonl")
    assert protocol.default_text is None
    assert protocol.metadata == {}
    [processor] = protocol.process
    assert processor.type == "linear_quant"
    assert processor.path == ("spec", "process", 0)
    assert processor.config == {
        "type": "linear_quant",
        "qconfig": W8A8_STATIC,
        "include": ["*"],
        "exclude": ["*down_proj*"],
    }
    [saver] = protocol.save
    assert (saver.type, saver.path) == ("ascendv1_saver", ("spec", "save", 0))
    assert saver.config == {"type": "ascendv1_saver", "part_file_size": 4}


def test_the_mixed_example_of_the_guide_expands_its_templates(registry: Registry) -> None:
    protocol = load_protocol(HERE / "good" / "guide_mixed_moe.yaml", registry)
    [group] = protocol.process
    assert group.config["configs"] == [
        {"type": "linear_quant", "qconfig": W8A8_STATIC, "include": ["*self_attn*"]},
        {"type": "linear_quant", "qconfig": W8A8_DYNAMIC, "include": ["*mlp*"], "exclude": ["*gate"]},
    ]


def test_the_example_of_the_integration_guide_has_a_prompt_and_its_dataset(registry: Registry) -> None:
    protocol = load_protocol(HERE / "good" / "guide_vlm.yaml", registry)
    assert protocol.apiversion == "multimodal_vlm_modelslim_v1"
    assert protocol.dataset == "calibImages"
    assert protocol.default_text == "Describe this image in detail."
    assert [entry.config["qconfig"] for entry in protocol.process] == [W8A8_STATIC, W8A8_DYNAMIC]


def test_a_vlm_protocol_without_a_prompt_gets_the_documented_one(registry: Registry) -> None:
    text = (HERE / "good" / "minimal.yaml").read_text(encoding="utf-8")
    document = parse_document(text.replace("modelslim_v1", "multimodal_vlm_modelslim_v1"))
    protocol = load_document(document, registry)
    assert protocol.default_text == "Describe this image in detail."
    assert (protocol.dataset, protocol.runner) == ("calibImages", "layer_wise")
    assert protocol.is_multimodal and not load_protocol(HERE / "good" / "minimal.yaml", registry).is_multimodal


def test_a_runner_that_a_vlm_protocol_does_not_know_is_kept_for_the_plan_to_warn(registry: Registry) -> None:
    assert load_protocol(HERE / "good" / "vlm_runner_unknown.yaml", registry).runner == "layer_wize"


def test_every_key_of_the_envelope_arrives(registry: Registry) -> None:
    protocol = load_protocol(HERE / "good" / "everything.yaml", registry)
    assert protocol.runner == "layer_wise"
    assert protocol.dataset == "/data/calib.jsonl"
    assert protocol.metadata["label"]["w_bit"] == 4
    assert protocol.metadata["verified_tags"] == {
        "Qwen2.5-7B-Instruct": [["vLLM-Ascend", "Atlas_A2_Inference"], ["MindIE"]]
    }
    assert [(stage.dataset, stage.path) for stage in protocol.prior] == [
        ("first.jsonl", ("spec", "prior", 0)),
        (None, ("spec", "prior", 1)),
    ]
    assert protocol.prior[0].process[0].config == {"type": "linear_quant", "exclude": [], "qconfig": {"weight": {}}}
    assert protocol.prior[1].process[0].path == ("spec", "prior", 1, "process", 0)
    assert protocol.process[0].config["exclude"] == ["*.down_proj"]  # its own, not the merged one
    assert [entry.config for entry in protocol.save] == [
        {"type": "ascendv1_saver", "part_file_size": 0.5},
        {"type": "ascendv1_saver"},
    ]


def test_a_protocol_is_frozen(registry: Registry) -> None:
    protocol = load_protocol(HERE / "good" / "minimal.yaml", registry)
    with pytest.raises(FrozenInstanceError):
        protocol.runner = "layer_wise"  # type: ignore[misc]


def test_a_text_is_called_string_in_its_diagnostics(registry: Registry) -> None:
    with pytest.raises(ProtocolError, match=r"<string>:1:13: apiversion: unknown apiversion 'x'"):
        load_document(parse_document("apiversion: x"), registry)


def test_the_error_counts_the_mistakes(registry: Registry) -> None:
    with pytest.raises(ProtocolError) as caught:
        load_document(parse_document("apiversion: modelslim_v1\nspec: {process: [], save: []}"), registry)
    assert caught.value.message == "<string> is not a valid protocol: 2 mistakes"


def test_reading_leniently_keeps_the_entries_without_a_mistake(tmp_path: Path, registry: Registry) -> None:
    path = tmp_path / "quant.yaml"
    path.write_text(
        "apiversion: modelslim_v1\n"
        "spec:\n"
        "  runner: 5\n"
        "  process:\n"
        "    - {type: linear_quant, qconfig: {weight: {dtyp: int8}}}\n"
        "    - {type: linear_quant, qconfig: {weight: {}}, include: ['*mlp*']}\n"
        "    - {type: group, configs: [{type: linear_quant, qconfig: {}}]}\n"
        "  save: [{type: ascendv1_saver}, {}]\n"
        "  prior: [{process: [{type: nothing}]}]\n",
        encoding="utf-8",
    )
    protocol, diagnostics = read_protocol(path, registry)
    assert isinstance(protocol, Protocol)
    assert protocol.runner == "auto"
    # A key that is only misspelt is read as it was meant.
    assert [entry.path for entry in protocol.process] == [("spec", "process", 0), ("spec", "process", 1)]
    assert protocol.process[0].config["qconfig"] == {"weight": {"dtype": "int8"}}
    assert [entry.path for entry in protocol.save] == [("spec", "save", 0)]
    assert protocol.prior == ()
    assert [diagnostic.line for diagnostic in diagnostics] == [3, 5, 7, 8, 9]


def test_reading_leniently_gives_nothing_without_an_apiversion(tmp_path: Path, registry: Registry) -> None:
    path = tmp_path / "quant.yaml"
    path.write_text("spec: {}\n", encoding="utf-8")
    protocol, diagnostics = read_protocol(path, registry)
    assert protocol is None
    assert [diagnostic.path for diagnostic in diagnostics] == ["apiversion"]


def test_groups_as_deep_as_a_document_may_be_are_judged(registry: Registry) -> None:
    entry = "{type: linear_quant, qconfig: {weight: {dtype: %s}}}"
    for _ in range(17):
        entry = f"{{type: group, configs: [{entry}]}}"
    text = f"apiversion: modelslim_v1\nspec:\n  process: [{entry}]\n  save: [{{type: ascendv1_saver}}]\n"
    assert load_document(parse_document(text % "int4"), registry).process
    with pytest.raises(ProtocolError, match="not 'int5'"):
        load_document(parse_document(text % "int5"), registry)


@pytest.mark.parametrize("value", ["{}", "5", "[x]", "x", "null", "{runner: 1}"])
def test_any_value_may_stand_under_a_key_of_ones_own_at_the_top(value: str, registry: Registry) -> None:
    text = (HERE / "good" / "minimal.yaml").read_text(encoding="utf-8")
    assert load_document(parse_document(f"{text}mine: {value}\n"), registry)


def test_a_key_named_like_a_setting_may_hold_anchors(registry: Registry) -> None:
    text = (
        "apiversion: modelslim_v1\n"
        "process:\n  - &p {type: linear_quant, qconfig: {weight: {}}}\n"
        "save: &s [{type: ascendv1_saver}]\n"
        "spec: {process: [*p], save: *s}\n"
    )
    assert load_document(parse_document(text), registry).process[0].type == "linear_quant"


def test_loading_a_protocol_imports_no_torch() -> None:
    program = (
        "import sys\n"
        "from modelslim.protocol.validate import load_protocol\n"
        "from modelslim.registry import Registry\n"
        "heavy = {'torch', 'transformers', 'numpy'}\n"
        "assert 'jsonschema' not in sys.modules\n"
        f"load_protocol({str(HERE / 'good' / 'guide_mixed_moe.yaml')!r}, Registry.scan())\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "assert not [name for name in sys.modules if name.startswith(('modelslim_group', 'modelslim_linear_quant'))]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
