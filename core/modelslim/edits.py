# SPDX-License-Identifier: Apache-2.0
"""Parameters that an algorithm changed or added and that stay float: how they are written, and how they come back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modelslim.experts import ExpertLinear
from modelslim.types import WeightSource

if TYPE_CHECKING:
    from modelslim.checkpoint import Checkpoint
    from modelslim.plan import Plan


def stored_edits(
    plan: Plan, model: nn.Module, names: Iterable[str], bring: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of edited parameters by stored name, on the CPU.

    Args:
        plan: the plan, which has refused what cannot be written.
        model: the model with the parameters loaded.
        names: full names of the parameters, added biases among them.
        bring: the copy of a tensor on the host, or the tensor itself where it is there.
    """
    for name in sorted(names):
        owner, _, part = name.rpartition(".")
        module = model.get_submodule(owner)
        tensor = getattr(module, part).detach()
        if isinstance(module, ExpertLinear):
            tensor, bank = bring(tensor), plan.info.banks[owner]
            for expert, linears in enumerate(bank.linears):
                for linear, rows in zip(linears, bank.rows, strict=True):
                    yield f"{linear.stored}.{part}", tensor[expert, rows]
            continue
        stored = stored_name(name, plan.loader.sources)
        if stored in plan.checkpoint.tensors:
            tensor = tensor.to(plan.checkpoint.tensors[stored].torch_dtype)
        held = bring(tensor)
        # The module may be released or changed while the writer is at work.
        yield stored, tensor.clone() if held is tensor else held


def edited_parameters(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Edited parameters by their names in the model, added biases among them."""
    found = {}
    for name in sorted(names):
        owner, _, part = name.rpartition(".")
        found[name] = getattr(model.get_submodule(owner), part).detach()
    return found


def stored_name(name: str, sources: Mapping[str, WeightSource]) -> str:
    """Under which name a parameter is written; of one that was added, beside the weight of its module."""
    if name in sources:
        return sources[name].keys[0]
    owner, _, part = name.rpartition(".")
    weight = sources.get(f"{owner}.weight")
    return f"{weight.keys[0].removesuffix('.weight')}.{part}" if weight else name


def add_bias(module: nn.Module, bias: Tensor) -> None:
    """Let a module add a bias to its output; its class stays.

    Args:
        module: a linear or a norm without one.
        bias: [channels], on meta to be filled later.
    """
    parameter = nn.Parameter(bias, requires_grad=False)
    if isinstance(module, nn.Linear):
        module.bias = parameter
        return
    module.register_parameter("bias", parameter)

    def add(owner: nn.Module, _args: Any, output: Tensor) -> Tensor:
        added: Tensor = owner.bias  # type: ignore[assignment]
        return output + added.to(output.dtype)

    module.register_forward_hook(add)


def with_added_biases(
    model: nn.Module, checkpoint: Checkpoint, sources: Mapping[str, WeightSource] | None
) -> dict[str, WeightSource]:
    """Make room for stored biases that the architecture does not have.

    Args:
        model: on meta; norms get the biases that lie beside their weights in the checkpoint.
        checkpoint: what smoothing has written.
        sources: stored tensors by parameter; None when names are the same.

    Returns:
        the sources with those of the biases.
    """
    found = {name: WeightSource((name,)) for name in checkpoint.tensors} if sources is None else dict(sources)
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 1 or getattr(module, "bias", None) is not None:
            continue
        stored = stored_name(f"{name}.bias", found)
        if stored in checkpoint.tensors:
            add_bias(module, torch.empty_like(weight))
            found[f"{name}.bias"] = WeightSource((stored,))
    return found
