# SPDX-License-Identifier: Apache-2.0
"""An analysis from model and calibration set to ranked scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from modelslim.analysis.attentions import analyze_attentions
from modelslim.analysis.layers import analyze_layers
from modelslim.analysis.linears import METRICS, analyze_linears
from modelslim.analysis.model import FloatModel, find_samples
from modelslim.analysis.scores import Analysis, as_patterns, worst
from modelslim.errors import UsageError, nearest
from modelslim.registry import Registry

SCOPES: Mapping[str, tuple[str, ...]] = {
    "linear": ("kurtosis", *sorted(set(METRICS) - {"kurtosis"})),
    "layer": ("mse_layer_wise", "mse_model_wise"),
    "attn": ("mse",),
}
"""The metrics of each scope, the default first."""


def analyze(
    model_path: Path,
    scope: str,
    *,
    metric: str | None = None,
    dataset: str = "mix_calib.jsonl",
    topk: int = 15,
    pattern: Sequence[str] = ("*",),
    quant_modules: Sequence[str] = ("*",),
    device: str | None = None,
    model_type: str | None = None,
    trust_remote_code: bool = False,
    observers: Sequence[tuple[str, object]] = (),
) -> Analysis:
    """Find out what of a model suffers most from quantization.

    Args:
        model_path: directory of the float model; never touched.
        scope: ``linear``: inputs of linears; ``layer``: units that are quantized alone; ``attn``: attentions
            whose keys and values are quantized.
        metric: one of ``SCOPES[scope]``; None for the default.
        dataset: calibration set: the name of a shipped one, or a path.
        topk: how many of the largest scores the exclude list takes.
        pattern: scope linear: which linears, as in ``include`` of a protocol.
        quant_modules: scope layer: which linears are quantized.
        device: as for ``quant``.
        model_type: published model name or model_type; None to go by config.json.
        trust_remote_code: allow code of the checkpoint to run.
        observers: further plugins, by name.

    Raises:
        UsageError: there is no such scope or metric, or a pattern matches nothing.
        ModelSlimError: another of its subclasses; the model or the data cannot be used.
    """
    if scope not in SCOPES:
        raise UsageError(f"there is no scope {scope!r}", hint=nearest(scope, SCOPES))
    metric = metric or SCOPES[scope][0]
    if metric not in SCOPES[scope]:
        raise UsageError(f"the scope {scope} has no metric {metric!r}", hint=f"its metrics: {', '.join(SCOPES[scope])}")
    registry = Registry.scan()
    place, samples, remarks = find_samples(dataset, registry)
    opened = FloatModel(
        model_path,
        registry,
        device=device,
        model_type=model_type,
        trust_remote_code=trust_remote_code,
        observers=observers,
    )
    with opened as model:
        if scope == "linear":
            scores = analyze_linears(model, samples, metric, pattern)
            exclude = as_patterns(worst(scores, topk), model.info.linears)
        elif scope == "layer":
            scores = analyze_layers(model, samples, metric, quant_modules, registry)
            exclude = [f"{one}.*" for one in as_patterns(worst(scores, topk), model.info.units)]
        else:
            scores = analyze_attentions(model, samples)
            exclude = [f"{one}.*" for one in as_patterns(worst(scores, topk), ())]
        return Analysis(scope, metric, str(place), len(samples), scores, exclude, [*remarks, *model.warnings])
