# SPDX-License-Identifier: Apache-2.0
"""What transformers 5 changed is hidden from old adapters where that is exact, and told where it is not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modelslim.api import ModelError, PluginError, ProcessRequest, UsageError
from modelslim.checkpoint import Checkpoint
from modelslim.loader import Loader
from modelslim.open_model import OpenModel
from modelslim.session import Session
from msmodelslim.bridge.forward import as_before, mend_rope_index
from msmodelslim.core.const import DeviceType
from msmodelslim.model.default.model_adapter import DefaultModelAdapter
from msmodelslim.model.vlm_base import VlmBaseModelAdapter


def open_vl(path: Path) -> Any:
    from old_qwen3_vl_moe.model_adapter import Qwen3VLMoeModelAdapter

    return Qwen3VLMoeModelAdapter("qwen3_vl_moe", path)


def filled(adapter: Any, path: Path) -> Any:
    with Checkpoint(path) as checkpoint, torch.no_grad():
        opened = OpenModel.of(adapter, checkpoint)
        opened.fill()
    return opened.model


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("model.vlm_base", "VlmBaseModelAdapter"),
        ("model.common.vlm_base", "VLMBaseModelAdapter"),
        ("model.interface_hub", "ModelSlimPipelineInterfaceV1 IterSmoothInterface FlexSmoothQuantInterface"),
        (
            "model.interface_hub",
            "QuaRotInterface ModelInfoInterface IModel SmoothQuantInterface KVSmoothFusedInterface",
        ),
        ("model.interface_hub", "LayerWiseOffloadOptionalInterface AscendV1SaveInterface FA3QuantAdapterInterface"),
        ("utils.logging", "logger_setter get_logger"),
        ("infra.dataset_loader.vlm_dataset_loader", "VlmCalibSample VLMDatasetLoader"),
        ("core.base.protocol", "ProcessRequest"),
        ("core.const", "DeviceType"),
        ("core.graph", "AdapterConfig MappingConfig FusionConfig"),
        ("core.graph.adapter_types", "AdapterConfig MappingConfig"),
        ("model.base", "BaseModelAdapter"),
        ("model.common.transformers", "TransformersModel"),
        ("model.common.layer_wise_forward", "generated_decoder_layer_visit_func TransformersForwardBreak"),
        ("model.common.layer_wise_forward", "transformers_generated_forward_func"),
        ("model.common.weight_helper", "get_state_dict"),
        ("model.default.model_adapter", "DefaultModelAdapter"),
        ("processor.quarot", "QuaRotInterface RotatePair LAOSOnlineRotationInterface OnlineQuaRotInterface"),
        ("processor.anti_outlier.iter_smooth.interface", "IterSmoothInterface"),
        ("app.naive_quantization.model_info_interface", "ModelInfoInterface"),
        ("core.quant_service.modelslim_v1.save.interface", "AscendV1SaveInterface"),
        ("utils.exception", "InvalidModelError UnsupportedError SchemaValidateError InvalidDatasetError"),
        ("utils.security", "get_valid_read_path json_safe_load MAX_READ_FILE_SIZE_32G"),
        ("utils.security.model", "SafeGenerator"),
        ("pytorch.llm_ptq.accelerate_adapter.hook_adapter", "PrepareWeight"),
    ],
)
def test_import_paths(module: str, names: str) -> None:
    found = import_module(f"msmodelslim.{module}")
    assert [name for name in names.split() if not hasattr(found, name)] == []


def test_it_refuses_to_live_beside_the_existing_tool(tmp_path: Path) -> None:
    info = tmp_path / "msmodelslim-26.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: msmodelslim\nVersion: 26.1.0\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import msmodelslim"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "modelslim-compat cannot be used beside msmodelslim 26.1.0, since both bring the import" in done.stderr
    assert "uninstall both, then install modelslim-compat alone" in done.stderr


def test_vision_towers_answer_as_before(vl_model: Path) -> None:
    model = filled(open_vl(vl_model), vl_model).model.visual
    pixels, grid = torch.randn(16, 3 * 2 * 16 * 16).bfloat16(), torch.tensor([[1, 4, 4]])
    with torch.no_grad():
        output = model(pixels, grid)
    merged, features = as_before(model, output)
    assert torch.equal(merged, output.pooler_output)
    assert len(features) == 2
    assert all(torch.equal(one, other) for one, other in zip(features, output.deepstack_features, strict=True))
    tensor = torch.ones(2)
    assert as_before(nn.Linear(1, 1), tensor) is tensor


def test_rope_index_is_found_without_token_types(vl_model: Path) -> None:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeModel

    config = Qwen3VLMoeConfig.from_pretrained(vl_model)
    with torch.device("meta"):
        model = Qwen3VLMoeModel(config)
    ids = torch.tensor([[5, 6, config.vision_start_token_id, *[config.image_token_id] * 4, 7, 8]])
    grid, mask = torch.tensor([[1, 4, 4]]), torch.ones_like(ids)
    types = (ids == config.image_token_id).int()
    expected, deltas = model.get_rope_index(ids, types, image_grid_thw=grid, attention_mask=mask)
    mend_rope_index(model)
    calls: list[Callable[[], Any]] = [
        lambda: model.get_rope_index(input_ids=ids, image_grid_thw=grid, attention_mask=mask),
        lambda: model.get_rope_index(ids, grid, None, attention_mask=mask),  # in the order of transformers 4
        lambda: model.get_rope_index(ids, types, grid, attention_mask=mask),
        lambda: model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=grid),
    ]
    for call in calls:
        positions, offsets = call()
        assert torch.equal(positions, expected)
        assert torch.equal(offsets, deltas)


def test_inputs_are_collected_with_the_token_types() -> None:
    collect = VlmBaseModelAdapter._collect_inputs_to_device
    ids = torch.tensor([[1, 2]])
    given = {"input_ids": ids, "mm_token_type_ids": ids, "other": ids}
    collected = collect(VlmBaseModelAdapter, given, DeviceType.CPU, ["input_ids", "labels", "keep"], {"keep": 0})  # type: ignore[arg-type]
    assert collected == {"input_ids": ids, "labels": None, "keep": 0, "mm_token_type_ids": ids}
    without = collect(VlmBaseModelAdapter, {"input_ids": ids}, "cpu", ["input_ids"])  # type: ignore[arg-type]
    assert without == {"input_ids": ids}


def test_the_configuration_has_its_old_names(vl_model: Path, llama: Path) -> None:
    for config in (open_vl(vl_model).config.text_config, DefaultModelAdapter("llama", llama).config):
        assert config.rope_theta == config.rope_parameters["rope_theta"]


class AsInstalled:
    """Unstacks the experts in the layout of transformers 5: [experts, out, in]."""

    def _convert_single_moe_layer(self, layer: Any, layer_idx: int) -> None:
        from old_qwen3_vl_moe.moe_utils import UnstackedQwen3VLMoeSparseMoeBlock

        held = layer.mlp

        class Turned:
            gate = held.gate
            experts = type(
                "Experts",
                (),
                {name: getattr(held.experts, name).transpose(1, 2) for name in ("gate_up_proj", "down_proj")},
            )

        layer.mlp = UnstackedQwen3VLMoeSparseMoeBlock(self.config.text_config, Turned)  # type: ignore[attr-defined]


def test_experts_may_be_taken_apart_in_either_layout(vl_model: Path) -> None:
    """An author looks at the transformers that is installed; authors of the existing tool looked at version 4."""
    kind = type(open_vl(vl_model))
    one = filled(kind("qwen3_vl_moe", vl_model), vl_model).state_dict()
    other = filled(type("Newer", (AsInstalled, kind), {})("qwen3_vl_moe", vl_model), vl_model).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_square_experts_are_turned(vl_model: Path, tmp_path: Path) -> None:
    """transformers leaves a stored weight alone whose two sizes are equal; the other weight of the layer tells."""
    config = json.loads((vl_model / "config.json").read_text(encoding="utf-8"))
    text = config["text_config"]
    width = text["moe_intermediate_size"] = text["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {name: tensor for file in vl_model.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name in tensors:
        if "mlp.experts" in name:
            out = 2 * width if "gate_up" in name else width
            tensors[name] = torch.randn(len(tensors[name]), width, out).bfloat16()
    save_file(tensors, tmp_path / "model.safetensors")
    state = filled(open_vl(tmp_path), tmp_path).state_dict()
    prefix = "model.language_model.layers.2.mlp.experts"
    for expert in range(len(tensors[f"{prefix}.down_proj"])):
        down, gate_up = (tensors[f"{prefix}.{name}"][expert] for name in ("down_proj", "gate_up_proj"))
        assert torch.equal(state[f"{prefix}.{expert}.down_proj.weight"], down.t())
        assert torch.equal(state[f"{prefix}.{expert}.up_proj.weight"], gate_up[:, width:].t())


class ReadsFiles(DefaultModelAdapter):
    """Reads its weights by itself, as many adapters do."""

    def init_model(self, device: DeviceType = DeviceType.NPU) -> nn.Module:
        from safetensors import safe_open
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM(self.config)
        with safe_open(Path(self.model_path) / "model.safetensors", framework="pt", device="cpu") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state["model.norm.weight"] = state["model.norm.weight"] * 2
        model.load_state_dict(state)
        return model.to(torch.bfloat16)


def test_files_that_an_adapter_reads_itself_are_read_when_they_are_needed(text_model: Callable[..., Path]) -> None:
    path = text_model("llama", tie_word_embeddings=False)
    stored = load_file(path / "model.safetensors")
    state = filled(ReadsFiles("llama", path), path).state_dict()
    assert state.keys() == stored.keys()
    for name, tensor in state.items():
        factor = 2 if name == "model.norm.weight" else 1
        assert torch.equal(tensor, stored[name] * factor)


class ScalesExperts(DefaultModelAdapter):
    def init_model(self, device: DeviceType = DeviceType.NPU) -> nn.Module:
        model: Any = super().init_model(device)
        model.model.layers[1].mlp.experts.down_proj.mul_(2)
        return model  # type: ignore[no-any-return]


def test_experts_that_the_adapter_changed_are_left_as_it_left_them(text_model: Callable[..., Path]) -> None:
    path = text_model("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40)
    stored = load_file(path / "model.safetensors")
    state = filled(ScalesExperts("qwen3_moe", path), path).state_dict()
    for layer, factor in ((0, 1), (1, 2)):
        experts = [stored[f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"] for expert in range(4)]
        assert torch.equal(state[f"model.layers.{layer}.mlp.experts.down_proj"], torch.stack(experts) * factor)


class LooksIntoWeights(DefaultModelAdapter):
    def init_model(self, device: DeviceType = DeviceType.NPU) -> nn.Module:
        model: Any = super().init_model(device)
        if model.lm_head.weight.abs().max() > 100:
            raise ValueError
        return model  # type: ignore[no-any-return]


class BuildsAgain(DefaultModelAdapter):
    def generate_model_forward(self, model: Any, inputs: Any) -> Generator[ProcessRequest, Any, Any]:
        layer = type(model.model.layers[0])(self.config, 0)
        yield ProcessRequest("model.layers.0", layer, (inputs,), {})


class ReadsLate(DefaultModelAdapter):
    def generate_model_forward(self, model: Any, inputs: Any) -> Generator[ProcessRequest, Any, Any]:
        self._get_state_dict(model)
        yield ProcessRequest("model.layers.0", model.model.layers[0], (inputs,), {})


class ExpectsTuples(DefaultModelAdapter):
    def generate_model_forward(self, model: Any, inputs: Any) -> Generator[ProcessRequest, Any, Any]:
        for index, layer in enumerate(model.model.layers):
            answer = yield ProcessRequest(f"model.layers.{index}", layer, (inputs,), {})
            inputs = answer[0]


class LoadsNothing(DefaultModelAdapter):
    def init_model(self, device: DeviceType = DeviceType.NPU) -> nn.Module:
        from transformers import LlamaForCausalLM

        model: nn.Module = LlamaForCausalLM(self.config)
        return model


@pytest.fixture(scope="module")
def llama(text_model: Callable[..., Path]) -> Path:
    return text_model("llama", tie_word_embeddings=False)


def test_an_adapter_that_looks_into_weights_while_it_loads_is_refused(llama: Path) -> None:
    with pytest.raises(PluginError, match="LooksIntoWeights cannot load its model") as caught:
        Session(LooksIntoWeights("llama", llama)).init_model("meta")
    assert "it may rearrange weights and not look into them" in caught.value.hint


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (BuildsAgain, "yields model.layers.0, which is not that module of its model"),
        (ReadsLate, "the adapter reads weights outside init_model and generate_model_visit"),
    ],
)
def test_layers_that_are_loaded_during_the_forward_are_refused(kind: Any, message: str, llama: Path) -> None:
    session = Session(kind("llama", llama))
    with pytest.raises(PluginError, match=message):
        next(session.generate_model_forward(session.init_model("cpu"), torch.ones(1, 3, 64)))


def test_an_adapter_that_takes_answers_for_tuples_is_refused(llama: Path) -> None:
    session = Session(ExpectsTuples("llama", llama))
    forward = session.generate_model_forward(session.init_model("cpu"), torch.ones(1, 3, 64))
    next(forward)
    with pytest.raises(PluginError, match="takes the first element of a layer's answer"):
        forward.send(torch.ones(1, 3, 64))


def test_what_an_adapter_does_not_load_is_missing(llama: Path) -> None:
    session = Session(LoadsNothing("llama", llama))
    with Checkpoint(llama) as checkpoint:
        model = session.init_model("meta")
        loader = Loader(model, checkpoint, session.get_weight_sources(model, checkpoint.shapes), "cpu")
        with pytest.raises(ModelError, match="the weights do not fit") as caught:
            loader.require_fit()
    assert "holds no tensor for model.embed_tokens.weight" in str(caught.value)


def test_old_masks_are_made_by_the_new_function(vl_model: Path) -> None:
    from transformers import Qwen3VLMoeConfig
    from transformers.masking_utils import create_causal_mask

    config = Qwen3VLMoeConfig.from_pretrained(vl_model).text_config
    config._attn_implementation = "eager"
    embeds, mask = torch.zeros(1, 5, config.hidden_size), torch.tensor([[0, 1, 1, 1, 1]])
    found: list[Tensor] = []

    class Adapter:
        def generate_model_forward(self, model: nn.Module, inputs: Any) -> Iterator[ProcessRequest]:
            from transformers import masking_utils

            found.append(
                masking_utils.create_causal_mask(
                    config=config,
                    input_embeds=embeds,
                    attention_mask=mask,
                    cache_position=torch.arange(5),
                    past_key_values=None,
                )
            )
            yield ProcessRequest("", model)

    from msmodelslim.bridge.forward import run_forward

    next(run_forward(Adapter(), nn.Linear(1, 1), None))
    expected = create_causal_mask(config=config, inputs_embeds=embeds, attention_mask=mask, past_key_values=None)
    assert torch.equal(found[0], expected)


def test_paths_and_json_are_checked(tmp_path: Path) -> None:
    from msmodelslim.utils.security import get_valid_read_path, json_safe_load

    file = tmp_path / "a.json"
    file.write_text('{"a": [1]}', encoding="utf-8")
    assert json_safe_load(file) == {"a": [1]}
    assert get_valid_read_path(tmp_path, is_dir=True) == str(tmp_path.resolve())
    for options in ({"is_dir": True}, {"extensions": "txt"}, {"size_max": 3}):
        with pytest.raises(UsageError, match=r"a\.json"):
            get_valid_read_path(file, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a key has more than"):
        json_safe_load(file, key_max_len=0)
