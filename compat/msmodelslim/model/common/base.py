# SPDX-License-Identifier: Apache-2.0
"""What every adapter has: the model's name and place, its configuration, its weights by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msmodelslim.bridge.hooks import Bridged
from msmodelslim.bridge.loading import active_loading
from msmodelslim.interfaces import AscendV1GlobalModelDtypeInterface, IModel
from msmodelslim.utils.exception import SchemaValidateError
from msmodelslim.utils.security.model import SafeGenerator


class BaseModelAdapter(Bridged, IModel):
    """Knows which model it serves.

    Args:
        model_type: name of the model.
        model_path: directory of the checkpoint.
        trust_remote_code: True when code of the checkpoint may run.
    """

    def __init__(self, model_type: str, model_path: Path, trust_remote_code: bool = False) -> None:
        self._model_type = model_type
        self._model_path = model_path
        self._trust_remote_code = trust_remote_code

    @property
    def model_type(self) -> str:
        """Name of the model."""
        return self._model_type

    @model_type.setter
    def model_type(self, model_type: str) -> None:
        self._model_type = model_type

    @property
    def model_path(self) -> Path:
        """Directory of the checkpoint."""
        return self._model_path

    @model_path.setter
    def model_path(self, model_path: Path) -> None:
        self._model_path = model_path

    @property
    def trust_remote_code(self) -> bool:
        """True when code of the checkpoint may run."""
        return self._trust_remote_code

    @trust_remote_code.setter
    def trust_remote_code(self, trust_remote_code: bool) -> None:
        self._trust_remote_code = trust_remote_code


class ConfiguredModelAdapter(BaseModelAdapter, AscendV1GlobalModelDtypeInterface):
    """Has read the model's configuration.

    Attributes:
        config: as transformers reads it.
        model_pedigree: the letters with which the model's name begins, in lower case.
    """

    def __init__(self, model_type: str, model_path: Path, trust_remote_code: bool = False) -> None:
        super().__init__(model_type, model_path, trust_remote_code)
        self.config = self._load_config(trust_remote_code=trust_remote_code)
        self.model_pedigree = self._get_model_pedigree(self.model_type)
        self.model_type = self._get_model_type(self.model_type)

    def get_global_model_torch_dtype(self) -> torch.dtype:
        """The model's dtype, float32 where the configuration states none."""
        stated = self.config.dtype or self.config.get_text_config().dtype
        return stated if isinstance(stated, torch.dtype) else torch.float32

    def _load_config(self, trust_remote_code: bool = False) -> Any:
        config = SafeGenerator.get_config_from_pretrained(self.model_path, trust_remote_code=trust_remote_code)
        for part in (config, config.get_text_config()):
            rope = getattr(part, "rope_parameters", None) or {}
            if "rope_theta" in rope and not hasattr(part, "rope_theta"):
                part.rope_theta = rope["rope_theta"]  # where transformers 4 had it
        return config

    def _get_state_dict(self, module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
        """What ``module.load_state_dict`` wants, as transformers would load it.

        Args:
            module: the model or one of its layers.
            prefix: the layer's name in the model; empty for the model itself.

        Raises:
            ModelError: the checkpoint lacks a tensor.
            PluginError: called when the model is built already.
        """
        return active_loading().state_dict(module, prefix)

    def _enable_kv_cache(self, model: Any, enable: bool) -> None:
        model.config.use_cache = enable

    def _get_model_type(self, model_type: str | None) -> str:
        return str(self.config.model_type) if model_type is None else model_type

    def _get_model_pedigree(self, model_type: str | None) -> str:
        if model_type is None:
            return str(self.config.model_type)
        letters = re.match("[a-zA-Z]+", model_type)
        if letters is None:
            raise SchemaValidateError(
                f"the model's name {model_type!r} does not begin with a letter", action="check --model_type"
            )
        return letters.group().lower()
