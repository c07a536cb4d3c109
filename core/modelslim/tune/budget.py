# SPDX-License-Identifier: Apache-2.0
"""The strategy ``budget``: the least loss within a budget of bytes, over sensitivities that were measured."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from modelslim.analysis.model import FloatModel
from modelslim.analysis.scores import as_patterns
from modelslim.analysis.simulate import Simulation
from modelslim.disk import write_json
from modelslim.errors import Diagnostic, ProtocolError
from modelslim.patterns import Selector
from modelslim.protocol.document import Document
from modelslim.sampling import choose_samples
from modelslim.saver import Saver
from modelslim.tune.groups import Group, find_groups
from modelslim.tune.knapsack import Choice, Item, solve
from modelslim.tune.plan import FLOAT, with_process
from modelslim.tune.sensitivity import Key, Sensitivities
from modelslim.tune.strategy import Candidate, Proposals, Strategy
from modelslim.types import QuantSpec

FILE = "sensitivities.json"
_UNITS = {"B": 1, "kB": 1000, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


class Budget(Strategy):
    """Measures every option of every group of linears, and solves for the best choice."""

    def probes(self) -> Sequence[Document]:
        """The template with each option for all linears that take part."""
        return [self._document(index) for index in self._quantizing]

    def propose(self) -> Proposals:
        """The solution: the trial says what it is worth."""
        with self.context.open() as model:
            groups, items = self.groups_and_costs(model)
            room, budget = self._room(model, groups), self._describe()
        least = sum(min(costs) for costs in items)
        if least > room:
            raise self._too_small(least, room, groups)
        losses = self._losses(groups)
        offers = [
            [Item(cost, losses[index, number]) for number, cost in enumerate(costs)]
            for index, costs in enumerate(items)
        ]
        choice = solve(offers, room)
        assert choice is not None
        self.context.say(
            f"{budget}: expected loss {choice.loss:.5g}"
            + ("" if choice.exact else f", at least {choice.bound:.5g} for any choice")
            + f", {8 * choice.cost / sum(group.weights for group in groups):.4g} bits per weight"
        )
        everything = list(model.info.linears)
        yield Candidate(self.protocol(groups, choice, everything), self._note(choice))

    def groups_and_costs(self, model: FloatModel) -> tuple[list[Group], list[list[int]]]:
        """The groups that take part, and the bytes of each with every option."""
        groups, saver = self._groups(model), self._saver()
        return groups, self._costs(groups, self._simulations(model, saver), saver, model.info.dtype)

    def protocol(self, groups: Sequence[Group], choice: Choice, everything: Sequence[str]) -> dict[str, Any]:
        """The template with the chosen options, each for its linears."""
        value = copy.deepcopy(dict(self.config["template"]))
        process = list(value["spec"].get("process", []))
        for number, option in enumerate(self.config["options"]):
            names = [
                name
                for group, chosen in zip(groups, choice.options, strict=True)
                if chosen == number
                for name in group.names
            ]
            if option != FLOAT and names:
                process.append({**copy.deepcopy(option), "include": as_patterns(names, everything)})
        value["spec"] = {**value["spec"], "process": process}
        return value

    @property
    def _quantizing(self) -> list[int]:
        return [index for index, option in enumerate(self.config["options"]) if option != FLOAT]

    def _document(self, index: int) -> Document:
        """The template with one option, which all linears take that take part."""
        plan = self.context.plan
        template, root = plan.part(("strategy", "template"))
        option, place = plan.part(("strategy", "options", index))
        entry = {**option, "include": list(self.config["include"]), "exclude": list(self.config["exclude"])}
        return plan.protocol(*with_process(template, root, [entry], [place]))

    def _saver(self) -> Saver:
        config = self.config["template"]["spec"]["save"][0]
        saver: Saver = self.context.registry.load("savers", config["type"]).from_config(config)
        return saver

    def _groups(self, model: FloatModel) -> list[Group]:
        selector = Selector(tuple(self.config["include"]), tuple(self.config["exclude"]))
        groups = find_groups(selector.select(model.info.linears.values()))
        outside = next((group for group in groups if not group.unit), None)
        if outside is not None:
            raise self._refusal(
                f"{outside.name} lies outside the layers, where nothing is measured", ("strategy", "include"),
                "take it out of include; give it to an entry of the template",
            )  # fmt: skip
        return groups

    def _simulations(self, model: FloatModel, saver: Saver) -> list[Simulation | None]:
        """What each option makes of the linears."""
        simulations: list[Simulation | None] = []
        for index, option in enumerate(self.config["options"]):
            if option == FLOAT:
                simulations.append(None)
                continue
            document = self._document(index)
            last = len(document.value["spec"]["process"]) - 1
            entries = [(("spec", "process", last), document.value["spec"]["process"][last])]
            simulations.append(Simulation(document, entries, model.info, self.context.registry, saver))
        return simulations

    def _costs(
        self, groups: Sequence[Group], simulations: Sequence[Simulation | None], saver: Saver, dtype: str
    ) -> list[list[int]]:
        """Bytes of every group with every option."""
        specs: list[dict[str, QuantSpec] | None] = [
            None if one is None else {name: spec for step in one.steps for name, spec in step.specs.items()}
            for one in simulations
        ]
        return [
            [group.float_bytes() if one is None else group.encoded_bytes(one, saver, dtype) for one in specs]
            for group in groups
        ]

    def _room(self, model: FloatModel, groups: Sequence[Group]) -> int:
        """Bytes that the groups may have together."""
        if "bits_per_weight" in self.config:
            return int(self.config["bits_per_weight"] * sum(group.weights for group in groups) / 8)
        stored = sum(tensor.nbytes for tensor in model.checkpoint.tensors.values())
        return self._bytes() - (stored - sum(group.float_bytes() for group in groups))

    def _bytes(self) -> int:
        match = re.fullmatch(r"([0-9.]+) ?([A-Za-z]+)", self.config["size"])
        assert match is not None
        return int(float(match[1]) * _UNITS[match[2]])

    def _describe(self) -> str:
        return self.config.get("size") or f"{self.config['bits_per_weight']:g} bits per weight"

    def _losses(self, groups: Sequence[Group]) -> Mapping[Key, float]:
        """Sensitivities: those of an earlier start of this tune, or measured now."""
        method = self.config["sensitivity"]
        file = self.context.directory / FILE
        if not file.exists():
            samples = self.context.samples(self.config["template"]["spec"])
            samples = list(choose_samples(samples, self.config["samples"]))
            options = len(self._quantizing)
            self.context.say(f"measuring {options} options of {len(groups)} groups on {len(samples)} samples: {method}")
            with self.context.open("float32") as model:
                simulations = self._simulations(model, self._saver())
                measured = Sensitivities(model, groups, simulations).measure(samples, method)
            table = [
                {"group": group.names, "losses": [measured[index, number] for number in range(len(simulations))]}
                for index, group in enumerate(groups)
            ]
            write_json(file, {"sensitivity": method, "groups": table})
        kept = json.loads(file.read_text(encoding="utf-8"))["groups"]
        return {(index, number): loss for index, row in enumerate(kept) for number, loss in enumerate(row["losses"])}

    def _note(self, choice: Choice) -> str:
        counts = [list(choice.options).count(number) for number in range(len(self.config["options"]))]
        parts = [f"{count} groups option {number}" for number, count in enumerate(counts) if count]
        return f"{self._describe()}: {', '.join(parts)}; expected {self.config['sensitivity']} {choice.loss:.5g}"

    def _too_small(self, least: int, room: int, groups: Sequence[Group]) -> ProtocolError:
        key = "size" if "size" in self.config else "bits_per_weight"
        bits = 8 * least / sum(group.weights for group in groups)
        hint = f"the cheapest option of every group takes {bits:.4g} bits per weight"
        if key == "size":
            hint = f"at least {(self._bytes() - room + least) / 1e6:.1f} MB are needed"
        return self._refusal("the budget is below what the cheapest options take", ("strategy", key), hint)

    def _refusal(self, message: str, path: tuple[str, ...], hint: str) -> ProtocolError:
        document = self.context.plan.document
        diagnostic: Diagnostic = document.diagnostic(message, path, hint=hint)
        return ProtocolError(f"{document.file} does not fit the model", diagnostics=[diagnostic])
