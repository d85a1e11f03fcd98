"""A text with a value of each character as its background: in a terminal, and as SVG.

The palette diverges from blue (low) through the background to orange (high): eyes that confuse red and green can tell
them apart.
"""

import html
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from charlstm.inspect.patterns import columns, visible

LOW, HIGH = (107, 174, 214), (253, 141, 60)
STEPS = 8  # on either side of 0
MARK = "<!-- charlstm inspect -->"  # by which a picture of ours is known
WIDTH = 80
CELL_WIDTH, LINE_HEIGHT, FONT = 9, 20, 15  # of SVG


def classes(values: np.ndarray, largest: float = 1.0) -> np.ndarray:
    """Returns the step of the palette of each value, int, -STEPS (low) to STEPS (high); `largest` has the last one."""
    return np.clip(np.round(values / (largest or 1) * STEPS), -STEPS, STEPS).astype(int)


def own_scale(values: np.ndarray) -> float:
    """Returns the size that 99 % of the values do not exceed."""
    return float(np.quantile(np.abs(values), 0.99)) or 1.0


def color(step: int, ground: tuple[int, int, int] = (255, 255, 255)) -> tuple[int, int, int]:
    """Returns red, green and blue of a step of the palette, 0 to 255."""
    end, share = (HIGH if step > 0 else LOW), abs(step) / STEPS
    red, green, blue = (round(g + (e - g) * share) for g, e in zip(ground, end, strict=True))
    return red, green, blue


def wrapped(text: Sequence[str], width: int = WIDTH) -> Iterator[list[int]]:
    """Yields the positions of the characters of each line: it ends after its newline, or is cut at `width` columns."""
    line: list[int] = []
    used = 0
    for position, character in enumerate(text):
        length = columns(visible(character))
        if line and used + length > width:
            yield line
            line, used = [], 0
        line.append(position)
        used += length
        if character == "\n":
            yield line
            line, used = [], 0
    if line:
        yield line


def in_terminal(text: str, values: np.ndarray, colors: int, width: int = WIDTH, largest: float = 1.0) -> str:
    """The text on colored ground.

    Args:
      values: `[characters]`.
      colors: that the terminal has: 1 << 24, 256, or 0 for a line of digits under each line of text, 1 to 8 for the
        size of a value, with a - under it where it is negative.
    """
    step, lines = classes(values, largest), []
    for line in wrapped(text, width):
        if not colors:
            lines += _plain(text, step, line)
            continue
        parts, last = [], None
        for position in line:
            if step[position] != last:
                last = int(step[position])
                parts.append(_escape(last, colors))
            parts.append(visible(text[position]))
        lines.append("".join(parts) + "\x1b[0m")
    return "\n".join(lines)


def _plain(text: str, step: np.ndarray, line: list[int]) -> list[str]:
    shown = [visible(text[position]) for position in line]
    widths = list(map(columns, shown))
    sizes = "".join((str(abs(step[p])) if step[p] else " ").ljust(n) for p, n in zip(line, widths, strict=True))
    signs = "".join(("-" if step[p] < 0 else " ").ljust(n) for p, n in zip(line, widths, strict=True))
    return [row for row in ("".join(shown), sizes.rstrip(), signs.rstrip()) if row] + [""]


def _escape(step: int, colors: int) -> str:
    if not step:
        return "\x1b[0m"
    red, green, blue = color(step)
    if colors > 256:
        return f"\x1b[30;48;2;{red};{green};{blue}m"
    cube = 16 + 36 * round(red / 51) + 6 * round(green / 51) + round(blue / 51)
    return f"\x1b[30;48;5;{cube}m"


def legend(colors: int, largest: float = 1.0) -> str:
    """The palette with its numbers, in one line."""
    if not colors:
        return f"1 to {STEPS}: sizes up to {largest:.2g}; - under it: negative"
    ramp = "".join(_escape(step, colors) + " " for step in range(-STEPS, STEPS + 1)) + "\x1b[0m"
    return f"{-largest:.2g} {ramp} {largest:.2g}"


def svg(text: str, values: np.ndarray, title: str, width: int = WIDTH, largest: float = 1.0) -> str:
    """The heat-map as SVG: a rectangle for each run of one color, a text for each line and its wide characters."""
    step, lines, parts = classes(values, largest), list(wrapped(text, width)), []
    for number, line in enumerate(lines):
        top, column = 2.4 * LINE_HEIGHT + number * LINE_HEIGHT, 0
        run_start, run_step = 0, 0
        for position in [*line, None]:
            now = 0 if position is None else int(step[position])
            if now != run_step or position is None:
                if run_step:
                    parts.append(_rectangle(run_start, column - run_start, top, run_step))
                run_start, run_step = column, now
            if position is not None:
                column += columns(visible(text[position]))
        parts += _texts([visible(text[position]) for position in line], top + 0.72 * LINE_HEIGHT)
    whole_width, height = 20 + width * CELL_WIDTH, 2.4 * LINE_HEIGHT + len(lines) * LINE_HEIGHT + 10
    scale = [_rectangle(46 + n * 2, 2, 8, s) for n, s in enumerate(range(-STEPS, STEPS + 1)) if s]
    low, high = (f'<text x="{x}" y="24" font-size="12">{n:.2g}</text>' for x, n in ((380, -largest), (738, largest)))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(whole_width, 780)}" height="{height:g}" '
            f'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="{FONT}">',
            MARK,
            '<rect width="100%" height="100%" fill="#fff"/>',
            f'<text x="10" y="24" font-family="sans-serif" font-weight="bold">{html.escape(title)}</text>',
            *scale,
            low + high,
            *parts,
            "</svg>\n",
        ]
    )


def _texts(shown: Sequence[str], y: float) -> Iterator[str]:
    """Yields a line's texts: wide characters apart from others, as a font need not make them twice as wide."""
    column = 0
    for _, group in itertools.groupby(shown, lambda one: columns(one) > len(one)):
        together = "".join(group)
        where = f'x="{10 + column * CELL_WIDTH}" y="{y:g}" textLength="{columns(together) * CELL_WIDTH}"'
        yield f'<text {where} lengthAdjust="spacingAndGlyphs" xml:space="preserve">{html.escape(together)}</text>'
        column += columns(together)


def _rectangle(column: int, columns: int, top: float, step: int) -> str:
    fill = "#{:02x}{:02x}{:02x}".format(*color(step))
    size = f'width="{columns * CELL_WIDTH}" height="{LINE_HEIGHT}"'
    return f'<rect x="{10 + column * CELL_WIDTH}" y="{top:g}" {size} fill="{fill}"/>'
