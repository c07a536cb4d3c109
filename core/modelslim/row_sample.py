# SPDX-License-Identifier: Apache-2.0
"""A sample of the tokens that reached a port, as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modelslim.statistics import Statistic, rescale_tokens

_KEYS = 1 << 32
_STEP, _START = 2654435769, 1 << 31
"""Multiples of the golden ratio, whose lowest lie evenly apart, and not at the first token, which is like no other."""


class RowSample(Statistic):
    """Some tokens as they are, spread evenly over all that came by.

    Every token has a key that depends on its place alone, and those with the lowest keys are kept, of equal ones the
    first (bottom-k sampling: Cohen and Kaplan, "Summarizing data using bottom-k sketches", 2007). So it does not
    matter how batches and samples are grouped: what is kept of all is kept of each part.

    Attributes:
        capacity: how many tokens are kept at most.
    """

    capacity = 256

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._bound = _KEYS
        self._seen = 0

    def update(self, x: Tensor) -> None:
        """Keep some tokens of a batch."""
        places = torch.arange(self._seen, self._seen + len(x))
        self._seen += len(x)
        keys = (places * _STEP + _START) % _KEYS
        chosen = self._choose(keys)
        self._add(x[chosen.to(x.device)], keys[chosen])

    def merge(self, other: Statistic) -> None:
        """Add what another instance keeps."""
        assert isinstance(other, RowSample)
        for part, keys in zip(other._parts, other._keys, strict=True):
            keys = keys.to("cpu")  # from another rank they come to this one's device
            chosen = self._choose(keys)
            self._add(_taken(part, chosen), keys[chosen])

    def rescaled(self, scale: Tensor, shift: Tensor | None = None) -> RowSample:
        """The same tokens after the rescaling, in float32."""
        result = type(self)()
        vars(result).update(vars(self), _keys=list(self._keys))
        result._parts = [rescale_tokens(part, scale, shift) for part in self._parts]
        return result

    @classmethod
    def condense(cls, samples: Sequence[Statistic]) -> None:
        """Drop what is not among the lowest keys of all."""
        held = [one for one in samples if isinstance(one, RowSample)]
        keys = [key for one in held for key in one._keys]
        if sum(map(len, keys)) > held[0].capacity:
            bound = int(torch.cat(keys).kthvalue(held[0].capacity).values)
            for one in held:
                one._keep([key <= bound for key in one._keys])

    @property
    def rows(self) -> Tensor | None:
        """[kept tokens, channels], in the order in which they came; None before the first token."""
        self._thin()
        return torch.cat(self._parts) if self._parts else None

    def _choose(self, keys: Tensor) -> Tensor:
        """Places of those that may be kept, in their order."""
        chosen = (keys < self._bound).nonzero().view(-1)
        return chosen if len(chosen) <= self.capacity else chosen[_lowest(keys[chosen], self.capacity)]

    def _add(self, rows: Tensor, keys: Tensor) -> None:
        if len(keys):
            self._parts.append(rows)
            self._keys.append(keys)
        if sum(map(len, self._keys)) > 2 * self.capacity:  # not each time, since all rows are copied
            self._thin()

    def _thin(self) -> None:
        """Keep no more than the capacity."""
        keys = torch.cat(self._keys) if self._keys else torch.empty(0)
        if len(keys) > self.capacity:
            is_kept = torch.zeros(len(keys), dtype=torch.bool)
            is_kept[_lowest(keys, self.capacity)] = True
            self._bound = int(keys[is_kept].max())
            self._keep(torch.split(is_kept, list(map(len, self._keys))))

    def _keep(self, masks: Sequence[Tensor]) -> None:
        """Keep these rows of each part."""
        parts, keys = [], []
        for part, key, mask in zip(self._parts, self._keys, masks, strict=True):
            chosen = mask.nonzero().view(-1)
            if len(chosen):
                parts.append(_taken(part, chosen))
                keys.append(key[chosen])
        self._parts, self._keys = parts, keys


def _taken(rows: Tensor, places: Tensor) -> Tensor:
    """Rows at some places, in order; the tensor itself where these are all."""
    return rows if len(places) == len(rows) else rows[places.to(rows.device)]


def _lowest(keys: Tensor, count: int) -> Tensor:
    """Places of the lowest keys, of equal ones the first, in their order."""
    return keys.sort(stable=True).indices[:count].sort().values
