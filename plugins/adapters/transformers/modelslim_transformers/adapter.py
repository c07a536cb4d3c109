# SPDX-License-Identifier: Apache-2.0
"""The generic adapter: any decoder-only transformers model, without code of its own."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelslim.api import DatasetError, ModelError, ProcessRequest, WeightSource, drive, hookimpl
from modelslim_transformers.sources import weight_sources


class TransformersAdapter:
    """Serves a causal language model that transformers can build from config.json.

    Its units are the modules of the list that holds the most parameters, which in a decoder is the list
    of its layers; everything else is derived from the model itself.

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
        """The model's configuration, caching switched off."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(
                self.model_path, trust_remote_code=self.trust_remote_code, local_files_only=True
            )
        except Exception as error:
            message = f"{self._config_file}: transformers cannot use it: {_line(error)}"
            raise ModelError(message, hint=_hint(error)) from error
        config.use_cache = False
        return config

    @property
    def _config_file(self) -> Path:
        return self.model_path / "config.json"

    def _load_tokenizer(self) -> Any:
        """The model's tokenizer; not kept, since it takes tens of MB and is needed once."""
        from transformers import AutoTokenizer

        hint = "the directory must hold tokenizer.json or tokenizer.model, and tokenizer_config.json"
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.model_path, trust_remote_code=self.trust_remote_code, local_files_only=True
            )
        except Exception as error:
            message = f"{self.model_path}: transformers cannot load the tokenizer: {_line(error)}"
            raise ModelError(message, hint=hint) from error
        # Where the files are missing, some tokenizers come up empty instead of failing.
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise ModelError(f"{self.model_path}: the tokenizer has no vocabulary", hint=hint)
        return tokenizer

    @hookimpl
    def init_model(self, device: str) -> nn.Module:
        """The model on meta; buffers that no checkpoint holds are computed unless the device is meta."""
        from transformers import AutoModelForCausalLM

        _refuse_quantized(self.config, self._config_file)
        dtype = self.config.dtype or _stored_dtype(self.model_path)
        try:
            with torch.device("meta"):
                model: nn.Module = AutoModelForCausalLM.from_config(
                    self.config, dtype=dtype, trust_remote_code=self.trust_remote_code
                )
        except Exception as error:
            raise ModelError(
                f"{self._config_file}: transformers cannot build {self.model_type!r} as a causal language model: "
                f"{_line(error)}",
                hint=_hint(error),
            ) from error
        # Some parameters are made by functions that overlook the device of the context.
        model.to("meta").eval()
        _keep_in_float32(model, dtype)
        if device != "meta":
            _compute_buffers(model, device)
        return model

    @hookimpl
    def handle_dataset(self, dataset: Sequence[Any], device: str) -> list[dict[str, Tensor]]:
        """One input per sample, neither padded nor truncated."""
        inputs = []
        tokenizer = self._load_tokenizer()
        vocabulary = self.config.get_text_config().vocab_size
        for number, sample in enumerate(dataset, start=1):
            ids = _tokenize(tokenizer, sample, number)
            if not ids:
                raise DatasetError(f"calibration sample {number} has no tokens", hint="remove it from the data file")
            if max(ids) >= vocabulary:
                raise ModelError(
                    f"{self.model_path}: the tokenizer gives the id {max(ids)} and the model knows {vocabulary} tokens",
                    hint="tokenizer and config.json belong to different models",
                )
            inputs.append({"input_ids": torch.tensor([ids], device=device)})
        return inputs

    @hookimpl
    def generate_model_visit(self, model: nn.Module) -> Iterator[ProcessRequest]:
        """The decoder layers in order."""
        name, layers = _decoder_layers(model)
        for index, layer in enumerate(layers):
            yield ProcessRequest(f"{name}.{index}", layer)

    @hookimpl
    def generate_model_forward(self, model: Any, inputs: Any) -> Generator[ProcessRequest, Any, Any]:
        """The model's own forward, stopping at every decoder layer; returns the logits [1, tokens, vocabulary]."""
        # Some forwards ask where the embedding lies before they call it, and calling it is what fills it.
        model.get_input_embeddings()(inputs["input_ids"][:, :1])
        output = yield from drive(self.generate_model_visit(model), model, **inputs, use_cache=False)
        return output.logits

    @hookimpl
    def get_weight_sources(self, model: nn.Module, keys: Sequence[str]) -> Mapping[str, WeightSource]:
        """Names and layouts as transformers itself converts them on load."""
        return weight_sources(model, keys)


def _tokenize(tokenizer: Any, sample: Any, number: int) -> list[int]:
    """Token ids of a text or of a chat, the ``number``-th sample."""
    if isinstance(sample, str):
        return list(tokenizer(sample)["input_ids"])
    if getattr(tokenizer, "chat_template", None) is None:
        raise DatasetError(
            "a calibration sample holds chat messages and the tokenizer has no chat template",
            hint="use samples of plain text",
        )
    try:
        return list(tokenizer.apply_chat_template(sample, return_dict=True)["input_ids"])
    except Exception as error:  # a template is a program of the model's publisher and raises what it likes
        raise DatasetError(
            f"calibration sample {number}: the tokenizer's chat template refuses it: {_line(error)}",
            hint="check its roles and their order; some models take no system message",
        ) from error


def _decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The outermost list of modules that holds the most parameters."""
    lists = list(_outermost_lists(model))
    if not lists:
        raise ModelError(
            f"{type(model).__name__} has no list of layers", hint="write an adapter that names the model's units"
        )
    if len(lists) == 1:  # as in a language model, where counting would be repeated for every sample
        return lists[0]
    return max(lists, key=lambda found: sum(parameter.numel() for parameter in found[1].parameters()))


def _outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists of modules by their paths, those inside another list left out."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and len(child):
            yield f"{prefix}{name}", child
        else:
            yield from _outermost_lists(child, f"{prefix}{name}.")


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


def _line(error: BaseException) -> str:
    """The first line of an error's text, which is often a page; with the next where the first announces it."""
    first, _, rest = str(error).strip().partition("\n")
    return f"{first} {rest.strip().partition(chr(10))[0]}".strip() if first.endswith(":") else first


def _hint(error: BaseException) -> str:
    if "trust_remote_code" in str(error):
        return "the model brings its own code; if you trust its source, add --trust_remote_code True"
    return "check model_type and architectures in config.json, or install a transformers version that knows the model"
