# SPDX-License-Identifier: Apache-2.0
"""How far two next-token distributions are apart."""

from __future__ import annotations

from torch import Tensor


def kl_sum(log_p: Tensor, log_q: Tensor) -> float:
    """Sum over tokens of KL(p || q), in nats.

    Args:
        log_p, log_q: log-probabilities [tokens, vocabulary], float32.
    """
    return float((log_p.exp() * (log_p - log_q)).sum().double())
