# SPDX-License-Identifier: Apache-2.0
"""The generic adapter: any transformers language or multimodal model, without code of its own."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from modelslim.api import (
    AttentionCache,
    CapabilityError,
    DatasetError,
    DecodedTensor,
    ModelError,
    ProcessRequest,
    StoredTensor,
    Topology,
    VlmCalibSample,
    WeightSource,
    drive,
    hookimpl,
)
from modelslim_transformers.experts import fuse_experts
from modelslim_transformers.fp8 import block_size, decoded_tensors
from modelslim_transformers.inputs import first_line, media, process, require_modalities, to_device, tokenize
from modelslim_transformers.kv_caches import candidates, kind_of, proven_kinds
from modelslim_transformers.placement import state_device
from modelslim_transformers.processor import load_processor
from modelslim_transformers.sources import weight_sources
from modelslim_transformers.structure import language_layers, towers
from modelslim_transformers.tiny import fill_raw_parameters, write_tiny_checkpoint
from modelslim_transformers.topology import Block, blocks, derive
from modelslim_transformers.topology_proof import TinyModel, reproducible


class TransformersAdapter:
    """Serves a language model, with or without vision and audio, that transformers can build from config.json.

    Its units are the towers for images and audio, each as a whole, and the language layers one by one;
    everything else is derived from the model itself. A family that differs overrides one of the public
    methods that are no hooks.

    Args:
        model_type: ``model_type`` of config.json.
        model_path: directory of the checkpoint.
        trust_remote_code: allow code of the checkpoint to run.
    """

    def __init__(self, model_type: str, model_path: Path, trust_remote_code: bool = False) -> None:
        self.model_type = model_type
        self.model_path = model_path
        self.trust_remote_code = trust_remote_code

    @cached_property
    def config(self) -> Any:
        """The model's configuration, caching switched off, and without the entry on weights in blocks of float8."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(
                self.model_path, trust_remote_code=self.trust_remote_code, local_files_only=True
            )
        except Exception as error:
            message = f"{self._config_file}: transformers cannot use it: {first_line(error)}"
            raise ModelError(message, hint=_hint(error)) from error
        for part in (config, config.get_text_config()):
            part.use_cache = False
        self._block = block_size(getattr(config, "quantization_config", None))
        if self._block is not None:
            del config.quantization_config
        return config

    @property
    def _config_file(self) -> Path:
        return self.model_path / "config.json"

    @cached_property
    def auto_class(self) -> Any:
        """The class of transformers that builds the model: one of multimodal models if config.json means such a one."""
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

        own_code = getattr(self.config, "auto_map", None) or {}
        for multimodal in (AutoModelForMultimodalLM, AutoModelForImageTextToText):
            if multimodal.__name__ in own_code:
                return multimodal
        kind = type(self.config)
        known = MODEL_FOR_MULTIMODAL_LM_MAPPING.get(kind, None)
        if known is None:
            return AutoModelForCausalLM
        # Some configurations describe both; then the published class decides.
        stated = known.__name__ in (self.config.architectures or ())
        return AutoModelForMultimodalLM if stated or kind not in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForCausalLM

    @property
    def is_multimodal(self) -> bool:
        """True when the model takes more than text."""
        return bool(self.auto_class.__name__ != "AutoModelForCausalLM")

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype: as config.json states it, else that of the first stored tensor; of float8 bfloat16."""
        stated: torch.dtype | None = self.config.dtype
        if stated is None and self._block is not None:
            return torch.bfloat16
        return stated or _stored_dtype(self.model_path)

    def build(self) -> nn.Module:
        """The model, built without weights; called on meta.

        Raises:
            Exception: whatever transformers raises; it becomes a ModelError.
        """
        model: nn.Module = self.auto_class.from_config(
            self.config, dtype=self.dtype, trust_remote_code=self.trust_remote_code
        )
        return model

    def towers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Path and module of every unit before the language layers, in the order in which the forward calls them."""
        if self.is_multimodal:
            yield from towers(model)

    def language_layers(self, model: nn.Module) -> tuple[str, nn.ModuleList]:
        """Path of the list of language layers, and the list."""
        return language_layers(model)

    def messages(self, sample: VlmCalibSample) -> list[dict[str, Any]]:
        """The chat that asks a sample's text about its files."""
        files: list[dict[str, Any]] = [{"type": kind, kind: path} for kind, path in media(sample).items()]
        return [{"role": "user", "content": [*files, {"type": "text", "text": sample.text}]}]

    def load_processor(self) -> Any:
        """The model's processor, whose ``video_processor`` is None where torchvision is not installed."""
        hint = "the directory must hold processor_config.json or preprocessor_config.json, and the tokenizer's files"
        try:
            processor = load_processor(self.model_path, self.config, self.trust_remote_code)
        except Exception as error:
            message = f"{self.model_path}: transformers cannot load the processor: {first_line(error)}"
            raise ModelError(message, hint=hint) from error
        # Where the files are missing, transformers may answer with the tokenizer alone.
        if not hasattr(processor, "tokenizer"):
            raise ModelError(f"{self.model_path}: transformers finds no processor", hint=hint)
        return processor

    def load_tokenizer(self) -> Any:
        """The model's tokenizer; not kept, since it takes tens of MB and is needed once."""
        from transformers import AutoTokenizer

        hint = "the directory must hold tokenizer.json or tokenizer.model, and tokenizer_config.json"
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.model_path, trust_remote_code=self.trust_remote_code, local_files_only=True
            )
        except Exception as error:
            message = f"{self.model_path}: transformers cannot load the tokenizer: {first_line(error)}"
            raise ModelError(message, hint=hint) from error
        # Where the files are missing, some tokenizers come up empty instead of failing.
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise ModelError(f"{self.model_path}: the tokenizer has no vocabulary", hint=hint)
        return tokenizer

    @hookimpl
    def init_model(self, device: str) -> nn.Module:
        """The model on meta; buffers that no checkpoint holds are computed unless the device is meta."""
        _refuse_quantized(self.config, self._config_file)
        try:
            with torch.device("meta"):
                model = self.build()
        except Exception as error:
            kind = "multimodal" if self.is_multimodal else "causal"
            raise ModelError(
                f"{self._config_file}: transformers cannot build {self.model_type!r} as a {kind} language model: "
                f"{first_line(error)}",
                hint=_hint(error),
            ) from error
        # Some parameters are made by functions that overlook the device of the context.
        model.to("meta").eval()
        _keep_in_float32(model, self.dtype)
        if device != "meta":
            _compute_buffers(model, device)
            state_device(model, device)
        fuse_experts(model)
        return model

    @hookimpl
    def handle_dataset(self, dataset: Sequence[Any], device: str) -> list[dict[str, Any]]:
        """One input per sample, neither padded nor truncated."""
        processor = None
        if self.is_multimodal and not all(isinstance(sample, str) for sample in dataset):
            processor = self.load_processor()
        require_modalities(dataset, processor)
        tokenizer = self.load_tokenizer() if processor is None else processor.tokenizer
        inputs = []
        vocabulary = self.config.get_text_config().vocab_size
        for number, sample in enumerate(dataset, start=1):
            arguments = self._arguments(sample, number, tokenizer, processor)
            ids = arguments["input_ids"]
            if not ids.numel():
                raise DatasetError(f"calibration sample {number} has no tokens", hint="remove it from the data file")
            if ids.max() >= vocabulary:
                raise ModelError(
                    f"{self.model_path}: the tokenizer gives the id {ids.max()} and the model knows "
                    f"{vocabulary} tokens",
                    hint="tokenizer and config.json belong to different models",
                )
            inputs.append({key: to_device(value, device) for key, value in arguments.items()})
        return inputs

    def _arguments(self, sample: Any, number: int, tokenizer: Any, processor: Any) -> dict[str, Any]:
        """What the forward takes of a sample."""
        if isinstance(sample, VlmCalibSample) and processor is not None:
            return process(processor, self.messages(sample), True, number, self.dtype)
        if isinstance(sample, VlmCalibSample):
            sample = [{"role": "user", "content": sample.text}]
        if isinstance(sample, str) or processor is None:
            return {"input_ids": torch.tensor([tokenize(tokenizer, sample, number)], dtype=torch.long)}
        # Templates of multimodal models may overlook a content that is no list.
        chat = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in sample]
        return process(processor, chat, False, number, self.dtype)

    @hookimpl
    def generate_model_visit(self, model: nn.Module) -> Iterator[ProcessRequest]:
        """The towers as a whole, then the language layers one by one."""
        prefix, layers = self.language_layers(model)
        for name, tower in self.towers(model):
            yield ProcessRequest(name, tower)
        for index, layer in enumerate(layers):
            yield ProcessRequest(f"{prefix}.{index}", layer)

    @hookimpl
    def generate_model_forward(self, model: Any, inputs: Any) -> Generator[ProcessRequest, Any, Any]:
        """The model's own forward, stopping at every unit; returns the logits [1, tokens, vocabulary]."""
        # Some forwards ask where the embedding lies before they call it, and calling it is what fills it.
        model.get_input_embeddings()(inputs["input_ids"][:, :1])
        output = yield from drive(self.generate_model_visit(model), model, **inputs, use_cache=False)
        return output.logits

    @hookimpl
    def get_decoded_tensors(self, tensors: Mapping[str, StoredTensor]) -> Mapping[str, DecodedTensor]:
        """The weights that are stored in blocks of float8, in the model's dtype."""
        dtype = self.dtype  # which reads the configuration
        return decoded_tensors(tensors, self._block, dtype) if self._block else {}

    @hookimpl
    def make_tiny_checkpoint(self, model: nn.Module, path: Path) -> list[dict[str, Any]]:
        """The architecture with every kind of its layers and all sizes small."""

        def build(tiny: Path) -> nn.Module:
            return type(self)(self.model_type, tiny, self.trust_remote_code).build()

        return write_tiny_checkpoint(self.model_path, self.config, self.language_layers(model)[1], build, path)

    @hookimpl
    def get_adapter_config_for_subgraph(self, model: nn.Module) -> Topology:
        """What is proven to be harmless on a tiny model of the architecture, carried over to this one."""
        try:
            with self._twin(model) as (twin, tiny, inputs):
                units = [request.name for request in twin.generate_model_visit(tiny)]
                towers = [name for name, _ in twin.towers(tiny)]
                return derive(self._blocks(model), twin._blocks(tiny), TinyModel(tiny, units, towers, inputs))
        except Exception as error:  # whatever a model's code raises; nothing is proven then
            return Topology(left_out={"*": f"nothing can be proven on a tiny model: {first_line(error)}"})

    @hookimpl
    def get_kv_caches(self, model: nn.Module) -> Sequence[AttentionCache]:
        """The attentions whose kind shows keys and values to a cache in a tiny model of the architecture."""
        try:
            with self._twin(model) as (_, tiny, inputs):
                kinds = proven_kinds(tiny, inputs)
        except Exception as error:  # whatever a model's code raises
            raise CapabilityError(
                f"nothing can be proven of the caches of this model: {first_line(error)}",
                hint="leave out what quantizes caches",
            ) from error
        return [one for one in candidates(model) if kind_of(model.get_submodule(one.attention)) in kinds]

    @contextmanager
    def _twin(self, model: nn.Module) -> Iterator[tuple[TransformersAdapter, Any, list[dict[str, Any]]]]:
        """A tiny model of the architecture in float32, its adapter, and inputs."""
        with TemporaryDirectory() as directory, reproducible():
            path = Path(directory)
            inputs = self.make_tiny_checkpoint(model, path)
            twin = type(self)(self.model_type, path, self.trust_remote_code)
            tiny = twin.build().float().eval()
            fuse_experts(tiny)
            fill_raw_parameters(tiny)
            yield twin, tiny, inputs

    def _blocks(self, model: nn.Module) -> list[Block]:
        return list(blocks(self.language_layers(model), list(self.towers(model))))

    @hookimpl
    def get_weight_sources(self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, WeightSource]:
        """Names and layouts as transformers itself converts them on load."""
        return weight_sources(model, shapes)


def _refuse_quantized(config: Any, file: Path) -> None:
    for part in (config, config.get_text_config()):
        quantization = getattr(part, "quantization_config", None)
        if quantization:
            method = quantization.get("quant_method", "unknown")
            raise ModelError(
                f"{file}: the model is quantized already (quantization_config, method {method})",
                hint="give --model_path the float checkpoint that it was made from, mostly in bfloat16",
            )


def _stored_dtype(model_path: Path) -> torch.dtype:
    """What transformers takes where config.json states no dtype: that of the first floating tensor."""
    from transformers.modeling_utils import get_state_dict_dtype, load_state_dict

    first = min(model_path.glob("*.safetensors"))
    dtype: torch.dtype = get_state_dict_dtype(load_state_dict(str(first), map_location="meta"))
    return dtype


def _keep_in_float32(model: Any, dtype: torch.dtype) -> None:
    """Give the parameters and buffers that transformers keeps in float32 that type, as its own loader does."""
    parts = "|".join(part.replace("*", ".*") for part in model._get_dtype_plan(dtype))
    if not parts:
        return
    for name, tensor in model.state_dict(keep_vars=True).items():
        if re.search(parts, name):
            tensor.data = tensor.data.to(torch.float32)


def _compute_buffers(model: Any, device: str) -> None:
    """Make the buffers that no checkpoint holds (rotary frequencies), by the model's own initialization."""
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # the checkpoint has it, so that initialization leaves it alone
    made = []
    for name, buffer in model.named_non_persistent_buffers(remove_duplicate=False):
        owner, _, attribute = name.rpartition(".")
        value = torch.full_like(buffer, float("nan") if buffer.is_floating_point() else 0, device=device)
        model.get_submodule(owner)._buffers[attribute] = value
        made.append((name, value))
    model.initialize_weights()
    for name, value in made:
        if value.is_floating_point() and value.isnan().any():
            raise ModelError(
                f"{type(model).__name__} does not compute its buffer {name} in _init_weights",
                hint="transformers 5 builds models without memory; the model's code must fill its buffers there",
            )


def _hint(error: BaseException) -> str:
    if "trust_remote_code" in str(error):
        return "the model brings its own code; if you trust its source, add --trust_remote_code True"
    return (
        "check model_type and architectures in config.json, or install the adapter of the model's family "
        "(modelslim-adapter-<family>) or a transformers version that knows the model"
    )
