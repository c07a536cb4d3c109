# SPDX-License-Identifier: Apache-2.0
"""An analysis as a picture: one bar per part, in the order of the ranking."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from modelslim.analysis.scores import Analysis
from modelslim.errors import SaveError, UsageError

FORMATS = (".png", ".svg", ".pdf")
_BARS = 60  # names that one picture can show


def require_plotting(file: Path) -> None:
    """Refuse a plot that could not be drawn, before anything is measured.

    Raises:
        UsageError: the plotting library is not installed, or the file has no known suffix.
    """
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib, which is not installed", hint="pip install 'modelslim[plot]'")
    if file.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot {file}: unknown kind of file", hint=f"name it with {', '.join(FORMATS)}")
    if not file.parent.is_dir():
        raise UsageError(f"--plot {file}: there is no directory {file.parent}", hint="make it first")


def draw(analysis: Analysis, file: Path) -> None:
    """Draw the worst scores; those below are one line of text.

    Raises:
        SaveError: the file cannot be written.
    """
    # The object interface: no window system is looked for, and no state is left behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scores = [one for one in analysis.scores if one.score is not None]
    shown = scores[:_BARS]
    figure = Figure(figsize=(10, 1.5 + 0.2 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.barh([one.name for one in shown], [one.score or 0.0 for one in shown], color="#4878a8")
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    axes.margins(y=0.01)
    axes.set_xlabel(analysis.metric)
    more = f", the {len(shown)} largest of {len(scores)}" if len(shown) < len(scores) else ""
    axes.set_title(f"{analysis.scope}: {analysis.metric}{more}", fontsize=10, loc="left")
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise SaveError(f"{file}: {error.strerror}", hint="choose another place for --plot") from error
