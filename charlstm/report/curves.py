"""Curves of runs, drawn by matplotlib or, in a terminal, by uniplot; both are imported where they are used."""

import contextlib
import importlib.util
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from charlstm.report.history import BY, History

PANELS, FEW = 3, 8  # side by side; different values that are drawn as categories if they are not floats
MOST_NAMED = 16  # curves whose legend has room within the axes
Points = tuple[list[float], list[float]]  # xs, ys

# Okabe and Ito, Color Universal Design, 2008: they stay apart in print and for color-blind eyes.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
SIGNS = "123456789abcdefghijklmnopqrstuvwxyz"  # of curves without color
STYLES = ("-", "--", ":", "-.")  # of the first 8 curves, the next 8, and so on
MISSING = "{} needs {}, which is not installed: pip install 'charlstm[compare]'"


def check_installed() -> None:
    """Raises ValueError where matplotlib, which all drawings but those in a terminal need, is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(MISSING.format("a plot", "matplotlib"))


def figure(runs: Sequence[History], value: str, by: str = "steps", legend: bool = True) -> Any:
    """A matplotlib figure: validation as lines with points, training thin behind it; run n has the gid curve-n.

    The legend of more than MOST_NAMED runs stands beside the axes, and the figure is larger by it.

    Raises:
      ValueError: matplotlib is not installed.
    """
    valid = {run.name: run.curve("valid", value, by) for run in runs}
    train = {run.name: run.curve("train", value, by) for run in runs}
    return _drawn(valid, train, BY[by], value.replace("_", " "), legend)


def svg(runs: Sequence[History], value: str, by: str = "steps", legend: bool = True) -> str:
    """The figure as SVG, the same text for the same runs."""
    return _as_svg(figure(runs, value, by, legend))


def png(runs: Sequence[History], value: str, by: str = "steps") -> tuple[bytes, str]:
    """The figure as PNG, and those characters of its names for which its font has nothing but boxes."""
    out, drawn = io.BytesIO(), figure(runs, value, by)
    with _lacking() as lacking:
        drawn.savefig(out, format="png", dpi=150)
    return out.getvalue(), "".join(lacking)


def lines_svg(lines: Mapping[str, Points], x_name: str, y_name: str) -> str:
    """Lines with points that no run has measured, by their names in the legend, as SVG.  Raises as `figure`."""
    return _as_svg(_drawn(lines, {}, x_name, y_name))


def slices_svg(slices: Mapping[str, tuple[list[Any], list[float]]], y_name: str) -> str:
    """Points of scores by the values of a setting, a panel for each, as SVG.  Raises as `figure`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(MISSING.format("a plot", "matplotlib")) from None
    rows = max(1, -(-len(slices) // PANELS))
    drawn = Figure(figsize=(9, 3 * rows), layout="constrained")
    panels = drawn.subplots(rows, PANELS, sharey=True, squeeze=False)
    for axes in panels.flat[len(slices) :]:
        axes.set_visible(False)
    for axes, (name, (values, scores)) in zip(panels.flat, slices.items(), strict=False):
        points = sorted(zip(values, scores, strict=True))  # categories are drawn in the order in which they come
        xs, ys = [x for x, _ in points], [y for _, y in points]
        few = len(set(xs)) <= FEW and not any(isinstance(x, float) for x in xs)
        numbers = not few and all(isinstance(x, int | float) for x in xs)
        axes.scatter(xs if numbers else [_as_it_is(str(x)) for x in xs], ys, color=COLORS[0], s=16)
        if numbers and xs[0] > 0 and xs[-1] >= 10 * xs[0]:
            axes.set_xscale("log")
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    for axes in panels[:, 0]:
        axes.set_ylabel(y_name)
    return _as_svg(drawn)


def _drawn(
    lines: Mapping[str, Points], behind: Mapping[str, Points], x_name: str, y_name: str, legend: bool = True
) -> Any:
    """A matplotlib figure of `lines`, with points, and thin ones `behind` them by the same names."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        raise ValueError(MISSING.format("a plot", "matplotlib")) from None
    drawn = Figure(figsize=(9, 4.5), layout="constrained")
    axes, shown, curves = drawn.subplots(), list[float](), list[Any]()
    for number, (name, (xs, ys)) in enumerate(lines.items()):
        color, style = COLORS[number % len(COLORS)], STYLES[number // len(COLORS) % len(STYLES)]
        thin_xs, thin_ys = behind.get(name, ([], []))
        width, alpha = (0.8, 0.45) if len(ys) > 1 else (1.6, 0.8)  # alone, they are what there is to see
        (thin,) = axes.plot(thin_xs, thin_ys, color=color, linestyle=style, lw=width, alpha=alpha)
        (thick,) = axes.plot(xs, ys, color=color, linestyle=style, lw=1.8, marker="o", ms=3.5)
        thin.set_gid(f"train-{number}")
        thick.set_gid(f"curve-{number}")
        curves.append(thick)
        shown += ys if len(ys) > 1 else [*ys, *thin_ys]
    if shown:  # the first steps, of a model that knows nothing, would make all the rest flat
        ordered = sorted(shown)
        least, most = ordered[0], ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
        margin = max(0.05 * (most - least), 0.02)
        axes.set_ylim(least - 2 * margin, most + 2 * margin)
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    if legend:
        _add_legend(drawn, curves, list(lines))
    return drawn


def _add_legend(drawn: Any, curves: Sequence[Any], names: Sequence[str]) -> None:
    """Names the curves within the axes, or in columns beside them where they are too many for that."""
    given = list(curves), [_as_it_is(name) for name in names]  # both, or names that begin with _ would be left out
    if len(names) <= MOST_NAMED:
        drawn.axes[0].legend(*given, frameon=False)
        return
    columns = min(3, -(-len(names) // 20))
    rows, width = -(-len(names) // columns), 0.6 + 0.08 * max(map(len, names))  # inches of a column
    drawn.set_size_inches(9 + columns * width, max(4.5, 0.5 + 0.21 * rows))
    drawn.legend(*given, loc="outside right upper", ncols=columns, frameon=False)


def _as_it_is(name: str) -> str:
    """Returns `name` as matplotlib is to be given it.

    It sets what stands between two dollars as a formula, and takes no lone surrogates, as a name that is not UTF-8 has.
    """
    return name.encode("utf-8", "replace").decode().replace("$", r"\$")


def _as_svg(drawn: Any) -> str:
    import matplotlib

    out = io.StringIO()
    with _lacking(), matplotlib.rc_context({"svg.hashsalt": "charlstm", "svg.fonttype": "none"}):
        drawn.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()  # its text is drawn by a browser, which has fonts of its own


@contextlib.contextmanager
def _lacking() -> Iterator[dict[str, None]]:
    """Yields the characters that matplotlib's font lacks, once the block has ended, in place of a warning for each."""
    found: dict[str, None] = {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield found
    for warning in told:
        if missing := re.match(r"Glyph (\d+) .*missing from", str(warning.message)):
            found[chr(int(missing[1]))] = None
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def in_terminal(runs: Sequence[History], value: str, by: str, width: int, color: bool) -> str:
    """Validation curves, training's where there are fewer than two scores, in block characters.

    Without color several curves are drawn with a digit or letter each, which the legend has, too.

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
    signs: dict[str, Any] = {}
    if not color and len(names) > 1:
        characters = list(SIGNS) * (len(names) // len(SIGNS) + 1)  # of more curves they come again, as colors do
        signs = {"character_set": "ascii", "force_ascii_characters": characters}
    how: dict[str, Any] = {"lines": True, "color": color, "width": width, "height": 14, "title": title, **signs}
    drawn = plot_to_string(ys, xs, legend_labels=names, **how)
    return drawn if isinstance(drawn, str) else "\n".join(drawn)
