# SPDX-License-Identifier: Apache-2.0
"""Perplexity and KL divergence of a saved checkpoint against its float model, unit by unit.

Both models run in lockstep over the same windows of text: a unit of each is read from disk, applied
to all windows and dropped. Memory holds two units, the activations at one boundary, and the logits
of one window; models larger than memory can be evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modelslim.checkpoint import Checkpoint
from modelslim.devices import resolve_device
from modelslim.divergence import kl_sum
from modelslim.errors import CapabilityError, DatasetError, ModelError
from modelslim.registry import Registry
from modelslim.saved import RunOptions, SavedModel, saved_caches, saved_linears
from modelslim.saved_config import opened_as_float
from modelslim.session import Session
from modelslim.start import started

_ROWS = 64  # tokens whose log-probabilities are in memory at once


@dataclass(frozen=True)
class Evaluation:
    """How a quantized model compares with its float model.

    Attributes:
        kl: mean over tokens of KL(float || quantized), in nats.
        float_perplexity: exp of the float model's mean negative log-likelihood of the next token.
        quantized_perplexity: the same of the quantized model.
        tokens: how many predictions were compared.
        top1_agreement: share of positions at which both models prefer the same next token.
    """

    kl: float
    float_perplexity: float
    quantized_perplexity: float
    tokens: int
    top1_agreement: float


def evaluate(
    path: Path,
    float_path: Path,
    text: str,
    *,
    window: int = 512,
    max_tokens: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Compare a saved checkpoint with its float model on a text.

    Args:
        path: the quantized checkpoint.
        float_path: the float checkpoint that it was made from.
        text: what both models read.
        window: tokens per window; windows are read independently of each other.
        max_tokens: read no more than so many tokens; None for the whole text.
        dtype: type of all floating computation, ``float32`` to see the error of quantization alone,
            or ``model`` for the type in which an engine computes.
        device: as for ``quant``.
        trust_remote_code: allow code of the checkpoints to run.

    Raises:
        ModelError: ``path`` is no checkpoint of an installed format, or is damaged.
        DatasetError: the text is shorter than two tokens.
    """
    if len(text.strip()) == 0:
        raise DatasetError("the evaluation text is empty", hint="give a text of at least a few hundred words")
    registry = Registry.scan()
    options = RunOptions(registry, resolve_device(device), None if dtype == "model" else dtype, trust_remote_code)
    with (
        Checkpoint(float_path) as float_checkpoint,
        Checkpoint(path) as checkpoint,
        opened_as_float(checkpoint) as directory,
        torch.no_grad(),
    ):
        saved = saved_linears(checkpoint, registry)
        reference = SavedModel(float_checkpoint, options)
        quantized = SavedModel(checkpoint, options, reference.places(saved), directory)
        quantized.put_caches(reference.cache_places(saved_caches(checkpoint, registry)))
        if reference.units != quantized.units:
            raise ModelError(f"{path} and {float_path} are different models", hint="give the float model it came from")
        windows = _windows(reference.session, text, window, max_tokens, options.device)
        started()
        for model in (reference, quantized):
            model.start(windows)
        for unit in reference.units[:-1]:
            for model in (reference, quantized):
                model.pass_unit(unit)
        return _compare(reference, quantized, windows)


def _windows(session: Session, text: str, window: int, max_tokens: int | None, device: str) -> list[dict[str, Tensor]]:
    """The text as inputs of at most ``window`` tokens each."""
    inputs = session.handle_dataset([text], device)[0]
    if not isinstance(inputs, dict) or "input_ids" not in inputs:
        raise CapabilityError("evaluation on text needs an adapter whose inputs have input_ids")
    ids: Tensor = inputs["input_ids"][:, :max_tokens]
    windows = [part for part in torch.split(ids, window, dim=1) if part.shape[1] > 1]
    if not windows:
        raise DatasetError("the evaluation text has fewer than two tokens", hint="give a longer text")
    return [{"input_ids": part} for part in windows]


def _compare(reference: SavedModel, quantized: SavedModel, windows: Sequence[Mapping[str, Tensor]]) -> Evaluation:
    """Read the logits of both models window by window."""
    sums = torch.zeros(4, dtype=torch.float64)
    positions = predictions = 0
    last = reference.units[-1]
    with reference.resident(last), quantized.resident(last):
        for index, inputs in enumerate(windows):
            p, q = reference.finish(index)[0], quantized.finish(index)[0]
            target = inputs["input_ids"][0, 1:]
            for start in range(0, p.shape[0], _ROWS):
                rows = slice(start, start + _ROWS)
                log_p, log_q = p[rows].float().log_softmax(-1), q[rows].float().log_softmax(-1)
                sums[0] += kl_sum(log_p, log_q)
                sums[3] += (log_p.argmax(-1) == log_q.argmax(-1)).sum()
                following = target[rows].unsqueeze(-1)
                for column, log in ((1, log_p), (2, log_q)):
                    sums[column] -= log[: len(following)].gather(-1, following).sum().double()
            positions += p.shape[0]
            predictions += len(target)
    return Evaluation(
        kl=float(sums[0] / positions),
        float_perplexity=float((sums[1] / predictions).exp()),
        quantized_perplexity=float((sums[2] / predictions).exp()),
        tokens=positions,
        top1_agreement=float(sums[3] / positions),
    )
