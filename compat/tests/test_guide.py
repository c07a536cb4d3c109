# SPDX-License-Identifier: Apache-2.0
"""The adapter of the integration guide, unchanged, quantizes Qwen3-VL-MoE by the guide's own YAML."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from modelslim.api import CapabilityError, Subgraph, VlmCalibSample, hookimpl
from modelslim.checkpoint import Checkpoint
from modelslim.cli.main import main
from modelslim.open_model import OpenModel
from modelslim.run import quantize
from modelslim.session import Session

PROTOCOL = Path(__file__).parents[2] / "tests" / "protocol" / "good" / "guide_vlm.yaml"
LAYER = "model.language_model.layers"


def open_adapter(path: Path) -> Any:
    from old_qwen3_vl_moe.model_adapter import Qwen3VLMoeModelAdapter

    return Qwen3VLMoeModelAdapter("qwen3_vl_moe", path)


def read(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def result(vl_model: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``modelslim quant`` makes with the guide's command line."""
    folder = tmp_path_factory.mktemp("run")
    protocol = folder / "protocol.yaml"
    lines = [line for line in PROTOCOL.read_text(encoding="utf-8").splitlines() if not line.startswith("  dataset:")]
    protocol.write_text("\n".join([*lines, f"  dataset: {images}"]) + "\n", encoding="utf-8")
    done = main(
        f"quant --model_path {vl_model} --save_path {folder / 'result'} --device cpu --model_type Old-VL "
        f"--config_path {protocol} --trust_remote_code True".split()
    )
    assert done == 0
    return folder / "result"


@pytest.fixture(scope="module")
def types(result: Path) -> Mapping[str, str]:
    """Tensor names with their types."""
    description = json.loads((result / "quant_model_description.json").read_text(encoding="utf-8"))
    return {name: kind for name, kind in description.items() if "." in name and isinstance(kind, str)}


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("self_attn.q_proj.weight", "W8A8"),
        ("self_attn.o_proj.deq_scale", "W8A8"),
        ("visual.blocks.0.attn.qkv.weight", "W8A8"),
        ("visual.blocks.1.mlp.linear_fc1.weight", "W8A8"),
        (".mlp.experts.0.gate_proj.weight", "W8A8_DYNAMIC"),
        (".mlp.experts.7.down_proj.weight_scale", "W8A8_DYNAMIC"),
        ("linear_fc2.weight", "FLOAT"),
        ("merger.linear_fc1.weight", "FLOAT"),
        ("deepstack_merger_list", "FLOAT"),
        (".mlp.gate.weight", "FLOAT"),
        ("layernorm.weight", "FLOAT"),
        ("lm_head.weight", "FLOAT"),
    ],
)
def test_every_part_gets_the_scheme_that_the_guide_gives_it(types: Mapping[str, str], part: str, kind: str) -> None:
    found = {type_ for name, type_ in types.items() if part in name}
    assert found == {kind}


def test_all_experts_of_all_layers_are_quantized(types: Mapping[str, str], vl_model: Path) -> None:
    stacked = [tensor for name, tensor in read(vl_model).items() if name.endswith("experts.down_proj")]
    weights = Counter(name.rpartition(".")[2] for name, kind in types.items() if kind == "W8A8_DYNAMIC")
    expected = 3 * sum(map(len, stacked))
    assert weights["weight"] == weights["weight_scale"] == expected > 0
    assert not [name for name in types if "gate_up" in name]


def test_the_experts_codes_are_those_of_the_published_weights(result: Path, vl_model: Path) -> None:
    """Against a rounding in float64 of the stored [in, out] slices."""
    made, source = read(result), read(vl_model)
    for layer, expert in ((0, 0), (0, 5), (3, 7)):
        stored = f"{LAYER}.{layer}.mlp.experts"
        gate_up, down = source[f"{stored}.gate_up_proj"][expert], source[f"{stored}.down_proj"][expert]
        half = gate_up.shape[1] // 2
        slices = {"gate_proj": gate_up[:, :half], "up_proj": gate_up[:, half:], "down_proj": down}
        for name, stored_slice in slices.items():
            weight = stored_slice.t().double()
            scale = made[f"{stored}.{expert}.{name}.weight_scale"].double()
            # Rounded to the dtype in which an engine holds it, before the codes are made.
            torch.testing.assert_close(scale, weight.abs().amax(1, keepdim=True) / 127, rtol=2**-8, atol=0)
            codes = torch.round(weight / scale).clamp(-128, 127).to(torch.int8)
            assert torch.equal(made[f"{stored}.{expert}.{name}.weight"], codes)


def test_every_other_tensor_is_copied(result: Path, vl_model: Path, types: Mapping[str, str]) -> None:
    made, source = read(result), read(vl_model)
    copied = [name for name in source if types.get(name) == "FLOAT"]
    assert {name for name in source if f"{name}" not in made} == {
        f"{LAYER}.{layer}.mlp.experts.{name}" for layer in range(4) for name in ("gate_up_proj", "down_proj")
    }
    assert len(copied) > 50
    for name in copied:
        assert torch.equal(made[name], source[name])


@pytest.fixture(scope="module")
def opened(vl_model: Path) -> Iterator[OpenModel]:
    with Checkpoint(vl_model) as checkpoint, torch.no_grad():
        yield OpenModel.of(open_adapter(vl_model), checkpoint)


def reference(path: Path) -> Any:
    from transformers import Qwen3VLMoeForConditionalGeneration

    return Qwen3VLMoeForConditionalGeneration.from_pretrained(
        path, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def test_unit_by_unit_the_model_computes_what_transformers_computes(
    opened: OpenModel, vl_model: Path, images: Path
) -> None:
    samples = [VlmCalibSample("Describe it.", str(image)) for image in sorted(images.iterdir())]
    inputs = opened.session.handle_dataset(samples, "cpu")
    assert [sorted(sample)[:2] for sample in inputs] == [["attention_mask", "cache_position"]] * 2
    hidden: list[Tensor] = []
    last: nn.Module = opened.visit[-1].module
    plain = last.forward

    def keep(*args: Any, **kwargs: Any) -> Tensor:
        hidden.append(plain(*args, **kwargs))
        return hidden[-1]

    last.forward = keep  # type: ignore[method-assign]
    opened.run_units(inputs)
    whole = reference(vl_model)
    outputs: list[Tensor] = []
    whole.model.language_model.layers[-1].register_forward_hook(lambda _module, _args, output: outputs.append(output))
    for sample in inputs:
        names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")
        whole(**{name: sample[name] for name in names}, use_cache=False)
    assert len(hidden) == len(outputs) == 2
    for mine, other in zip(hidden, outputs, strict=True):
        # The same rounding to bf16 in every layer; only the order in which experts are added differs.
        torch.testing.assert_close(mine, other, rtol=0.02, atol=0.05)


def test_nothing_is_in_memory_before_the_engine_loads_it(vl_model: Path) -> None:
    for device in ("meta", "cpu"):
        model = Session(open_adapter(vl_model)).init_model(device)
        assert [name for name, tensor in model.state_dict().items() if not tensor.is_meta] == []
        assert len(model.model.language_model.layers) == 4


def test_buffers_that_no_checkpoint_holds_are_those_of_transformers(opened: OpenModel, vl_model: Path) -> None:
    expected = dict(reference(vl_model).named_buffers())
    found = dict(opened.model.named_buffers())
    assert found.keys() == expected.keys() and len(found) >= 2
    for name, buffer in found.items():
        assert torch.equal(buffer, expected[name])


def test_the_plan_proves_the_forward(
    vl_model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    protocol = tmp_path / "protocol.yaml"
    text = PROTOCOL.read_text(encoding="utf-8").replace("spec:", f"spec:\n  dataset: {images}", 1)
    kept = [line for line in text.splitlines() if line == f"  dataset: {images}" or not line.startswith("  dataset:")]
    protocol.write_text("\n".join(kept) + "\n", encoding="utf-8")
    done = main(f"plan --model_path {vl_model} --device cpu --model_type Old-VL --config_path {protocol}".split())
    assert done == 0
    assert "not proven" not in capsys.readouterr().err


def test_one_unit_is_in_memory_at_a_time(vl_model: Path, images: Path, tmp_path: Path) -> None:
    class Watch:
        """Keeps the model of the run, and notes which parameters it holds when a unit is done."""

        def __init__(self) -> None:
            self.model: nn.Module = nn.Module()
            self.held: list[set[str]] = []

        @hookimpl(wrapper=True)
        def init_model(self) -> Generator[None, nn.Module, nn.Module]:
            self.model = yield
            return self.model

        @hookimpl
        def unit_finished(self) -> None:
            self.held.append({name for name, tensor in self.model.named_parameters() if not tensor.is_meta})

    watch, protocol = Watch(), tmp_path / "protocol.yaml"
    lines = [line for line in PROTOCOL.read_text(encoding="utf-8").splitlines() if not line.startswith("  dataset:")]
    protocol.write_text("\n".join([*lines, f"  dataset: {images}"]) + "\n", encoding="utf-8")
    quantize(vl_model, tmp_path / "result", protocol, device="cpu", model_type="Old-VL", observers=[("watch", watch)])
    assert len(watch.held) == 5
    assert watch.held[:-1] == [set()] * 4  # after the last layer the forward's end may stay


def test_a_part_of_the_experts_alone_is_refused(
    vl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others lie in the same stored tensor, which the result no longer holds."""
    protocol = tmp_path / "protocol.yaml"
    protocol.write_text(
        """\
apiversion: multimodal_vlm_modelslim_v1
spec:
  process:
    - type: linear_quant
      qconfig:
        act: {scope: per_token, dtype: int8, symmetric: True, method: minmax}
        weight: {scope: per_channel, dtype: int8, symmetric: True, method: minmax}
      include: ["*experts*"]
      exclude: ["*layers.2*experts.3.up_proj"]
  save:
    - type: ascendv1_saver
""",
        encoding="utf-8",
    )
    done = main(f"plan --model_path {vl_model} --device cpu --model_type Old-VL --config_path {protocol}".split())
    error = capsys.readouterr().err
    assert done == 2
    assert f"and not {LAYER}.2.mlp.experts.3.up_proj.weight, which are parts of the stored tensor" in error


def test_the_topology_is_translated(vl_model: Path) -> None:
    session = Session(open_adapter(vl_model))
    topology = session.get_adapter_config_for_subgraph(session.init_model("meta"))
    assert topology is not None and len(topology.subgraphs) == 8
    attention = f"{LAYER}.0.self_attn"
    assert topology.subgraphs[1] == Subgraph("ov", f"{attention}.v_proj", (f"{attention}.o_proj",), heads=(4, 2))
    assert topology.subgraphs[0].type == "norm-linear" and not topology.subgraphs[0].unit_offset
    with pytest.raises(CapabilityError, match="which the model does not have"):
        session.get_adapter_config_for_subgraph(nn.Module())
    assert not session.has("get_rotate_map")
