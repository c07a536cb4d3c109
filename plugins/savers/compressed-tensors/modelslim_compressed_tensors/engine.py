# SPDX-License-Identifier: Apache-2.0
"""Asks the package with which vLLM and transformers parse config.json what it thinks of one."""

from __future__ import annotations

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from modelslim.api import Problem
from modelslim_compressed_tensors.decode import KEY

_PACKAGE = "compressed_tensors"


def check_config(file: Path) -> list[Problem]:
    """What the package refuses; nothing when it is not installed.

    Args:
        file: a config.json, which holds ``quantization_config`` at its top.
    """
    if find_spec(_PACKAGE) is None:
        return []
    from compressed_tensors.quantization import QuantizationConfig

    content = json.loads(file.read_text(encoding="utf-8"))[KEY]
    try:
        QuantizationConfig.model_validate(content)
    except (ValueError, NotImplementedError) as error:  # pydantic's errors are of the former kind
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3]) or str(error)
        return [
            Problem(
                f"{file}: compressed-tensors {version(_PACKAGE)} refuses {KEY}: {reason}",
                hint="engines parse it with this package; quantize again",
            )
        ]
    return []
