# SPDX-License-Identifier: Apache-2.0
"""``apiversion: modelslim_convert``: the existing tool's YAML of a conversion, as what does the same here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from modelslim.errors import Diagnostic, ProtocolError, nearest
from modelslim.protocol.document import Document, Steps, read_document
from modelslim.registry import Registry

APIVERSION = "modelslim_convert"
FLOAT, MXFP8 = "FLOAT", "W8A8_MXFP8"
"""What its linears may become: plain weights in the model's dtype, and a scheme that needs no calibration."""

_FLOAT_FORMATS = ("huggingface", "hf", "float")
_QCONFIG = {
    MXFP8: {"act": {"dtype": "mxfp8", "scope": "per_block"}, "weight": {"dtype": "mxfp8", "scope": "per_block"}},
}
_QUANTIZES = "linear_quant"
_KEYS = {
    "spec": ("preprocess", "linears", "save", "parallel"),
    "linears": ("match", "target", "route"),
    "save": ("type", "part_file_size"),
}


@dataclass(frozen=True)
class ConversionRequest:
    """What the YAML asks for.

    Attributes:
        to: name of the saver that writes the result, or ``float``.
        part_file_size: GiB of a weight file; None for the saver's default.
        protocol: the protocol of ``quant`` that does it, where linears become quantized; None for a conversion.
        warnings: what of it has no effect here.
    """

    to: str
    part_file_size: float | None = None
    protocol: Mapping[str, Any] | None = None
    warnings: Sequence[str] = ()

    @contextmanager
    def protocol_file(self) -> Iterator[Path]:
        """The protocol of ``quant`` in a file, for the time of the context."""
        with TemporaryDirectory(prefix="modelslim-") as name:
            file = Path(name) / "quant.yaml"
            file.write_text(yaml.safe_dump(self.protocol, sort_keys=False), encoding="utf-8")
            yield file


def read_conversion(path: Path) -> ConversionRequest | None:
    """Read a YAML file; None when it is of another apiversion, or of none.

    Raises:
        ProtocolError: it cannot be read, or asks for what is not there; carries every mistake.
    """
    document = read_document(path)
    value = document.value
    if not isinstance(value, dict) or value.get("apiversion") != APIVERSION:
        return None
    reader = _Reader(document, Registry.scan())
    request = reader.request(value.get("spec"))
    if reader.mistakes:
        count = len(reader.mistakes)
        raise ProtocolError(f"{path}: {count} mistake{'s' if count > 1 else ''}", diagnostics=reader.mistakes)
    return request


@dataclass
class _Reader:
    """Reads the document and notes what is wrong with it."""

    document: Document
    registry: Registry
    mistakes: list[Diagnostic] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def request(self, spec: Any) -> ConversionRequest:
        """What ``spec`` asks for; only good when there are no mistakes."""
        if not isinstance(spec, dict):
            self._refuse("spec must say what becomes of the linears", ("spec",), "linears: and save:")
            return ConversionRequest("")
        self._known(spec, "spec", ("spec",))
        if spec.get("preprocess"):
            hint = "leave preprocess out"
            self._refuse("stored names are known to the model's adapter and stay", ("spec", "preprocess"), hint)
        if spec.get("parallel"):
            self._warn("has no effect: linears are converted one after another", ("spec", "parallel"))
        to, size = self._save(spec.get("save"))
        matches = self._linears(spec.get("linears", []), to)
        if MXFP8 not in matches:
            if FLOAT in matches and "*" not in matches[FLOAT]:
                hint = 'match: ["*"]'
                self._refuse("a conversion to FLOAT is one of all linears", ("spec", "linears"), hint)
            return ConversionRequest(to, size, None, self.warnings)
        process = {"type": _QUANTIZES, "qconfig": _QCONFIG[MXFP8], "include": matches[MXFP8]}
        if FLOAT in matches:
            process["exclude"] = matches[FLOAT]
        save = {"type": to} if size is None else {"type": to, "part_file_size": size}
        protocol = {"apiversion": "modelslim_v1", "spec": {"process": [process], "save": [save]}}
        return ConversionRequest(to, size, protocol, self.warnings)

    def _save(self, save: Any) -> tuple[str, float | None]:
        place: Steps = ("spec", "save")
        if not isinstance(save, list) or len(save) != 1 or not isinstance(save[0], dict):
            self._refuse("must be a list with one entry", place, "such as - type: huggingface")
            return "", None
        self._known(save[0], "save", (*place, 0))
        word, size = save[0].get("type"), save[0].get("part_file_size")
        if size is not None and (not isinstance(size, int | float) or isinstance(size, bool) or size < 0):
            self._refuse("must be a number of GiB, 0 for one file", (*place, 0, "part_file_size"))
            size = None
        names = self.registry.names("savers")
        to = next((name for name in names if _plain(name) == _plain(str(word))), "")
        if word in _FLOAT_FORMATS:
            to = "float"
        elif not to:
            self._refuse(
                f"no format is called {word!r}", (*place, 0, "type"), nearest(str(word), [*names, "huggingface"])
            )
        return to, size

    def _linears(self, linears: Any, to: str) -> dict[str, list[str]]:
        """The patterns of each target."""
        place: Steps = ("spec", "linears")
        found: dict[str, list[str]] = {}
        if not isinstance(linears, list):
            self._refuse("must be a list of match and target", place)
            return found
        for number, entry in enumerate(linears):
            here = (*place, number)
            if not isinstance(entry, dict):
                self._refuse("must have match and target", here)
                continue
            self._known(entry, "linears", here)
            match, target = entry.get("match"), entry.get("target")
            patterns = [match] if isinstance(match, str) else match
            if not isinstance(patterns, list) or not patterns or not all(isinstance(one, str) for one in patterns):
                self._refuse("match must be a pattern of names, or a list of such", here)
                continue
            if target not in (FLOAT, MXFP8):
                hint = "another scheme is quantized: `apiversion: modelslim_v1` with a processor for it"
                self._refuse(f"target must be {FLOAT} or {MXFP8}, not {target!r}", here, hint)
                continue
            if target == MXFP8 and to == "float":
                self._refuse(f"{MXFP8} linears are no float model", here, "save them with a quantized format")
            if target == FLOAT and to not in ("", "float") and len(linears) == 1:
                self._refuse("FLOAT linears are a float model", here, "type: huggingface")
            if entry.get("route", "auto") != "auto":
                self._warn("has no effect: there is one way to each target", (*here, "route"))
            found.setdefault(target, []).extend(patterns)
        return found

    def _known(self, entry: Mapping[str, Any], what: str, place: Steps) -> None:
        for key in entry:
            if key not in _KEYS[what]:
                diagnostic = self.document.diagnostic
                hint = nearest(str(key), _KEYS[what])
                self.mistakes.append(diagnostic(f"unknown key '{key}'", (*place, key), key=True, hint=hint))

    def _refuse(self, message: str, place: Steps, hint: str = "") -> None:
        self.mistakes.append(self.document.diagnostic(message, place, hint=hint))

    def _warn(self, message: str, place: Steps) -> None:
        self.warnings.append(str(self.document.diagnostic(message, place)))


def _plain(name: str) -> str:
    """A saver's name as the existing tool may write it: ``ascend_v1`` for ``ascendv1_saver``."""
    return name.removesuffix("_saver").replace("_", "").replace("-", "").lower()
