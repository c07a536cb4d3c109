# SPDX-License-Identifier: Apache-2.0
"""Installed plugins as data: what the entry points of the distributions say, without importing one.

A plugin that is broken, incompatible or claimed twice is a row with a reason; it becomes an error
only when that very plugin is asked for.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any, Literal

import modelslim
from modelslim.errors import PluginError, nearest

CORE = "modelslim"
RESTRICT = "MODELSLIM_PLUGINS"


@dataclass(frozen=True)
class Kind:
    """What one entry-point group holds.

    Attributes:
        noun: how people call one of it.
        offered_by: naming convention of the distributions that offer it; empty when there is none.
        is_package: True when an entry names a package of data files instead of an object.
        is_configured: True when the protocol configures it, so that a JSON Schema fragment must lie beside it.
    """

    noun: str
    offered_by: str = ""
    is_package: bool = False
    is_configured: bool = False


KINDS: Mapping[str, Kind] = {
    "adapters": Kind("adapter", "modelslim-adapter-<family>"),
    "models": Kind("model", "modelslim-adapter-<family>"),
    "algorithms": Kind("algorithm", "modelslim-algorithm-<name>", is_configured=True),
    "savers": Kind("saver", "modelslim-saver-<format>", is_configured=True),
    "runners": Kind("runner"),
    "plugins": Kind("vendor plugin"),
    "practices": Kind("package of practices", is_package=True),
    "calibration": Kind("package of calibration sets", is_package=True),
    "engines": Kind("package of engine contracts", is_package=True),
}
"""By the last part of the entry-point group's name, ``modelslim.<kind>``."""

Status = Literal["ok", "incompatible", "duplicate", "broken"]

_OBJECT = re.compile(r"(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*)\s*(?::\s*(?P<attribute>[^\W\d]\w*(?:\.[^\W\d]\w*)*))?")


@dataclass(frozen=True)
class Entry:
    """One entry point.

    Attributes:
        kind: a key of ``KINDS``; something else in a row that is broken for that reason.
        name: the word used on the command line or in YAML.
        value: where the object is, ``package.module:attribute``.
        distribution: the distribution that offers it.
        version: that distribution's version.
        status: ``ok``; ``incompatible``: made for another version of the core; ``duplicate``: claimed
            twice; ``broken``: malformed, or known not to load because it was tried.
        reason: why it is not ok; empty when it is.
    """

    kind: str
    name: str
    value: str
    distribution: str
    version: str
    status: Status = "ok"
    reason: str = ""

    @property
    def module(self) -> str:
        """The module part of the value."""
        return self.value.partition(":")[0].strip()

    @property
    def attribute(self) -> str:
        """The part of the value after the colon; empty when there is none."""
        return self.value.partition(":")[2].strip()

    @property
    def origin(self) -> str:
        """Distribution and version."""
        return f"{self.distribution} {self.version}".rstrip()

    @property
    def label(self) -> str:
        """What error messages call it."""
        return f"{KINDS[self.kind].noun} {self.name!r}"


@dataclass(frozen=True)
class Registry:
    """The entry points that were found.

    Attributes:
        entries: every row, sorted by kind, name and distribution.
        hidden: rows of distributions that the MODELSLIM_PLUGINS variable leaves out.
    """

    entries: tuple[Entry, ...]
    hidden: tuple[Entry, ...] = ()

    @classmethod
    def scan(cls, environ: Mapping[str, str] = os.environ) -> Registry:
        """Read the metadata of all installed distributions; imports none of them.

        Args:
            environ: environment variables. ``MODELSLIM_PLUGINS`` restricts to the distributions that it
                lists, separated by commas; the core is always seen. Unset: all; empty: only the core.

        Raises:
            PluginError: MODELSLIM_PLUGINS names a distribution that offers nothing.
        """
        found = list(_read_all())
        if RESTRICT not in environ:
            return cls(_ordered(_mark_duplicates(found)))
        wanted = {_canonical(name) for name in environ[RESTRICT].split(",") if name.strip()}
        known = {_canonical(entry.distribution) for entry in found}
        if unknown := sorted(wanted - known):
            raise PluginError(
                f"{RESTRICT} names {', '.join(unknown)}: no installed distribution of that name offers a plugin",
                hint=nearest(unknown[0], known),
            )
        seen = wanted | {CORE}
        visible = [entry for entry in found if _canonical(entry.distribution) in seen]
        hidden = [entry for entry in found if _canonical(entry.distribution) not in seen]
        return cls(_ordered(_mark_duplicates(visible)), _ordered(hidden))

    def names(self, kind: str) -> list[str]:
        """Names of that kind that can be used, sorted."""
        return [entry.name for entry in self._of(kind) if entry.status == "ok"]

    def claims(self, kind: str, name: str) -> bool:
        """True when an installed distribution offers the name, be it usable or not."""
        return any(entry.name == name for entry in self._of(kind))

    def load(self, kind: str, name: str) -> Any:
        """Import what the entry names: an object, or the package for practices and calibration sets.

        Raises:
            PluginError: unknown, incompatible, claimed twice, or it cannot be imported (the cause is chained).
        """
        entry = self._usable(kind, name)
        try:
            return _import(entry)
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{entry.label} of {entry.origin} cannot be loaded: {_text(error)}",
                hint=f"reinstall or repair {entry.distribution}; `modelslim plugins` shows the state of all plugins",
            ) from error

    def check(self) -> Registry:
        """The registry after trying to load every entry that is ok: those that fail are marked broken."""
        return replace(self, entries=tuple(self._checked(entry) for entry in self.entries))

    def schema(self, kind: str, name: str) -> dict[str, Any] | None:
        """The JSON Schema fragment ``<name>.schema.json`` in the plugin's top-level package; imports nothing.

        Returns:
            The fragment; None for a kind that the protocol does not configure and that has no such file.

        Raises:
            PluginError: unknown or unusable name, the fragment is missing, or it is not a JSON object.
        """
        entry = self._usable(kind, name)
        package = entry.module.partition(".")[0]
        folders = _folders(package)
        filename = f"{name}.schema.json"
        file = next((folder / filename for folder in folders if (folder / filename).is_file()), None)
        if file is None:
            if not KINDS[kind].is_configured:
                return None
            expected = folders[0] / filename if folders else f"{filename} in the package {package}, which is not there"
            raise PluginError(
                f"{entry.label} of {entry.origin} has no JSON Schema: expected {expected}",
                hint=f"the author of {entry.distribution} adds the file and lists it in package-data",
            )
        try:
            fragment = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise PluginError(
                f"the JSON Schema of {entry.label} of {entry.origin} is not valid JSON: {file}: {error}",
                hint=f"reinstall or repair {entry.distribution}",
            ) from error
        if not isinstance(fragment, dict):
            raise PluginError(
                f"the JSON Schema of {entry.label} of {entry.origin} is not a JSON object: {file}",
                hint=f"reinstall or repair {entry.distribution}",
            )
        return fragment

    def resource(self, kind: str, name: str) -> Path:
        """The folder of the package that the entry names, or of the top-level package of the object that it names.

        Raises:
            PluginError: unknown or unusable name, or the package does not exist.
        """
        entry = self._usable(kind, name)
        package = entry.module if KINDS[kind].is_package else entry.module.partition(".")[0]
        folders = _folders(package)
        if not folders:
            raise PluginError(
                f"{entry.label} of {entry.origin} has no folder: there is no package {package}",
                hint=f"reinstall or repair {entry.distribution}",
            )
        return folders[0]

    def _of(self, kind: str) -> list[Entry]:
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is not a kind of plugin; {nearest(kind, KINDS)}")
        return [entry for entry in self.entries if entry.kind == kind]

    def _usable(self, kind: str, name: str) -> Entry:
        rows = [entry for entry in self._of(kind) if entry.name == name]
        for entry in rows:
            if entry.status == "ok":
                return entry
        if not rows:
            raise PluginError(f"no {KINDS[kind].noun} is called {name!r}", hint=self._remedy(kind, name))
        entry = rows[0]
        if entry.status == "duplicate":
            raise PluginError(
                f"{entry.label} is {entry.reason}",
                hint=f"uninstall one of them, or choose with the {RESTRICT} environment variable",
            )
        remedy = {
            "incompatible": f"install a version of {entry.distribution} made for modelslim {modelslim.__version__}",
            "broken": f"reinstall or repair {entry.distribution}",
        }
        raise PluginError(
            f"{entry.label} of {entry.origin} is {entry.status}: {entry.reason}", hint=remedy[entry.status]
        )

    def _remedy(self, kind: str, name: str) -> str:
        for entry in self.hidden:
            if (entry.kind, entry.name) == (kind, name):
                return f"{entry.distribution} offers it and {RESTRICT} leaves it out: add it there"
        offered = nearest(name, self.names(kind))
        if offered.startswith("did you mean"):
            return offered
        install = "install a distribution that offers it"
        if KINDS[kind].offered_by:
            install += f", e.g. `pip install {KINDS[kind].offered_by}`"
        return f"{offered}; or {install}" if offered else install

    def _checked(self, entry: Entry) -> Entry:
        if entry.status != "ok":
            return entry
        try:
            _import(entry)
        except (Exception, SystemExit) as error:
            return replace(entry, status="broken", reason=_text(error))
        try:
            self.schema(entry.kind, entry.name)
        except PluginError as error:
            return replace(entry, status="broken", reason=error.message)
        return entry


def _read_all() -> Iterator[Entry]:
    """Every entry of every distribution; of two distributions of one name the first on the path counts."""
    names: set[str] = set()
    for found in metadata.distributions():
        if f"[{CORE}." not in (found.read_text("entry_points.txt") or ""):
            continue
        if "Name" not in found.metadata:
            reason = f"its distribution in {found.locate_file('')} has no METADATA file; installing it was interrupted"
            yield from (replace(entry, status="broken", reason=reason) for entry in _entries(found, "(unnamed)", ""))
            continue
        name = found.metadata["Name"]
        if _canonical(name) in names:
            continue
        names.add(_canonical(name))
        try:
            # The first of that name, which may offer nothing and still hides this one.
            first = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            first = found  # its folder is named otherwise than its metadata
        version = first.version if "Version" in first.metadata else ""
        entries = _entries(first, name, version)
        mismatch = _mismatch(first.requires or ())
        if mismatch is not None:
            status, reason = mismatch
            entries = [entry if entry.reason else replace(entry, status=status, reason=reason) for entry in entries]
        yield from entries


def _entries(distribution: metadata.Distribution, name: str, version: str) -> list[Entry]:
    """The distribution's entries in our groups, those with a malformed value marked broken."""
    entries, kind = [], ""
    # Read here and not by importlib, which raises on a line without "=" and keeps quiet about none.
    for line in (distribution.read_text("entry_points.txt") or "").splitlines():
        text = line.strip()
        if text.startswith("[") and text.endswith("]"):
            project, _, kind = text[1:-1].strip().partition(".")
            # Another group may be one of a later version; a misspelt one must not vanish.
            kind = kind if project == CORE and (kind in KINDS or _meant(kind)) else ""
        elif text and text[0] not in "#;" and kind:
            word, _, value = (part.strip() for part in text.partition("="))
            entry = Entry(kind, word, value, name, version)
            flaw = _flaw(entry)
            entries.append(replace(entry, status="broken", reason=flaw) if flaw else entry)
    return entries


def _flaw(entry: Entry) -> str:
    """What is malformed about an entry; empty when nothing is."""
    if entry.kind not in KINDS:
        return f"there is no entry-point group {CORE}.{entry.kind}; {_meant(entry.kind)}"
    match = _OBJECT.fullmatch(entry.value)
    if KINDS[entry.kind].is_package:
        return "" if match and not match["attribute"] else f"{entry.value!r} does not name a package"
    if match is None:
        return f"{entry.value!r} is not of the form package.module:name"
    # A vendor plugin may be a module.
    return "" if match["attribute"] or entry.kind == "plugins" else f"{entry.value!r} lacks the :name of the object"


def _meant(kind: str) -> str:
    """The kind that is meant by a misspelt one, as a question; empty when none comes near."""
    known = nearest(kind, KINDS)
    return known if known.startswith("did you mean") else ""


def _mismatch(requires: Iterable[str]) -> tuple[Status, str] | None:
    """Status and reason when the requirements do not admit this core."""
    for line in requires:
        if not re.match(rf"\s*{CORE}(?![\w.-])", line, re.IGNORECASE):
            continue
        from packaging.requirements import InvalidRequirement, Requirement

        try:
            requirement = Requirement(line)
        except InvalidRequirement as error:
            return "broken", f"its requirement {line!r} cannot be read: {str(error).splitlines()[0]}"
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        if not requirement.specifier.contains(modelslim.__version__, prereleases=True):
            return "incompatible", f"needs {CORE}{requirement.specifier}, installed is {modelslim.__version__}"
    return None


def _mark_duplicates(entries: Iterable[Entry]) -> list[Entry]:
    """Mark the entries that are usable by themselves and share kind and name."""
    entries = list(entries)
    claims = defaultdict(list)
    for entry in entries:
        if entry.status == "ok":
            claims[entry.kind, entry.name].append(entry.origin)
    marked = []
    for entry in entries:
        origins = claims.get((entry.kind, entry.name), [])
        if entry.status == "ok" and len(origins) > 1:
            twice = f"claimed by {' and '.join(origins)}" if len(set(origins)) > 1 else f"claimed twice by {origins[0]}"
            marked.append(replace(entry, status="duplicate", reason=twice))
        else:
            marked.append(entry)
    return marked


def _ordered(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    return tuple(sorted(entries, key=lambda entry: (entry.kind, entry.name, entry.distribution, entry.value)))


def _canonical(name: str) -> str:
    """A distribution's name as the packaging specifications compare it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _import(entry: Entry) -> Any:
    module = import_module(entry.module)
    return reduce(getattr, entry.attribute.split("."), module) if entry.attribute else module


def _folders(package: str) -> list[Path]:
    """The folders of a package, none when it does not exist; imports neither it nor a plugin's parents of it."""
    top, *parts = package.split(".")
    try:
        spec = util.find_spec(top)
    except ValueError:  # in sys.modules without a spec, as a script's __main__ is
        return []
    if spec is None or spec.submodule_search_locations is None:
        return []
    folders = [Path(location, *parts) for location in spec.submodule_search_locations]
    found = [folder for folder in folders if folder.is_dir()]
    if not found and package.startswith(f"{CORE}."):
        # Ours lie elsewhere in an editable installation; their parents are imported anyway.
        inner = util.find_spec(package)
        found = [Path(location) for location in inner.submodule_search_locations or ()] if inner else []
    return found


def _text(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".replace("\n", " ").removesuffix(": ")
