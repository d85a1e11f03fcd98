"""A page of runs side by side: one file of HTML, which needs neither a server nor the network."""

import html
from collections.abc import Sequence

from charlstm.report import curves
from charlstm.report.history import History, differing_settings
from charlstm.run.metrics import duration

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
tr[data-run] { cursor: pointer; }
tr.off { opacity: .35; }
i { display: inline-block; width: .8em; height: .8em; margin-right: .5em; }
.texts { display: flex; gap: 1rem; overflow-x: auto; }
.texts > div { flex: 1 0 20rem; max-width: 40rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #8881; padding: .7rem; }
svg { max-width: 100%; height: auto; background: #fff; }
"""
# Which runs are hidden stands in the address, so that it outlives a reload.
SCRIPT = """
const hidden = new Set(location.hash.slice(1).split(",").filter(Boolean));
function show() {
  for (const row of document.querySelectorAll("tr[data-run]")) {
    const run = row.dataset.run, off = hidden.has(run);
    row.classList.toggle("off", off);
    for (const part of document.querySelectorAll(`#curve-${run}, #train-${run}, .of-${run}`))
      part.style.display = off ? "none" : "";
  }
}
for (const row of document.querySelectorAll("tr[data-run]"))
  row.addEventListener("click", () => {
    const run = row.dataset.run;
    if (!hidden.delete(run)) hidden.add(run);
    history.replaceState(null, "", "#" + [...hidden].join(","));
    show();
  });
show();
"""


def render(runs: Sequence[History], value: str, by: str = "steps", reload: float = 0) -> str:
    """The page: a table, curves by steps, symbols or time, settings that differ, and samples by step.

    Args:
      value: the figure, such as bits_per_byte.
      reload: seconds after which a browser reads the file again; 0: never.

    Raises:
      ValueError: matplotlib is not installed.
    """
    again = f'<meta http-equiv="refresh" content="{reload:g}">' if reload else ""
    drawn = curves.svg(runs, value, by, legend=len(runs) <= curves.MOST_NAMED)  # the table has the colors, too
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><head><meta charset="utf-8">{again}',
            f"<title>{text(', '.join(run.name for run in runs))}</title><style>{STYLE}</style></head><body>",
            f"<h1>{len(runs)} run{'s' if len(runs) != 1 else ''}, {value.replace('_', ' ')}</h1>",
            _table(runs, value),
            "<p>Points: validation; thin lines: training. Click a run to hide it or to show it again.</p>",
            drawn[drawn.index("<svg") :],
            _settings(runs),
            _samples(runs),
            f"<script>{SCRIPT}</script></body></html>\n",
        ]
    )


def cells(run: History, value: str) -> dict[str, str]:
    """The row of a run as text, by the heads of its columns."""
    row = run.row(value)
    number = {name: "-" if row[name] is None else f"{row[name]:.4f}" for name in ("best", "last", "train")}
    speed = "-" if row["symbols_per_second"] is None else f"{row['symbols_per_second']:,.0f}"
    return {
        "run": row["run"],
        "state": row["state"],
        "step": f"{row['step']:,}/{row['num_steps']:,}",
        "best": number["best"] + ("" if row["best_step"] is None else f" at {row['best_step']:,}"),
        "last": number["last"],
        "train": number["train"],
        "symbols": f"{row['symbols']:,}",
        "symbols/s": speed,
        "parameters": f"{row['parameters']:,}",
        "time": "-" if row["seconds"] is None else duration(row["seconds"]),
    }


def _table(runs: Sequence[History], value: str) -> str:
    rows = [cells(run, value) for run in runs]
    head = "".join(f"<th>{name}</th>" for name in rows[0])
    lines = []
    for number, row in enumerate(rows):
        mark = f'<i style="background:{curves.COLORS[number % len(curves.COLORS)]}"></i>'
        first, *others = map(text, row.values())
        columns = f"<td>{mark}{first}</td>" + "".join(f"<td>{cell}</td>" for cell in others)
        lines.append(f'<tr data-run="{number}">{columns}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _settings(runs: Sequence[History]) -> str:
    if not (differing := differing_settings(runs)):
        return ""
    head = "".join(f'<th class="of-{n}">{text(run.name)}</th>' for n, run in enumerate(runs))
    lines = [
        f"<tr><td>{name}</td>" + "".join(f'<td class="of-{n}">{text(v)}</td>' for n, v in enumerate(values)) + "</tr>"
        for name, values in differing.items()
    ]
    return f"<h2>Settings that differ</h2><table><tr><th></th>{head}</tr>{''.join(lines)}</table>"


def _samples(runs: Sequence[History]) -> str:
    """The texts of each step side by side, the newest first and open."""
    by_step: dict[int, dict[int, str]] = {}
    for number, run in enumerate(runs):
        for sample in run.samples:
            by_step.setdefault(sample["step"], {})[number] = sample["prompt"] + sample["text"]
    parts = ["<h2>Samples</h2>"] if by_step else []
    for position, step in enumerate(sorted(by_step, reverse=True)):
        columns = "".join(
            f'<div class="of-{n}"><b>{text(runs[n].name)}</b><pre>{text(written)}</pre></div>'
            for n, written in sorted(by_step[step].items())
        )
        is_open = "" if position else " open"
        parts.append(f'<details{is_open}><summary>step {step:,}</summary><div class="texts">{columns}</div></details>')
    return "".join(parts)


def text(value: object) -> str:
    """Returns `value` as text of a page, its special characters escaped."""
    return html.escape(str(value))
