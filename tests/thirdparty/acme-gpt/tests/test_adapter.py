# SPDX-License-Identifier: Apache-2.0
"""The adapter keeps ModelSlim's contract on a tiny checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from modelslim_acme_gpt.adapter import AcmeGPTAdapter

from modelslim.api import ModelError
from modelslim.testing.adapter import AdapterContract

SIZES = '"hidden_size": 32, "num_layers": 8, "num_heads": 4, "window": 8, "max_positions": 64, "dtype": "float32"'


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A directory with the config.json of a model of another size."""
    path = tmp_path / "published"
    path.mkdir()
    (path / "config.json").write_text(f'{{"model_type": "acme_gpt", "architectures": ["AcmeGPT"], {SIZES}}}')
    return path


class TestAcmeGPT(AdapterContract):
    @pytest.fixture
    def checkpoint(self, published: Path, tmp_path: Path) -> Path:
        path = tmp_path / "tiny"
        path.mkdir()
        torch.manual_seed(0)
        AcmeGPTAdapter("acme_gpt", published).make_tiny_checkpoint(path)
        return path

    @pytest.fixture
    def adapter(self, checkpoint: Path) -> object:
        return AcmeGPTAdapter("acme_gpt", checkpoint)


def test_config_that_lacks_a_size_is_refused(published: Path) -> None:
    (published / "config.json").write_text('{"model_type": "acme_gpt", "architectures": ["AcmeGPT"]}')
    with pytest.raises(ModelError, match="lacks 'hidden_size'"):
        AcmeGPTAdapter("acme_gpt", published).init_model("meta")
