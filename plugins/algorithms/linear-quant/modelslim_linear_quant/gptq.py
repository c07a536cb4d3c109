# SPDX-License-Identifier: Apache-2.0
"""gptq: each column of a weight is rounded so that it makes up for the errors of those before it.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(2022), in the form of Chee et al., "QuIP" (2023), which proves the two equal and needs no inverse: with
``H = U diag(d) U^T``, U unit upper triangular, the squared error of the output is
``sum_j d_j (e U)_j^2``, e being the error of a row. So column j is rounded at ``w_j + sum_{i<j} e_i U_ij``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from modelslim.api import QuantizationError, QuantizedTensor, TensorSpec
from modelslim_linear_quant.config import WeightMethod
from modelslim_linear_quant.mse import best_scales
from modelslim_linear_quant.rows import bounds, find_scales
from modelslim_linear_quant.minmax import range_scale

_log = logging.getLogger(__name__)
_MOST_DAMPING = 1e6  # beyond it the Hessian is a multiple of the identity, and something else is wrong
