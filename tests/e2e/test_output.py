# SPDX-License-Identifier: Apache-2.0
"""What lies beside the weights, how the weights are cut into files, and what stays of unusual sources."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Program = Callable[..., subprocess.CompletedProcess[str]]
WriteProtocol = Callable[[str], Path]


def read_all(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def quantize(here: Program, protocol: WriteProtocol, tmp_path: Path) -> Callable[[Path, str], Path]:
    """``quantize(model, yaml)`` -> Path of the result."""

    def run(model: Path, text: str) -> Path:
        config = protocol(text)
        result = tmp_path / f"result-{config.stem}"
        done = here(
            "quant", "--quiet", "--device", "cpu", "--model_path", model, "--save_path", result, "--config_path", config
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        return result

    return run


def test_every_file_but_weights_and_indices_is_copied(
    quantize: Callable[[Path, str], Path], tiny_llama: Path, w8a8_dynamic: str, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    wanted = {
        "tokenizer.model": b"\x00\xffa sentencepiece model",
        "chat_template.jinja": b"{{ messages }}\n",
        "LICENSE": b"Apache License\r\n",
        "README.md": b"# A model\n",
        "merges.txt": b"a b\n",
        "modeling_own.py": b"raise SystemExit('must not run')\n",
        "subdir/remote_code.py": b"raise SystemExit('must not run')\n",
        "subdir/deeper/data.json": b"[1]",
        "preprocessor_config.json": b"{}",
    }
    unwanted = {
        "pytorch_model.bin": b"pickled",
        "pytorch_model.bin.index.json": b"{}",
        "original/consolidated.00.pth": b"pickled",
        "model.gguf": b"GGUF",
        "quant_model_description.json": b"{}",
        "quant_model_weights.safetensors.index.json": b"{}",
        "subdir/__pycache__/remote_code.pyc": b"compiled",
        ".cache/huggingface/download/tokenizer.json.lock": b"",
        ".gitattributes": b"*.safetensors filter=lfs\n",
    }
    for name, content in {**wanted, **unwanted}.items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(content)
    result = quantize(model, w8a8_dynamic)
    for name, content in wanted.items():
        assert (result / name).read_bytes() == content, name
    from_checkpoint = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    made = {
        "quant_model_description.json",
        "quant_model_weights-00001-of-00001.safetensors",
        "quant_model_weights.safetensors.index.json",
        "report.html",
        "report.json",
    }
    files = {str(file.relative_to(result)) for file in result.rglob("*") if file.is_file()}
    assert files == wanted.keys() | from_checkpoint | made
    assert (result / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_a_stale_index_of_the_float_model_is_not_copied(
    quantize: Callable[[Path, str], Path], tiny_llama_sharded: Path, w8a8_dynamic: str
) -> None:
    assert (tiny_llama_sharded / "model.safetensors.index.json").exists()
    result = quantize(tiny_llama_sharded, w8a8_dynamic)
    assert not list(result.glob("model*"))


def test_links_of_a_download_cache_become_files(
    quantize: Callable[[Path, str], Path], tiny_llama: Path, w8a8_dynamic: str, tmp_path: Path
) -> None:
    blobs, model = tmp_path / "blobs", tmp_path / "snapshot"
    shutil.copytree(tiny_llama, blobs)
    model.mkdir()
    for file in blobs.iterdir():
        (model / file.name).symlink_to(file)
    result = quantize(model, w8a8_dynamic)
    assert not any(file.is_symlink() for file in result.rglob("*"))
    assert (result / "tokenizer.json").read_bytes() == (blobs / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("size", ["0", "0.00005", "1e-12", "4"])
def test_weights_are_cut_at_the_size_that_was_asked_for_and_stay_the_same(
    size: str, quantize: Callable[[Path, str], Path], tiny_llama: Path, w8a8_static: str
) -> None:
    whole = read_all(quantize(tiny_llama, w8a8_static))
    result = quantize(tiny_llama, w8a8_static.replace("part_file_size: 4", f"part_file_size: {size}"))
    files = sorted(file.name for file in result.glob("*.safetensors"))
    tensors = read_all(result)
    assert tensors.keys() == whole.keys()
    assert all(torch.equal(tensors[name], whole[name]) for name in whole)
    index = result / "quant_model_weights.safetensors.index.json"
    if size == "0":
        assert files == ["quant_model_weights.safetensors"]
        assert not index.exists()
        return
    assert files == [f"quant_model_weights-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    parts = {file: load_file(result / file) for file in files}
    assert json.loads(index.read_text()) == {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in whole.values())},
        "weight_map": {name: file for file, part in parts.items() for name in part},
    }
    limit = float(size) * 2**30
    for part in parts.values():
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= limit
    assert len(files) in {"0.00005": range(4, len(whole)), "1e-12": [len(whole)], "4": [1]}[size]


def test_a_sharded_source_gives_the_bytes_of_a_single_file(
    quantize: Callable[[Path, str], Path], tiny_llama: Path, tiny_llama_sharded: Path, w8a8_static: str
) -> None:
    first, second = read_all(quantize(tiny_llama, w8a8_static)), read_all(quantize(tiny_llama_sharded, w8a8_static))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_tied_head_stays_tied(quantize: Callable[[Path, str], Path], tiny_llama_tied: Path, w8a8_static: str) -> None:
    result = quantize(tiny_llama_tied, w8a8_static)
    assert "lm_head.weight" not in read_all(result)
    assert "lm_head.weight" not in json.loads((result / "quant_model_description.json").read_text())
    assert json.loads((result / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_tensor_that_the_model_does_not_know_is_copied_and_described(
    quantize: Callable[[Path, str], Path], tiny_llama: Path, w8a8_dynamic: str, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    extra = {
        "model.layers.3.mtp.weight": torch.randn(6, 4, dtype=torch.bfloat16),
        "model.router.e_score_correction_bias": torch.randn(5, dtype=torch.float32),
        "a.scalar": torch.tensor(3, dtype=torch.int64),
        "an.empty.tensor": torch.zeros(0, 4),
    }
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, **extra}, model / "model.safetensors", metadata={"format": "pt"})
    result = quantize(model, w8a8_dynamic)
    written = read_all(result)
    description = json.loads((result / "quant_model_description.json").read_text())
    for name, tensor in extra.items():
        assert (written[name].dtype, description[name]) == (tensor.dtype, "FLOAT")
        assert torch.equal(written[name], tensor)
