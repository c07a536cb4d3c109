# SPDX-License-Identifier: Apache-2.0
"""Which practice a request gets, and why: six priorities, the first that has a practice wins."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from modelslim.adapters import GENERIC, choose_adapter
from modelslim.engines import find_contract
from modelslim.errors import UsageError, nearest
from modelslim.practices import ANY, Practice
from modelslim.quant_type import RECOMMENDED, QuantType
from modelslim.registry import Registry
from modelslim.tags import Tags, folded

Standing = Literal["verified", "other scenario", "not verified", "no"]

LEVELS: Sequence[tuple[Standing, str]] = (
    ("verified", "a practice of {type} that is verified for the model{tags}"),
    ("other scenario", "a practice of {type} that is verified for the model, whatever the tags"),
    ("not verified", "a practice of {type} that is made for the model and not verified for it"),
)
"""What is looked for, first of the wanted type, then of the recommended one."""


@dataclass(frozen=True)
class Model:
    """What is known of the model before it is opened.

    Attributes:
        names: the published name, when it was given, and ``model_type`` of config.json.
        distribution: the distribution that offers its adapter; empty when it is not known.
        remark: what the user should know about the name; mostly empty.
    """

    names: tuple[str, ...]
    distribution: str = ""
    remark: str = ""

    @property
    def name(self) -> str:
        """What messages and files call it."""
        return self.names[0]


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
        model: the model.
        quant_type: the type; None when it was not given.
        tags: the scenario.
        engine: the engine that the result must load in, as of ``--engine``; empty for none.
    """

    model: Model
    quant_type: QuantType | None
    tags: Tags = field(default_factory=Tags)
    engine: str = ""


@dataclass(frozen=True)
class Verdict:
    """What speaks for or against a practice.

    Attributes:
        practice: the practice.
        standing: how it stands to the model and the tags; ``no`` when it cannot be taken.
        why: the same in words.
        overlap: of the tags, how many a scenario has in which it is verified.
        is_special: True when it is made for the model's family, not for any model.
    """

    practice: Practice
    standing: Standing
    why: str
    overlap: int = 0
    is_special: bool = False

    @property
    def rank(self) -> tuple[object, ...]:
        """The least comes first among those of one priority."""
        one = self.practice
        return (not self.is_special, -self.overlap, -one.score, not one.is_custom, one.config_id)


@dataclass(frozen=True)
class Choice:
    """The practice that a request gets.

    Attributes:
        request: the request.
        verdicts: what speaks for or against each practice.
        chosen: the verdict on the practice that is taken.
        priority: 1 to 6.
        because: why it is this one.
    """

    request: Request
    verdicts: Sequence[Verdict]
    chosen: Verdict
    priority: int
    because: str

    @property
    def practice(self) -> Practice:
        """The practice that is taken."""
        return self.chosen.practice

    @property
    def needs_consent(self) -> bool:
        """True when the user must agree: it is not what was asked for, or not verified."""
        return self.priority > 1 or self.request.quant_type is None

    @property
    def line(self) -> str:
        """The choice in one line."""
        one = self.practice
        return f"practice {one.config_id} ({one.origin}), chosen because {self.because} [priority {self.priority} of 6]"

    @property
    def filename(self) -> str:
        """Name of the file beside the checkpoint that holds the protocol."""
        return f"{re.sub(r'[^0-9A-Za-z._-]', '_', self.request.model.name)}_best_practice.yaml"

    def as_data(self) -> dict[str, Any]:
        """As JSON values, for the report."""
        wanted = self.request.quant_type
        return {
            "config_id": self.practice.config_id,
            "origin": self.practice.origin,
            "file": str(self.practice.file),
            "evidence": self.practice.evidence,
            "priority": self.priority,
            "chosen_because": self.because,
            "model_type": self.request.model.name,
            "quant_type": str(wanted) if wanted else None,
            "tags": list(self.request.tags.given),
            "copy": self.filename,
        }

    def write(self, directory: Path) -> None:
        """Write the protocol beside the checkpoint, with the line above it."""
        text = self.practice.file.read_text(encoding="utf-8-sig")
        (directory / self.filename).write_text(f"# {self.line}\n# copied from {self.practice.file}\n{text}", "utf-8")


def find_model(
    config: Mapping[str, Any] | None, model_type: str | None, registry: Registry, verified: Sequence[str] = ()
) -> Model:
    """What is known of a model.

    Args:
        config: config.json of the model; None when there is only the name.
        model_type: published name or model_type, as given; None to go by config.json.
        registry: the installed plugins.
        verified: further names that are known, because practices are verified for them.

    Raises:
        ModelError, PluginError: as of ``choose_adapter``.
        UsageError: there is neither a name nor a configuration.
    """
    if config is not None:
        kind, name, remark = choose_adapter(config, model_type, registry)
        names = tuple(dict.fromkeys(one for one in (model_type, config["model_type"]) if one))
    elif model_type:
        kind = next((one for one in ("models", "adapters") if registry.claims(one, model_type)), "adapters")
        name = model_type if registry.claims(kind, model_type) else GENERIC
        names, remark = (model_type,), ""
        if name == GENERIC and model_type not in verified:
            remark = f"no adapter is registered for {model_type}, so the one for any model would serve it"
    else:
        raise UsageError("neither a model nor a name of one is given", hint="--model_type or --model_path says which")
    if remark and model_type and "did you mean" not in remark:
        meant = nearest(model_type, [*registry.names("models"), *registry.names("adapters"), *verified])
        remark += f" ({meant})" if meant.startswith("did you mean") and model_type not in verified else ""
    row = next((one for one in registry.entries if (one.kind, one.name) == (kind, name)), None)
    return Model(names, row.distribution if row else "", remark)


def judge(request: Request, practices: Sequence[Practice], registry: Registry) -> list[Verdict]:
    """What speaks for or against each practice, whatever its type.

    Raises:
        UsageError: no contract is known of the engine.
    """
    contract = find_contract(request.engine, registry) if request.engine else None

    def verdict(practice: Practice) -> Verdict:
        if practice.problem:
            return Verdict(practice, "no", practice.problem)
        if practice.quant_type is None:
            return Verdict(practice, "no", "its label does not say to how many bits it quantizes")
        if contract is not None and practice.saver not in contract.formats:
            return Verdict(practice, "no", f"{contract.title} does not read what {practice.saver} writes")
        return _standing(practice, request)

    return [verdict(practice) for practice in practices]


def choose(request: Request, verdicts: Sequence[Verdict]) -> Choice:
    """The practice that a request gets.

    Raises:
        UsageError: none has even the lowest priority.
    """
    wanted = request.quant_type or RECOMMENDED
    for priority, quant_type, standing in priorities(wanted):
        fitting = fits(verdicts, quant_type, standing)
        if fitting:
            return Choice(request, verdicts, fitting[0], priority, _because(request, quant_type, fitting[0], verdicts))
    types = sorted({str(one.practice.quant_type) for one in verdicts if one.standing != "no"})
    raise UsageError(
        f"there is no practice of {wanted} for {request.model.name}, and none of {RECOMMENDED}",
        hint=f"there are some of {', '.join(types)}" if types else "write a protocol and give it as --config_path",
    )


def priorities(wanted: QuantType) -> list[tuple[int, QuantType, Standing]]:
    """Number, type and standing of the priorities, the highest first; three when the recommended type is wanted."""
    types = [wanted] if wanted == RECOMMENDED else [wanted, RECOMMENDED]
    return [
        (3 * step + number, quant_type, standing)
        for step, quant_type in enumerate(types)
        for number, (standing, _) in enumerate(LEVELS, start=1)
    ]


def fits(verdicts: Sequence[Verdict], quant_type: QuantType, standing: Standing) -> list[Verdict]:
    """The practices of a priority, the one that is taken first."""
    found = (one for one in verdicts if one.standing == standing and one.practice.quant_type == quant_type)
    return sorted(found, key=lambda one: one.rank)


def describe(request: Request, quant_type: QuantType, standing: Standing) -> str:
    """What a priority looks for."""
    tags = f" with {' and '.join(request.tags.given)}" if request.tags.given else ""
    return dict(LEVELS)[standing].format(type=quant_type, tags=tags)


def is_foreign(practice: Practice, model: Model) -> bool:
    """True when another family's adapter ships the practice than the one that serves the model."""
    return practice.source == "adapter" and practice.distribution != model.distribution


def _standing(practice: Practice, request: Request) -> Verdict:
    """How a practice that could be taken stands to the model and the tags."""
    model, tags = request.model, request.tags
    name = next((one for one in model.names if one in practice.verified), "")
    pattern = practice.made_for(model.names)
    own = practice.source == "adapter" and practice.distribution == model.distribution
    if is_foreign(practice, model):
        return Verdict(practice, "no", "is for the models of another adapter")
    special = own or pattern not in ("", ANY) or bool(name)
    if name:
        scenarios = [list(one) for one in practice.verified_tags.get(name, ())]
        missing = min((tags.missing_in(one) for one in scenarios or [[]]), key=len)
        if not missing:
            shown = f" with {' and '.join(tags.given)}" if tags.given else ""
            return Verdict(practice, "verified", f"is verified for {name}{shown}", len(tags.given), special)
        where = " or ".join(sorted({" ".join(one) for one in scenarios if one})) or "no scenario in particular"
        why = f"is verified for {name}, with {where}, and not with {' and '.join(missing)}"
        return Verdict(practice, "other scenario", why, len(tags.given) - len(missing), special)
    if pattern:
        what = "any model" if pattern == ANY else pattern
    elif practice.model_types or practice.verified:
        others = ", ".join(practice.model_types or practice.verified)
        return Verdict(practice, "no", f"is for other models: {others}")
    else:
        what = "all models of its adapter" if own else "any model"
    measured = f", measured on {', '.join(practice.verified)} only" if practice.verified else ", measured on none"
    return Verdict(
        practice, "not verified", f"is made for {what}{measured}: its accuracy on {model.name} is not known", 0, special
    )


def _because(request: Request, quant_type: QuantType, chosen: Verdict, verdicts: Sequence[Verdict]) -> str:
    wanted = request.quant_type
    if wanted is None:
        return f"no --quant_type was given, {quant_type} is what is recommended, and it {chosen.why}"
    if quant_type == wanted:
        return f"{wanted} was asked for and it {chosen.why}"
    reason = wanted.lacking
    blocked = sum(one.practice.quant_type == wanted for one in verdicts)
    if not reason:
        reason = f"{blocked} practice{'s' if blocked > 1 else ''} of this type cannot be taken" if blocked else ""
    return (
        f"there is no practice of {wanted} for {request.model.name}{f' ({reason})' if reason else ''}, "
        f"{quant_type} is recommended instead, and it {chosen.why}"
    )


def used_tags(practices: Sequence[Practice]) -> list[str]:
    """Every tag that practices name, in one spelling each."""
    tags = (tag for one in practices for found in one.verified_tags.values() for scene in found for tag in scene)
    return list({folded(tag): tag for tag in tags}.values())
