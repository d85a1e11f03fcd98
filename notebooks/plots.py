"""How the notebooks' figures look: quiet axes, and colors that stay apart in print and for color-blind eyes."""

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display

# Okabe and Ito, Color Universal Design, 2008.
BLUE, ORANGE, GREEN, PINK, SKY, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000"
CELLS = {"RNN": ORANGE, "GRU": GREEN, "LSTM": BLUE, "capped LSTM": SKY}


def style() -> None:
    plt.rcParams.update(
        {
            "figure.dpi": 90,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "legend.frameon": False,
            "font.size": 10,
        }
    )


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over `width` neighbors of each value, fewer at the ends."""
    kernel = np.ones(min(width, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def say(text: str) -> None:
    """Shows Markdown with figures in it that were computed just now."""
    display(Markdown(text))


def table(head: list[str], rows: list[list]) -> None:
    """Shows a table."""
    lines = [head, ["---"] * len(head), *rows]
    say("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines))


def side_by_side(texts: dict[str, str], width: int, lines: int) -> None:
    """Prints texts in columns of `width` characters, each under its name; long lines go on in the next."""
    columns = []
    for name, text in texts.items():
        clean = "".join(c if c.isprintable() or c == "\n" else "?" for c in text.replace("\t", "    "))
        folded = [line[i : i + width] for line in clean.split("\n") for i in range(0, max(len(line), 1), width)]
        columns.append([name, "-" * width, *folded[:lines]])
    for row in range(lines + 2):
        print("   ".join((c[row] if row < len(c) else "").ljust(width) for c in columns).rstrip())
