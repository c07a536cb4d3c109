# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-Omni and Qwen3-Omni: the thinker, which reads text, images, audio and video, is what gets quantized."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from modelslim.api import VlmCalibSample
from modelslim_qwen_omni.audio import read_audio
from modelslim_qwen_omni.video import read_frames
from modelslim_transformers.adapter import TransformersAdapter

FRAMES_PER_SECOND: Mapping[str, float] = {"qwen2_5_omni_thinker": 2.0, "qwen3_omni_moe_thinker": 1.0}
"""By type of the thinker, the rate that its processor takes frames to have when nobody says."""


class QwenOmniAdapter(TransformersAdapter):
    """Serves the thinker inside a checkpoint of a whole Qwen-Omni model, or alone.

    No parameter has a source in the talker or in what makes the waveform, so that the engine copies
    those as they are.
    """

    @cached_property
    def config(self) -> Any:
        """The thinker's configuration, with what config.json says once for the whole model."""
        from transformers.utils import logging

        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it finds fault with token ids of the talker, which is not built
        try:
            whole = super().config
        finally:
            logging.set_verbosity(verbosity)
        thinker = getattr(whole, "thinker_config", whole)
        for name in ("dtype", "quantization_config"):
            if getattr(thinker, name, None) is None and getattr(whole, name, None) is not None:
                setattr(thinker, name, getattr(whole, name))
        return thinker

    def load_processor(self) -> Any:
        """The processor, which transformers finds by the configuration of the whole model."""
        processor = TransformersAdapter(self.model_type, self.model_path, self.trust_remote_code).load_processor()
        if processor.video_processor is not None:
            processor.video_processor.do_sample_frames = False  # `messages` gives the frames that count
        return processor

    def messages(self, sample: VlmCalibSample) -> list[dict[str, Any]]:
        """The chat that asks a sample's text about its files; audio and video are decoded here.

        Raises:
            CapabilityError: a package is missing that decodes them.
            InvalidDatasetError: a file cannot be decoded.
        """
        messages = super().messages(sample)
        for part in messages[0]["content"]:
            if part["type"] == "audio":
                part["audio"] = read_audio(part["audio"], self._sampling_rate)
            if part["type"] == "video":
                part["video"] = read_frames(part["video"], FRAMES_PER_SECOND[self.config.model_type])
        return messages

    @cached_property
    def _sampling_rate(self) -> int:
        from transformers import AutoFeatureExtractor

        extractor = AutoFeatureExtractor.from_pretrained(self.model_path, local_files_only=True)
        return int(extractor.sampling_rate)
