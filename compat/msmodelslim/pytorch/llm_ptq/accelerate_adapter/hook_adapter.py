# SPDX-License-Identifier: Apache-2.0
"""The context in which an adapter looks at weights that may be elsewhere."""

from __future__ import annotations

from torch import nn


class PrepareWeight:
    """Does nothing: while an adapter loads, every weight of its model is there."""

    def __init__(self, module: nn.Module, post_force: bool = False, post_recurse: bool = False) -> None:
        self.module = module

    def __enter__(self) -> nn.Module:
        return self.module

    def __exit__(self, *_: object) -> None:
        pass
