# SPDX-License-Identifier: Apache-2.0
"""report.html: a report as one page that needs no network and no other file."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from modelslim import __version__
from modelslim.disk import explained
from modelslim.module_sizes import star
from modelslim.plots import Panel, heat_map, panel

if TYPE_CHECKING:
    from jinja2 import Template

PAGE = "report.html"
_WORST = 20
_MODULES = 14
_ORIGIN = ("finished", "source", "protocol", "dataset", "libraries", "computer")


def write_page(report: Mapping[str, Any], folder: Path, name: str = PAGE) -> Path:
    """Write the page of a report.

    Args:
        report: contents of report.json.
        folder: where it goes.
        name: name of the file.

    Returns:
        The file.

    Raises:
        SaveError: it cannot be written.
    """
    file = folder / name
    with explained(file):
        file.write_text(render(report), encoding="utf-8")
    return file


def render(report: Mapping[str, Any]) -> str:
    """The page as HTML. What the report does not say is left out, of conversions and of older reports much."""
    return template().render(_view(report))


@cache
def template() -> Template:
    """The page without a report; compiled once in a process, since that takes longer than a small run."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.undefined = jinja2.StrictUndefined
    environment.filters |= {"size": size, "seconds": seconds, "number": number, "breakable": _breakable}
    text = files("modelslim").joinpath("report_page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(text)


def size(nbytes: float | None) -> str:
    """Bytes for people, such as ``1.3 GB``."""
    if nbytes is None:
        return "not known"
    value = float(nbytes)
    power = 0
    while abs(value) >= 1000 and power < 4:
        value /= 1000
        power += 1
    return f"{value:.{0 if not power or value >= 100 else 1}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def seconds(value: float) -> str:
    """Seconds for people."""
    if value < 100:
        return f"{value:.1f} s" if value >= 1 else f"{value * 1000:.0f} ms"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def number(value: float | None) -> str:
    """A number with three digits that count."""
    if value is None:
        return ""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _breakable(name: str) -> Any:
    """A dotted name that may break behind its dots."""
    from markupsafe import Markup, escape

    return Markup(".<wbr>").join(escape(part) for part in name.split("."))


def _view(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows."""
    units = list(report.get("units", ()))
    names = [".".join(unit["unit"].split(".")[-2:]) or "outside the units" for unit in units]
    before, after = report["bytes_before"], report["bytes_after"]
    qualities = [(unit["linears"].get(name, ""), name, one) for unit in units for name, one in _qualities(unit)]
    qualities.sort(key=lambda one: -one[2]["relative_error"])
    origin = {**dict.fromkeys(_ORIGIN), **report.get("provenance", {})}
    return {
        "report": report,
        "version": __version__,
        "model": Path(report["model_path"]).name or report["model_path"],
        "before": before,
        "after": after,
        "ratio": before / after if after else None,
        "modules": _modules(report.get("modules", ())),
        "worst": qualities[:_WORST],
        "judged": len(qualities),
        "median_error": median(one[2]["relative_error"] for one in qualities) if qualities else None,
        "error": _error_plot(units, names),
        "error_by_kind": _error_by_kind(units, names),
        "kl": {"texts": 0, "tokens": 0, "positions": 0, "notes": (), **(report.get("kl") or {})},
        "kl_plot": _kl_plot(report, units, names),
        "activations": _activations(units, names),
        "smoothed": any("after" in port for unit in units for port in unit.get("activations", ())),
        "experts": _experts(units),
        "fallen": [(name, fate) for unit in units for name, fate in unit.get("fell_back", {}).items()],
        "notes": [(name, note) for unit in units for name, said in unit.get("notes", {}).items() for note in said],
        "phases": _phases(report, units),
        "unit_seconds": panel(
            "Seconds per layer",
            names,
            [("seconds", [sum(unit["seconds"].values()) for unit in units])] if units else [],
            log=False,
            unit=" s",
        ),
        "unit_memory": panel(
            "Largest memory so far",
            names,
            _memory_series(units),
            log=False,
            unit=" MB",
        ),
        "origin": origin,
        "command": shlex.join(origin.get("command", ())),
        "total_seconds": sum(phase["seconds"] for phase in report.get("phases", ())),
    }


def _qualities(unit: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return list(unit.get("quality", {}).items())


def _modules(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The largest modules, and the rest as one."""
    most_rows = _MODULES if len(rows) > _MODULES + 1 else len(rows)
    shown = [dict(row) for row in rows[:most_rows]]
    if rest := rows[most_rows:]:
        schemes: Counter[str] = Counter()
        for row in rest:
            schemes.update(row["schemes"])
        sums = {key: sum(row[key] for row in rest) for key in ("bytes_before", "bytes_after")}
        shown.append({"module": f"{len(rest)} others", "schemes": dict(schemes), **sums})
    most = max((max(row["bytes_before"], row["bytes_after"]) for row in shown), default=1) or 1
    for row in shown:
        row["before_share"] = 100 * row["bytes_before"] / most
        row["after_share"] = 100 * row["bytes_after"] / most
    return shown


def _error_plot(units: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Panel | None:
    errors = [[one["relative_error"] for _, one in _qualities(unit)] for unit in units]
    worst = [max(found) if found else None for found in errors]
    middle = [median(found) if found else None for found in errors]
    return panel("", names, [("worst linear", worst), ("median", middle)], height=260)


def _kl_plot(report: Mapping[str, Any], units: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Panel | None:
    found = (report.get("kl") or {}).get("units", {})
    return panel("", names, [("KL so far", [found.get(unit["unit"]) for unit in units])], unit=" nats", height=260)


def _error_by_kind(units: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Panel]:
    """A panel for each kind of linear, all with one scale."""
    found: dict[str, list[float | None]] = {}
    for index, unit in enumerate(units):
        for name, one in _qualities(unit):
            line = found.setdefault(_kind(name, unit["unit"]), [None] * len(units))
            line[index] = max(line[index] or 0.0, one["relative_error"])
    return _panels(found, {}, names)


def _activations(units: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Panel]:
    before: dict[str, list[float | None]] = {}
    after: dict[str, list[float | None]] = {}
    for index, unit in enumerate(units):
        for port in unit.get("activations", ()):
            label = ", ".join(dict.fromkeys(_kind(name, unit["unit"]) for name in port["linears"]))
            for key, found in (("before", before), ("after", after)):
                largest = (port.get(key) or {}).get("largest")
                if largest is not None:
                    line = found.setdefault(label, [None] * len(units))
                    line[index] = max(line[index] or 0.0, largest)
    return _panels(before, after, names)


def _panels(
    first: Mapping[str, list[float | None]], second: Mapping[str, list[float | None]], names: Sequence[str]
) -> list[Panel]:
    """One panel per key, all with one scale of values."""
    values = [value for lines in (first, second) for line in lines.values() for value in line]
    shown = []
    for key, line in first.items():
        series = [("before", line)]
        if key in second:
            series.append(("after", second[key]))
        one = panel(key, names, series, among=values, height=120)
        if one is not None:
            shown.append(one)
    return shown


def _kind(name: str, unit: str) -> str:
    """A linear without its unit's name and its numbers, such as ``self_attn.q_proj``."""
    return star(name.removeprefix(f"{unit}.")) if unit else star(name)


def _experts(units: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    layers = {
        name: seen["tokens"] for unit in units for name, seen in unit.get("experts", {}).items() if seen["tokens"]
    }
    if not layers:
        return None
    idle = [f"{name}.{number}" for name, tokens in layers.items() for number, seen in enumerate(tokens) if not seen]
    rows = [
        (name, min(tokens), median(tokens), max(tokens), sum(not seen for seen in tokens))
        for name, tokens in layers.items()
    ]
    borrowed = sum(len(unit.get("borrowed", ())) for unit in units)
    return {"map": heat_map(list(layers.values())), "rows": rows, "idle": idle, "borrowed": borrowed}


def _phases(report: Mapping[str, Any], units: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Phases of the run; in place of that of the units, those of the units summed up."""
    inner: dict[str, dict[str, Any]] = {}
    for unit in units:
        for phase, took in unit["seconds"].items():
            one = inner.setdefault(phase, {"phase": phase, "seconds": 0.0, "peak_memory_bytes": None, "inner": True})
            one["seconds"] += took
            for key in ("peak_memory_bytes", "peak_device_memory_bytes"):
                peak = unit.get(key, {}).get(phase)
                if peak is not None:
                    one[key] = max(one.get(key) or 0, peak)
    shown: list[dict[str, Any]] = []
    for phase in report.get("phases", ()):
        shown.append({**phase, "inner": False})
        if phase["phase"] == "units":
            shown += inner.values()
    shown = shown or list(inner.values())
    most = max((phase["seconds"] for phase in shown), default=0) or 1
    return [{**phase, "share": 100 * phase["seconds"] / most} for phase in shown]


def _memory_series(units: Sequence[Mapping[str, Any]]) -> list[tuple[str, Sequence[float | None]]]:
    series: list[tuple[str, Sequence[float | None]]] = []
    for label, key in (("process", "peak_memory_bytes"), ("accelerator", "peak_device_memory_bytes")):
        values = [max(unit[key].values()) / 1e6 if unit.get(key) else None for unit in units]
        if any(value is not None for value in values):
            series.append((label, values))
    return series
