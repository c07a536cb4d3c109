# SPDX-License-Identifier: Apache-2.0
"""``verify`` finds nothing in good checkpoints, and names every fault that is put into one by hand."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modelslim.errors import VerificationError
from modelslim.run import quantize
from modelslim.saver import Saver
from modelslim.verify import Verification, verify

Protocol = Callable[[str], Path]

DESCRIPTION = "quant_model_description.json"
INDEX = "quant_model_weights.safetensors.index.json"
QUERY = "model.layers.1.self_attn.q_proj"
KEY = "model.layers.1.self_attn.k_proj"
DOWN = "model.layers.0.mlp.down_proj"
GATE = "model.layers.1.mlp.experts.1.gate_proj"
EXPERT_DOWN = "model.layers.1.mlp.experts.1.down_proj"
STATIC = "{scope: per_tensor, dtype: int8, symmetric: false, method: minmax}"
DYNAMIC = "{scope: per_token, dtype: int8, symmetric: true, method: minmax}"
INT8 = "{scope: per_channel, dtype: int8, symmetric: true, method: minmax}"
INT4 = "{scope: per_channel, dtype: int4, symmetric: true, method: minmax}"


def entry(act: str, weight: str, include: str, exclude: str = "") -> str:
    left = f'      exclude: ["{exclude}"]\n' if exclude else ""
    qconfig = f"{{act: {act}, weight: {weight}}}"
    return f'    - type: linear_quant\n      qconfig: {qconfig}\n      include: ["{include}"]\n{left}'


def yaml(*entries: str, dataset: Path, part_file_size: float = 4) -> str:
    return (
        "apiversion: modelslim_v1\nspec:\n  process:\n" + "".join(entries) + "  save:\n    - type: ascendv1_saver\n"
        f"      part_file_size: {part_file_size}\n  dataset: {dataset}\n"
    )


@dataclass(frozen=True)
class Good:
    """A good result and its float model."""

    path: Path
    source: Path


@pytest.fixture(scope="session")
def biased_llama(llama_factory: Callable[..., Path]) -> Path:
    return llama_factory(attention_bias=True)


@pytest.fixture(scope="session")
def good(
    biased_llama: Path, tiny_moe: Path, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Good]:
    """Static int8 in several files; experts, of eight bits (moe) and of four (int4); and key/value caches."""
    root = tmp_path_factory.mktemp("verify")
    experts = "*experts*"
    made = {
        "static": (biased_llama, [entry(STATIC, INT8, "*")], 0.0001),
        "moe": (tiny_moe, [entry(STATIC, INT8, "*", experts), entry(DYNAMIC, INT8, experts)], 4),
        "int4": (tiny_moe, [entry(DYNAMIC, INT8, "*", experts), entry(DYNAMIC, INT4, experts)], 4),
        "caches": (biased_llama, [entry(DYNAMIC, INT8, "*"), "    - type: dynamic_cache\n"], 4),
    }
    results = {}
    for name, (source, entries, size) in made.items():
        protocol = root / f"{name}.yaml"
        protocol.write_text(yaml(*entries, dataset=calibration_file, part_file_size=size), encoding="utf-8")
        quantize(source, root / name, protocol, device="cpu")
        results[name] = Good(root / name, source)
    return results


@dataclass
class Copy:
    """A result that may be damaged; ``write`` puts tensors, index and description back, as they were changed.

    Attributes:
        path: its directory.
        source: the float model.
        tensors: every tensor.
        shards: the file of every tensor.
        description: the description file.
    """

    path: Path
    source: Path
    tensors: dict[str, Tensor] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, good: Good, path: Path) -> Copy:
        shutil.copytree(good.path, path)
        copy = cls(path, good.source, description=json.loads((path / DESCRIPTION).read_text()))
        for file in sorted(path.glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                copy.tensors[name], copy.shards[name] = tensor, file.name
        return copy

    def write(self) -> None:
        for file in self.path.glob("*.safetensors"):
            file.unlink()
        for shard in sorted(set(self.shards.values())):
            held = {name: one.contiguous() for name, one in self.tensors.items() if self.shards[name] == shard}
            save_file(held, self.path / shard, metadata={"format": "pt"})
        total = sum(tensor.nbytes for tensor in self.tensors.values())
        weight_map = {name: self.shards[name] for name in self.tensors}
        self.json(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        self.json(DESCRIPTION, self.description)

    def json(self, name: str, value: Any) -> None:
        (self.path / name).write_text(json.dumps(value), encoding="utf-8")

    def read(self, name: str) -> Any:
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    # What one does to it

    def drop(self, name: str) -> None:
        """Remove a tensor from files, index and description."""
        del self.tensors[name], self.shards[name], self.description[name]
        self.write()

    def add(self, name: str, tensor: Tensor, type_: str = "FLOAT") -> None:
        self.tensors[name], self.shards[name] = tensor, next(iter(self.shards.values()))
        self.description[name] = type_
        self.write()

    def put(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        self.tensors[name] = change(self.tensors[name])
        self.write()

    def swap(self, one: str, other: str) -> None:
        self.tensors[one], self.tensors[other] = self.tensors[other], self.tensors[one]
        self.write()

    def describe(self, **types: str) -> None:
        self.description.update(types)
        self.write()

    def make_float(self, *linears: str) -> None:
        """Put the float weights of linears in place of the quantized ones, cleanly."""
        floats = load_file(self.source / "model.safetensors")
        for linear in linears:
            for name in [name for name in self.tensors if name.rpartition(".")[0] == linear]:
                shard = self.shards.pop(name)
                del self.tensors[name], self.description[name]
            self.tensors[f"{linear}.weight"], self.shards[f"{linear}.weight"] = floats[f"{linear}.weight"], shard
            self.description[f"{linear}.weight"] = "FLOAT"
        self.write()

    def truncate(self, count: int) -> None:
        file = max(self.path.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-count])

    def lose_shard(self) -> None:
        max(self.path.glob("*.safetensors")).unlink()

    def change_json(self, name: str, change: Callable[[Any], object]) -> None:
        value = self.read(name)
        change(value)
        self.json(name, value)

    def rename_shard(self) -> None:
        file = max(self.path.glob("*.safetensors"))
        file.rename(file.with_name("extra.safetensors"))

    def rename(self, old: str, new: str) -> None:
        tensor, type_ = self.tensors[old], self.description[old]
        self.drop(old)
        self.add(new, tensor, type_)


def set_at(index: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[index] = value
        return changed

    return change


@dataclass(frozen=True)
class Fault:
    """What is done to a good checkpoint, and what must be said about it."""

    result: str
    damage: Callable[[Copy], object]
    says: str
    needs_float: bool = False


NAN = float("nan")
FAULTS: Mapping[str, Fault] = {
    # Files
    "a shard is missing": Fault("static", lambda c: c.lose_shard(), r"index\.json: names .*, which is not there"),
    "a shard is truncated": Fault("static", lambda c: c.truncate(1), r"safetensors: truncated"),
    "a shard has no header": Fault("static", lambda c: c.truncate(10**9), r"not a whole safetensors file"),
    "an unfinished shard": Fault("static", lambda c: (c.path / "a.safetensors.unfinished").touch(), "never finished"),
    "a stale index of the float model": Fault(
        "static",
        lambda c: c.json("model.safetensors.index.json", {"weight_map": dict.fromkeys(c.tensors, "model.safetensors")}),
        r"model\.safetensors\.index\.json: names model\.safetensors, which is not there",
    ),
    "float shards beside the new ones": Fault(
        "moe", lambda c: save_file(dict(c.tensors), c.path / "model.safetensors"), "is both in model.safetensors and in"
    ),
    "the index names a tensor too many": Fault(
        "moe",
        lambda c: c.change_json(INDEX, lambda i: i["weight_map"].update({"a.b": next(iter(c.shards.values()))})),
        r"says that a\.b is in .*, which does not hold it",
    ),
    "the index forgets a tensor": Fault(
        "moe",
        lambda c: c.change_json(INDEX, lambda i: i["weight_map"].pop(f"{QUERY}.weight")),
        rf"does not name {QUERY}\.weight",
    ),
    "the index sends to another shard": Fault(
        "static",
        lambda c: c.change_json(INDEX, lambda i: i["weight_map"].update({f"{QUERY}.weight": max(c.shards.values())})),
        rf"says that {QUERY}\.weight is in .*, which does not hold it; it is in quant",
    ),
    "the index gives another size": Fault(
        "moe", lambda c: c.change_json(INDEX, lambda i: i["metadata"].update(total_size=7)), "total_size is 7"
    ),
    "the index has no weight_map": Fault("moe", lambda c: c.json(INDEX, {}), "has no weight_map"),
    "the index is no JSON": Fault("moe", lambda c: (c.path / INDEX).write_text("{"), "cannot be read as JSON"),
    "a shard got another name": Fault("static", lambda c: c.rename_shard(), "which is not there"),
    "no config.json": Fault("moe", lambda c: (c.path / "config.json").unlink(), "config.json: no such file"),
    "no description": Fault("moe", lambda c: (c.path / DESCRIPTION).unlink(), "no installed saver recognizes"),
    "the description is no JSON": Fault("moe", lambda c: (c.path / DESCRIPTION).write_text("["), DESCRIPTION),
    # Entries
    "an entry is missing": Fault(
        "moe",
        lambda c: c.change_json(DESCRIPTION, lambda d: d.pop(f"{QUERY}.deq_scale")),
        rf"does not describe {QUERY}\.deq_scale",
    ),
    "lm_head has no entry": Fault(
        "moe", lambda c: c.change_json(DESCRIPTION, lambda d: d.pop("lm_head.weight")), r"not describe lm_head\.weight"
    ),
    "an entry has no tensor": Fault("moe", lambda c: c.describe(**{"a.weight": "FLOAT"}), r"describes a\.weight"),
    "an unknown type": Fault("moe", lambda c: c.describe(**{f"{QUERY}.weight": "W8A9"}), "the type 'W8A9'"),
    "another type": Fault("moe", lambda c: c.describe(**{f"{GATE}.weight": "W8A8"}), GATE),
    "a quantized linear that says FLOAT": Fault(
        "moe",
        lambda c: c.describe(**{name: "FLOAT" for name in c.tensors if name.startswith(f"{QUERY}.")}),
        rf"{QUERY}",
    ),
    # Tensors
    "weight_scale is missing": Fault("moe", lambda c: c.drop(f"{GATE}.weight_scale"), rf"{GATE}\.weight_scale"),
    "deq_scale is missing": Fault("moe", lambda c: c.drop(f"{QUERY}.deq_scale"), rf"{QUERY}\.deq_scale"),
    "quant_bias is missing": Fault("moe", lambda c: c.drop(f"{QUERY}.quant_bias"), rf"{QUERY}\.quant_bias"),
    "scale_bias is missing": Fault("int4", lambda c: c.drop(f"{GATE}.scale_bias"), rf"{GATE}\.scale_bias"),
    "weight is missing": Fault("moe", lambda c: c.drop(f"{QUERY}.weight"), QUERY),
    "a bias is missing": Fault("static", lambda c: c.drop(f"{QUERY}.bias"), rf"{QUERY}: its bias is missing"),
    "a float weight is missing": Fault(
        "moe", lambda c: c.drop("lm_head.weight"), r"lm_head.*(is missing|nothing in the checkpoint)|nothing.*lm_head"
    ),
    "a norm is missing": Fault("moe", lambda c: c.drop("model.norm.weight"), r"model\.norm\.weight"),
    "a router is missing": Fault("moe", lambda c: c.drop("model.layers.1.mlp.gate.weight"), r"layers\.1\.mlp\.gate"),
    "a tensor that nobody wants": Fault(
        "moe",
        lambda c: c.add("model.layers.9.extra.weight", torch.ones(3)),
        r"layers\.9\.extra\.weight .* no parameter",
    ),
    "a bias that no smoothing made": Fault(
        "moe", lambda c: c.add("model.norm.bias", torch.zeros(64)), r"model\.norm\.bias .* no parameter"
    ),
    "a quantized linear that nobody wants": Fault(
        "moe",
        lambda c: [
            c.add(f"model.layers.9.mlp.{n}", t, "W8A16")
            for n, t in {
                "weight": torch.ones(4, 8, dtype=torch.int8),
                "weight_scale": torch.ones(4, 1),
                "weight_offset": torch.zeros(4, 1),
            }.items()
        ],
        r"model\.layers\.9\.mlp is quantized and is no linear",
    ),
    "a float weight got another name": Fault(
        "moe", lambda c: c.rename("model.norm.weight", "model.norm.wight"), r"model\.norm\.w"
    ),
    # Types and shapes
    "codes as floats": Fault("moe", lambda c: c.put(f"{QUERY}.weight", lambda t: t.bfloat16()), rf"{QUERY}.*BF16"),
    "codes as int32": Fault("moe", lambda c: c.put(f"{QUERY}.weight", lambda t: t.int()), rf"{QUERY}.*I32"),
    "deq_scale as bits": Fault(
        "moe",
        lambda c: c.put(f"{QUERY}.deq_scale", lambda t: t.view(torch.int32).long()),
        rf"{QUERY}\.deq_scale is I64",
    ),
    "quant_bias as floats": Fault(
        "moe", lambda c: c.put(f"{QUERY}.quant_bias", lambda t: t.float()), rf"{QUERY}\.quant_bias is F32"
    ),
    "weight_scale as integers": Fault(
        "moe", lambda c: c.put(f"{GATE}.weight_scale", lambda t: t.ceil().int()), rf"{GATE}\.weight_scale is I32"
    ),
    "a float weight as integers": Fault(
        "moe", lambda c: c.put("model.norm.weight", lambda t: t.to(torch.int8)), r"model\.norm\.weight is I8"
    ),
    "a weight that is turned": Fault("static", lambda c: c.put(f"{DOWN}.weight", lambda t: t.t()), rf"{DOWN}"),
    "two weights of one shape too many rows": Fault(
        "static", lambda c: c.put(f"{DOWN}.deq_scale", lambda t: t[:-1]), rf"{DOWN}\.deq_scale has shape"
    ),
    "swapped weights of other shapes": Fault(
        "static", lambda c: c.swap(f"{QUERY}.weight", f"{DOWN}.weight"), rf"{DOWN}: its weight is 64 x 64"
    ),
    "swapped linears of other shapes": Fault(
        "static",
        lambda c: [
            c.swap(f"{QUERY}.{part}", f"{DOWN}.{part}")
            for part in ("weight", "deq_scale", "quant_bias", "input_scale", "input_offset")
        ],
        rf"{QUERY}: its weight is 64 x 96, and the model's 64 x 64",
    ),
    "a float weight of another shape": Fault(
        "moe", lambda c: c.put("model.norm.weight", lambda t: t[:-1]), r"model\.norm\.weight has the shape \[63\]"
    ),
    "a float weight that is turned": Fault(
        "moe", lambda c: c.put("lm_head.weight", lambda t: t.t()), r"lm_head\.weight has the shape \[64, 512\]"
    ),
    # Numbers
    "a scale of zero": Fault("moe", lambda c: c.put(f"{GATE}.weight_scale", set_at(3, 0)), rf"{GATE}: 1 rows .*row 3"),
    "a negative scale": Fault(
        "moe", lambda c: c.put(f"{GATE}.weight_scale", set_at(0, -1)), rf"{GATE}: .*not positive"
    ),
    "a scale that is NaN": Fault("moe", lambda c: c.put(f"{GATE}.weight_scale", set_at(0, NAN)), rf"{GATE}.*NaN"),
    "an infinite deq_scale": Fault(
        "moe", lambda c: c.put(f"{QUERY}.deq_scale", set_at(0, float("inf"))), rf"{QUERY}.*infinite"
    ),
    "an input_scale of zero": Fault("moe", lambda c: c.put(f"{QUERY}.input_scale", set_at(0, 0)), rf"{QUERY}: "),
    "an input_offset that is no int8": Fault(
        "moe", lambda c: c.put(f"{QUERY}.input_offset", set_at(0, 300)), rf"{QUERY}\.(input_offset|quant_bias) differs"
    ),
    "a float weight that is NaN": Fault(
        "moe", lambda c: c.put("model.norm.weight", set_at(0, NAN)), r"model\.norm\.weight holds 1 value that is NaN"
    ),
    "quant_bias of another offset": Fault(
        "moe", lambda c: c.put(f"{QUERY}.quant_bias", lambda t: t + 5), rf"{QUERY}\.quant_bias differs in 64 of 64"
    ),
    "quant_bias without the bias": Fault(
        "static", lambda c: c.put(f"{QUERY}.bias", torch.zeros_like), rf"{QUERY}\.quant_bias differs"
    ),
    "scale_bias of other codes": Fault(
        "int4", lambda c: c.put(f"{GATE}.weight", lambda t: t ^ 1), rf"{GATE}\.scale_bias differs"
    ),
    "scale_bias that is not cut": Fault(
        "int4", lambda c: c.put(f"{EXPERT_DOWN}.scale_bias", lambda t: t.flip(1)), rf"{EXPERT_DOWN}\.scale_bias differs"
    ),
    "weight_offset of a symmetric weight": Fault(
        "moe", lambda c: c.put(f"{GATE}.weight_offset", set_at(0, 1)), rf"{GATE}\.weight_offset differs"
    ),
    "a cache scale of zero": Fault(
        "caches", lambda c: c.put(f"{KEY}.kv_cache_scale", set_at(5, 0)), rf"{KEY} fills has scales .*not .*positive"
    ),
    "a negative cache scale": Fault(
        "caches", lambda c: c.put(f"{KEY}.kv_cache_scale", set_at(0, -1)), rf"{KEY} fills has scales .*not .*positive"
    ),
    "a cache scale that is NaN": Fault(
        "caches", lambda c: c.put(f"{KEY}.kv_cache_scale", set_at(0, NAN)), rf"{KEY}\.kv_cache_scale holds 1 value.*NaN"
    ),
    "an infinite cache scale": Fault(
        "caches", lambda c: c.put(f"{KEY}.kv_cache_scale", set_at(0, float("inf"))), rf"{KEY}\.kv_cache_scale holds 1"
    ),
    "a cache offset that is NaN": Fault(
        "caches", lambda c: c.put(f"{KEY}.kv_cache_offset", set_at(0, NAN)), rf"{KEY}\.kv_cache_offset holds 1"
    ),
    "a cache offset that is no int8": Fault(
        "caches", lambda c: c.put(f"{KEY}.kv_cache_offset", set_at(0, 300)), rf"{KEY}\.kv_cache_offset"
    ),
    "a cache offset is missing": Fault("caches", lambda c: c.drop(f"{KEY}.kv_cache_offset"), f"{KEY}.kv_cache_offset"),
    "a cache with scales for other channels": Fault(
        "caches",
        lambda c: [c.put(f"{KEY}.kv_cache_{part}", lambda t: t[:-2]) for part in ("scale", "offset")],
        rf"{KEY} fills has 30 scales for 32 channels",
    ),
    # Layers
    "q and k of different type": Fault("moe", lambda c: c.make_float(KEY), r"q_proj, k_proj and v_proj.*k_proj FLOAT"),
    "one expert is float": Fault("moe", lambda c: c.make_float(GATE), rf"{GATE} is float, while other experts"),
    # Against the float model
    "swapped scales": Fault(
        "moe",
        lambda c: c.swap(f"{GATE}.weight_scale", "model.layers.1.mlp.experts.2.gate_proj.weight_scale"),
        rf"{GATE}: the dequantized weight differs",
        needs_float=True,
    ),
    "swapped linears of one shape": Fault(
        "moe",
        lambda c: [
            c.swap(f"{GATE}.{part}", f"model.layers.1.mlp.experts.2.gate_proj.{part}")
            for part in ("weight", "weight_scale")
        ],
        rf"{GATE}: the dequantized weight differs",
        needs_float=True,
    ),
    "codes that were shifted by a row": Fault(
        "moe", lambda c: c.put(f"{GATE}.weight", lambda t: t.roll(1, 0)), rf"{GATE}: .*differs", needs_float=True
    ),
    "nibbles in the other order": Fault(
        "int4",
        lambda c: [
            c.put(f"{GATE}.weight", lambda t: ((t & 15) << 4) | ((t >> 4) & 15)),
            c.put(f"{GATE}.scale_bias", lambda t: t.view(-1, 2).flip(1).reshape(-1, 1)),
        ],
        rf"{GATE}",
        needs_float=True,
    ),
    "a float weight of another model": Fault(
        "moe", lambda c: c.put("model.norm.weight", lambda t: t * 2), r"model\.norm\.weight .*differs", needs_float=True
    ),
}
"""At least the forty of the issue; none may pass."""


def faults(found: Verification) -> list[str]:
    return [problem.message for problem in found.faults]


@pytest.fixture
def copy(good: Mapping[str, Good], tmp_path: Path) -> Callable[[str], Copy]:
    def make(name: str) -> Copy:
        return Copy.of(good[name], tmp_path / name)

    return make


@pytest.mark.parametrize("name", ["static", "moe", "int4", "caches"])
@pytest.mark.parametrize("with_float", [True, False])
def test_good_checkpoint_has_no_fault(name: str, with_float: bool, good: Mapping[str, Good]) -> None:
    found = verify(good[name].path, good[name].source if with_float else None)
    assert faults(found) == []
    assert [problem.message for problem in found.problems if "experts" not in problem.message] == []
    quantized = {"static": 21, "caches": 21}.get(name, 8 + 24)
    assert sum(found.schemes.values()) == quantized
    assert found.float_linears == ["lm_head"]
    assert len(found.errors) == (quantized if with_float else 0)
    for error in found.errors.values():
        assert 0.5 * error.expected < error.relative < 1.5 * error.expected


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_named(name: str, copy: Callable[[str], Copy], good: Mapping[str, Good]) -> None:
    fault = FAULTS[name]
    damaged = copy(fault.result)
    fault.damage(damaged)
    found = faults(verify(damaged.path, good[fault.result].source if fault.needs_float else None))
    assert any(re.search(fault.says, message) for message in found), found


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if not fault.needs_float])
def test_no_fault_passes_beside_the_float_model_either(
    name: str, copy: Callable[[str], Copy], good: Mapping[str, Good]
) -> None:
    fault = FAULTS[name]
    damaged = copy(fault.result)
    fault.damage(damaged)
    assert faults(verify(damaged.path, good[fault.result].source))


def test_there_are_as_many_faults_as_the_issue_asks_for() -> None:
    assert len(FAULTS) >= 40


# Smoothed weights, and formats of other engines


def test_report_says_that_the_result_was_verified(good: Mapping[str, Good]) -> None:
    assert all(json.loads((one.path / "report.json").read_text())["verified"] for one in good.values())


def test_smoothed_weights_are_compared_behind_the_factors(
    tiny_llama: Path, protocol: Protocol, calibration_file: Path, tmp_path: Path
) -> None:
    smooth = "    - {type: smooth_quant, alpha: 0.9, symmetric: false}\n"
    text = yaml(smooth, entry(STATIC, INT8, "*"), dataset=calibration_file)
    quantize(tiny_llama, tmp_path / "out", protocol(text), device="cpu")
    assert "model.layers.0.input_layernorm.bias" in load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert faults(verify(tmp_path / "out")) == []
    found = verify(tmp_path / "out", tiny_llama)
    assert [problem.message for problem in found.problems] == []
    assert any(error.rescaled for error in found.errors.values())
    for error in found.errors.values():
        assert error.relative < 1.5 * error.expected
    # Without the report nobody knows: the same is a warning.
    (tmp_path / "out" / "report.json").unlink()
    found = verify(tmp_path / "out", tiny_llama)
    assert faults(found) == []
    (warning,) = (problem.message for problem in found.problems)
    assert re.search(r"and \d+ more: rows or columns are multiplied by factors", warning)


GROUPS = "{scope: per_group, dtype: int4, symmetric: true, method: minmax, group_size: 32}"
FORMATS = {
    "compressed_tensors_saver": (entry(DYNAMIC, INT8, "*"), "weight_scale"),
    "gptq_saver": (f"    - {{type: linear_quant, qconfig: {{weight: {GROUPS}}}}}\n", "scales"),
    "awq_saver": (f"    - {{type: linear_quant, qconfig: {{weight: {GROUPS}}}}}\n", "scales"),
    "mindie_format_saver": (entry(STATIC, INT8, "*"), "deq_scale"),
}


@pytest.mark.parametrize("saver", FORMATS)
def test_other_formats_are_verified_alike(
    saver: str, tiny_llama: Path, protocol: Protocol, calibration_file: Path, tmp_path: Path
) -> None:
    process, scale = FORMATS[saver]
    text = yaml(process, dataset=calibration_file).replace("ascendv1_saver", saver)
    quantize(tiny_llama, tmp_path / "out", protocol(text), device="cpu")
    for source in (None, tiny_llama):
        found = verify(tmp_path / "out", source)
        assert (faults(found), found.format, sum(found.schemes.values())) == ([], saver, 21)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(file)
    name = f"{DOWN}.{scale}"
    for damaged in (
        {one: tensor for one, tensor in tensors.items() if one != name},
        {**tensors, name: set_at(0, NAN)(tensors[name])},
        {**tensors, name: torch.zeros_like(tensors[name])},
        {**tensors, name: tensors[name].to(torch.int8)},
        {**tensors, name: tensors[name].view(-1)[:-1]},
    ):
        save_file({one: tensor.contiguous() for one, tensor in damaged.items()}, file, metadata={"format": "pt"})
        assert any(DOWN in message for message in faults(verify(tmp_path / "out")))


# What an engine loads


def fatal(path: Path, engine: str, tp: int = 1) -> list[str]:
    return faults(verify(path, engine=engine, tp=tp))


def test_engine_is_told_of_static_experts(
    tiny_moe: Path, protocol: Protocol, calibration_file: Path, tmp_path: Path
) -> None:
    text = yaml(entry(STATIC, INT8, "*"), dataset=calibration_file)
    report = quantize(tiny_moe, tmp_path / "out", protocol(text), device="cpu")
    assert any("runs W8A8 for dense linears only" in warning for warning in report["warnings"])
    found = verify(tmp_path / "out")
    assert faults(found) == []
    assert any("runs W8A8 for dense linears only" in problem.message for problem in found.problems)
    (fault,) = fatal(tmp_path / "out", "vllm-ascend-0.23")
    assert "model.layers.0.mlp.experts.0.gate_proj and 23 more" in fault
    assert fault.endswith("[vllm-ascend-0.23.0: schemes]")


def test_engine_is_told_of_dense_four_bit_weights(
    tiny_llama: Path, protocol: Protocol, calibration_file: Path, tmp_path: Path
) -> None:
    text = yaml(entry(DYNAMIC, INT4, "*down_proj*"), dataset=calibration_file)
    quantize(tiny_llama, tmp_path / "out", protocol(text), device="cpu")
    (fault,) = fatal(tmp_path / "out", "vllm-ascend")
    assert "runs W4A8_DYNAMIC for experts only; it will not load model.layers.0.mlp.down_proj and 2 more" in fault
    (fault,) = fatal(tmp_path / "out", "vllm-ascend-0.23")
    assert "for dense linears with weight per_group, not per_channel" in fault


def test_engine_of_another_format_does_not_read_it(good: Mapping[str, Good]) -> None:
    (fault,) = fatal(good["static"].path, "vllm")
    assert "vLLM does not read what ascendv1_saver writes" in fault


def test_tensor_parallelism_cuts_no_slice(good: Mapping[str, Good]) -> None:
    assert fatal(good["int4"].path, "vllm-ascend", tp=16) == []
    (fault,) = fatal(good["int4"].path, "vllm-ascend", tp=32)
    assert "on a number of ranks that divides 16, which 32 does not" in fault


def test_quantization_config_hides_the_description(copy: Callable[[str], Copy]) -> None:
    damaged = copy("moe")
    damaged.change_json("config.json", lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    assert any("config.json has quantization_config" in message for message in fatal(damaged.path, "vllm-ascend"))


def test_kv_b_of_latent_attention_must_be_float(copy: Callable[[str], Copy]) -> None:
    # No run would make one: a linear of another model gets its name.
    from modelslim.engine_rules import Target, find_problems
    from modelslim.engines import find_contract
    from modelslim.registry import Registry
    from modelslim.saver import PlannedModel
    from modelslim.types import LinearInfo, QuantSpec, TensorSpec

    info = LinearInfo("layers.0.attn.kv_b_proj", "layers.0.attn.kv_b_proj", "layers.0", 64, 64, False, "bfloat16")
    spec = QuantSpec(TensorSpec("int8", "per_channel"), TensorSpec("int8", "per_token"))
    model = PlannedModel({}, "bfloat16", {info.name: info}, {info.name: spec}, frozenset({f"{info.name}.weight"}))
    target = Target(find_contract("vllm-ascend", Registry.scan()))
    (problem,) = find_problems(target, "ascendv1_saver", model)
    assert problem.fatal and "takes kv_b_proj in float only" in problem.message


def test_experts_that_stayed_float_are_told(
    tiny_moe: Path, protocol: Protocol, calibration_file: Path, tmp_path: Path
) -> None:
    text = yaml(entry(DYNAMIC, INT8, "*", "*experts*"), dataset=calibration_file)
    quantize(tiny_moe, tmp_path / "out", protocol(text), device="cpu")
    found = verify(tmp_path / "out", tiny_moe)
    assert faults(found) == []
    assert len(found.float_linears) == 24 + 1
    (warning,) = (problem.message for problem in found.problems)
    assert re.fullmatch(
        r"24 weights of routed experts, such as model\.layers\.0\.mlp\.experts\.0\.gate_proj, are float: \d\d% of all "
        r"parameters",
        warning,
    )


# The end of a run


def test_faulty_result_keeps_its_partial_name(
    tiny_llama: Path, protocol: Protocol, w8a8_dynamic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelslim_ascendv1.saver import AscendV1Saver

    honest: Any = AscendV1Saver.encode

    def encode(self: Saver, name: str, module: Any, model_dtype: str) -> Any:
        for full, tensor in honest(self, name, module, model_dtype):
            yield full, torch.zeros_like(tensor) if full == f"{DOWN}.weight_scale" else tensor

    monkeypatch.setattr(AscendV1Saver, "encode", encode)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(VerificationError) as caught:
        quantize(tiny_llama, out, protocol(w8a8_dynamic), device="cpu")
    assert not out.exists() and (partial / "config.json").is_file()
    assert caught.value.diagnostics[0].message.startswith(f"{DOWN}: 64 rows of its scale")
    assert str(partial) in caught.value.message
    assert json.loads((partial / "report.json").read_text(encoding="utf-8"))["verified"] is False
    report = quantize(tiny_llama, out, protocol(w8a8_dynamic), device="cpu", check=False)
    assert out.exists() and not partial.exists()
    assert report["verified"] is False
