# SPDX-License-Identifier: Apache-2.0
"""Lets an adapter load its processor where torchvision, which only videos need, is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from modelslim_transformers.processor import load_processor


@contextmanager
def processors_without_torchvision(adapter: Any) -> Iterator[None]:
    """While entered, ``AutoProcessor.from_pretrained`` gives the adapter's model a processor without a video part."""
    from transformers import AutoProcessor
    from transformers.utils import is_torchvision_available

    real = AutoProcessor.from_pretrained

    def from_pretrained(path: Any, *args: Any, **kwargs: Any) -> Any:
        with patch.object(AutoProcessor, "from_pretrained", real):
            if str(path) != str(adapter.model_path):
                return real(path, *args, **kwargs)
            return load_processor(path, adapter.config, adapter.trust_remote_code)

    if is_torchvision_available():
        yield
    else:
        with patch.object(AutoProcessor, "from_pretrained", from_pretrained):
            yield
