# SPDX-License-Identifier: Apache-2.0
"""Strategies that leave as little in float as the target allows: ``standing_high`` and ``binary_fallback``."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import Any

from modelslim.analysis.layers import layer_errors
from modelslim.analysis.simulate import Simulation
from modelslim.errors import ProtocolError
from modelslim.protocol.document import Document, Place
from modelslim.tune.plan import with_process
from modelslim.tune.strategy import Candidate, Proposals, Strategy, Verdict, added

Step = tuple[str | int, ...]
Items = Sequence[Sequence[str]]
"""Patterns of each thing that may be left in float."""


def least_fallback(
    make: Callable[[Items], Candidate], items: Items, *, thin: bool
) -> Generator[Candidate, Verdict, bool]:
    """Look for few items that must stay float, the first ones first.

    Nothing is tried, then 1, 2, 4, ... items until the target is reached, then the numbers between by halving.

    Args:
        make: the candidate with some items in float.
        items: what may be left in float, the most important first.
        thin: True to see at the end which of them can be quantized after all, several at a time while that succeeds.

    Returns:
        True when some candidate passed.
    """
    low, high = -1, 0
    while not (yield make(items[:high])).passed:
        if high == len(items):
            return False
        low, high = high, min(max(1, 2 * high), len(items))
    while high - low > 1:
        middle = (low + high) // 2
        if (yield make(items[:middle])).passed:
            high = middle
        else:
            low = middle
    if thin:
        yield from _thin(make, list(items[:high]))
    return True


def _thin(make: Callable[[Items], Candidate], kept: list[Sequence[str]]) -> Generator[Candidate, Verdict, None]:
    """Quantize again what need not be float; the last item is known to be needed."""
    place, step = len(kept) - 2, 1
    while place >= 0:
        first = max(0, place - step + 1)
        fewer = kept[:first] + kept[place + 1 :]
        if (yield make(fewer)).passed:
            kept, place, step = fewer, first - 1, 2 * step
        elif step > 1:
            step = 1
        else:
            place -= 1


class Fallback(Strategy):
    """What both strategies share: layers ranked by what quantization does to them."""

    def ranked_units(self, document: Document) -> Items:
        """Patterns of the layers in which something is quantized, the most sensitive first.

        Args:
            document: the protocol; smoothing in it is not taken into account.
        """
        spec = document.value["spec"]
        samples = self.context.samples(spec, self.config.get("analysis_dataset"))
        entries = [(("spec", "process", index), entry) for index, entry in enumerate(spec["process"])]
        self.context.say(f"ranking layers by the error of their outputs on {len(samples)} samples")
        with self.context.open() as model:
            simulation = Simulation(document, entries, model.info, self.context.registry)
            errors = layer_errors(model, samples, simulation)
        return [[f"{unit}.*"] for unit in sorted(errors, key=lambda unit: -(errors[unit].relative or 0.0))]

    def quantizing(self, document: Document) -> list[Step]:
        """Places of the entries that quantize linears."""
        entries = [(("spec", "process", index), one) for index, one in enumerate(document.value["spec"]["process"])]
        with self.context.open() as model:
            return [step.path for step in Simulation(document, entries, model.info, self.context.registry).steps]


class StandingHigh(Fallback):
    """Each list of anti_outlier_strategies in turn, with as few layers in float as the target allows."""

    def probes(self) -> Sequence[Document]:
        """The template with each list in front."""
        return [document for _, document in self._documents()]

    def propose(self) -> Proposals:
        """The first list with which the target is reached ends the search."""
        ranked: Items | None = None
        for number, document in self._documents():
            if ranked is None:
                ranked = self.ranked_units(document)
            places = self.quantizing(document)

            def make(
                items: Items, number: int = number, document: Document = document, places: Sequence[Step] = places
            ) -> Candidate:
                protocol = dict(document.value)
                patterns = [pattern for item in items for pattern in item]
                for place in places if patterns else ():
                    protocol = added(protocol, (*place, "exclude"), patterns)
                return Candidate(protocol, f"anti_outlier_strategies[{number}], {len(items)} layers in float")

            # With every layer in float nothing would be quantized.
            if (yield from least_fallback(make, ranked[:-1], thin=True)):
                return

    def _documents(self) -> list[tuple[int, Document]]:
        template, root = self.template()
        fronts = self.config["anti_outlier_strategies"]
        base = self.context.plan
        documents = []
        for number, front in enumerate(fronts):
            places = [Place(root.value)] * len(front)
            if "anti_outlier_strategies" in base.document.value["strategy"]:
                place = base.part(("strategy", "anti_outlier_strategies", number))[1]
                places = [place.children[index] for index in range(len(front))]
            documents.append((number, base.protocol(*with_process(template, root, front, places, front=True))))
        return documents

    def template(self) -> tuple[Any, Place]:
        """The protocol that trials are made from, and its place."""
        return self.context.plan.part(("strategy", "template"))


class BinaryFallback(Fallback):
    """The shortest head of a list of candidates that reaches the target when it is left in float."""

    def probes(self) -> Sequence[Document]:
        """The template, with and without all candidates."""
        document = self._document()
        try:
            whole = added(document.value, self._path(), [one for item in self._candidates() or [] for one in item])
        except (KeyError, IndexError, TypeError, AttributeError):
            plan = self.context.plan.document
            message = f"the template has no {self.config['rollback_path']}"
            hint = "write the place of a list of the template, such as spec.process[0].exclude"
            path = ("strategy", "rollback_path")
            raise ProtocolError(
                f"{plan.file} is not a valid plan of a tune", diagnostics=[plan.diagnostic(message, path, hint=hint)]
            ) from None
        return [document, Document(document.file, whole, document.root)] if self._candidates() else [document]

    def propose(self) -> Proposals:
        """No candidate, then heads of the list."""
        document = self._document()
        items = self._candidates()
        if items is None:
            items = self.ranked_units(document)[:-1]

        def make(items: Items) -> Candidate:
            patterns = [pattern for item in items for pattern in item]
            protocol = added(document.value, self._path(), patterns) if patterns else dict(document.value)
            return Candidate(protocol, f"{len(items)} candidates in float")

        yield from least_fallback(make, items, thin=False)

    def _document(self) -> Document:
        plan = self.context.plan
        return plan.protocol(*plan.part(("strategy", "template")))

    def _candidates(self) -> Items | None:
        candidates: Items | None = self.config.get("rollback_candidates")
        return candidates

    def _path(self) -> Step:
        words = re.findall(r"[^.\[\]]+", self.config["rollback_path"])
        return tuple(int(word) if word.isdigit() else word for word in words)
