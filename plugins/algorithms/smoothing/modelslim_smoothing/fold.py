# SPDX-License-Identifier: Apache-2.0
"""Folds a scale into weights: what makes a tensor is divided, what reads it is multiplied; the function stays.

Arithmetic is at least float32, and every weight is rounded to its own dtype once. A norm's gain is one
number per channel, so the scale that it really divides by after rounding is known and given to the readers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from modelslim.api import ExpertLinear, add_bias


@torch.no_grad()
def divide_norm(
    norm: nn.Module, scale: Tensor, shift: Tensor | None = None, *, unit_offset: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Make a norm give ``(y - shift) / scale`` in place of ``y``.

    Args:
        norm: has ``weight`` [channels], and perhaps ``bias``; its class and all else stay as they are. One
            without a bias gets one when there is a shift.
        scale: [channels], positive.
        shift: [channels], or None.
        unit_offset: True when the gain is ``1 + weight``.

    Returns:
        the scale and the shift that hold after rounding, for the readers.
    """
    weight: Tensor = norm.weight  # type: ignore[assignment]
    offset = 1.0 if unit_offset else 0.0
    gain = _wide(weight) + offset
    folded = (gain / scale - offset).to(weight.dtype)
    held = _wide(folded) + offset
    scale = torch.where((held != 0) & (gain != 0), gain / held, scale.to(gain.dtype))
    weight.copy_(folded)
    bias = bias_of(norm)
    if shift is None:
        if bias is not None:
            bias.copy_((_wide(bias) / scale).to(bias.dtype))
        return scale, None
    before = torch.zeros_like(gain) if bias is None else _wide(bias)
    after = ((before - shift) / scale).to(weight.dtype if bias is None else bias.dtype)
    shift = before - _wide(after) * scale  # what is really subtracted
    if bias is None:
        add_bias(norm, after)
    else:
        bias.copy_(after)
    return scale, shift


@torch.no_grad()
def divide_rows(source: nn.Module, scale: Tensor, rows: Sequence[int] | None = None) -> None:
    """Divide the outputs of a linear, or of all experts of an ``ExpertLinear``.

    Args:
        source: has ``weight`` [..., out, in] and perhaps ``bias`` [..., out].
        scale: [channels], or [experts, channels].
        rows: the rows that make the channels, in their order; None for all.
    """
    weight: Tensor = source.weight  # type: ignore[assignment]
    bias = bias_of(source)
    chosen = slice(None) if rows is None else torch.tensor(rows, device=weight.device)
    weight[..., chosen, :] = (_wide(weight[..., chosen, :]) / scale.unsqueeze(-1)).to(weight.dtype)
    if bias is not None:
        bias[..., chosen] = (_wide(bias[..., chosen]) / scale).to(bias.dtype)


@torch.no_grad()
def multiply_columns(targets: Iterable[nn.Module], scale: Tensor) -> None:
    """Multiply what reads the tensor.

    Args:
        targets: each has ``weight`` [..., out, channels].
        scale: [channels], or [experts, channels].
    """
    for target in targets:
        weight: Tensor = target.weight  # type: ignore[assignment]
        # Computed in the wider dtype, that of the scale, and rounded once.
        weight.mul_(scale if scale.dim() == 1 else scale.unsqueeze(-2))


@torch.no_grad()
def add_shift(linears: Iterable[nn.Module], shift: Tensor) -> None:
    """Add ``W @ shift`` to the bias, before the columns are multiplied; a linear without a bias gets one.

    Args:
        linears: each is an ``nn.Linear``.
        shift: [channels].
    """
    for linear in linears:
        weight: Tensor = linear.weight  # type: ignore[assignment]
        added = _wide(weight) @ shift.to(_wide(weight).dtype)
        bias = bias_of(linear)
        if bias is None:
            add_bias(linear, added.to(weight.dtype))
        else:
            bias.copy_((_wide(bias) + added).to(bias.dtype))


def column_magnitudes(modules: Iterable[nn.Module], *, per_expert: bool = False) -> Tensor:
    """``w``: the largest magnitude of every column over all rows of all modules.

    Args:
        modules: each has ``weight`` [..., out, channels]; at least one.
        per_expert: True to keep the experts of ``ExpertLinear`` modules apart.

    Returns:
        float32 [channels], or [experts, channels].
    """
    parts = [_weight(module).abs() for module in modules]
    return torch.stack([(p if per_expert else p.flatten(0, -2)).amax(-2) for p in parts]).amax(0).to(torch.float32)


def row_magnitudes(source: nn.Module, rows: Sequence[int] | None = None) -> Tensor:
    """The largest magnitude of every chosen row, float32 [channels], or [experts, channels]."""
    magnitudes = _weight(source).abs().amax(-1).to(torch.float32)
    return magnitudes if rows is None else magnitudes[..., torch.tensor(rows, device=magnitudes.device)]


def gain_magnitudes(norm: nn.Module, *, unit_offset: bool) -> Tensor:
    """The magnitude of a norm's gain, float32 [channels]."""
    return (_weight(norm).to(torch.float32) + (1.0 if unit_offset else 0.0)).abs()


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias, where there is one."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def can_shift(module: nn.Module) -> bool:
    """True for a linear that adds a bias; others (routers, experts) have none in any engine."""
    return isinstance(module, nn.Linear) and not isinstance(module, ExpertLinear)


def _weight(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.detach()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
