# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL-MoE with every hook written by hand: what the generic adapter does without a line of code."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelslim.api import InvalidDatasetError, ProcessRequest, VlmCalibSample, WeightSource, hookimpl
from modelslim_qwen3_vl_moe_by_hand.experts import expert_sources, fuse_experts
from modelslim_transformers.processor import load_processor


class Qwen3VLMoeByHand:
    """Serves the models that transformers builds as qwen3_vl_moe, on texts and images.

    Args:
        model_type: ``model_type`` of config.json.
        model_path: directory of the checkpoint.
        trust_remote_code: not used; transformers has the model's code.
    """

    def __init__(self, model_type: str, model_path: Path, trust_remote_code: bool = False) -> None:
        self.model_path = model_path

    @cached_property
    def config(self) -> Any:
        """The model's configuration, caching switched off."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.model_path, local_files_only=True)
        config.use_cache = config.text_config.use_cache = False
        return config

    @hookimpl
    def init_model(self, device: str) -> nn.Module:
        """The whole model on meta, all layers of it; only the rotary frequencies are computed."""
        from transformers import AutoModelForImageTextToText

        with torch.device("meta"):
            model: Any = AutoModelForImageTextToText.from_config(self.config, dtype=self.config.dtype)
        fuse_experts(model)
        if device != "meta":
            # No checkpoint holds these buffers, so the engine cannot fill them.
            visual, language = model.model.visual, model.model.language_model
            visual.rotary_pos_emb = type(visual.rotary_pos_emb)(self.config.vision_config).to(device)
            language.rotary_emb = type(language.rotary_emb)(self.config.text_config).to(device)
        evaluated: nn.Module = model.eval()
        return evaluated

    @hookimpl
    def get_weight_sources(self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, WeightSource]:
        """Every parameter is stored under its own name, but for those of the experts."""
        same = {name: WeightSource((name,)) for name in model.state_dict() if name in shapes}
        return {**same, **expert_sources(model, shapes)}

    @hookimpl
    def handle_dataset(self, dataset: Sequence[Any], device: str) -> list[dict[str, Tensor]]:
        """Arguments of the model's forward for every sample, as its processor makes them."""
        processor = load_processor(self.model_path, self.config)
        inputs = []
        for number, sample in enumerate(dataset, start=1):
            made = processor.apply_chat_template(
                self._messages(sample, number),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            # input_ids, attention_mask, mm_token_type_ids; with an image also pixel_values, image_grid_thw
            arguments = {key: value.to(device) for key, value in made.items()}
            if "pixel_values" in arguments:
                arguments["pixel_values"] = arguments["pixel_values"].to(self.config.dtype)
            inputs.append(arguments)
        return inputs

    def _messages(self, sample: Any, number: int) -> list[dict[str, Any]]:
        if not isinstance(sample, VlmCalibSample) or sample.audio is not None or sample.video is not None:
            raise InvalidDatasetError(
                f"calibration sample {number} is no text with or without an image",
                hint="leave it out; write apiversion: multimodal_vlm_modelslim_v1",
            )
        content = [{"type": "text", "text": sample.text}]
        if sample.image is not None:
            content.insert(0, {"type": "image", "image": sample.image})
        return [{"role": "user", "content": content}]

    @hookimpl
    def generate_model_visit(self, model: Any) -> Iterator[ProcessRequest]:
        """The vision part as a whole, then the decoder layers one by one."""
        yield ProcessRequest("model.visual", model.model.visual)
        for index, layer in enumerate(model.model.language_model.layers):
            yield ProcessRequest(f"model.language_model.layers.{index}", layer)

    @hookimpl
    def generate_model_forward(
        self, model: Any, inputs: Mapping[str, Tensor]
    ) -> Generator[ProcessRequest, Any, Tensor]:
        """The same units with their arguments; returns the logits [1, tokens, vocabulary]."""
        from transformers.masking_utils import create_causal_mask

        language = model.model.language_model
        input_ids, grid = inputs["input_ids"], inputs.get("image_grid_thw")
        hidden = language.embed_tokens(input_ids)
        # [1, tokens], True where the text has a placeholder for a merged patch of an image
        is_image = input_ids == self.config.image_token_id
        deepstack: Sequence[Tensor] = ()
        if grid is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            text_positions, rotary_positions = positions, positions.expand(3, 1, -1)
        else:
            # An output object. pooler_output is [merged patches, hidden]; deepstack_features is a list of such.
            seen = yield ProcessRequest("model.visual", model.model.visual, (inputs["pixel_values"], grid))
            hidden = hidden.masked_scatter(is_image[..., None], seen.pooler_output.to(hidden.dtype))
            deepstack = seen.deepstack_features
            text_positions = None
            rotary_positions, _ = model.model.get_rope_index(  # time, height and width: [3, 1, tokens]
                input_ids,
                mm_token_type_ids=inputs["mm_token_type_ids"],
                image_grid_thw=grid,
                attention_mask=inputs["attention_mask"],
            )
        arguments = {
            "attention_mask": create_causal_mask(
                config=self.config.text_config,
                inputs_embeds=hidden,
                attention_mask=inputs["attention_mask"],
                past_key_values=None,
                position_ids=text_positions,
            ),
            "position_ids": text_positions,
            "position_embeddings": language.rotary_emb(hidden, rotary_positions),
        }
        for index, layer in enumerate(language.layers):
            name = f"model.language_model.layers.{index}"
            # A decoder layer returns a tensor, no tuple.
            hidden = yield ProcessRequest(name, layer, (hidden,), dict(arguments))
            if index < len(deepstack):
                hidden = hidden.clone()
                hidden[is_image] += deepstack[index].to(hidden.dtype)
        logits: Tensor = model.lm_head(language.norm(hidden))
        return logits
