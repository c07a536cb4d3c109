# SPDX-License-Identifier: Apache-2.0
"""Which runner a run takes, and why."""

from __future__ import annotations

from dataclasses import dataclass

from modelslim.errors import Diagnostic
from modelslim.protocol.document import shorten
from modelslim.protocol.model import Protocol
from modelslim.registry import Registry

ONE = "layer_wise"
SEVERAL = "dp_layer_wise"


@dataclass(frozen=True)
class Choice:
    """A runner.

    Attributes:
        name: its entry point.
        why: in a few words.
        warnings: what the user should know about it.
        refusals: why it cannot work.
    """

    name: str
    why: str
    warnings: tuple[str, ...] = ()
    refusals: tuple[Diagnostic, ...] = ()


def choose_runner(protocol: Protocol, ranks: int, registry: Registry) -> Choice:
    """The runner that a protocol asks for, or ``auto``'s choice.

    Args:
        protocol: the protocol.
        ranks: how many processes share the run.
        registry: the installed plugins.
    """
    asked = protocol.runner
    place = ("spec", "runner")
    if protocol.is_multimodal:
        choice = _auto(ranks)
        if asked in ("auto", ONE, choice.name):
            return choice
        where = " on several devices" if ranks > 1 else ""
        message = f"{shorten(asked)!r} becomes {choice.name}, the only runner of {protocol.apiversion}{where}"
        return Choice(choice.name, choice.why, (str(protocol.document.diagnostic(message, place)),))
    if asked == "auto":
        return _auto(ranks)
    divides = getattr(registry.load("runners", asked), "divides_samples", False)
    if ranks > 1 and not divides:
        refusal = protocol.document.diagnostic(
            f"{asked} uses one device, and {ranks} are to share the run", place, hint=f"say {SEVERAL} or auto"
        )
        return Choice(asked, "", (), (refusal,))
    alone = "; with one device there is nobody to share with" if divides and ranks == 1 else ""
    return Choice(asked, f"as the protocol says{alone}")


def _auto(ranks: int) -> Choice:
    if ranks > 1:
        return Choice(SEVERAL, f"{ranks} ranks share the samples and the work on weights")
    return Choice(ONE, "one device; one unit is held while the next is read, which is as fast as holding them all")
