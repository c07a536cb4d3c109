# SPDX-License-Identifier: Apache-2.0
"""The processor of a multimodal model, also where the library that only its video part needs is missing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

VIDEO = "video_processor"


def load_processor(path: Path, config: Any, trust_remote_code: bool = False) -> Any:
    """The model's processor.

    Transformers refuses to build a processor whose video part needs torchvision when that is not
    installed, although images, audio and text do not need it. Then the model's own processor class is
    built without that part: its ``video_processor`` is None, everything else is its own.

    Args:
        path: directory of the checkpoint.
        config: the model's configuration.
        trust_remote_code: allow code of the checkpoint to run.

    Raises:
        Exception: whatever transformers raises when files are missing or broken.
    """
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.utils import is_torchvision_available

    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    own = PROCESSOR_MAPPING.get(type(config), None)
    if own is None or is_torchvision_available() or VIDEO not in own.get_attributes():
        return AutoProcessor.from_pretrained(path, **options)
    return _without_video(own, path, options)


def _without_video(own: Any, path: Path, options: Mapping[str, Any]) -> Any:
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    loaders = {
        "tokenizer": AutoTokenizer,
        "image_processor": AutoImageProcessor,
        "feature_extractor": AutoFeatureExtractor,
    }

    class WithoutVideo(own):  # type: ignore[misc]
        """The model's processor, which accepts that a part is missing."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    WithoutVideo.__name__ = own.__name__
    parts = [None if name == VIDEO else loaders[name].from_pretrained(path, **options) for name in own.get_attributes()]
    settings, _ = own.get_processor_dict(path, local_files_only=True)
    return WithoutVideo.from_args_and_dict(parts, settings)
