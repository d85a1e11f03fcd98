"""Initial parameters from another run (--initial_checkpoint): a run takes them once and never others.

initial_checkpoint.json     in the run directory: what the flag named, the step that was taken, how the model was
                            grown, the digest of the parameters

A run that is killed before its first own checkpoint starts from the same parameters again, though the other run may
have gone on and have newer ones.  A run with another vocabulary, more layers or more units grows the model
(model/growth.py): what is new is drawn by the run's own seed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from charlstm import distributed, rng
from charlstm.config import Config
from charlstm.model import growth, language_model
from charlstm.model.growth import Kept
from charlstm.run import digest, run_directory
from charlstm.run.checkpoint import Checkpoints
from charlstm.run.run_directory import Identity, Initial
from charlstm.training import train_state
from charlstm.types import ModelParams
from data_pipeline.vocabulary import Vocabulary

SHOWN = 20  # symbols that are named in a sentence


def refuse_imported(run_dir: Path) -> None:
    """Raises ValueError where a directory holds an imported model: says how to train on from it."""
    try:
        is_imported = not run_directory.read(run_dir)[1].corpus_fingerprint
    except ValueError:  # there is no run, or a damaged one
        return
    if is_imported:
        raise ValueError(
            f"{run_dir} holds an imported model, without a text or a state of training to go on from: train from it in "
            f"a run of its own, python -m launch.train --flagfile={run_dir / 'flags.txt'} "
            f"--initial_checkpoint={run_dir} --corpus=TEXT --run_dir=runs/mine"
        )


class Taken(NamedTuple):
    """Parameters, and what is written down of them."""

    params: ModelParams
    initial: Initial


def take(flag: str, config: Config, identity: Identity, mesh: Mesh, say: Callable[[str], None]) -> Taken:
    """The parameters that `flag` names, for a new run.

    Args:
      flag: a run directory, of which the newest whole checkpoint is taken, or its checkpoints/STEP.
    """
    named = run_directory.named("initial_checkpoint", flag)
    by_step = named.parent.name == "checkpoints" and named.name.isdecimal()
    other_dir, step = (named.parent.parent, int(named.name)) if by_step else (named, None)
    other_config = run_directory.read(other_dir, "initial_checkpoint")[0]
    if other_config.streams.reverse != config.streams.reverse:
        say(
            f"{other_dir} reads the text {'backward' if other_config.streams.reverse else 'forward'}, this run does not"
        )
    item = other_config.optimizer.eval_params_field
    params, meta, grown = _params(other_dir, item, step, config, identity, mesh, say)
    what = "the average of the parameters" if item == "average" else "the parameters"
    say(f"starting from {what} of step {meta['step']} of {other_dir}")
    if grown:
        say(grown)
    return Taken(params, Initial(str(named), str(other_dir), meta["step"], item, digest.state_digest(params), grown))


def take_again(
    run_dir: Path, initial: Initial, config: Config, identity: Identity, mesh: Mesh, say: Callable[[str], None]
) -> ModelParams:
    """The parameters that the run in `run_dir` has started from.  Raises ValueError where they are there no longer."""
    other_dir, item, step = Path(initial.other), initial.item, initial.step
    try:
        params, _, _ = _params(other_dir, item, step, config, identity, mesh, say)
        if digest.state_digest(params) != initial.digest:
            raise ValueError("they are others now")
    except ValueError as error:
        raise ValueError(
            f"{run_dir} has no checkpoint of its own yet and was started from the parameters of step {step} of "
            f"{other_dir}, which are not there any more ({error}): put them back, or name another run_dir"
        ) from None
    say(f"starting again from the parameters of step {step} of {other_dir}")
    return params


def _params(
    run_dir: Path,
    item: str,
    step: int | None,
    config: Config,
    identity: Identity,
    mesh: Mesh,
    say: Callable[[str], None],
) -> tuple[ModelParams, dict[str, Any], str]:
    """Returns the parameters, grown where the run asks for it, the meta of their checkpoint, and how they were grown.

    Raises:
      ValueError: they are not there, or are of a model that cannot become that of `config`.
    """
    other, other_identity = run_directory.read(run_dir, "initial_checkpoint")
    if why := growth.refusal(other.model, config.model):  # arrays of the same shapes may be of other equations
        raise ValueError(f"initial_checkpoint={run_dir} cannot become the model that is asked for: {why}")
    kept = shared_symbols(other_identity.vocabulary, identity.vocabulary)
    if not len(kept.here):
        raise ValueError(
            f"initial_checkpoint={run_dir} has {other_identity.vocabulary.in_short} and this corpus "
            f"{identity.vocabulary.in_short}: they have no symbol in common"
        )
    abstract = train_state.abstract(other, other_identity.vocabulary.size, mesh).params
    with Checkpoints(run_dir / "checkpoints", writable=False, log=say) as source:
        params, meta = source.restore_params(abstract, step=step, item=item)
    if other_identity.vocabulary == identity.vocabulary and growth.same_arrays(other.model, config.model):
        return params, meta, ""
    key = rng.named(jax.random.key(config.training.seed), "init")  # as a run that begins from nothing draws its own
    drawn = language_model.init(config.model, identity.vocabulary.size, key)
    grown = growth.grow(jax.tree.map(np.asarray, params), config.model, kept, drawn)
    said = (
        _layers_in_words(other, config),
        _state_in_words(other, config),
        _symbols_in_words(other_identity, identity, kept),
    )
    return distributed.put(mesh, distributed.REPLICATED, grown), meta, f"grown: {', '.join(filter(None, said))}"


def shared_symbols(there: Vocabulary, here: Vocabulary) -> Kept:
    """Returns the ids of the symbols that both vocabularies have, in the order of those here."""
    ids = {symbol: number for number, symbol in enumerate(_symbols(there))}
    pairs = [(number, ids[symbol]) for number, symbol in enumerate(_symbols(here)) if symbol in ids]
    return Kept(*np.array(pairs, np.int64).reshape(-1, 2).T)


def _symbols(vocabulary: Vocabulary) -> list[str | int]:
    """Returns the symbol of each id: a character, the value of a byte that is none alone, -1 for the unknown one."""
    if vocabulary.kind == "bytes":
        return [chr(byte) if byte < 128 else byte for byte in range(256)]
    return [-1, *vocabulary.characters]


def _layers_in_words(old: Config, new: Config) -> str:
    def words(config: Config) -> str:
        widths = " + ".join(map(str, config.model.widths))
        return f"{widths} units, embedding {config.model.embedding_size}" if config.model.embedding_size else widths

    return "" if words(old) == words(new) else f"layers of {words(old)} -> {words(new)}"


def _state_in_words(old: Config, new: Config) -> str:
    is_new = new.model.train_initial_state and not old.model.train_initial_state
    return "an initial state that is learned, from zero on" if is_new else ""


def _symbols_in_words(old: Identity, new: Identity, kept: Kept) -> str:
    if old.vocabulary == new.vocabulary:
        return ""

    def others(vocabulary: Vocabulary, ids: np.ndarray) -> str:
        symbols = _symbols(vocabulary)
        left = [symbols[number] for number in sorted(set(range(len(symbols))) - set(ids.tolist()))]
        named = ["the unknown symbol" if s == -1 else f"byte {s:#x}" if isinstance(s, int) else repr(s) for s in left]
        more = f" and {len(named) - SHOWN:,} more" if len(named) > SHOWN else ""
        return f"{len(named):,}" + (f" ({' '.join(named[:SHOWN])}{more})" if named else "")

    return (
        f"{len(kept.here):,} of {new.vocabulary.size:,} symbols keep their parameters, those of "
        f"{others(new.vocabulary, kept.here)} are drawn, and {others(old.vocabulary, kept.there)} are left behind"
    )
