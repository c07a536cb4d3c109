# SPDX-License-Identifier: Apache-2.0
"""Analysis and tuning of a vision-language model on images."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image

from modelslim.analysis.run import analyze
from modelslim.tune.run import tune

MODEL = Path(__file__).parents[1] / "models" / "qwen3-vl-moe-tiny"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    Image.radial_gradient("L").convert("RGB").resize((64, 96)).save(folder / "a.png")
    Image.linear_gradient("L").convert("RGB").resize((96, 64)).save(folder / "b.png")
    return folder


@pytest.mark.parametrize("metric", ["kurtosis", "std", "quantile"])
def test_linears_of_the_tower_and_of_the_language_model_are_scored(metric: str, images: Path) -> None:
    result = analyze(MODEL, "linear", metric=metric, dataset=str(images), device="cpu")
    names = [one.name for one in result.scores if one.score is not None]
    assert any("visual" in name for name in names) and any("experts" in name for name in names)


@pytest.mark.parametrize("metric", ["mse_layer_wise", "mse_model_wise"])
def test_layers_are_scored(metric: str, images: Path) -> None:
    result = analyze(MODEL, "layer", metric=metric, dataset=str(images), device="cpu", quant_modules=["*self_attn*"])
    assert result.scores and all(one.score is not None and one.score > 0 for one in result.scores)
    whole = analyze(MODEL, "layer", metric=metric, dataset=str(images), device="cpu")
    assert any("visual" in one.name for one in whole.scores)


def test_attentions_are_scored(images: Path) -> None:
    result = analyze(MODEL, "attn", dataset=str(images), device="cpu")
    assert result.scores and all(one.score is not None and one.score > 0 for one in result.scores)


@pytest.mark.parametrize("strategy", ["budget", "standing_high_with_experience"])
def test_a_tune_on_images(strategy: str, images: Path, tmp_path: Path) -> None:
    entry = {"type": "linear_quant", "qconfig": {"weight": {"dtype": "int4"}}}
    save = [{"type": "ascendv1_saver" if strategy != "budget" else "compressed_tensors_saver"}]
    chosen = {
        "budget": {
            "bits_per_weight": 9,
            "options": [entry, "float"],
            "include": ["*language_model*"],
            "template": {
                "apiversion": "multimodal_vlm_modelslim_v1",
                "spec": {"save": save, "dataset": str(images)},
            },
        },
        "standing_high_with_experience": {"quant_type": "w8a8", "save": save, "dataset": str(images)},
    }
    plan = tmp_path / "plan.yaml"
    evaluation = {"type": "in_process", "metric": "top1_agreement", "target": 0.0, "max_tokens": 256}
    plan.write_text(yaml.safe_dump({"strategy": {"type": strategy, **chosen[strategy]}, "evaluation": evaluation}))
    result = tune(MODEL, tmp_path / "out", plan, device="cpu")
    assert result["metric"] == "top1_agreement" and 0 < result["score"] <= 1
    protocol = yaml.safe_load((tmp_path / "out" / "protocol.yaml").read_text())
    assert protocol["apiversion"] == "multimodal_vlm_modelslim_v1"
