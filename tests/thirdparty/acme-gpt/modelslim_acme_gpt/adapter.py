# SPDX-License-Identifier: Apache-2.0
"""The adapter of Acme's GPT, its forward written by hand."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from modelslim.api import DatasetError, ModelError, ProcessRequest, hookimpl
from modelslim_acme_gpt.model import AcmeGPT, Config
from modelslim_acme_gpt.tokenizer import VOCABULARY, encode


class AcmeGPTAdapter:
    """Serves checkpoints whose ``model_type`` is ``acme_gpt``.

    Args:
        model_type: ``model_type`` of config.json.
        model_path: directory of the checkpoint.
        trust_remote_code: not used; the model's code is in this package.
    """

    def __init__(self, model_type: str, model_path: Path, trust_remote_code: bool = False) -> None:
        self.model_path = model_path

    @cached_property
    def config(self) -> Config:
        """The sizes of the model."""
        file = self.model_path / "config.json"
        try:
            return Config.of(json.loads(file.read_text(encoding="utf-8")))
        except KeyError as error:
            raise ModelError(f"{file}: lacks {error}", hint="take config.json from the model's publisher") from None

    @hookimpl
    def init_model(self, device: str) -> nn.Module:
        """The model on meta: it has no buffers, and the engine loads every parameter when it is wanted."""
        with torch.device("meta"):
            return AcmeGPT(self.config).eval()

    @hookimpl
    def handle_dataset(self, dataset: Sequence[Any], device: str) -> list[Tensor]:
        """Token ids [1, tokens] of every text, cut to the positions that the model has."""
        inputs = []
        for number, sample in enumerate(dataset, start=1):
            if not isinstance(sample, str):
                raise DatasetError(f"calibration sample {number} is no text", hint="Acme's GPT knows no chats")
            inputs.append(torch.tensor([encode(sample)[: self.config.max_positions]], device=device))
        return inputs

    @hookimpl
    def generate_model_visit(self, model: Any) -> Iterator[ProcessRequest]:
        """The layers in order."""
        for index, layer in enumerate(model.layers):
            yield ProcessRequest(f"layers.{index}", layer)

    @hookimpl
    def generate_model_forward(self, model: Any, inputs: Tensor) -> Generator[ProcessRequest, Tensor, Tensor]:
        """Every layer with the mask of its kind; returns the logits [1, tokens, vocabulary]."""
        hidden, masks = model.embed(inputs), model.masks(inputs)
        for request in self.generate_model_visit(model):
            kwargs = {"mask": masks[request.module.sees_all]}
            hidden = yield ProcessRequest(request.name, request.module, (hidden,), kwargs)
        logits: Tensor = model.head(model.norm(hidden))
        return logits

    @hookimpl
    def make_tiny_checkpoint(self, path: Path) -> list[Tensor]:
        """Three layers of 16 channels, so that a wide layer follows a narrow one and is followed by one."""
        config = replace(self.config, hidden_size=16, num_layers=3, num_heads=2, window=4, max_positions=32)
        model = AcmeGPT(config)
        state = {name: torch.randn_like(tensor) * 0.3 for name, tensor in model.state_dict().items()}
        save_file(state, path / "model.safetensors")
        values = {"model_type": "acme_gpt", "architectures": ["AcmeGPT"], **asdict(config)}
        (path / "config.json").write_text(json.dumps(values), encoding="utf-8")
        return [torch.randint(VOCABULARY, (1, length)) for length in (9, 14)]
