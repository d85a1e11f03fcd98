"""Shows what the units of a run do, symbol by symbol: in the terminal, as a picture, or as a page.

    python -m launch.inspect --run_dir=runs/mine --text=file.txt --output=inside.html
    python -m launch.inspect --run_dir=runs/mine --text=file.txt --unit=1:85
    python -m launch.inspect --run_dir=runs/mine --text=file.txt --unit=1:85 --output=unit.svg
    python -m launch.inspect --run_dir=runs/mine --find='"[^"\\n]*"'

A unit is LAYER:UNIT, layers from 1 and units from 0: its cell state c as tanh(c), or h where the cell has no c; or
LAYER.ARRAY:UNIT, such as 1.h:85 or 1.f:85, with ARRAY h or a gate.  The page is one file, which needs neither a
server nor the network.  --find ranks all units by how well each alone tells whether a symbol is inside a
match: blocks of even number choose, those of odd number give the figures.  AUC is 0.5 by chance and 1 if it never errs.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from data_pipeline import startup

    startup.attach("launch.inspect")

import dataclasses
import itertools
import json
import shutil
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from charlstm import api
from charlstm.api import Model
from charlstm.config.model import ModelConfig
from charlstm.inference.evaluate import Split
from charlstm.inspect import heatmap, inspection, page, patterns, probe, ranking, units
from charlstm.run import corpus as corpus_lib
from charlstm.run import run_directory
from data_pipeline import signals
from data_pipeline.settings import check_choices, setting
from data_pipeline.shards import ArraySplit
from data_pipeline.vocabulary import Vocabulary
from launch.support import cli, flags, jax_setup, progress

MOST_SHOWN = 20_000  # characters of a page
MOST_SURVEYED = 200_000  # symbols of a split that a page is made of
COLORS = {"24bit": 1 << 24, "256": 256, "none": 0}


@dataclasses.dataclass(frozen=True)
class InspectFlags:
    """The run, the text, and what is shown."""

    run_dir: str = setting("", "The run to look into.  Required.")
    checkpoint: str = setting("best", "best (on validation; the newest where none was validated), latest, or a step.")
    other: str = setting("", "Another run, or RUN_DIR@CHECKPOINT, that reads the same text beside it on the page.")
    text: str = setting("", "A file of text to read; without it, the validation split of the run's own corpus.")
    unit: str = setting("", "The unit to show, or with which the page opens: LAYER:UNIT or LAYER.ARRAY:UNIT.")
    find: str = setting(
        "", f"Rank the units by a regular expression, or by one of these patterns: {', '.join(patterns.NAMED)}."
    )
    output: str = setting("", "Write this file: .html, the page; with --unit .svg, the heat-map.")
    overwrite: bool = setting(False, "Replace an --output that launch.inspect has not written.")
    length: int = setting(4000, f"Characters that are shown, at most {MOST_SHOWN}; of a text, the first.")
    arrays: str = setting("", "Other arrays that the page has beside c or h, such as h,f; all: all gates, too.")
    saliency: int = setting(
        24, "Characters before each one whose influence on it the page has; 0: none, which is fast."
    )
    probe: str = setting(
        "", "Patterns, separated by |, of which the page has a linear probe on all units (extra inspect)."
    )
    scale: str = setting(
        "own",
        "What the strongest color means: own, that 99 % of the unit's values are smaller, or fixed, 1 and -1.",
        choices=("own", "fixed"),
    )
    colors: str = setting(
        "auto", "Colors of the terminal: 24bit, 256, none, or auto, as it says of itself.", choices=("auto", *COLORS)
    )
    format: str = setting("text", "How --find prints the units: a table or one json object.", choices=("text", "json"))

    def __post_init__(self) -> None:
        check_choices(self)
        if not 1 <= self.length <= MOST_SHOWN:
            raise ValueError(f"length={self.length} must be from 1 to {MOST_SHOWN}: a page shows no more")
        if not 0 <= self.saliency <= 200:
            raise ValueError(f"saliency={self.saliency} must be from 0 to 200")
        if self.output and Path(self.output).suffix not in (".html", ".svg"):
            raise ValueError(f"output={self.output} is neither .html nor .svg")
        if self.output.endswith(".svg") and not self.unit:
            raise ValueError(f"output={self.output} is the heat-map of one unit: give --unit as well")

    @property
    def is_page(self) -> bool:
        """True if a page is made."""
        return self.output.endswith(".html")


def main(argv: Sequence[str]) -> int:
    (chosen,), _ = flags.parse(argv, __doc__ or "", InspectFlags())
    if not chosen.run_dir:
        raise ValueError("--run_dir is required: name the run to look into")
    if not (chosen.unit or chosen.find or chosen.output):
        raise ValueError("nothing to show: give --unit, --find or --output=inside.html")
    _check(chosen, flags.given_in(argv, __doc__ or "", InspectFlags()))
    jax_setup.keep_freed_memory()
    jax_setup.keep_compiled()
    model = api.load(chosen.run_dir, chosen.checkpoint)
    split = None if chosen.text else _own_split(model)
    text: Split | bytes = _read(chosen.text, model) if split is None else split
    if chosen.find:
        _print_ranking(
            ranking.units_for(model, text, chosen.find, progress=progress.shown("reading")),
            chosen.format,
        )
    if not (chosen.unit or chosen.output):
        return cli.DONE
    if split is not None:
        text = ArraySplit.of_ids(split.read(0, min(len(split), MOST_SURVEYED)), model.vocabulary)
    if chosen.is_page:
        unit = units.parse(chosen.unit, model.config.model) if chosen.unit else None
        _write(chosen.output, page.render(_inspections(chosen, model, text), unit))
    elif chosen.unit:
        _show_unit(chosen, model, text)
    return cli.DONE


def _check(chosen: InspectFlags, given: Collection[str]) -> None:
    """Refuses before all work what cannot be done, and flags that would have no part in it."""
    is_map = bool(chosen.unit) and not chosen.is_page
    of_page = chosen.is_page, "is of the page: give --output=inside.html as well"
    of_map = is_map, "is of one unit in the terminal or as .svg: leave it out, or give --unit alone"
    uses = {
        **dict.fromkeys(("other", "arrays", "saliency", "probe"), of_page),
        "length": (is_map or chosen.is_page, "is of the text that is shown: give --unit or --output as well"),
        "scale": of_map,
        "colors": (is_map and not chosen.output, "is of the terminal: leave it out, or give --unit alone"),
        "format": (bool(chosen.find), "is of --find: give that as well"),
        "overwrite": (bool(chosen.output), "is of --output: give that as well"),
    }
    for name in given:
        is_used, remedy = uses.get(name, (True, ""))
        if not is_used:
            raise ValueError(f"--{name} {remedy}")
    if chosen.output:
        _check_output(cli.output_file("output", chosen.output), chosen.overwrite)
    for pattern in filter(None, (chosen.find, *chosen.probe.split("|"))):
        ranking.pattern_of(pattern)
    if chosen.probe:
        probe.check_installed()
    config = run_directory.read(run_directory.named("run_dir", chosen.run_dir))[0].model
    if chosen.unit:
        units.parse(chosen.unit, config)
    _arrays(chosen, config)
    if chosen.other:
        _arrays(chosen, run_directory.read(_other(chosen.other)[0], "other")[0].model)


def _other(value: str) -> tuple[Path, str]:
    """Returns the run directory and the checkpoint, or "", of RUN_DIR@CHECKPOINT; a path may have an @ of its own."""
    run_dir, at, checkpoint = value.rpartition("@")
    if not at or run_directory.exists(run_directory.named("other", value)):
        return run_directory.named("other", value), ""
    return run_directory.named("other", run_dir), checkpoint


def _check_output(path: Path, overwrite: bool) -> None:
    """Refuses to replace a file that is not of this program."""
    if path.exists() and not overwrite:
        with path.open("rb") as file:
            begin = file.read(4096)
        if page.MARK.encode() not in begin and heatmap.MARK.encode() not in begin:
            raise ValueError(f"output={path} is there, and launch.inspect has not written it: add --overwrite")


def _read(name: str, model: Model) -> bytes:
    """Reads the text; says how many of its symbols the model does not know."""
    text = cli.read_file("text", name)
    if not text:
        raise ValueError(f"text={name} is empty: give one that has characters")
    if unknown := ArraySplit(text, model.vocabulary).unknown:
        signals.say(f"{unknown:,} symbols of {name} are not in the vocabulary, and read as unknown")
    return text


def _own_split(model: Model) -> Split:
    assert model.run_dir is not None
    corpus = corpus_lib.load_own(model.run_dir, model.config, ": give --text")
    return corpus.splits.get("valid") or corpus.splits["train"]


def _inspections(chosen: InspectFlags, model: Model, text: Split | bytes) -> list[inspection.Inspection]:
    models = {run_directory.name_of(run_directory.named("run_dir", chosen.run_dir)): model}
    if chosen.other:
        path, checkpoint = _other(chosen.other)
        at = f"@{checkpoint}" if checkpoint else ""
        name = run_directory.name_of(path) + at
        models[f"{path}{at}" if name in models else name] = api.load(path, checkpoint or "best")
    found, arrays_of = [], {name: _arrays(chosen, each.config.model) for name, each in models.items()}
    texts = {name: _in_vocabulary(text, each.vocabulary) for name, each in models.items()}
    probes = list(filter(None, chosen.probe.split("|")))
    for name, pattern in itertools.product(models, probes):
        probe.examples(models[name], texts[name], pattern)  # refuses now what it would after minutes
    for name, each in models.items():
        signals.say(f"reading the text with {name}, step {each.step}")
        read = inspection.inspect(
            each,
            texts[name],
            name,
            length=chosen.length,
            arrays=arrays_of[name],
            lookback=chosen.saliency,
            progress=progress.shown,
        )
        probed = [probe.probe(each, texts[name], pattern) for pattern in probes]
        found.append(dataclasses.replace(read, probes=probed))
        if read.left_out:
            signals.say(f"{len(read.text):,} of {len(read.text) + read.left_out:,} characters are shown (--length)")
    return found


def _in_vocabulary(text: Split | bytes, vocabulary: Vocabulary) -> Split | bytes:
    """Returns a text for a model: symbols of another vocabulary as the bytes of their text."""
    if isinstance(text, bytes) or text.vocabulary == vocabulary:
        return text
    return text.vocabulary.decode_bytes(text.read(0, len(text)))


def _arrays(chosen: InspectFlags, config: ModelConfig) -> tuple[str, ...]:
    """Returns the arrays that the page has of a model, that of --unit among them."""
    known = units.arrays_of(config)
    arrays = known if chosen.arrays == "all" else tuple(filter(None, chosen.arrays.split(",")))
    if unknown := [array for array in arrays if array not in known]:
        raise ValueError(f"arrays={chosen.arrays}: {unknown[0]!r} is none of {', '.join(known)}")
    of_unit = [array for array in known if f".{array}:" in chosen.unit]
    return tuple(dict.fromkeys((*arrays, *of_unit)))


def _show_unit(chosen: InspectFlags, model: Model, text: Split | bytes) -> None:
    unit = units.parse(chosen.unit, model.config.model)
    shown, split = inspection.first_characters(model, text, chosen.length)
    values = inspection.values(model, split, unit)
    largest = 1.0 if chosen.scale == "fixed" else heatmap.own_scale(values)
    name = f"tanh({unit})" if unit.array == "c" else str(unit)
    if chosen.output:
        _write(chosen.output, heatmap.svg(shown, values, name, largest=largest))
        return
    colors = cli.terminal_colors() if chosen.colors == "auto" else COLORS[chosen.colors]
    columns = shutil.get_terminal_size(fallback=(heatmap.WIDTH, 24)).columns  # a pty may have none
    width = min(100, columns) if sys.stdout.isatty() else heatmap.WIDTH
    print(f"{name} of step {model.step}: {heatmap.legend(colors, largest)}", flush=True)
    sys.stdout.buffer.write(heatmap.in_terminal(shown, values, colors, width, largest).encode("utf-8", "replace"))
    print(flush=True)


def _print_ranking(found: ranking.Ranking, how: str) -> None:
    if how == "json":
        fields: dict[str, Any] = {"pattern": found.pattern, "inside": found.inside, "symbols": found.symbols}
        print(json.dumps(fields | {"units": [u._asdict() | {"unit": str(u.unit)} for u in found.units]}))
        return
    share = 100 * found.inside / found.symbols
    print(f"{found.pattern}: {found.inside:,} of {found.symbols:,} symbols are inside ({share:.2g} %)")
    print(f"{'unit':>10}  {'AUC':>6}  {'F1':>6}  {'inside':>8}  {'AUC that chose':>14}")
    for u in found.units:
        side = f"{'<' if u.is_low else '>'} {u.threshold:.2f}"
        print(f"{u.unit!s:>10}  {u.auc:6.3f}  {u.f1:6.3f}  {side:>8}  {u.auc_chosen:14.3f}")


def _write(path: str, content: str) -> None:
    cli.write_output(path, content)
    signals.say(f"{path}: {np.ceil(len(content) / 1024):,.0f} KB")


if __name__ == "__main__":
    cli.run("launch.inspect", main)
