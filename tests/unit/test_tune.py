# SPDX-License-Identifier: Apache-2.0
"""Tune: the knapsack against brute force, sensitivities against whole models, every strategy on a tiny model."""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from modelslim.errors import ProtocolError, QuantizationError, UsageError
from modelslim.evaluation import evaluate
from modelslim.registry import Registry
from modelslim.run import quantize
from modelslim.tune.experience import find_structures
from modelslim.tune.fallback import least_fallback
from modelslim.tune.judge import read_score
from modelslim.tune.knapsack import Item, solve
from modelslim.tune.plan import read_tune_plan
from modelslim.tune.run import parse_timeout, trials_path, tune
from modelslim.tune.strategy import Candidate, Verdict
from modelslim.tune.trials import Trials

INT4 = {"type": "linear_quant", "qconfig": {"weight": {"dtype": "int4", "scope": "per_channel"}}}
INT8 = {"type": "linear_quant", "qconfig": {"weight": {"dtype": "int8", "scope": "per_channel"}}}
SAVE = [{"type": "compressed_tensors_saver"}]
WritePlan = Callable[[dict[str, Any]], Path]


@pytest.fixture
def write_plan(tmp_path: Path) -> WritePlan:
    def write(value: dict[str, Any]) -> Path:
        file = tmp_path / "plan.yaml"
        file.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
        return file

    return write


@pytest.fixture
def text_file(tmp_path: Path, calibration_texts: tuple[str, ...]) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(calibration_texts[:3]), encoding="utf-8")
    return file


def budget(calibration_file: Path, text_file: Path, **changes: Any) -> dict[str, Any]:
    strategy = {
        "type": "budget",
        "bits_per_weight": 6.0,
        "options": [INT4, INT8, "float"],
        "samples": 2,
        "template": {"apiversion": "modelslim_v1", "spec": {"save": SAVE, "dataset": str(calibration_file)}},
        **changes,
    }
    return {"strategy": strategy, "evaluation": {"type": "in_process", "text": str(text_file)}}


def test_the_knapsack_finds_the_best_of_all_choices() -> None:
    generator = random.Random(1)
    for _ in range(200):
        groups = [
            [Item(generator.randint(1, 12), generator.random()) for _ in range(generator.randint(1, 4))]
            for _ in range(generator.randint(1, 6))
        ]
        room = generator.randint(1, 60)
        choices = (
            (sum(one.loss for one in choice), choice)
            for choice in itertools.product(*groups)
            if sum(one.cost for one in choice) <= room
        )
        best = min((loss for loss, _ in choices), default=None)
        found = solve(groups, room)
        assert (found is None) == (best is None)
        if found is not None:
            assert best is not None and found.exact
            assert found.loss == pytest.approx(best, abs=1e-12) and found.bound == found.loss
            chosen = [items[option] for items, option in zip(groups, found.options, strict=True)]
            assert sum(one.loss for one in chosen) == pytest.approx(found.loss)
            assert sum(one.cost for one in chosen) == found.cost <= room


def test_the_bound_holds_where_the_search_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(2)
    groups = []
    for _ in range(30):
        cost = generator.randint(1000, 9000)
        groups.append([Item(cost * part, 1 / part + generator.random() / 1000) for part in (1, 2, 3)])
    room = int(1.37 * sum(items[0].cost for items in groups))
    exact = solve(groups, room)
    monkeypatch.setattr("modelslim.tune.knapsack.MOST_STATES", 2)
    rough = solve(groups, room)
    assert exact is not None and rough is not None and exact.exact and not rough.exact
    assert rough.bound <= exact.loss <= rough.loss


@pytest.mark.parametrize("path", ["llama", "moe"])
def test_a_budget_is_kept_and_the_protocol_lies_beside_the_result(
    path: str, tiny_llama: Path, tiny_moe: Path, calibration_file: Path, text_file: Path, write_plan: WritePlan,
    tmp_path: Path,
) -> None:  # fmt: skip
    model = tiny_llama if path == "llama" else tiny_moe
    changes = {"sensitivity": "output_error"} if path == "moe" else {}
    result = tune(model, tmp_path / "out", write_plan(budget(calibration_file, text_file, **changes)), device="cpu")
    (trial,) = result["trials"]
    chosen = yaml.safe_load((tmp_path / "out" / "protocol.yaml").read_text())
    assert [entry["qconfig"]["weight"]["dtype"] for entry in chosen["spec"]["process"]] == ["int4", "int8"]
    table = json.loads((trials_path(tmp_path / "out") / "sensitivities.json").read_text())
    names = [name for row in table["groups"] for name in row["group"]]
    assert len(names) == len(set(names)) == (21 if path == "llama" else 2 * (4 + 4 * 3))
    for row in table["groups"]:
        assert row["losses"][0] > row["losses"][1] > row["losses"][2] == 0
        lasts = {name.rpartition(".")[2] for name in row["group"]}
        assert lasts in ({"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}) or (
            lasts == {"gate_proj", "up_proj", "down_proj"} and len(row["group"]) == 12
        )
    again = evaluate(tmp_path / "out", model, text_file.read_text(), max_tokens=2048, device="cpu")
    assert trial["score"] == pytest.approx(again.kl, rel=1e-5)
    # The budget, by the bytes of the files: everything beside the linears is what the float model has.
    tensors = {
        name: tensor
        for file in (tmp_path / "out").glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if "_proj" in name
    }
    linears = {name: one for name, one in load_file(model / "model.safetensors").items() if "_proj" in name}
    bits = 8 * sum(tensor.nbytes for tensor in tensors.values()) / sum(one.numel() for one in linears.values())
    assert 5 < bits <= 6


def test_sensitivities_are_the_kl_of_checkpoints_with_one_group_quantized(
    tiny_llama: Path, calibration_file: Path, text_file: Path, write_plan: WritePlan, tmp_path: Path,
    protocol: Callable[[str], Path],
) -> None:  # fmt: skip
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"text": text_file.read_text()}) + "\n")
    tune(tiny_llama, tmp_path / "out", write_plan(budget(data, text_file, options=[INT4, "float"])), device="cpu")
    table = json.loads((trials_path(tmp_path / "out") / "sensitivities.json").read_text())["groups"]
    for number in (0, 3, len(table) - 1):
        entry = {**INT4, "include": table[number]["group"]}
        spec = {"process": [entry], "save": SAVE}
        alone = protocol(yaml.safe_dump({"apiversion": "modelslim_v1", "spec": spec}))
        quantize(tiny_llama, tmp_path / f"alone{number}", alone, device="cpu")
        kl = evaluate(tmp_path / f"alone{number}", tiny_llama, text_file.read_text(), device="cpu").kl
        assert table[number]["losses"][0] == pytest.approx(kl, rel=0.02), table[number]["group"]


def test_a_budget_in_bytes_and_one_that_is_too_small(
    tiny_llama: Path, calibration_file: Path, text_file: Path, write_plan: WritePlan, tmp_path: Path
) -> None:
    value = budget(calibration_file, text_file, size="215 kB", sensitivity="output_error")
    del value["strategy"]["bits_per_weight"]
    result = tune(tiny_llama, tmp_path / "out", write_plan(value), device="cpu")
    assert 205_000 < result["bytes_after"] <= 215_000
    value["strategy"]["size"] = "100 kB"
    with pytest.raises(ProtocolError) as caught:
        tune(tiny_llama, tmp_path / "small", write_plan(value), device="cpu")
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.message == "the budget is below what the cheapest options take"
    assert diagnostic.line is not None and diagnostic.hint.endswith("MB are needed")


def test_a_tune_goes_on_where_it_was_killed_and_refuses_other_inputs(
    tiny_llama: Path, calibration_file: Path, text_file: Path, write_plan: WritePlan, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    value = budget(calibration_file, text_file)
    plan = write_plan(value)

    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("modelslim.tune.judge.evaluate", killed)
        tune(tiny_llama, tmp_path / "out", plan, device="cpu")
    assert (trials_path(tmp_path / "out") / "trials" / "0001" / "checkpoint").is_dir()
    with monkeypatch.context() as patch:
        # Neither is anything measured again, nor the trial quantized; only the last quantization is.
        patch.setattr("modelslim.tune.sensitivity.Sensitivities.measure", killed)
        runs: list[Path] = []
        real = quantize
        patch.setattr("modelslim.tune.run.quantize", lambda *a, **k: (runs.append(a[1]), real(*a, **k))[1])
        first = tune(tiny_llama, tmp_path / "out", plan, device="cpu")
        assert runs == [tmp_path / "out"]
    assert len(first["trials"]) == 1
    with (trials_path(tmp_path / "out") / "journal.jsonl").open("a") as stream:
        stream.write('{"trial": 2, "ke')  # half a line counts for nothing
    said: list[str] = []
    monkeypatch.setattr("modelslim.tune.judge.evaluate", killed)
    (tmp_path / "out").rename(tmp_path / "old")
    second = tune(tiny_llama, tmp_path / "out", plan, device="cpu", say=said.append)
    assert second["trials"] == first["trials"]
    assert said[0].endswith("1 trials are done")
    value["evaluation"]["window"] = 64
    (tmp_path / "out").rename(tmp_path / "older")
    with pytest.raises(UsageError, match="another tune") as caught:
        tune(tiny_llama, tmp_path / "out", write_plan(value), device="cpu")
    assert [one.message for one in caught.value.diagnostics] == ["the plan changed", "the evaluation changed"]


def _drive(needed: set[int], count: int, *, thin: bool) -> tuple[list[list[int]], bool]:
    """What least_fallback tries, where a candidate passes that leaves the needed items in float."""
    tried: list[list[int]] = []
    items = [[str(index)] for index in range(count)]

    def make(chosen: Sequence[Sequence[str]]) -> Candidate:
        return Candidate({}, " ".join(one[0] for one in chosen))

    search = least_fallback(make, items, thin=thin)
    candidate = next(search)
    while True:
        tried.append([int(word) for word in candidate.note.split()])
        try:
            candidate = search.send(Verdict(0.0, needed <= set(tried[-1])))
        except StopIteration as end:
            return tried, end.value


@pytest.mark.parametrize("needed", [set(), {0}, {2}, {0, 5}, {1, 2, 6}, {7}, set(range(8))])
def test_the_search_finds_the_fewest_items(needed: set[int]) -> None:
    tried, passed = _drive(needed, 8, thin=True)
    assert passed
    least = min((one for one in tried if needed <= set(one)), key=len)
    assert set(least) == needed
    assert len(tried) <= 4 + 3 + 8
    heads, passed = _drive(needed, 8, thin=False)
    assert passed and all(one == list(range(len(one))) for one in heads)
    assert min(len(one) for one in heads if needed <= set(one)) == (max(needed) + 1 if needed else 0)
    assert len(heads) <= 8


def test_the_search_gives_up_when_all_items_do_not_suffice() -> None:
    tried, passed = _drive({99}, 5, thin=True)
    assert not passed and [len(one) for one in tried] == [0, 1, 2, 4, 5]


def scorer(tmp_path: Path, body: str) -> dict[str, Any]:
    """An evaluation by a program of the user's, which sees what is quantized."""
    file = tmp_path / "score.py"
    file.write_text(
        "import json, sys, pathlib\n"
        "from safetensors import safe_open\n"
        "def tensors(path):\n"
        "    files = [safe_open(one, 'pt') for one in pathlib.Path(path).glob('*.safetensors')]\n"
        "    return {name: one.get_tensor(name) for one in files for name in one.keys()}\n"
        "found = tensors(sys.argv[1])\n"
        "floats = [name for name, one in found.items() if '_proj.weight' in name and one.dtype.itemsize == 2\n"
        "          and not name.endswith('_scale')]\n"
        "print('some words')\n" + body
    )
    return {"type": "command", "command": [sys.executable, str(file), "{checkpoint}"]}


NEEDS_LAYER_1 = "print(json.dumps({'score': 0.9 if any('layers.1.' in one for one in floats) else 0.2}))\n"


def template(calibration_file: Path, entry: dict[str, Any] = INT8) -> dict[str, Any]:
    spec = {"process": [entry], "save": SAVE, "dataset": str(calibration_file)}
    return {"apiversion": "modelslim_v1", "spec": spec}


def test_standing_high_leaves_only_what_is_needed_in_float(
    tiny_llama: Path, calibration_file: Path, write_plan: WritePlan, tmp_path: Path
) -> None:
    smooth = {"type": "smooth_quant", "alpha": 0.5}
    evaluation = {**scorer(tmp_path, NEEDS_LAYER_1), "target": 0.95, "tolerance": 0.1}
    strategy = {
        "type": "standing_high",
        "template": template(calibration_file),
        "anti_outlier_strategies": [[smooth], []],
    }
    plan = write_plan({"strategy": strategy, "evaluation": evaluation})
    result = tune(tiny_llama, tmp_path / "out", plan, device="cpu")
    chosen = yaml.safe_load((tmp_path / "out" / "protocol.yaml").read_text())["spec"]["process"]
    assert [entry["type"] for entry in chosen] == ["smooth_quant", "linear_quant"]
    assert chosen[1]["exclude"] == ["model.layers.1.*"]
    assert result["score"] == 0.9 and result["trials"][0]["passed"] is False


def test_the_second_anti_outlier_strategy_is_tried_when_the_first_fails(
    tiny_llama: Path, calibration_file: Path, write_plan: WritePlan, tmp_path: Path
) -> None:
    # The program knows smoothed checkpoints by their norms, which differ from those of the model.
    evaluation = scorer(
        tmp_path,
        "name = 'model.layers.0.input_layernorm.weight'\n"
        "print(float(bool((found[name] == tensors(sys.argv[2])[name]).all())))\n",
    )
    evaluation["command"].append("{model}")
    strategy = {
        "type": "standing_high",
        "template": template(calibration_file),
        "anti_outlier_strategies": [[{"type": "smooth_quant", "alpha": 0.5}], []],
    }
    plan = write_plan({"strategy": strategy, "evaluation": {**evaluation, "target": 1}})
    result = tune(tiny_llama, tmp_path / "out", plan, device="cpu")
    assert [one["passed"] for one in result["trials"]] == [False, False, False, True]
    assert "anti_outlier_strategies[1], 0 layers" in result["trials"][-1]["note"]


def test_binary_fallback_takes_the_shortest_head_of_the_candidates(
    tiny_llama: Path, calibration_file: Path, write_plan: WritePlan, tmp_path: Path
) -> None:
    strategy = {
        "type": "binary_fallback",
        "template": template(
            calibration_file, {**INT8, "exclude": ["*layers.0.*k_proj", "*layers.0.*v_proj", "*layers.0.*q_proj"]}
        ),
        "rollback_path": "spec.process[0].exclude",
        "rollback_candidates": [["*layers.2.*down_proj"], ["*layers.1.*o_proj"], ["*layers.0.*o_proj"]],
    }
    value = {"strategy": strategy, "evaluation": {**scorer(tmp_path, NEEDS_LAYER_1), "target": 0.9}}
    result = tune(tiny_llama, tmp_path / "out", write_plan(value), device="cpu")
    chosen = yaml.safe_load((tmp_path / "out" / "protocol.yaml").read_text())["spec"]["process"]
    assert chosen[0]["exclude"][3:] == ["*layers.2.*down_proj", "*layers.1.*o_proj"]
    assert len(result["trials"]) == 3
    strategy["rollback_path"] = "spec.process[4].exclude"
    with pytest.raises(ProtocolError) as caught:
        tune(tiny_llama, tmp_path / "other", write_plan(value), device="cpu")
    assert "the template has no spec.process[4].exclude" in str(caught.value.diagnostics[0])


@pytest.mark.parametrize("quant_type", ["w8a8", "w4a8"])
def test_experience_makes_the_template(
    quant_type: str, tiny_moe: Path, calibration_file: Path, text_file: Path, write_plan: WritePlan, tmp_path: Path
) -> None:
    strategy = {
        "type": "standing_high_with_experience",
        "quant_type": quant_type,
        "save": [{"type": "ascendv1_saver"}],
        "dataset": str(calibration_file),
    }
    evaluation = {"type": "in_process", "metric": "perplexity", "target": 1e6, "text": str(text_file)}
    result = tune(
        tiny_moe, tmp_path / "out", write_plan({"strategy": strategy, "evaluation": evaluation}), device="cpu"
    )
    assert len(result["trials"]) == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    expected = {"W8A8": 6, "W8A8_DYNAMIC": 26} if quant_type == "w8a8" else {"W8A8_DYNAMIC": 8, "W4A8_DYNAMIC": 24}
    assert report["schemes"] == expected


def test_structures_are_known_by_the_names_of_linears() -> None:
    from types import SimpleNamespace

    from modelslim.types import LinearInfo

    def linear(name: str, rows: int = 8) -> LinearInfo:
        return LinearInfo(name, name, "layer", rows, 8, False, "bfloat16")

    names = {
        "l.attn.q_proj": "GQA", "l.attn.k_proj": "GQA", "l.mla.kv_b_proj": "MLA", "l.mla.o_proj": "MLA",
        "l.mla.indexer.wk": "DSA", "l.lin.in_proj_qkvz": "GatedDeltaNet", "l.lin.out_proj": "GatedDeltaNet",
        "l.mlp.down_proj": "FFN", "l.mlp.experts.0.up_proj": "MoE", "l.mlp.shared_expert.up_proj": "MoE",
        "l.odd.fc": "other",
    }  # fmt: skip
    linears = {name: linear(name, 4 if name.endswith("k_proj") else 8) for name in names}
    info: Any = SimpleNamespace(linears=linears)
    assert find_structures(info) == names


def test_no_trial_that_passes_is_an_error_that_says_how_far_it_was(
    tiny_llama: Path, calibration_file: Path, text_file: Path, write_plan: WritePlan, tmp_path: Path
) -> None:
    value = budget(calibration_file, text_file, sensitivity="output_error")
    value["evaluation"]["target"] = 1e-9
    with pytest.raises(QuantizationError, match="no trial reached the target: the best kl is 0"):
        tune(tiny_llama, tmp_path / "out", write_plan(value), device="cpu")
    assert not (tmp_path / "out").exists()
    value["evaluation"]["target"] = 1e9
    tune(tiny_llama, tmp_path / "out", write_plan(value), device="cpu", restart=True)


def test_no_trial_begins_when_the_time_is_over_or_the_number_is_reached(
    tiny_llama: Path, calibration_file: Path, write_plan: WritePlan, tmp_path: Path
) -> None:
    strategy = {"type": "standing_high", "template": template(calibration_file)}
    value = {
        "max_trials": 2,
        "strategy": strategy,
        "evaluation": {**scorer(tmp_path, "print(len(floats))\n"), "target": 10**6},
    }
    with pytest.raises(QuantizationError):
        tune(tiny_llama, tmp_path / "out", write_plan(value), device="cpu")
    journal = (trials_path(tmp_path / "out") / "journal.jsonl").read_text().splitlines()
    assert len(journal) == 1 + 2
    with pytest.raises(QuantizationError, match="none was made"):
        tune(tiny_llama, tmp_path / "late", write_plan(value), device="cpu", timeout=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["strategy"].update(type="budgets"), "must be 'budget' or"),
        (lambda v: v["strategy"].update(bits=4), "unknown key 'bits'"),
        (lambda v: v["strategy"].update(size="9 MB"), "bits_per_weight is given already"),
        (lambda v: v["strategy"].pop("bits_per_weight"), "missing key 'size'"),
        (lambda v: v["strategy"]["options"].pop(), "needs at least two options"),
        (lambda v: v["strategy"]["options"].append("flaot"), "must be an entry of process, or the word float"),
        (lambda v: v["strategy"]["options"][0]["qconfig"]["weight"].update(dtype="int5"), "int5"),
        (lambda v: v["strategy"]["options"][0].update(include=["*"]), "an option has no include"),
        (lambda v: v["strategy"]["template"]["spec"].update(svae=[]), "unknown key 'svae'"),
        (lambda v: v["evaluation"].update(metric="loss"), "must be 'kl' or"),
        (lambda v: v["evaluation"].update(type="service_oriented"), "must be 'in_process' or 'command'"),
        (lambda v: v.update(max_trails=3), "unknown key 'max_trails'"),
        (lambda v: v["strategy"].update(type="standing_high"), "unknown key"),
    ],
)
def test_every_mistake_of_a_plan_has_its_line(
    change: Callable[[Any], Any], message: str, calibration_file: Path, text_file: Path, write_plan: WritePlan
) -> None:
    value = json.loads(json.dumps(budget(calibration_file, text_file, options=[INT4, "float"])))
    change(value)
    with pytest.raises(ProtocolError) as caught:
        read_tune_plan(write_plan(value), Registry.scan())
    found = [one for one in caught.value.diagnostics if message in one.message]
    assert found and all(one.line and one.file for one in found), caught.value


def test_a_strategy_that_looks_for_a_target_wants_one(
    calibration_file: Path, text_file: Path, write_plan: WritePlan
) -> None:
    strategy = {"type": "standing_high", "template": template(calibration_file)}
    plan = write_plan({"strategy": strategy, "evaluation": {"type": "in_process"}})
    with pytest.raises(ProtocolError) as caught:
        read_tune_plan(plan, Registry.scan())
    assert [one.path for one in caught.value.diagnostics] == ["evaluation.target"]


def test_what_does_not_fit_the_model_is_told_at_its_line_before_anything_is_measured(
    tiny_llama: Path, calibration_file: Path, text_file: Path, write_plan: WritePlan, tmp_path: Path
) -> None:
    odd = {"type": "linear_quant", "qconfig": {"weight": {"dtype": "int4", "scope": "per_group", "group_size": 50}}}
    plan = write_plan(budget(calibration_file, text_file, options=[odd, "float"]))
    with pytest.raises(ProtocolError) as caught:
        tune(tiny_llama, tmp_path / "out", plan, device="cpu")
    lines = plan.read_text().splitlines()
    places = [one for one in caught.value.diagnostics if "group_size 50" in one.message]
    assert places and all(one.line is not None and one.file == str(plan) for one in places)
    assert "weight:" in lines[(places[0].line or 0) - 2] or "dtype" in lines[(places[0].line or 0) - 1]
    assert not trials_path(tmp_path / "out").exists()


def test_two_tunes_do_not_share_their_trials(tmp_path: Path) -> None:
    with Trials(tmp_path / "t", {"tune": 1}, restart=False) as first:
        first.add({"trial": 1, "key": "a"})
        with pytest.raises(UsageError, match="in use by another tune"):
            Trials(tmp_path / "t", {"tune": 1}, restart=False)
    with Trials(tmp_path / "t", {"tune": 1}, restart=False) as again:
        assert again.find("a") == {"trial": 1, "key": "a"} and again.find("b") is None
    with Trials(tmp_path / "t", {"tune": 2}, restart=True) as other:
        assert other.records == []
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(UsageError, match="holds no trials"):
        Trials(tmp_path / "photos", {"tune": 1}, restart=True)


def test_a_program_that_is_stopped_by_the_time_of_the_tune_leaves_what_is_best(
    tiny_llama: Path, calibration_file: Path, write_plan: WritePlan, tmp_path: Path
) -> None:
    evaluation = {**scorer(tmp_path, "import time\ntime.sleep(600)\n"), "target": 1}
    value = {"strategy": {"type": "standing_high", "template": template(calibration_file)}, "evaluation": evaluation}
    with pytest.raises(QuantizationError, match="none was made"):
        tune(tiny_llama, tmp_path / "out", write_plan(value), device="cpu", timeout=6)
    evaluation["timeout"] = 1
    with pytest.raises(UsageError, match="took longer than 1 s"):
        tune(tiny_llama, tmp_path / "out", write_plan(value), device="cpu", restart=True)


def test_scores_are_read_from_the_last_line() -> None:
    assert read_score("words\n0.5\n\n")[0] == 0.5
    assert read_score('{"score": 2, "more": 1}\n') == (2.0, {"score": 2, "more": 1})
    for text in ("", "words", '{"scor": 1}', "NaN", "true", '{"score": "0.5"}'):
        with pytest.raises(UsageError, match="no score"):
            read_score(text)


def test_times_are_days_hours_minutes_and_seconds() -> None:
    assert parse_timeout("1D2H3M4S") == 86400 + 7200 + 180 + 4
    assert parse_timeout("90M") == 5400
    assert parse_timeout("1d1s") == 86401
    for text in ("", "10", "0S", "3M2H", "1.5H"):
        with pytest.raises(UsageError, match="is no time"):
            parse_timeout(text)


def test_a_program_that_fails_is_told_with_its_code(
    tiny_llama: Path, calibration_file: Path, write_plan: WritePlan, tmp_path: Path
) -> None:
    value = {
        "strategy": {"type": "standing_high", "template": template(calibration_file)},
        "evaluation": {**scorer(tmp_path, "sys.exit(7)\n"), "target": 1},
    }
    with pytest.raises(UsageError, match="exit code 7"):
        tune(tiny_llama, tmp_path / "out", write_plan(value), device="cpu")
    assert torch.is_grad_enabled()
