# SPDX-License-Identifier: Apache-2.0
"""Parameters that an algorithm changed and that stay float: under which names, and as what, they are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from modelslim.experts import ExpertLinear
from modelslim.types import WeightSource

if TYPE_CHECKING:
    from modelslim.plan import Plan


def stored_edits(plan: Plan, model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of edited parameters by stored name, on the CPU.

    Args:
        plan: the plan, which has refused what cannot be written.
        model: the model with the parameters loaded.
        names: full names of the parameters, added biases among them.
    """
    for name in sorted(names):
        owner, _, part = name.rpartition(".")
        module = model.get_submodule(owner)
        tensor = getattr(module, part).detach().to("cpu")
        if isinstance(module, ExpertLinear):
            bank = plan.info.banks[owner]
            for expert, linears in enumerate(bank.linears):
                for linear, rows in zip(linears, bank.rows, strict=True):
                    yield f"{linear.stored}.{part}", tensor[expert, rows]
            continue
        stored = stored_name(name, plan.loader.sources)
        if stored in plan.checkpoint.tensors:
            tensor = tensor.to(plan.checkpoint.tensors[stored].torch_dtype)
        # The module may be released or changed while the writer is at work.
        yield stored, tensor.clone()


def stored_name(name: str, sources: Mapping[str, WeightSource]) -> str:
    """Under which name a parameter is written; of one that was added, beside the weight of its module."""
    if name in sources:
        return sources[name].keys[0]
    owner, _, part = name.rpartition(".")
    weight = sources.get(f"{owner}.weight")
    return f"{weight.keys[0].removesuffix('.weight')}.{part}" if weight else name
