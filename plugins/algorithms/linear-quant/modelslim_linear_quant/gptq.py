# SPDX-License-Identifier: Apache-2.0
"""gptq: each column of a weight is rounded so that it makes up for the errors of those before it.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(2022), in the form of Chee et al., "QuIP" (2023), which proves the two equal and needs no inverse. With
``H = U diag(d) U^T``, U unit upper triangular, and e the error of a row, the squared error of the output
is ``e H e^T = sum_j d_j (e U)_j^2``. So column j rounds ``w_j + sum_{i<j} e_i U_ij``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modelslim.api import QuantizedTensor, TensorSpec, range_to_scale
from modelslim_linear_quant.config import WeightMethod
from modelslim_linear_quant.mse import best_scales
from modelslim_linear_quant.rows import clip_, find_scales

_BATCH = 1 << 27  # values in the Hessians of the experts that are worked on at once


@dataclass(frozen=True)
class Factor:
    """The Hessian of one port, decomposed; what all linears of the port share.

    Attributes:
        energy: [in], the diagonal of the Hessian before damping.
        order: int64 [in], the columns in the order in which they are rounded.
        feedback: [in, in], ``U^T`` in that order: row j holds what errors before j add to column j.
        percdamp: [], the damping that it took, as a share of the mean of the diagonal.

    Of fused experts all have the experts in front.
    """

    energy: Tensor
    order: Tensor
    feedback: Tensor
    percdamp: Tensor


def factorize(gram: Tensor, method: WeightMethod) -> Factor:
    """Decompose a Hessian.

    Args:
        gram: float32 [in, in] or [experts, in, in], finite; ``X^T X``, of which only ratios matter.
        method: damping and order.
    """
    energy = gram.diagonal(dim1=-2, dim2=-1)
    if method.act_order:
        order = energy.argsort(dim=-1, descending=True, stable=True)
    else:
        order = torch.arange(gram.shape[-1], device=gram.device).expand(energy.shape)
    # The Cholesky factor of the Hessian read backwards is, read backwards, U times the roots of d.
    backwards = order.flip(-1)
    square = backwards.unsqueeze(-1).expand(gram.shape)
    hessian = gram.gather(-2, square).gather(-1, square.mT)
    root, percdamp = _damped_cholesky(hessian, energy.mean(-1), method.percdamp)
    feedback = root.flip(-2, -1).mT.contiguous()
    feedback /= feedback.diagonal(dim1=-2, dim2=-1).unsqueeze(-1).clone()
    return Factor(energy, order, feedback, percdamp)


def _damped_cholesky(hessian: Tensor, mean: Tensor, percdamp: float) -> tuple[Tensor, Tensor]:
    """Lower factor of the Hessian plus a share of its mean diagonal, tenfold until there is one; and the share."""
    share = torch.full_like(mean, percdamp, dtype=torch.float64)
    while True:
        damped = hessian.clone()
        # A port whose inputs are all zero gets the identity: plain rounding.
        damping = torch.where(mean > 0, share.to(mean.dtype) * mean, 1.0)
        damped.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
        root: Tensor
        root, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            return root, share
        share = torch.where(failed > 0, share * 10, share)


def quantize(weight: Tensor, factor: Factor, spec: TensorSpec, method: WeightMethod) -> QuantizedTensor:
    """Quantize a weight, or those of several linears of one port, one above the other.

    Args:
        weight: [out, in] or [experts, out, in]; floating, finite.
        factor: of the inputs' Hessian.
        spec: ``per_channel`` or ``per_group``. Scales are those of the weight as it is, so groups keep
            their places whatever the order of the columns.
        method: how ranges are found, and the block size.
    """
    if method.range == "mse":
        scale, offset = best_scales(weight, spec, factor.energy)
    else:
        scale, offset = find_scales(weight, spec, lambda values: _full_range(values, spec))
    values = _pick(weight.mT.to(torch.float32), factor.order)
    groups = factor.order // (spec.group_size or weight.shape[-1])
    codes = torch.empty_like(values, dtype=torch.int8)
    error = torch.zeros_like(values)
    for start in range(0, values.shape[-2], method.block_size):
        group = groups[..., start : start + method.block_size]
        columns = (start, start + group.shape[-1])
        scales = _pick(scale.mT, group)
        offsets = None if offset is None else _pick(offset.mT, group)
        codes[..., slice(*columns), :] = _round_block(values, error, factor.feedback, columns, scales, offsets, spec)
    places = factor.order.argsort(-1)
    return QuantizedTensor(_pick(codes, places).mT.contiguous(), scale, offset, spec)


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """Rows [..., n, out] in the order of ``index`` [..., m], which experts have each for itself."""
    if rows.dim() == 2:
        return rows.index_select(0, index)
    return rows.gather(-2, index.unsqueeze(-1).expand(*index.shape, rows.shape[-1]))


def _round_block(
    values: Tensor,
    error: Tensor,
    feedback: Tensor,
    columns: tuple[int, int],
    scale: Tensor,
    offset: Tensor | None,
    spec: TensorSpec,
) -> Tensor:
    """Round some columns of ``values`` [..., in, out], the errors of those before them being known.

    Fills their rows of ``error``; scale and offset [..., columns, out]. Returns their codes as float32.
    """
    add_product = torch.addmm if values.dim() == 2 else torch.baddbmm
    start, stop = columns
    target = add_product(values[..., start:stop, :], feedback[..., start:stop, :start], error[..., :start, :])
    steps = torch.empty_like(target)
    for index in range(stop - start):
        one = slice(index, index + 1)
        column = slice(start + index, start + index + 1)
        wanted = target[..., one, :]
        if index:
            before = slice(start, start + index)
            wanted = add_product(wanted, feedback[..., column, before], error[..., before, :])
        step = torch.div(wanted, scale[..., one, :], out=steps[..., one, :]).round_()
        clip_(step, None if offset is None else offset[..., one, :], spec)
        torch.addcmul(values[..., column, :], step, scale[..., one, :], value=-1, out=error[..., column, :])
    return steps if offset is None else steps + offset


def quantize_experts(
    weight: Tensor, grams: Sequence[Tensor], spec: TensorSpec, method: WeightMethod
) -> tuple[QuantizedTensor, Tensor]:
    """Quantize the weights of fused experts, as many at once as memory should hold.

    Args:
        weight: [experts, out, in].
        grams: one [in, in] for each expert.
        spec, method: as above.

    Returns:
        the weights, and the ``percdamp`` [experts] that their Hessians took.
    """
    step = max(1, _BATCH // weight.shape[-1] ** 2)
    parts, percdamps = [], []
    for start in range(0, len(weight), step):
        factor = factorize(torch.stack(list(grams[start : start + step])), method)
        parts.append(quantize(weight[start : start + step], factor, spec, method))
        percdamps.append(factor.percdamp)
    offsets = [part.offset for part in parts if part.offset is not None]
    whole = QuantizedTensor(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(offsets) if offsets else None,
        spec,
    )
    return whole, torch.cat(percdamps)


def notes(percdamp: Tensor, method: WeightMethod) -> tuple[str, ...]:
    """For the report: what became of the damping where it was not enough.

    Args:
        percdamp: [] or [experts], what the Hessians took.
        method: what was wanted.
    """
    raised = percdamp > method.percdamp
    count = int(raised.sum())
    if not count:
        return ()
    whom = f" for {count} of its {len(percdamp)} experts" if percdamp.dim() else ""
    return (f"percdamp was raised from {method.percdamp:g} to {float(percdamp.max()):g}{whom}, X^T X being singular",)


def _full_range(values: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor | None]:
    return range_to_scale(values.amin(-1), values.amax(-1), spec)
