# SPDX-License-Identifier: Apache-2.0
"""Practices: protocols that ship with adapters or lie in a folder of the user's, and what each says about itself."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from modelslim.adapters import GENERIC
from modelslim.errors import ProtocolError, UsageError, nearest
from modelslim.protocol.compose import refuse_apiversion
from modelslim.protocol.document import read_document
from modelslim.quant_type import QuantType
from modelslim.registry import Registry

FOLDERS = "MSMODELSLIM_CUSTOM_PRACTICE_REPO"
"""Environment variable with folders of practices, separated as in PATH."""
ANY = "*"
Source = Literal["folder", "generic adapter", "adapter", "package"]
DEFAULT_SCORE = 100.0


@dataclass(frozen=True)
class Practice:
    """A protocol and what its ``metadata`` says.

    Attributes:
        config_id: its name.
        file: the YAML file.
        origin: distribution and version that ship it; of a custom one its folder.
        distribution: name of that distribution; empty for a custom one.
        source: ``folder`` of the user's, or whether the distribution offers the generic adapter, one of a family, or
            none, so that it is a package of practices for models that others serve.
        quant_type: what it quantizes to; None when its label does not say.
        score: rank among practices that fit equally well.
        evidence: ``measured`` or ``structural``.
        notes: what people should know.
        verified_model_types: published names of models for which it is verified.
        verified_tags: by published name, the scenarios in which it is verified, each a list of tags.
        model_types: patterns of models that it is made for; empty when it does not say.
        saver: name of its first saver; empty when there is none.
        problem: why it cannot be used; empty when it can.
    """

    config_id: str
    file: Path
    origin: str
    distribution: str = ""
    source: Source = "folder"
    quant_type: QuantType | None = None
    score: float = DEFAULT_SCORE
    evidence: str = "structural"
    notes: str = ""
    verified_model_types: tuple[str, ...] = ()
    verified_tags: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    model_types: tuple[str, ...] = ()
    saver: str = ""
    problem: str = ""

    @property
    def is_custom(self) -> bool:
        """True when it lies in a folder of the user's."""
        return self.source == "folder"

    @property
    def verified(self) -> list[str]:
        """Models for which it is verified."""
        return sorted({*self.verified_model_types, *self.verified_tags})

    def made_for(self, names: Sequence[str]) -> str:
        """The pattern of ``model_types`` that fits one of the model's names, one that is not ``*`` first; or empty."""
        for pattern in sorted(self.model_types, key=lambda one: one == ANY):
            if any(fnmatchcase(name, pattern) for name in names):
                return pattern
        return ""

    def as_data(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "config_id": self.config_id,
            "quant_type": str(self.quant_type) if self.quant_type else None,
            "score": self.score,
            "evidence": self.evidence,
            "verified_model_types": list(self.verified_model_types),
            "verified_tags": {name: [list(one) for one in found] for name, found in self.verified_tags.items()},
            "model_types": list(self.model_types),
            "saver": self.saver,
            "notes": self.notes,
            "origin": self.origin,
            "file": str(self.file),
            "problem": self.problem,
        }


def find_practices(
    registry: Registry, folders: Sequence[Path] = (), environ: Mapping[str, str] = os.environ
) -> list[Practice]:
    """All practices, those that cannot be used too: of the user's folders first, then those that are installed.

    Args:
        registry: the installed plugins.
        folders: folders that the user names; searched with all that lies below them.
        environ: environment variables; ``MSMODELSLIM_CUSTOM_PRACTICE_REPO`` names further folders.

    Raises:
        UsageError: such a folder does not exist.
        PluginError: an installed package of practices does not exist.
    """
    named = [*folders, *(Path(name) for name in environ.get(FOLDERS, "").split(os.pathsep) if name.strip())]
    found: list[Practice] = []
    for folder in dict.fromkeys(one.expanduser() for one in named):
        if not folder.is_dir():
            where = FOLDERS if folder not in {one.expanduser() for one in folders} else "--practices"
            raise UsageError(f"{where} names {folder}, which is no folder", hint="a folder with YAML files")
        found += (read_practice(file, str(folder)) for file in _yaml_files(folder))
    for entry in registry.entries:
        if entry.kind == "practices" and entry.status == "ok":
            source = _source(entry.distribution, registry)
            for file in _yaml_files(registry.resource("practices", entry.name)):
                found.append(read_practice(file, entry.origin, entry.distribution, source))
    return found


def find_practice(name: str, practices: Sequence[Practice]) -> Practice:
    """The practice of a name; of several the first, which is a custom one before those that are installed.

    Raises:
        UsageError: there is none.
    """
    for practice in practices:
        if practice.config_id == name:
            return practice
    raise UsageError(f"no practice is called {name!r}", hint=nearest(name, (one.config_id for one in practices)))


def read_practice(file: Path, origin: str, distribution: str = "", source: Source = "folder") -> Practice:
    """What a file says about itself; one that is no practice says why in ``problem``."""

    def broken(problem: str) -> Practice:
        return Practice(file.stem, file, origin, distribution, source, problem=problem)

    try:
        value = read_document(file).value
    except ProtocolError as error:
        return broken("; ".join([error.message, *map(str, error.diagnostics)]))
    if not isinstance(value, dict) or not isinstance(value.get("apiversion"), str):
        return broken("it has no apiversion, so it is no protocol")
    metadata = value.get("metadata", {})
    mistake = _mistake(metadata)
    if mistake:
        return broken(mistake)
    if refusal := refuse_apiversion(value["apiversion"]):
        return broken(refusal[0])
    config_id = metadata.get("config_id", file.stem)
    if distribution and config_id != file.stem:
        return broken(f"its config_id is {config_id!r}; of a shipped practice it is the name of the file")
    verified = (*metadata.get("verified_model_types", ()), *metadata.get("verified_tags", {}))
    evidence = metadata.get("label", {}).get("evidence", "measured" if verified else "structural")
    if evidence == "measured" and not verified:
        return broken("its label says measured, and no model is listed as verified")
    spec = value.get("spec")
    savers = spec.get("save") if isinstance(spec, dict) else None
    first = savers[0] if isinstance(savers, list) and savers else {}
    return Practice(
        config_id=config_id,
        file=file,
        origin=origin,
        distribution=distribution,
        source=source,
        quant_type=_quant_type(metadata.get("label", {})),
        score=float(metadata.get("score", DEFAULT_SCORE)),
        evidence=evidence,
        notes=metadata.get("notes", "").strip(),
        verified_model_types=tuple(metadata.get("verified_model_types", ())),
        verified_tags=metadata.get("verified_tags", {}),
        model_types=tuple(metadata.get("model_types", ())),
        saver=str(first.get("type", "")) if isinstance(first, dict) else "",
    )


def _source(distribution: str, registry: Registry) -> Source:
    adapters = {one.name for one in registry.entries if one.kind == "adapters" and one.distribution == distribution}
    return "generic adapter" if GENERIC in adapters else "adapter" if adapters else "package"


def _quant_type(label: Mapping[str, Any]) -> QuantType | None:
    """The type that a label means; None when it lacks bits."""
    if "w_bit" not in label or "a_bit" not in label:
        return None
    # As the existing tool has it: attention that is quantized without a number of bits has 8.
    fa_bit = label.get("fa_bit", 8 if label.get("fa_quant") else 0)
    return QuantType(
        label["w_bit"], label["a_bit"], label.get("kv_cache", False), fa_bit, label.get("is_sparse", False)
    )


def _mistake(metadata: Any) -> str:
    """What is wrong with metadata; empty when nothing is."""
    from jsonschema.exceptions import best_match

    found = best_match(_metadata_schema().iter_errors(metadata))
    return "" if found is None else f"metadata{found.json_path.removeprefix('$')}: {found.message}"


@cache
def _metadata_schema() -> Any:
    from jsonschema import Draft7Validator

    text = files("modelslim.schemas").joinpath("modelslim_v1.schema.json").read_text(encoding="utf-8")
    return Draft7Validator(json.loads(text)["definitions"]["metadata"])


def _yaml_files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.suffix in (".yaml", ".yml") and file.is_file())
