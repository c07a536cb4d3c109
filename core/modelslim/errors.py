# SPDX-License-Identifier: Apache-2.0
"""The error taxonomy: one base class, subclasses named after who must act.

Code raises these with a message, a hint (what to do next) and, where several things are wrong
at once, a list of diagnostics. How they look and which exit code they give is decided in one
table at the edge of the command line (:mod:`modelslim.cli.errors`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True)
class Diagnostic:
    """One thing that is wrong, with its place and its remedy.

    Attributes:
        message: what is wrong, one sentence.
        path: place inside the document, such as ``spec.process[0].qconfig.act.dtype``.
        file: file that holds it; empty when it did not come from a file.
        line: line in the file, counted from 1; None when unknown.
        column: column in the line, counted from 1; None when unknown.
        hint: what to do; empty when the message says it already.
    """

    message: str
    path: str = ""
    file: str = ""
    line: int | None = None
    column: int | None = None
    hint: str = ""

    @property
    def place(self) -> str:
        """``file:line:column``, as far as known."""
        return ":".join(str(part) for part in (self.file, self.line, self.column) if part not in ("", None))

    def __str__(self) -> str:
        head = ": ".join(part for part in (self.place, self.path, self.message) if part)
        return f"{head} ({self.hint})" if self.hint else head


class ModelSlimError(Exception):
    """Base of all errors that this project raises on purpose."""

    def __init__(self, message: str, *, hint: str = "", diagnostics: Iterable[Diagnostic] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.diagnostics: Sequence[Diagnostic] = tuple(diagnostics)

    def __str__(self) -> str:
        lines = [self.message, *(f"  {diagnostic}" for diagnostic in self.diagnostics)]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


class UsageError(ModelSlimError):
    """An option of the command or of the API cannot be honoured (paths, devices, combinations)."""


class ProtocolError(ModelSlimError):
    """The YAML protocol is wrong; carries one diagnostic per mistake."""


class PluginError(ModelSlimError):
    """A plugin is missing, broken, incompatible or claimed twice."""


class CapabilityError(ModelSlimError):
    """The protocol asks for something that the adapter or the saver does not offer."""


class ModelError(ModelSlimError):
    """The source checkpoint cannot be used: files missing, truncated, contradicting or not finite."""


class DatasetError(ModelSlimError):
    """The calibration or evaluation data cannot be used."""


class InvalidDatasetError(DatasetError):
    """The content of the data breaks the rules of its form, or is not what the model takes.

    A reader carries one diagnostic per mistake. The integration guide knows this name.
    """


class QuantizationError(ModelSlimError):
    """The numbers went wrong during the run: no tokens seen, not finite."""


class RankError(ModelSlimError):
    """A process that shares the run has ended, or could not be started."""


class SaveError(ModelSlimError):
    """The result could not be written."""


class VerificationError(ModelSlimError):
    """A quantized checkpoint is not what its format promises or its engine needs; one diagnostic per fault."""


def closest(word: str, known: Mapping[str, str]) -> str:
    """What ``known`` holds under the name nearest to ``word``; empty when none is near."""
    # A case slip is the commonest mistake and difflib counts it as a difference.
    folded = {name.casefold(): value for name, value in known.items()}
    close = get_close_matches(word.casefold(), folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else ""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that offers the nearest of ``known`` to ``word``, else lists them; empty when there are none."""
    names = sorted(set(known))
    if not names:
        return ""
    if close := closest(word, {name: name for name in names}):
        return f"did you mean {close!r}?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"known: {shown}"


def first_line(error: Exception) -> str:
    """The first line of an error's text, whoever raised it."""
    text = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
    return str(text).strip().partition("\n")[0]
