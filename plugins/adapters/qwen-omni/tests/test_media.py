# SPDX-License-Identifier: Apache-2.0
"""Waveforms and frames out of files, against the formulas they were made from."""

from __future__ import annotations

import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelslim.api import CapabilityError, InvalidDatasetError
from modelslim_qwen_omni.audio import read_audio, resample
from modelslim_qwen_omni.video import read_frames


def write_wav(path: Path, raw: bytes, width: int, channels: int = 1, rate: int = 16000) -> str:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw)
    return str(path)


@pytest.mark.parametrize(
    ("width", "codes", "full"), [(1, [0, 128, 255], 128), (2, [-32768, 0, 32767], 2**15), (4, [-(2**31), 0, 5], 2**31)]
)
def test_every_width_is_scaled_to_one(width: int, codes: list[int], full: int, tmp_path: Path) -> None:
    raw = b"".join(code.to_bytes(width, "little", signed=width > 1) for code in codes)
    expected = [(code - 128 * (width == 1)) / full for code in codes]
    actual = read_audio(write_wav(tmp_path / "a.wav", raw, width), 16000)
    assert actual.dtype == np.float32
    assert actual.tolist() == [np.float32(value) for value in expected]


def test_24_bits_and_two_channels_are_averaged(tmp_path: Path) -> None:
    codes = [(-(2**23), 2**22), (2**23 - 1, -1), (100, -300)]
    raw = b"".join(code.to_bytes(3, "little", signed=True) for frame in codes for code in frame)
    actual = read_audio(write_wav(tmp_path / "a.wav", raw, 3, channels=2), 16000)
    assert actual.tolist() == [np.float32(sum(frame) / 2 / 2**23) for frame in codes]


@pytest.mark.parametrize(("rate", "wanted"), [(44100, 16000), (8000, 16000), (48000, 16000), (22050, 16000)])
def test_tone_at_another_rate_is_the_same_tone(rate: int, wanted: int) -> None:
    def tone(rate: int) -> Any:
        return np.sin(2 * np.pi * 440 * np.arange(rate) / rate + 0.3)

    np.testing.assert_allclose(resample(tone(rate), rate, wanted), tone(wanted), atol=1e-9)


def test_what_the_lower_rate_cannot_hold_is_gone_and_does_not_come_back_as_another_tone() -> None:
    times = np.arange(44100) / 44100
    audible = np.sin(2 * np.pi * 1000 * times)
    actual = resample(audible + np.sin(2 * np.pi * 12000 * times), 44100, 16000)
    np.testing.assert_allclose(actual, np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000), atol=1e-9)


def test_length_follows_the_rate(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", bytes(2 * 44100), 2, rate=44100)
    assert len(read_audio(path, 16000)) == 16000
    assert len(read_audio(path, 44100)) == 44100


@pytest.mark.parametrize("raw", [b"", b"\x01"])
def test_file_without_samples_is_refused(raw: bytes, tmp_path: Path) -> None:
    path = Path(write_wav(tmp_path / "a.wav", b"", 2))
    path.write_bytes(path.read_bytes() + raw)
    with pytest.raises(InvalidDatasetError, match="holds no samples"):
        read_audio(str(path), 16000)


@pytest.mark.parametrize("name", ["a.mp3", "a.wav"])
def test_other_kinds_of_audio_name_the_packages_that_decode_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("soundfile is missing")

    monkeypatch.setattr("transformers.audio_utils.load_audio", refuse)
    (tmp_path / name).write_bytes(b"ID3 and what follows")
    with pytest.raises(CapabilityError, match=rf"{name} is not PCM in \.wav") as caught:
        read_audio(str(tmp_path / name), 16000)
    assert "soundfile soxr" in caught.value.hint


def test_float_wav_and_mp3_are_decoded_where_the_packages_are_installed(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile", reason="needs soundfile and soxr")
    pytest.importorskip("soxr", reason="needs soundfile and soxr")
    tone = np.sin(2 * np.pi * 440 * np.arange(32000) / 32000)
    soundfile.write(tmp_path / "a.wav", tone, 32000, subtype="FLOAT")
    soundfile.write(tmp_path / "a.mp3", tone, 32000)
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    for name, tolerance in (("a.wav", 1e-3), ("a.mp3", 0.05)):
        actual = read_audio(str(tmp_path / name), 16000)
        assert (actual.dtype, len(actual)) == (np.float32, 16000)
        np.testing.assert_allclose(actual[2000:-2000], expected[2000:-2000], atol=tolerance)
    (tmp_path / "b.mp3").write_bytes(b"no sound at all")
    with pytest.raises(InvalidDatasetError, match=r"b\.mp3 cannot be decoded"):
        read_audio(str(tmp_path / "b.mp3"), 16000)


def test_video_names_the_package_that_decodes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(CapabilityError, match=r"a\.mp4 needs the package av") as caught:
        read_frames("a.mp4", 2.0)
    assert "pip install av" in caught.value.hint


@pytest.mark.parametrize(("rate", "expected"), [(2.0, [0, 5, 10, 15]), (1.0, [0, 10]), (20.0, list(range(20)))])
def test_frames_are_taken_at_the_rate(rate: float, expected: list[int], tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="needs av")
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 32, 16
        for index in range(20):
            shade = np.full((16, 32, 3), 10 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        container.mux(stream.encode(None))
    frames = read_frames(str(path), rate)
    assert (frames.dtype, frames.shape) == (np.uint8, (len(expected), 16, 32, 3))
    assert np.round(frames.mean(axis=(1, 2, 3)) / 10).astype(int).tolist() == expected
    path.write_bytes(b"no video")
    with pytest.raises(InvalidDatasetError, match=r"a\.mp4 cannot be decoded"):
        read_frames(str(path), rate)
