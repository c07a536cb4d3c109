# SPDX-License-Identifier: Apache-2.0
"""The adapter of the integration guide, its gaps filled as an engineer of the existing tool would."""

from collections.abc import Generator
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask

from msmodelslim.core.base.protocol import ProcessRequest
from msmodelslim.core.const import DeviceType
from msmodelslim.core.graph import AdapterConfig, MappingConfig
from msmodelslim.infra.dataset_loader.vlm_dataset_loader import VlmCalibSample
from msmodelslim.model.common.layer_wise_forward import generated_decoder_layer_visit_func
from msmodelslim.model.interface_hub import IterSmoothInterface, ModelSlimPipelineInterfaceV1
from msmodelslim.model.vlm_base import VlmBaseModelAdapter
from msmodelslim.utils.logging import get_logger, logger_setter


@logger_setter()
class Qwen3VLMoeModelAdapter(VlmBaseModelAdapter, ModelSlimPipelineInterfaceV1, IterSmoothInterface):
    """Qwen3-VL-MoE as the integration guide writes it."""

    def handle_dataset(self, dataset: Any, device: DeviceType = DeviceType.NPU) -> list[Any]:
        from transformers import AutoProcessor

        self._processor = AutoProcessor.from_pretrained(self.model_path, trust_remote_code=True, local_files_only=True)
        model_inputs = []
        for sample in dataset:
            assert isinstance(sample, VlmCalibSample)
            image_path = sample.image
            text = sample.text
            messages = [
                {"role": "user", "content": [{"type": "image", "image": image_path}, {"type": "text", "text": text}]}
            ]
            inputs = self._processor.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            inputs = self._collect_inputs_to_device(
                inputs,
                device,
                keys=[
                    "input_ids",
                    "attention_mask",
                    "position_ids",
                    "past_key_values",
                    "inputs_embeds",
                    "labels",
                    "pixel_values",
                    "pixel_values_videos",
                    "image_grid_thw",
                    "video_grid_thw",
                    "cache_position",
                    "logits_to_keep",
                ],
                defaults={"logits_to_keep": 0},
            )
            model_inputs.append(inputs)
        return model_inputs

    def init_model(self, device: DeviceType = DeviceType.NPU) -> nn.Module:
        from transformers import Qwen3VLMoeForConditionalGeneration

        self.config.use_cache = False
        origin_layers = self.config.text_config.num_hidden_layers
        self.config.text_config.num_hidden_layers = 1
        model = Qwen3VLMoeForConditionalGeneration.from_pretrained(
            self.model_path,
            config=self.config,
            trust_remote_code=self.trust_remote_code,
            torch_dtype="auto",
            local_files_only=True,
            device_map="cpu",
            attn_implementation="eager",
        ).eval()
        self.config.text_config.num_hidden_layers = origin_layers
        self.config.text_config._attn_implementation = "eager"
        state_dict = self._get_state_dict(model)
        model.load_state_dict(state_dict)
        if self._is_moe_layer(0):
            self._convert_single_moe_layer(model.model.language_model.layers[0], 0)
        return model

    def generate_model_visit(self, model: nn.Module) -> Generator[ProcessRequest, Any, None]:
        yield ProcessRequest(name="model.visual", module=model.model.visual, args=(), kwargs={})
        yield from generated_decoder_layer_visit_func(model, transformer_blocks=self.generate_decoder_layer(model))

    def generate_decoder_layer(self, model: nn.Module) -> Generator[tuple[str, nn.Module], None, None]:
        num_layers = self.config.text_config.num_hidden_layers
        for layer_idx in range(num_layers):
            name = f"model.language_model.layers.{layer_idx}"
            layer = self._load_decoder_if_not_exist(model, name, layer_idx)
            yield name, layer

    def _load_decoder_if_not_exist(self, model: nn.Module, name: str, layer_idx: int) -> nn.Module:
        try:
            decoder = model.get_submodule(name)
            try:
                _ = decoder.input_layernorm.weight.device
                return decoder
            except RuntimeError:
                pass
        except AttributeError:
            pass
        with patch.object(nn.Linear, "reset_parameters", lambda _self: None):
            from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextDecoderLayer

            decoder = Qwen3VLMoeTextDecoderLayer(self.config.text_config, layer_idx=layer_idx)
            state_dict = self._get_state_dict(decoder, prefix=name)
            decoder.load_state_dict(state_dict)
            decoder.eval()
            module_list = model.model.language_model.layers
            if len(module_list) <= layer_idx:
                module_list.append(decoder)
            else:
                module_list[layer_idx] = decoder
            if self._is_moe_layer(layer_idx):
                self._convert_single_moe_layer(decoder, layer_idx)
        return decoder

    def _is_moe_layer(self, layer_idx: int) -> bool:
        text = self.config.text_config
        return layer_idx not in text.mlp_only_layers and (layer_idx + 1) % text.decoder_sparse_step == 0

    def _convert_single_moe_layer(self, layer: nn.Module, layer_idx: int):
        from .moe_utils import UnstackedQwen3VLMoeSparseMoeBlock

        get_logger().info("unstacking the experts of layer %d", layer_idx)
        layer.mlp = UnstackedQwen3VLMoeSparseMoeBlock(self.config.text_config, layer.mlp)

    def generate_model_forward(self, model: nn.Module, inputs: Any) -> Generator[ProcessRequest, Any, None]:
        sample = inputs[0] if isinstance(inputs, list) else inputs
        pixel_values = sample["pixel_values"]
        image_grid_thw = sample["image_grid_thw"]
        with torch.no_grad():
            image_embeds, deepstack_image_embeds = yield ProcessRequest(
                name="model.visual", module=model.model.visual, args=(pixel_values, image_grid_thw), kwargs={}
            )
        input_ids = sample["input_ids"]
        attention_mask = sample["attention_mask"]
        inputs_embeds = model.model.language_model.embed_tokens(input_ids)
        image_mask = (input_ids == self.config.image_token_id).unsqueeze(-1).expand_as(inputs_embeds)
        inputs_embeds = inputs_embeds.masked_scatter(image_mask, image_embeds.to(inputs_embeds.dtype))
        visual_pos_masks = image_mask[..., 0]

        position_ids, _ = model.model.get_rope_index(
            input_ids=input_ids, image_grid_thw=image_grid_thw, attention_mask=attention_mask
        )
        text_position_ids = position_ids[0]
        cache_position = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        attention_mask = create_causal_mask(
            config=self.config.text_config,
            input_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache_position=cache_position,
            past_key_values=None,
            position_ids=text_position_ids,
        )
        position_embeddings = model.model.language_model.rotary_emb(inputs_embeds, position_ids)

        hidden_states = inputs_embeds
        for layer_idx, (name, layer) in enumerate(self.generate_decoder_layer(model)):
            with torch.no_grad():
                hidden_states = yield ProcessRequest(
                    name=name,
                    module=layer,
                    args=(hidden_states,),
                    kwargs={
                        "attention_mask": attention_mask,
                        "position_ids": text_position_ids,
                        "cache_position": cache_position,
                        "position_embeddings": position_embeddings,
                        "past_key_values": None,
                        "use_cache": False,
                    },
                )
            if layer_idx < len(deepstack_image_embeds):
                hidden_states = hidden_states.clone()
                hidden_states[visual_pos_masks] += deepstack_image_embeds[layer_idx].to(hidden_states.dtype)

    def get_adapter_config_for_subgraph(self) -> list[AdapterConfig]:
        adapter_config = []
        for layer_idx in range(self.config.text_config.num_hidden_layers):
            prefix = f"model.language_model.layers.{layer_idx}"
            attention = f"{prefix}.self_attn"
            norm_linear_mapping_config = MappingConfig(
                source=f"{prefix}.input_layernorm", targets=[f"{attention}.{name}_proj" for name in "qkv"]
            )
            ov_mapping_config = MappingConfig(source=f"{attention}.v_proj", targets=[f"{attention}.o_proj"])
            adapter_config.extend(
                [
                    AdapterConfig(subgraph_type="norm-linear", mapping=norm_linear_mapping_config),
                    AdapterConfig(subgraph_type="ov", mapping=ov_mapping_config, extra_config={}),
                ]
            )
        return adapter_config
