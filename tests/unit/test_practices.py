# SPDX-License-Identifier: Apache-2.0
"""Types, tags, and which of several practices a request gets: the six priorities of the quick guide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelslim.errors import UsageError
from modelslim.practice_choice import Choice, Model, Request, choose, find_model, fits, judge, priorities
from modelslim.practices import FOLDERS, Practice, find_practice, find_practices, read_practice
from modelslim.quant_type import KNOWN, QuantType, parse_quant_type
from modelslim.registry import Registry
from modelslim.tags import read_tags, split_tags

NAME = "Qwen2.5-7B-Instruct"
REGISTRY = Registry.scan()
Write = Callable[..., Path]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("w8a8", QuantType(8, 8)),
        ("W4A8C8", QuantType(4, 8, kv_cache=True)),
        ("w8a8s", QuantType(8, 8, is_sparse=True)),
        ("w8a16", QuantType(8, 16)),
        ("w16a16s", QuantType(16, 16, is_sparse=True)),
        ("w4a4f4", QuantType(4, 4, fa_bit=4)),
        ("w8a8f8", QuantType(8, 8, fa_bit=8)),
        ("w8a8f", QuantType(8, 8, fa_bit=8)),
        ("w4a16", QuantType(4, 16)),
    ],
)
def test_types_are_read_as_the_guide_writes_them(word: str, expected: QuantType) -> None:
    assert parse_quant_type(word) == expected


@pytest.mark.parametrize("word", KNOWN)
def test_a_type_is_written_as_it_was_read(word: str) -> None:
    assert str(parse_quant_type(word)) == word


@pytest.mark.parametrize(("word", "meant"), [("w8a", "w8a8"), ("w4a8c4", "w4a8c8"), ("w8-a16", "w8a16")])
def test_what_is_no_type_gets_the_nearest(word: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_quant_type(word)
    assert caught.value.hint == f"did you mean {meant!r}?"


@pytest.mark.parametrize("word", ["w0a8", "w8a9", "w88", ""])
def test_bits_that_nothing_has_are_no_type(word: str) -> None:
    with pytest.raises(UsageError):
        parse_quant_type(word)


def test_tags_are_split_at_blanks_and_commas_and_each_counts_once() -> None:
    assert split_tags(["vLLM-Ascend Atlas_A2_Inference"]) == ("vLLM-Ascend", "Atlas_A2_Inference")
    assert split_tags(["MindIE,CPU", "cpu"]) == ("MindIE", "cpu")


@pytest.mark.parametrize("word", ["vLLM-Ascend", "vllm_ascend", "VLLM_ASCEND"])
def test_the_tag_of_an_engine_names_its_contract(word: str) -> None:
    tags = read_tags([word, "atlas-a2-inference"], REGISTRY)
    assert (tags.engine, tags.remarks) == ("vllm-ascend", ())
    assert tags.missing_in(["vLLM_Ascend", "Atlas_A2_Inference"]) == []
    assert tags.missing_in(["vLLM-Ascend", "Atlas_A3_Inference"]) == ["atlas-a2-inference"]


def test_a_scenario_has_one_engine() -> None:
    with pytest.raises(UsageError, match="2 engines: MindIE, SGLang"):
        read_tags(["MindIE", "SGLang"], REGISTRY)


def test_tags_that_nothing_knows_are_said_to_be_unchecked() -> None:
    (remark,) = read_tags(["Atlas_A3_Interface"], REGISTRY).remarks
    assert "nothing is checked" in remark and remark.endswith("did you mean 'Atlas_A3_Inference'?")
    (remark,) = read_tags(["LMDeploy"], REGISTRY, ["lmdeploy"]).remarks
    assert "practices name it, and whether an engine of this name loads the result is not checked" in remark


def practice(name: str, quant_type: str = "w8a8", **attributes: Any) -> Practice:
    """A practice in a folder of the user's."""
    values = {"saver": "ascendv1_saver", "quant_type": parse_quant_type(quant_type), **attributes}
    return Practice(name, Path(f"{name}.yaml"), "folder", **values)


A2, A3 = ["vLLM-Ascend", "Atlas_A2_Inference"], ["MindIE", "Atlas_A3_Inference"]
VERIFIED = practice("w4-verified", "w4a8", verified_tags={NAME: [A2]})
DEFAULT = practice("w4-default", "w4a8")
W8_VERIFIED = practice("w8-verified", verified_tags={NAME: [A2]})
W8_DEFAULT = practice("w8-default")


def pick(practices: list[Practice], quant_type: str | None, tags: list[str], engine: str = "") -> Choice:
    """What is chosen for the model of these tests."""
    wanted = None if quant_type is None else parse_quant_type(quant_type)
    request = Request(Model((NAME, "qwen2"), "dist"), wanted, read_tags(tags, REGISTRY), engine)
    return choose(request, judge(request, practices, REGISTRY))


@pytest.mark.parametrize(
    ("practices", "tags", "expected"),
    [
        ([W8_DEFAULT, W8_VERIFIED, DEFAULT, VERIFIED], ["vllm_ascend", "ATLAS-A2-inference"], (1, "w4-verified")),
        ([W8_DEFAULT, W8_VERIFIED, DEFAULT, VERIFIED], [], (1, "w4-verified")),
        ([W8_DEFAULT, W8_VERIFIED, DEFAULT, VERIFIED], A3, (2, "w4-verified")),
        ([W8_DEFAULT, W8_VERIFIED, DEFAULT], A2, (3, "w4-default")),
        ([W8_DEFAULT, W8_VERIFIED], A2, (4, "w8-verified")),
        ([W8_DEFAULT, W8_VERIFIED], A3, (5, "w8-verified")),
        ([W8_DEFAULT], A2, (6, "w8-default")),
    ],
)
def test_the_six_priorities(practices: list[Practice], tags: list[str], expected: tuple[int, str]) -> None:
    for order in (practices, practices[::-1]):
        choice = pick(order, "w4a8", tags)
        assert (choice.priority, choice.practice.config_id) == expected
        assert choice.needs_consent is (expected[0] > 1)


@pytest.mark.parametrize(
    ("practices", "tags", "expected"),
    [([W8_DEFAULT, W8_VERIFIED], A2, 1), ([W8_DEFAULT, W8_VERIFIED], A3, 2), ([W8_DEFAULT, VERIFIED], A2, 3)],
)
def test_the_recommended_type_has_three_and_without_a_type_all_need_consent(
    practices: list[Practice], tags: list[str], expected: int
) -> None:
    asked, unasked = pick(practices, "w8a8", tags), pick(practices, None, tags)
    assert asked.priority == unasked.priority == expected
    assert (asked.needs_consent, unasked.needs_consent) == (expected > 1, True)
    assert unasked.because.startswith("no --quant_type was given")
    assert [level[0] for level in priorities(QuantType(8, 8))] == [1, 2, 3]


def test_nothing_at_all_says_what_there_is() -> None:
    with pytest.raises(UsageError) as caught:
        pick([practice("only", "w8a16")], "w4a8", [])
    assert caught.value.message == f"there is no practice of w4a8 for {NAME}, and none of w8a8"
    assert caught.value.hint == "there are some of w8a16"


def test_attention_types_fall_to_w8a8_and_the_reason_is_told() -> None:
    choice = pick([W8_DEFAULT], "w8a8f8", [])
    assert choice.priority == 6
    assert f"there is no practice of w8a8f8 for {NAME} (no algorithm here quantizes attention itself)" in choice.line


def test_a_model_that_is_verified_without_tags_needs_consent_with_them() -> None:
    plain = practice("plain", verified_model_types=(NAME,))
    assert pick([plain], "w8a8", []).priority == 1
    choice = pick([plain], "w8a8", ["CPU"])
    assert (choice.priority, choice.needs_consent) == (2, True)
    assert "not with CPU" in choice.because


def test_all_tags_must_lie_in_one_scenario() -> None:
    split = practice("split", verified_tags={NAME: [["MindIE", "Atlas_A2_Inference"], ["vLLM-Ascend", "CPU"]]})
    assert pick([split], "w8a8", ["vLLM-Ascend", "CPU"]).priority == 1
    assert pick([split], "w8a8", ["vLLM-Ascend", "Atlas_A2_Inference"]).priority == 2


def test_among_equals_score_counts_then_the_users_own_then_the_name() -> None:
    names = [practice("b"), practice("a"), practice("low", score=99), practice("high", score=101)]
    assert pick(names, "w8a8", []).practice.config_id == "high"
    assert pick(names[:3], "w8a8", []).practice.config_id == "a"
    shipped = practice("0-shipped", source="generic adapter", distribution="other")
    assert pick([shipped, *names[:3]], "w8a8", []).practice.config_id == "a"


def test_what_is_made_for_the_family_goes_before_what_is_made_for_any_model() -> None:
    family = practice("family", score=1, model_types=("qwen2",))
    assert pick([practice("any", score=500, model_types=("*",)), family], "w8a8", []).practice is family


def test_a_practice_for_other_models_is_never_taken() -> None:
    others = [
        practice("other", model_types=("llama", "Qwen2.5-72B*")),
        practice("verified-other", verified_model_types=("Qwen2.5-72B-Instruct",)),
        practice("foreign", source="adapter", distribution="another", model_types=("*",)),
        Practice("unlabelled", Path("unlabelled.yaml"), "folder", saver="ascendv1_saver"),
    ]
    with pytest.raises(UsageError):
        pick(others, "w8a8", [])
    own = practice("own", source="adapter", distribution="dist")
    assert pick([*others, own], "w8a8", []).practice is own


def test_what_the_engine_does_not_read_is_passed_over() -> None:
    packed = practice("packed", saver="compressed_tensors_saver", score=1)
    assert pick([W8_DEFAULT, packed], "w8a8", []).practice is W8_DEFAULT
    assert pick([W8_DEFAULT, packed], "w8a8", [], engine="vllm").practice is packed
    request = Request(Model((NAME,)), None, engine="vllm")
    (verdict,) = judge(request, [W8_DEFAULT], REGISTRY)
    assert verdict.why == "vLLM does not read what ascendv1_saver writes"
    assert fits([verdict], QuantType(8, 8), "not verified") == []


def test_the_name_of_a_model_is_looked_up_as_by_the_registry() -> None:
    assert find_model(None, "Qwen3-VL-30B-A3B", REGISTRY).distribution == "modelslim-adapter-qwen3-vl"
    slip = find_model(None, "Qwen3-VL-30B-A3", REGISTRY)
    assert slip.distribution == "modelslim-adapter-transformers"
    assert slip.remark.endswith("(did you mean 'Qwen3-VL-30B-A3B'?)")
    assert find_model(None, "Acme-9b", REGISTRY, ["Acme-9B"]).remark.endswith("(did you mean 'Acme-9B'?)")
    assert find_model(None, "Acme-9B", REGISTRY, ["Acme-9B"]).remark == ""
    llama = {"model_type": "llama", "architectures": ["X"]}
    assert find_model(llama, "Acme-9b", REGISTRY, ["Acme-9B"]).remark.endswith("(did you mean 'Acme-9B'?)")
    config = {"model_type": "qwen3_vl_moe", "architectures": ["X"]}
    assert find_model(config, "Qwen3-VL-30B-A3B", REGISTRY).names == ("Qwen3-VL-30B-A3B", "qwen3_vl_moe")
    with pytest.raises(UsageError):
        find_model(None, None, REGISTRY)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a practice into a folder."""

    def to(name: str, metadata: str, head: str = "apiversion: modelslim_v1\n") -> Path:
        file = tmp_path / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        body = "spec:\n  process: [{type: linear_quant, qconfig: {weight: {}}}]\n  save: [{type: ascendv1_saver}]\n"
        file.write_text(f"{head}metadata: {metadata}\n{body}", encoding="utf-8")
        return file

    return to


def test_metadata_of_the_existing_tool_is_read(write: Write, tmp_path: Path) -> None:
    file = write(
        "mine",
        "{config_id: other, score: 80, label: {w_bit: 8, a_bit: 8, fa_quant: true}, verified_tags: {M: [[a, b]]}}",
    )
    read = read_practice(file, "folder")
    assert (read.config_id, read.score, read.quant_type, read.problem) == ("other", 80, QuantType(8, 8, fa_bit=8), "")
    assert (read.verified_tags, read.verified, read.evidence) == ({"M": [["a", "b"]]}, ["M"], "measured")
    assert read_practice(file, "dist 1.0", "dist", "adapter").problem.startswith("its config_id is 'other'")


@pytest.mark.parametrize(
    ("metadata", "head", "problem"),
    [
        ("{label: {w_bits: 8}}", "apiversion: modelslim_v1\n", "'w_bits' was unexpected"),
        ("{label: {evidence: measured}}", "apiversion: modelslim_v1\n", "no model is listed as verified"),
        ("{}", "", "no apiversion"),
        ("{}", "apiversion: modelslim_v0\n", "'modelslim_v0' is not supported"),
        ("{}", "apiversion: modelslim_convert\n", "that of a conversion"),
        ("[", "apiversion: modelslim_v1\n", "mine.yaml"),
    ],
)
def test_a_file_that_is_no_practice_says_why(write: Write, metadata: str, head: str, problem: str) -> None:
    assert problem in read_practice(write("mine", metadata, head), "folder").problem


def test_folders_of_the_user_come_first_and_are_searched_below(write: Write, tmp_path: Path) -> None:
    write("named/default_w8a8", "{}")
    write("environment", "{}")
    (tmp_path / "named" / "README.md").write_text("no practice")
    found = find_practices(REGISTRY, [tmp_path / "named"], {FOLDERS: str(tmp_path)})
    assert [one.config_id for one in found[:3]] == ["default_w8a8", "environment", "default_w8a8"]
    assert found[0].is_custom and not found[-1].is_custom
    assert find_practice("default_w8a8", found).is_custom
    with pytest.raises(UsageError, match="no practice is called 'default_w8a'"):
        find_practice("default_w8a", found)


@pytest.mark.parametrize("by_option", [True, False])
def test_a_folder_that_is_not_there_is_refused(by_option: bool, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(UsageError, match="missing, which is no folder") as caught:
        find_practices(REGISTRY, [missing] if by_option else [], {} if by_option else {FOLDERS: str(missing)})
    assert caught.value.message.startswith("--practices" if by_option else FOLDERS)


def test_a_distribution_without_an_adapter_may_ship_practices(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "acme_recipes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-recipes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[modelslim.practices]\nacme = acme_recipes.practices\n")
    folder = tmp_path / "acme_recipes" / "practices"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "__init__.py").touch()
    write("acme_recipes/practices/good", "{score: 300, label: {w_bit: 8, a_bit: 8}, model_types: [qwen2]}")
    write("acme_recipes/practices/stem", "{config_id: other}")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry.scan({})
    found = [one for one in find_practices(registry, environ={}) if one.distribution == "acme-recipes"]
    assert [(one.config_id, one.source, one.origin) for one in found] == [
        (name, "package", "acme-recipes 1.0") for name in ("good", "stem")
    ]
    assert found[1].problem == "its config_id is 'other'; of a shipped practice it is the name of the file"
    request = Request(Model((NAME, "qwen2"), "modelslim-adapter-transformers"), QuantType(8, 8))
    # Made for the family, it goes before those for any model.
    assert choose(request, judge(request, find_practices(registry, environ={}), registry)).practice == found[0]
