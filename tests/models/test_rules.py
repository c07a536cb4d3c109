# SPDX-License-Identifier: Apache-2.0
"""The checker of the rules itself: it finds every fault that is put into a good result."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from accounts import find_unaccounted
from ascend_output import Output, Stored, read_output
from ascend_rules import find_problems
from cells import FamilyRun
from schemes import write_protocol

from modelslim.run import quantize

Outputs = dict[str, Output]
LAYER = "model.layers.1"
QUERY, GATE = f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.experts.1.gate_proj"


@pytest.fixture(scope="module")
def run(runs: dict[str, FamilyRun]) -> FamilyRun:
    """A model with dense layers, experts and no biases."""
    return runs["qwen3_moe"]


@pytest.fixture(scope="module")
def outputs(run: FamilyRun, tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    """Good results by scheme."""
    path = tmp_path_factory.mktemp("rules")
    found = {}
    for scheme in ("W8A8", "W4A8_DYNAMIC", "W4A16"):
        write_protocol(path / f"{scheme}.yaml", run.family, scheme, run.samples)
        quantize(run.checkpoint, path / scheme, path / f"{scheme}.yaml", device="cpu")
        found[scheme] = read_output(path / scheme)
    return found


def change(output: Output, name: str, value: object, dtype: str = "") -> None:
    """Put other values into a tensor."""
    old = output.tensors[name]
    output.tensors[name] = Stored(
        dtype or old.dtype, np.broadcast_to(np.asarray(value, old.data.dtype), old.data.shape)
    )


def drop(output: Output, name: str) -> None:
    """Take a tensor away, cleanly."""
    for table in (output.tensors, output.description, output.index["weight_map"]):
        table.pop(name)


FAULTS: dict[str, tuple[str, Callable[[Output], object], str]] = {
    "tensor without a type": ("W8A8", lambda o: o.description.pop(f"{QUERY}.deq_scale"), "stored and not described"),
    "type without a tensor": (
        "W8A8",
        lambda o: o.description.update({"a.weight": "FLOAT"}),
        "described and not stored",
    ),
    "no entry for a linear": ("W8A8", lambda o: o.description.pop(f"{QUERY}.weight"), "the type ''"),
    "unknown type": ("W8A8", lambda o: o.description.update({f"{QUERY}.weight": "W8A9"}), "the type 'W8A9'"),
    "scale lost": ("W8A8", lambda o: drop(o, f"{GATE}.weight_scale"), "where W8A8_DYNAMIC has"),
    "weight_offset lost": ("W4A8_DYNAMIC", lambda o: drop(o, f"{GATE}.weight_offset"), "where W4A8_DYNAMIC has"),
    "wrong dtype": ("W8A8", lambda o: change(o, f"{QUERY}.deq_scale", 1, "I64"), "where W8A8 has"),
    "not finite": ("W8A8", lambda o: change(o, "model.norm.weight", np.nan), "not finite"),
    "other input_scale": ("W8A8", lambda o: change(o, f"{QUERY}.input_scale", 0.5), "share one input_scale"),
    "long input_scale": ("W8A8", lambda o: change(o, f"{QUERY}.input_scale", 0.1), "loses digits in bfloat16"),
    "fractional offset": ("W8A8", lambda o: change(o, f"{QUERY}.input_offset", 0.5), "is no int8"),
    "wrong quant_bias": ("W8A8", lambda o: change(o, f"{QUERY}.quant_bias", 77), "quant_bias is not"),
    "wrong codes": ("W8A8", lambda o: change(o, f"{QUERY}.weight", 1), "further from the source"),
    "wrong packed codes": ("W4A16", lambda o: change(o, f"{QUERY}.weight_packed", 1), "further from the source"),
    "wrong weight_shape": ("W4A16", lambda o: change(o, f"{QUERY}.weight_shape", 1), "weight_shape is"),
    "wrong scale_bias": ("W4A8_DYNAMIC", lambda o: change(o, f"{GATE}.scale_bias", 1), "scale_bias is not"),
    "added offset": ("W8A8", lambda o: change(o, f"{GATE}.weight_offset", 1), "an offset in a symmetric weight"),
    "group size of packed int4": ("W4A8_DYNAMIC", lambda o: o.description.update(group_size=256), "group_size is 256"),
    "no group size": ("W4A16", lambda o: o.description.update(group_size=0), "group_size is 0"),
    "old version": ("W8A8", lambda o: o.description.pop("version"), "version is not 1.0.0"),
    "one of a fusion float": (
        "W8A8",
        lambda o: o.description.update({f"{QUERY}.weight": "FLOAT"}),
        "are one linear and have several types",
    ),
    "one expert float": ("W8A8", lambda o: o.description.update({f"{GATE}.weight": "FLOAT"}), "experts have the types"),
    "static experts": (
        "W8A8",
        lambda o: o.description.update({key: "W8A8" for key in o.tensors if ".experts." in key}),
        "experts cannot be static",
    ),
    "name that a float weight begins with": (
        "W8A8",
        lambda o: o.description.update({f"{LAYER}.self_attn.o_proj_norm.weight": "FLOAT"}),
        "makes it float",
    ),
    "quantized embedding": (
        "W8A8",
        lambda o: o.description.update({"model.embed_tokens.weight": "W8A16"}),
        "cannot quantize the embedding",
    ),
    "stale index": ("W8A8", lambda o: o.files.add("model.safetensors.index.json"), "names the float model's shards"),
    "quantization_config": ("W8A8", lambda o: o.config.update(quantization_config={}), "is not opened"),
    "incomplete index": ("W8A8", lambda o: o.index["weight_map"].popitem(), "the index names"),
    "wrong size": ("W8A8", lambda o: o.index["metadata"].update(total_size=1), "another size"),
    "lost shard": (
        "W8A8",
        lambda o: o.files.remove("quant_model_weights-00001-of-00001.safetensors"),
        "files that are not there",
    ),
}


def test_good_results_have_no_problem(outputs: Outputs, run: FamilyRun) -> None:
    for output in outputs.values():
        assert list(find_problems(output, run.linears)) == []
        assert list(find_unaccounted(output, run.source, run.linears)) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str, outputs: Outputs, run: FamilyRun) -> None:
    scheme, damage, message = FAULTS[fault]
    output = deepcopy(outputs[scheme])
    damage(output)
    problems = list(find_problems(output, run.linears))
    assert any(message in problem for problem in problems), problems


def test_lost_changed_and_foreign_tensors_are_found(outputs: Outputs, run: FamilyRun) -> None:
    output = deepcopy(outputs["W8A8"])
    drop(output, "model.norm.weight")
    change(output, f"{LAYER}.mlp.gate.weight", 0)
    output.tensors["model.extra.weight"] = output.tensors[f"{QUERY}.weight"]
    problems = list(find_unaccounted(output, run.source, run.linears))
    for wanted in ("model.norm.weight: neither", "mlp.gate.weight: changed", "model.extra.weight: comes from nowhere"):
        assert any(wanted in problem for problem in problems), (wanted, problems)


def test_bfloat16_is_read_as_torch_reads_it(run: FamilyRun) -> None:
    from safetensors.torch import load_file

    file: Path = run.checkpoint / "model.safetensors"
    for name, tensor in load_file(file).items():
        assert np.array_equal(run.source[name].data, tensor.float().numpy()), name
