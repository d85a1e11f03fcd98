"""A page of what models do inside as they read a text: one file of HTML, which needs neither a server nor the network.

The text is data wherever it stands: it comes to the page as JSON, compressed, and is put into text nodes; a content
security policy lets no other script run and nothing be fetched.
"""

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from charlstm.inspect.heatmap import STEPS, color
from charlstm.inspect.inspection import Inspection
from charlstm.inspect.patterns import visible
from charlstm.inspect.units import LEVELS, Unit, all_units, main_array

DARK = (27, 27, 27)
LARGE = 2_000_000  # values of a page, from which on they have a quarter of the levels: two thirds of the file
MARK = '<meta name="generator" content="charlstm inspect">'  # by which a page of ours is known
KEEPS = {"lstm": "f", "layer_norm_lstm": "f", "mlstm": "f", "gru": "u", "rnn": ""}  # the gate that keeps the state

SKELETON = """
<section class="run" data-run="{number}"><h2>{name}</h2><p class="about"></p>
<div class="bar">
<label>unit <input class="unit" autocomplete="off"></label>
<span><button class="previous" aria-label="previous unit">&larr;</button>
<button class="next" aria-label="next unit">&rarr;</button></span>
<label>values <select class="array"></select></label>
<label>color <select class="what"><option value="unit">the unit</option><option value="bits">surprise</option>
<option value="influence">influence on the clicked</option></select></label>
<label>scale <select class="scale"><option value="own">99 % of the unit's own</option>
<option value="fixed">-1 to 1</option></select></label>
<label><input type="checkbox" class="with-rows"> guesses under the text</label></div>
<div class="legend"></div>
<div class="columns"><div class="text" tabindex="0" aria-label="the text"></div><aside>
<div class="at">Point at a character for what was expected there; click it for what it depends on; select several
for the units that are on there.</div><div class="decay"></div>
<label>on is above <input type="range" class="threshold" min="-1" max="1" step="0.05" value="0.3"></label>
<div class="span"></div>
<details open><summary>units</summary><label>order <select class="sort"><option value="number">number</option>
<option value="memory">memory</option><option value="change">change</option></select></label>
<label>find <input class="search" size="9" placeholder="1:3, quotes"></label><div class="units list"></div></details>
<details open><summary>this unit</summary><div class="of-unit"></div></details>
<details><summary>gates of all units</summary><div class="gates"></div></details></aside></div>
<details open><summary>units that know a pattern</summary>
<p>Chosen on one half of the text, measured on the other.</p><div class="tables patterns"></div></details></section>
<script type="application/json" id="head-{number}">{head}</script>
<script type="text/plain" id="levels-{number}">{levels}</script>
"""


def render(inspections: Sequence[Inspection], unit: Unit | None = None) -> str:
    """The page of one or several models, side by side.

    Args:
      unit: with which each model that has it opens; the others, and without one all, with the best of their rankings.
    """
    script, style = _resource("page.js"), _resource("page.css") + _palette()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    names = html.escape(", ".join(inspection.name for inspection in inspections))
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{MARK}',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f"<title>{names}</title><style>{style}</style></head><body><h1>Inside {names}</h1>",
        "<p>Arrow keys show the next unit. With the text in focus, Shift and an arrow key go through its characters, "
        'and Enter clicks.</p><div class="runs">',
    ]
    for number, inspection in enumerate(inspections):
        head, levels = _packed(json.dumps(_head(inspection, unit)).encode()), _packed(_levels(inspection))
        filled = {"number": number, "name": html.escape(inspection.name), "head": head, "levels": levels}
        parts.append(SKELETON.format(**filled))
    return "\n".join([*parts, f"</div><script>{script}</script></body></html>\n"])


def _resource(name: str) -> str:
    return resources.files("charlstm.inspect").joinpath(name).read_text("utf-8")


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()


def _palette() -> str:
    """Classes of the diverging palette, v0 to v16, and of one hue, s0 to s8, on light and on dark ground."""

    def rules(ground: tuple[int, int, int], dim: float) -> str:
        def rule(name: str, step: int) -> str:
            red, green, blue = (round(part * (dim if step else 1)) for part in color(step, ground))
            return f".{name}{{background:rgb({red},{green},{blue})}}"

        both = [rule(f"v{step + STEPS}", step) for step in range(-STEPS, STEPS + 1)]
        return "".join([*both, *(rule(f"s{step}", step) for step in range(STEPS + 1))])

    return f"{rules((255, 255, 255), 1)}\n@media (prefers-color-scheme:dark){{{rules(DARK, 0.68)}}}\n"


def _levels(inspection: Inspection) -> bytes:
    """The levels of all arrays, unit by unit, then the saliency, as parts of 255 of each character's largest."""
    values = inspection.saliency
    largest = np.maximum(values.max(1, initial=0, keepdims=True), 1e-30)
    scaled = np.round(values / largest * 255).astype(np.uint8)
    arrays = list(inspection.arrays.values())
    if sum(array.size for array in arrays) > LARGE:
        zero = len(LEVELS) // 2
        arrays = [
            ((array.astype(int) - zero + 2) // 4 * 4 + zero).clip(0, 2 * zero).astype(np.uint8) for array in arrays
        ]
    return b"".join([*(array.T.tobytes() for array in arrays), scaled.tobytes()])


def _head(inspection: Inspection, unit: Unit | None) -> dict[str, Any]:
    model, text, expected = inspection.model, inspection.text, inspection.expected
    survey, count = inspection.survey, max(1, inspection.survey.symbols)
    places = {unit: place for place, unit in enumerate(all_units(model.config.model))}
    shown = [visible(character) for character in text]
    used = np.unique(expected.guesses)
    gates = {
        gate: {"low": _short(low / count), "high": _short(high / count), "mean": _short(total / count, 5)}
        for gate, (low, high, total) in survey.gates.items()
    }
    rankings = [
        {
            "name": name,
            "inside": ranking.inside,
            "symbols": ranking.symbols,
            "units": [
                [places[u.unit], round(u.auc, 4), round(u.f1, 3), u.is_low, round(u.threshold, 3)]
                for u in ranking.units
            ],
        }
        for name, ranking in inspection.rankings.items()
    ]
    probes = [
        {"name": p.pattern, "auc": p.auc, "strength": p.strength, "units": [[places[u], w] for u, w in p.weights]}
        for p in inspection.probes
    ]
    best = [places[ranking.units[0].unit] for ranking in list(inspection.rankings.values())[:1]]
    opened = unit and places.get(unit._replace(array=main_array(model.config.model)))
    return {
        "about": _about(inspection),
        "place": next((place for place in (opened, *best) if place is not None), 0),
        "array": list(inspection.arrays).index(unit.array) if unit and unit.array in inspection.arrays else 0,
        "widths": model.config.model.widths,
        "arrays": list(inspection.arrays),
        "chars": shown,
        "newlines": [place for place, character in enumerate(text) if character == "\n"],
        "signs": [place for place, character in enumerate(text) if shown[place] != character],
        "bits": _short(expected.bits),
        "entropy": _short(expected.entropy),
        "rank": expected.rank.tolist(),
        "guesses": expected.guesses.shape[1],
        "guess": np.searchsorted(used, expected.guesses).ravel().tolist(),
        "probability": np.round(expected.probabilities.ravel() * 1000).astype(int).tolist(),
        "words": [_word(inspection, int(symbol)) for symbol in used],
        "lookback": inspection.saliency.shape[1],
        "influence": _short(inspection.saliency.max(1, initial=0), 4),
        "gates": gates,
        "keeps": KEEPS[model.config.model.cell],
        "rankings": rankings,
        "probes": probes,
        "snippets": [
            [[["".join(map(visible, part)) for part in snippet] for snippet in end[:4]] for end in ends]
            for ends in inspection.snippets
        ],
    }


def _short(values: np.ndarray, digits: int = 3) -> list[float]:
    return np.round(np.asarray(values, np.float64), digits).tolist()


def _word(inspection: Inspection, symbol: int) -> str:
    """A symbol as a guess: a character, · for a space, or a byte that is part of a character in hexadecimal digits."""
    vocabulary = inspection.model.vocabulary
    if vocabulary.kind == "bytes" and symbol >= 0x80:
        return f"⟦{symbol:02X}⟧"
    character = vocabulary.decode(np.array([symbol]))
    return "·" if character == " " else visible(character)


def _about(inspection: Inspection) -> str:
    model, text, expected = inspection.model, inspection.text, inspection.expected
    settings = model.config.model
    words = [
        f"{settings.cell}, {' + '.join(map(str, settings.widths))} units, step {model.step:,}.",
        f"{len(text):,} characters at {expected.bits.mean():.3f} bits each, {expected.bits.sum():,.0f} together.",
    ]
    if inspection.left_out:
        words.append(f"{inspection.left_out:,} more were read for patterns, gates and places, and are not shown.")
    if inspection.unknown:
        words.append(f"{inspection.unknown:,} symbols are not in the vocabulary; the model read them as unknown.")
    return " ".join(words)
