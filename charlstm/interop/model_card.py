"""The model card: a README whose front matter model hubs read, filled in from the run."""

import dataclasses
import json
import re
from pathlib import PurePosixPath
from typing import Any

from charlstm.config import Config
from charlstm.inference.score import FIGURES
from charlstm.interop.exported import Exported
from charlstm.report import history
from charlstm.run.step_directory import StepDirectory
from data_pipeline import mixture
from data_pipeline.vocabulary import Vocabulary

CARD = """\
---
library_name: charlstm
pipeline_tag: text-generation
tags:
- character-level
- recurrent-neural-network
- language-model
- {cell}
{datasets}# license: yours to choose
{front_score}---

# A character-level language model{of_texts}

{what}

## Score

{score}

## Use

With NumPy alone, text from the command line:

    python load_numpy.py --prompt="{prompt}" --length=500 --temperature=0.8

{use}

`model.safetensors` has the weights, float32, `config.json` what they compute and `vocabulary.json` the symbols.

## Training

{training}

## License

None is given here: who has the rights to the text and to the weights chooses one, in `license` of the front matter.
"""
FRONT_SCORE = """\
metrics:
{metrics}
model-index:
- name: {name}
  results:
  - task:
      type: text-generation
    dataset:
      name: {texts}
      type: {slug}
      split: validation
    metrics:
{results}
"""
TORCH = """\
In PyTorch (with `safetensors`):

    from load_torch import load

    model = load(".")
    logits, state = model(ids)  # ids [B, T], logits [B, T, V] of the next symbols; hand `state` on"""
NUMPY = """\
In a program:

    from load_numpy import Model

    model = Model(".")
    logits, state = model(model.encode("{prompt}"))  # [symbols, V] of the next symbols; hand `state` on

PyTorch has no layer that computes this cell."""


def card(exported: Exported, parameters: int, has_pytorch: bool) -> str:
    """The README of a model with so many parameters.  Raises ValueError where its run is damaged."""
    config, model = exported.config, exported.config.model
    names, record = texts_of(config), _score(exported)
    widths = (
        " + ".join(map(str, model.widths)) if model.last_hidden_size else f"{model.num_layers} x {model.hidden_size}"
    )
    extra = ", ".join(
        f"{name}={getattr(model, name)}".replace("=True", "")
        for name in ("cap_input_gate", "skip", "tie_embeddings", "mogrifier_rounds", "train_initial_state")
        if getattr(model, name)
    )
    way = " It reads from the end to the beginning: `reverse` in `config.json`." if config.streams.reverse else ""
    what = (
        f"It reads and writes text symbol by symbol: {exported.vocabulary.size:,} {exported.vocabulary.kind}. "
        f"Its cell is {model.cell}, of {widths} units{f' ({extra})' if extra else ''}, with {parameters:,} parameters"
    )
    trained = f", after {exported.step:,} updates" if names else ""
    prompt = _prompt(exported.vocabulary)
    slugs = [slug for name in names if (slug := re.sub(r"[^\w.-]+", "-", name).strip("-"))]
    return CARD.format(
        cell=model.cell,
        datasets="".join(["datasets:\n", *(f"- {json.dumps(slug)}\n" for slug in slugs)]) if slugs else "",
        front_score=_front_score(record, names, slugs) if record else "",
        of_texts=f" of {' and '.join(names)}" if names else "",
        what=f"{what}{trained}.{way}{' It was trained with charlstm.' if names else ''}",
        score=_in_words(record, exported) if record else "It was not measured.",
        use=TORCH if has_pytorch else NUMPY.format(prompt=prompt),
        prompt=prompt,
        training=_training(config) if names else "It was imported: on which text and how it was trained is not known.",
    )


def texts_of(config: Config) -> list[str]:
    """Names of the texts that a run was trained on, without the folders in which they lay; none if imported."""
    if config.streams.mixture:
        return [part.name for part in mixture.parse(config.streams.mixture)]
    if not (config.corpus.train or config.corpus.corpus):
        return []
    path = PurePosixPath(config.corpus.train or config.corpus.corpus)
    # Of a glob, such as news/*.txt, what its files have in common.
    name = next((part for part in reversed(path.parts) if "*" not in part), "").partition(".")[0]
    name = re.sub(r"-[0-9a-f]{16}$", "", name)  # of a prepared corpus in the cache
    return ["text" if re.fullmatch(r"[0-9a-f]{32}|", name) else name]


def _prompt(vocabulary: Vocabulary) -> str:
    """A prompt of symbols that the model knows, and that mean nothing else between quotes."""
    known = vocabulary.characters
    for prompt in ("The ", "the "):
        if vocabulary.kind == "bytes" or set(prompt) <= set(known):
            return prompt
    letters = [c for c in known if c.isalnum()] or [c for c in known if c.isprintable() and c not in '"$`\\!']
    return "".join(letters[:3])


def _score(exported: Exported) -> dict[str, Any] | None:
    """The line of metrics.jsonl that has the score of the exported parameters; None if they were not validated."""
    if exported.run_dir is None:
        return None
    lines = [line for line in history.read(exported.run_dir).records if line["split"] == "valid"]
    return next((line for line in reversed(lines) if line["step"] == exported.step), None)


def _figures(record: dict[str, Any]) -> dict[str, float]:
    """The figures of a score that name their unit, those that apply."""
    return {name: record[name] for name in FIGURES[1:] if record[name] is not None}


def _front_score(record: dict[str, Any], names: list[str], slugs: list[str]) -> str:
    found = _figures(record)
    return FRONT_SCORE.format(
        metrics="\n".join(f"- {name}" for name in found),
        name=json.dumps("charlstm-" + "-".join(slugs)),
        texts=json.dumps(" and ".join(names)),
        slug=json.dumps("-".join(slugs) or "text"),
        results="\n".join(f"    - type: {name}\n      value: {value:.4f}" for name, value in found.items()),
    )


def _scored_by(exported: Exported) -> dict[str, Any]:
    """The settings of evaluation with which the parameters were saved; a run that was resumed may have others now."""
    assert exported.run_dir is not None
    sealed = StepDirectory(exported.run_dir / "checkpoints").sealed()
    if exported.step not in sealed:  # it was removed since
        return dataclasses.asdict(exported.config.evaluation)
    return sealed[exported.step]["identity"]["config"]["evaluation"]


def _in_words(record: dict[str, Any], exported: Exported) -> str:
    """The score, and how it was measured."""
    figures = ", ".join(f"{value:.4f} {name.replace('_', ' ')}" for name, value in _figures(record).items())
    settings, compute_dtype = _scored_by(exported), exported.config.model.compute_dtype
    dtype = f", with matrix products in {compute_dtype}" if compute_dtype != "float32" else ""
    return (
        f"**{figures}** on {record['scored_symbols']:,} symbols of the validation split, in chunks of "
        f"{settings['eval_chunk']:,} symbols, each after {settings['burn_in']:,} symbols that are only read{dtype}. "
        "No update saw this split, but a run's best checkpoint is chosen by it."
    )


def _training(config: Config) -> str:
    streams, optimizer, training = config.streams, config.optimizer, config.training
    rows = {
        "text": ", ".join(texts_of(config)),
        "optimizer": f"{optimizer.optimizer}, learning rate {optimizer.learning_rate:g}, {optimizer.schedule}",
        "batch": f"{streams.batch_size} streams, windows of {streams.window} symbols",
        "updates": f"{training.num_steps:,} of the whole run",
        "weights": "as trained" if optimizer.average == "none" else f"average={optimizer.average} of those trained",
        "seed": training.seed,
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
