# SPDX-License-Identifier: Apache-2.0
"""Loads configurations, tokenizers and models from a local directory, by the names that adapters use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msmodelslim.utils.security import get_valid_read_path


class SafeGenerator:
    """transformers' loaders, restricted to local files."""

    @staticmethod
    def get_config_from_pretrained(model_path: str | Path, **kwargs: Any) -> Any:
        """The configuration."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(get_valid_read_path(model_path, is_dir=True), local_files_only=True, **kwargs)

    @staticmethod
    def get_model_from_pretrained(model_path: str | Path, **kwargs: Any) -> Any:
        """The causal language model."""
        from transformers import AutoModelForCausalLM

        path = get_valid_read_path(model_path, is_dir=True)
        return AutoModelForCausalLM.from_pretrained(path, local_files_only=True, **kwargs)

    @staticmethod
    def get_tokenizer_from_pretrained(model_path: str | Path, **kwargs: Any) -> Any:
        """The tokenizer."""
        from transformers import AutoTokenizer

        path = get_valid_read_path(model_path, is_dir=True)
        return AutoTokenizer.from_pretrained(path, local_files_only=True, **kwargs)
