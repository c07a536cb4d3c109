# SPDX-License-Identifier: Apache-2.0
"""The experts of a mixture-of-experts layer, fused: one stacked weight for all experts, seen by algorithms as a batch.

An adapter puts a :class:`FusedExperts` where its model has experts; the engine then measures, quantizes
and replaces the :class:`ExpertLinear` modules in it, and the saver gets every expert's linears by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from modelslim.multipliers import without_observers

WHOLE = slice(None)


class ExpertLinear(nn.Module):
    """One linear of every expert of a layer.

    Attributes:
        weight: [experts, out, in].
        bias: [experts, out], or None.
        parts: the rows of each linear that the weight holds, by the last part of its name:
            ``{"gate_proj": slice(0, 768), "up_proj": slice(768, 1536)}``, or every second row
            where two are interleaved. Together they are all rows.

    Args:
        experts, out_features, in_features: sizes.
        parts: see above.
        bias: True to have one.
        dtype, device: of the parameters.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        experts: int,
        out_features: int,
        in_features: int,
        parts: Mapping[str, slice],
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.experts = experts
        self.out_features = out_features
        self.in_features = in_features
        self.parts = dict(parts)
        weight = torch.empty((experts, out_features, in_features), dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias:
            rows = torch.empty((experts, out_features), dtype=dtype, device=device)
            self.bias = nn.Parameter(rows, requires_grad=False)
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Apply to each expert's tokens its own weight.

        Args:
            x: [tokens, in], tokens of the first expert first; tokens beyond the counts give zeros.
            counts: how many tokens each expert has.

        Returns:
            [tokens, out].
        """
        y = x.new_empty((len(x), self.out_features))
        start = 0
        for expert, count in enumerate(counts):
            if count:
                rows = y[start : start + count]
                torch.mm(x[start : start + count], self.weight[expert].t(), out=rows)
                if self.bias is not None:
                    rows.add_(self.bias[expert])
                start += count
        y[start:] = 0
        return y

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}"


class FusedExperts(nn.Module):
    """The experts of one layer: ``down(activation(up(x)))`` for each expert, weighted and summed per token.

    Tokens are sorted by expert once, so that every expert works on one block. The result is, to the bit,
    that of the ``grouped_mm`` implementation of transformers.

    Attributes:
        tokens_seen: how many tokens were routed to each expert since ``count_tokens`` was called.
        show_all: True to show all tokens to every expert, for statistics; the output stays that of
            the routed ones.

    Args:
        linears: the first and the second linear by their names in the model, such as
            ``{"gate_up_proj": ..., "down_proj": ...}``.
        activation: what lies between the two: [tokens, out of the first] -> [tokens, in of the second].
    """

    def __init__(self, linears: Mapping[str, ExpertLinear], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._first, self._second = linears
        for name, linear in linears.items():
            self.add_module(name, linear)
        self._activation = activation
        self.num_experts = linears[self._first].experts
        self.show_all = False
        self.count_tokens()

    def count_tokens(self) -> None:
        """Begin to count tokens anew."""
        self.tokens_seen = [0] * self.num_experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run the routed experts.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: [tokens, k] numbers of experts; a number beyond the experts stands for none.
            top_k_weights: [tokens, k] weights of their outputs.

        Returns:
            [tokens, hidden].
        """
        tokens, k = top_k_index.shape
        experts, order = torch.sort(top_k_index.reshape(-1))
        counts: list[int] = torch.bincount(experts, minlength=self.num_experts)[: self.num_experts].tolist()
        self.tokens_seen = [seen + count for seen, count in zip(self.tokens_seen, counts, strict=True)]
        first: nn.Module = getattr(self, self._first)
        second: nn.Module = getattr(self, self._second)
        if self.show_all:
            for expert in range(self.num_experts):
                alone = [0] * self.num_experts
                alone[expert] = tokens
                second(self._activation(first(hidden_states, alone)), alone)
        # Observers hang on the call of a module.
        run_first, run_second = (without_observers(one) if self.show_all else one for one in (first, second))
        y = run_second(self._activation(run_first(hidden_states[order // k], counts)), counts)
        y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        restored = torch.empty_like(y)
        restored[order] = y
        return restored.view(tokens, k, -1).sum(1).to(hidden_states.dtype)
