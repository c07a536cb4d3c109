# SPDX-License-Identifier: Apache-2.0
"""Every practice that ships, run on the tiny checkpoints of the families that it is made for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from cells import FamilyRun
from families import FAMILIES

from modelslim.cli.main import main
from modelslim.errors import ProtocolError
from modelslim.plan import make_plan
from modelslim.practice_choice import Request, choose, find_model, judge
from modelslim.practices import ANY, Practice, find_practices
from modelslim.quant_type import QuantType, parse_quant_type
from modelslim.registry import Registry

REGISTRY = Registry.scan()
PRACTICES = [one for one in find_practices(REGISTRY, environ={}) if one.source != "package"]
ENGINES = {"ascendv1_saver": "vllm-ascend", "compressed_tensors_saver": "vllm"}
ANY_MODEL = ("llama", "gemma2", "qwen3_5_text", "qwen2_moe", "internvl")
"""Families on which a practice for any model is run: dense, with linear attention, with experts, with images."""
LACKING = {
    ("default_w8a16", "qwen2_moe"): "vLLM-Ascend runs W8A16 for dense linears only",
}
"""What a practice for any model is refused for, and another one is made for."""
REFUSED = {
    ("gpt2", "ascendv1_saver"): "hold no linear that can be quantized",
    ("gpt2", "compressed_tensors_saver"): "hold no linear that can be quantized",
    ("llama4_text", "ascendv1_saver"): "vLLM-Ascend looks for one linear per expert",
}
"""Families that no practice can serve in a format, see docs/models.md."""
SCHEMES = {
    "w8a8": {"W8A8_DYNAMIC"},
    "w8a8c8": {"W8A8_DYNAMIC"},
    "w8a16": {"W8A16"},
    "w4a16": {"W4A16"},
    "w4a8": {"W4A8_DYNAMIC", "W8A8_DYNAMIC"},
    "w4a8c8": {"W4A8_DYNAMIC", "W8A8_DYNAMIC"},
    "w16a16s": {"W16A16S"},
    "w8a8s": {"W8A8S"},
}
# The processor of GLM-4.xV asks numpy 2 for an array in a way that it warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


def pairs() -> Iterator[tuple[Practice, str]]:
    """Every practice with the families that it must run on."""
    for practice in PRACTICES:
        for name in ANY_MODEL if ANY in practice.model_types else FAMILIES:
            if practice.made_for([name]):
                yield practice, name


@pytest.mark.parametrize(("practice", "family"), list(pairs()), ids=lambda one: getattr(one, "config_id", one))
def test_a_practice_runs_and_its_engine_has_all_that_it_makes(
    practice: Practice, family: str, runs: dict[str, FamilyRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = runs[family], tmp_path / "out"
    # The tiny tokenizer knows few letters: the practice as it is, on texts that these make.
    value = yaml.safe_load(practice.file.read_text(encoding="utf-8"))
    value["spec"]["dataset"] = str(run.samples / "texts.jsonl")
    protocol = tmp_path / "practice.yaml"
    protocol.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    words = ["quant", "--device", "cpu", "--model_path", run.checkpoint, "--save_path", out, "--config_path", protocol]
    assert practice.quant_type is not None
    engine = "mindie" if practice.quant_type.is_sparse else ENGINES[practice.saver]
    code = main([*map(str, words), "--engine", engine])
    said = capsys.readouterr().err
    if (practice.config_id, family) in LACKING:
        assert code == 2 and LACKING[practice.config_id, family] in said
        return
    assert code == 0, said
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert set(report["schemes"]) == SCHEMES[str(practice.quant_type)]
    assert report["verified"] is True
    assert not [warning for warning in report["warnings"] if "proven" in warning]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quant_type", ["w8a8", "w8a16", "w4"])
def test_every_family_gets_a_practice_that_the_plan_accepts(
    quant_type: str, family: str, runs: dict[str, FamilyRun]
) -> None:
    run = runs[family]
    if quant_type == "w4":
        quant_type = "w4a8" if run.family.experts else "w4a16"
    config = json.loads((run.checkpoint / "config.json").read_text(encoding="utf-8"))
    request = Request(find_model(config, None, REGISTRY), parse_quant_type(quant_type))
    choice = choose(request, judge(request, PRACTICES, REGISTRY))
    assert str(choice.practice.quant_type) == quant_type
    # One text only, since the tiny tokenizer knows few letters: none of those that ship is read.
    value = yaml.safe_load(choice.practice.file.read_text(encoding="utf-8"))
    value["spec"]["dataset"] = str(run.samples / "texts.jsonl")
    protocol = run.samples / f"{family}_{quant_type}.yaml"
    protocol.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    refusal = REFUSED.get((family, choice.practice.saver))
    with pytest.raises(ProtocolError, match=refusal) if refusal else nullcontext():
        make_plan(run.checkpoint, protocol, device="cpu", engine=ENGINES[choice.practice.saver])


def test_all_that_ships_is_whole_and_says_what_it_is() -> None:
    assert len(PRACTICES) > 20
    for practice in PRACTICES:
        assert practice.problem == ""
        assert isinstance(practice.quant_type, QuantType) and practice.model_types and practice.notes
        assert practice.evidence == ("measured" if practice.verified else "structural")


def test_every_adapter_has_practices_of_the_usual_types() -> None:
    for distribution in {one.distribution for one in REGISTRY.entries if one.kind == "adapters"}:
        found = {str(one.quant_type) for one in PRACTICES if one.distribution == distribution}
        if found:  # adapters of the examples and of the existing tool bring none
            assert found >= {"w8a8", "w8a16"} and found & {"w4a8", "w4a16"}, distribution
