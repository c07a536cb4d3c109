# SPDX-License-Identifier: Apache-2.0
"""GLM-4.5, 4.6 and 4.7: a generic decoder with multi-token prediction layers; with vision, a tower in front."""

from __future__ import annotations

from modelslim_transformers.mtp import MtpAdapter


class GlmAdapter(MtpAdapter):
    """Serves the models that transformers builds as glm4_moe, glm4_moe_lite and glm4v_moe."""
