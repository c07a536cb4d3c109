# SPDX-License-Identifier: Apache-2.0
"""Which files beside the weights come along, byte for byte."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modelslim.errors import SaveError
from modelslim.files import companions, copy_companions

NEEDED = [
    "LICENSE",
    "README.md",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "modeling_own.py",
    "preprocessor_config.json",
    "sub/assets/picture.png",
    "sub/config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "voices.pt",
]
LEFT = [
    ".git/HEAD",
    ".gitattributes",
    ".cache/huggingface/download/x.lock",
    "__pycache__/modeling_own.cpython-311.pyc",
    "config.json",  # the saver writes its own
    "consolidated.00.pth",
    "flax_model.msgpack",
    "model-00001-of-00002.safetensors",
    "model.ckpt",
    "model.gguf",
    "model.safetensors.index.json",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model-00001-of-00002.pt",
    "quant_model_description.json",
    "quant_model_description_w8a8.json",
    "sub/weights.pt",
    "tf_model.h5",
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    for number, name in enumerate([*NEEDED, *LEFT]):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(bytes([number, 0, 255]) * number)
    (path / "empty folder").mkdir()
    return path


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_what_a_tokenizer_or_processor_needs_comes_along_and_weights_do_not(source: Path, tmp_path: Path) -> None:
    assert sorted(map(str, companions(source))) == sorted(NEEDED)
    before = tree(source)
    copy_companions(source, tmp_path / "result")
    assert tree(tmp_path / "result") == {name: before[name] for name in NEEDED}
    assert tree(source) == before


def test_the_name_of_a_folder_above_does_not_matter(tmp_path: Path) -> None:
    source = tmp_path / ".cache" / "__pycache__" / "model.bin"
    source.mkdir(parents=True)
    (source / "tokenizer.json").write_text("{}")
    assert list(companions(source)) == [Path("tokenizer.json")]


def test_links_become_files(source: Path, tmp_path: Path) -> None:
    """A model in the cache of a hub consists of links to blobs."""
    (tmp_path / "blob").write_text("the vocabulary")
    (source / "vocab.txt").symlink_to(tmp_path / "blob")
    copy_companions(source, tmp_path / "result")
    copy = tmp_path / "result" / "vocab.txt"
    assert copy.read_text() == "the vocabulary" and not copy.is_symlink()


def test_what_is_no_file_is_left_out(source: Path, tmp_path: Path) -> None:
    (source / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(source / "pipe")
    assert sorted(map(str, companions(source))) == sorted(NEEDED)


def test_a_file_that_cannot_be_copied_is_an_error_that_names_it(source: Path, tmp_path: Path) -> None:
    (tmp_path / "result" / "vocab.json").mkdir(parents=True)
    with pytest.raises(SaveError, match=r"vocab\.json"):
        copy_companions(source, tmp_path / "result")
