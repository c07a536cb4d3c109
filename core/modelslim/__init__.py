# SPDX-License-Identifier: Apache-2.0
"""ModelSlim: post-training quantization of Hugging Face models, layer by layer, through plugins.

Names are loaded on first use (PEP 562); importing this package imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelslim.evaluation import evaluate
    from modelslim.plan import make_plan
    from modelslim.run import quantize

__version__ = "0.1.0"

_HOMES = {"evaluate": "modelslim.evaluation", "make_plan": "modelslim.plan", "quantize": "modelslim.run"}

__all__ = ["__version__", "evaluate", "make_plan", "quantize"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'modelslim' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
