# SPDX-License-Identifier: Apache-2.0
"""Audio files as waveforms of one channel: PCM in .wav by numpy, other kinds as transformers decodes them."""

from __future__ import annotations

import wave
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from modelslim.api import CapabilityError, InvalidDatasetError

Waveform: TypeAlias = npt.NDArray[np.floating[Any]]


def read_audio(path: str, rate: int) -> Waveform:
    """The mean of the file's channels.

    Args:
        path: of the file.
        rate: samples per second that the result shall have.

    Returns:
        float32 [samples], between -1 and 1.

    Raises:
        CapabilityError: packages are missing that decode this kind of file.
        InvalidDatasetError: the file holds no audio, or is broken.
    """
    try:
        with wave.open(path, "rb") as file:
            width, channels, own_rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            content = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        return _decode(path, rate, f"is not PCM in .wav ({error or 'it ends too early'})")
    whole = len(content) - len(content) % (width * channels)
    if not whole:
        raise InvalidDatasetError(f"audio {path} holds no samples", hint="replace the file, or leave it out")
    samples = _from_pcm(content[:whole], width).reshape(-1, channels).mean(axis=1)
    return resample(samples, own_rate, rate).astype(np.float32)


def resample(samples: Waveform, rate: int, wanted: int) -> Waveform:
    """The same sound at another rate: its spectrum, cut off or continued by zeros.

    Args:
        samples: float64 [samples].
        rate: samples per second of these.
        wanted: samples per second of the result.
    """
    if rate == wanted:
        return samples
    length = max(1, round(len(samples) * wanted / rate))
    spectrum = np.fft.rfft(samples)[: length // 2 + 1]
    return np.fft.irfft(spectrum, length) * (length / len(samples))


def _from_pcm(content: bytes, width: int) -> Waveform:
    if width == 1:  # the only width without a sign
        return np.frombuffer(content, np.uint8) / 128.0 - 1.0
    # As the upper bytes of 32 bits, since numpy has no type of 24.
    padded = np.zeros((len(content) // width, 4), np.uint8)
    padded[:, 4 - width :] = np.frombuffer(content, np.uint8).reshape(-1, width)
    return padded.view("<i4").reshape(-1) / 2.0**31


def _decode(path: str, rate: int, reason: str) -> Waveform:
    from transformers.audio_utils import load_audio

    try:
        waveform: Waveform = load_audio(path, sampling_rate=rate)
    except ImportError as error:
        raise CapabilityError(
            f"audio {path} {reason}, and transformers lacks the packages that decode other kinds",
            hint="pip install soundfile soxr, or convert the file to .wav with 16 bits",
        ) from error
    except Exception as error:  # decoding libraries raise what they like
        raise InvalidDatasetError(
            f"audio {path} cannot be decoded: {error}", hint="replace the file, or leave it out"
        ) from error
    return waveform
