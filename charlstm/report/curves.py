"""Curves of runs, drawn by matplotlib or, in a terminal, by uniplot; both are imported where they are used."""

import io
from collections.abc import Sequence
from typing import Any

from charlstm.report.history import BY, History

# Okabe and Ito, Color Universal Design, 2008: they stay apart in print and for color-blind eyes.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
MISSING = "{} needs {}, which is not installed: pip install 'charlstm[compare]'"


def figure(runs: Sequence[History], value: str, by: str = "steps") -> Any:
    """A matplotlib figure: validation as lines with points, training thin behind it; run n has the gid curve-n.

    Raises:
      ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        raise ValueError(MISSING.format("a plot", "matplotlib")) from None
    drawn = Figure(figsize=(9, 4.5), layout="constrained")
    axes = drawn.subplots()
    shown = []
    for number, run in enumerate(runs):
        color, style = COLORS[number % len(COLORS)], "-" if number < len(COLORS) else "--"
        (thin,) = axes.plot(*run.curve("train", value, by), color=color, linestyle=style, lw=0.8, alpha=0.45)
        xs, ys = run.curve("valid", value, by)
        (thick,) = axes.plot(xs, ys, color=color, linestyle=style, lw=1.8, marker="o", ms=3.5, label=run.name)
        thin.set_gid(f"train-{number}")
        thick.set_gid(f"curve-{number}")
        shown += ys or run.curve("train", value, by)[1]
    if shown:  # the first steps, of a model that knows nothing, would make all the rest flat
        ordered = sorted(shown)
        least, most = ordered[0], ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
        margin = max(0.05 * (most - least), 0.02)
        axes.set_ylim(least - 2 * margin, most + 2 * margin)
    axes.set_xlabel(BY[by])
    axes.set_ylabel(value.replace("_", " "))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return drawn


def svg(runs: Sequence[History], value: str, by: str = "steps") -> str:
    """The figure as SVG, the same text for the same runs."""
    drawn, out = figure(runs, value, by), io.StringIO()
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "charlstm", "svg.fonttype": "none"}):
        drawn.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def in_terminal(runs: Sequence[History], value: str, by: str, width: int, color: bool) -> str:
    """Validation curves, training's where there are fewer than two scores, in block characters.

    Raises:
      ValueError: uniplot is not installed.
    """
    try:
        from uniplot import plot_to_string
    except ImportError:
        raise ValueError(MISSING.format("a curve in the terminal", "uniplot")) from None
    xs, ys, names = [], [], []
    for run in runs:
        split = "valid" if len(run.curve("valid", value)[0]) > 1 else "train"
        x, y = run.curve(split, value, by)
        if x:
            xs.append(x)
            ys.append(y)
            names.append(run.name if split == "valid" else f"{run.name} (training)")
    if not xs:
        return "no run has measured anything yet"
    title = f"{value.replace('_', ' ')} by {BY[by]}"
    drawn = plot_to_string(ys, xs, lines=True, color=color, legend_labels=names, width=width, height=14, title=title)
    return drawn if isinstance(drawn, str) else "\n".join(drawn)
