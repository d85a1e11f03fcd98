"""The library in a notebook: a text becomes a corpus, a corpus a model, and a model scores and writes."""

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config, arguments
from charlstm.inference import evaluate as evaluate_lib
from charlstm.inference.sampling import Sampling
from charlstm.inference.score import Score
from charlstm.inference.text import Sample, begin
from charlstm.inspect import trace, units
from charlstm.interop import export as export_lib
from charlstm.interop.exported import Exported, folded
from charlstm.model import language_model
from charlstm.model.ops import compiler
from charlstm.run import corpus as corpus_lib
from charlstm.run import loop, prepared, run_directory
from charlstm.run.loop import Outcome
from charlstm.run.services import InterruptibleServices
from charlstm.run.start import start
from charlstm.training.placement import choose_mesh
from charlstm.types import CellState, ModelParams, RecurrentState
from data_pipeline import mixture
from data_pipeline.batch import Separator
from data_pipeline.build import corpora
from data_pipeline.build.sources import NoSuchText
from data_pipeline.mixture import Mixture
from data_pipeline.progress import bar, say_on_stderr
from data_pipeline.shards import Corpus
from data_pipeline.vocabulary import Vocabulary

Clamp = Mapping[str | units.Unit, float]
NOTHING: Clamp = MappingProxyType({})

_log = logging.getLogger("charlstm")


def load_corpus(source: str | os.PathLike[str] | bytes, **settings: Any) -> Corpus:
    """The corpus of a text, prepared into the cache where it is not yet.

    Args:
      source: a text file, a glob, a directory of texts, a prepared directory or its URL in an object store, or the name
        of a corpus (python, tinyshakespeare, enwik8, text8); bytes, or a string of several lines, are the text itself.
      settings: any of `CorpusSettings`, such as vocabulary="characters" or valid_fraction=0.1.

    Raises:
      TypeError: the source is neither a path nor a text, or there is no such setting.
      ValueError: there is no such text, or it cannot be prepared so.
    """
    given = corpus_lib.settings_of(source, settings)
    try:
        corpus = corpora.load(given, bar(), say_on_stderr)
    except NoSuchText as error:
        if given.train:
            raise
        raise NoSuchText(f"{error}; bytes, or a string of several lines, are taken as the text itself") from None
    return dataclasses.replace(corpus, settings=prepared.to_record(given, corpus))


def load_mixture(weights: Mapping[str, float], **settings: Any) -> Mixture:
    """The mixture of several corpora of one vocabulary, to be trained on as a corpus is.

    Args:
      weights: corpus -> its share of what is read, of any sum.  A corpus is named as for `load_corpus` (no text
        itself), or by NAME=CORPUS, where NAME is what its scores are called.
      settings: as of `load_corpus`, for those that are not prepared yet.

    Raises:
      ValueError: a corpus cannot be had, two have different vocabularies, or a weight is too small.
    """
    parts = mixture.parse(",".join(f"{source}:{weight}" for source, weight in weights.items()))
    return mixture.load(parts, lambda source: load_corpus(source, **settings))


def train(config: Config, corpus: Corpus, run_dir: str | os.PathLike[str], *, initial_checkpoint: str = "") -> "Model":
    """Trains a run to config's num_steps and returns its best model; the same call again resumes it.

    The bits are those of `launch.train` with the same settings.  An interrupt in the main thread saves, and returns
    the best model so far; a second one is a KeyboardInterrupt.

    Args:
      config: the settings; of a run that is there, those that may change on resuming.
      corpus: of `load_corpus` or `load_mixture`.
      run_dir: where the run lives, or is to live: config, log, metrics, checkpoints.
      initial_checkpoint: a run directory whose parameters a new run starts from.

    Raises:
      TypeError: it is given a path, a split or a dict in place of a corpus or a config, or a run_dir that is no path.
      ValueError: the settings go neither with each other, nor with the text, the machine or the run that is there.
      Diverged: a loss or a gradient was not finite.
      OSError: the last checkpoint could not be written.
    """
    if not isinstance(config, Config):
        raise TypeError(
            f"config is a {type(config).__name__}: give cl.Config(hidden_size=256), of a dict cl.Config(**d)"
        )
    if not isinstance(corpus, Corpus):
        raise TypeError(
            f"corpus is a {type(corpus).__name__}: give the whole of cl.load_corpus(...), not a path or split"
        )
    distributed.use_cpu_cores()
    folder = run_directory.named("run_dir", run_dir)
    config = corpus_lib.taken(config, corpus)
    corpus_lib.refuse_inside(folder, config.corpus, config.streams.mixture)
    begun = start(folder, config, corpus, choose_mesh, initial_checkpoint)
    outcome = loop.train(begun, InterruptibleServices(), config_lib.to_flags(config))
    if outcome is Outcome.NOT_SAVED:
        raise OSError(f"the last checkpoint of {folder} could not be written: see {folder / 'log.txt'}")
    return load(folder)


def load(run_dir: str | os.PathLike[str], checkpoint: str | int = "best") -> "Model":
    """The model of a run, on this machine's first device, whatever it was trained on.

    Args:
      checkpoint: "best" on validation (the newest where none was validated), "latest", or a step.

    Raises:
      TypeError: `run_dir` is no path.
      ValueError: there is no such run or checkpoint, or it is damaged.
    """
    distributed.use_cpu_cores()
    folder = run_directory.named("run_dir", run_dir)
    config, identity = run_directory.read(folder)
    mesh = distributed.make(distributed.make().local_devices[:1])
    params, step = run_directory.restore_params(folder, config, identity, mesh, str(checkpoint), _log.warning)
    return Model(config, identity.vocabulary, params, step, folder)


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained language model.

    Texts that it is given, and what it returns of their symbols, are in the order of the text, also where it reads
    backward (`reverse`): then its bits and states at a symbol are those of reading from the end to there, and it writes
    what stands before the prompt.
    """

    config: Config
    vocabulary: Vocabulary
    params: ModelParams
    step: int  # updates after which its parameters were saved
    run_dir: Path | None = None  # of `load` and `train`

    @property
    def separator(self) -> Separator:
        """The symbols that end a document, as they are read; () where documents are not told apart."""
        return run_directory.separator(self.config, self.vocabulary)

    def evaluate(self, text: evaluate_lib.Split | str | bytes) -> Score:
        """The score of a split, as `launch.evaluate` gives it: every symbol once, with carried state.

        A text is scored as if it were a split: in chunks of config's eval_chunk symbols, each after burn_in symbols
        that are read before it.  `launch.evaluate --text` scores it as one stream, as `bits` does.

        Raises:
          ValueError: it has fewer than two symbols, or another vocabulary than the model.
        """
        split, mesh = trace.as_read(self, text), distributed.make()
        evaluator = evaluate_lib.make_evaluator(self.config, self.vocabulary.size, split, mesh, self.separator)
        return evaluator(distributed.put(mesh, distributed.REPLICATED, jax.tree.map(np.asarray, self.params)))

    def bits(self, text: evaluate_lib.Split | str | bytes) -> np.ndarray:
        """Bits of each symbol given all before it, float32 [symbols]; the first has log2(V), as nothing precedes it.

        A backward model has read all after it, and the last has log2(V).
        """
        return trace.bits(self, text)

    def states(self, text: evaluate_lib.Split | str | bytes) -> tuple[CellState, ...]:
        """The state of every layer after each symbol: hidden states h, and cell states c if any, `[symbols, H]`."""
        layers, cells = range(1, len(self.config.model.widths) + 1), self.config.model.cell.endswith("lstm")
        found: dict[str, Any] = self.trace(text, [f"{n}.{name}" for n in layers for name in ("hc" if cells else "h")])
        return tuple(CellState(found[f"{n}.h"], found.get(f"{n}.c")) for n in layers)

    def trace(self, text: evaluate_lib.Split | str | bytes, names: str | Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Returns named arrays of each symbol: "logits" of the next one `[symbols, V]`, states and gates.

        Args:
          names: one or several, such as "1.c", c of the first layer, `[symbols, H]`: h, c if any, and the gates of the
            cell's equations; all by default.  `charlstm.inspect.chunks` gives those of a long text, by windows.

        Raises:
          ValueError: there is no array of a name.
        """
        return trace.whole(self, trace.split_of(self, text), names)

    def __call__(self, ids: Any, state: RecurrentState | None = None) -> tuple[jax.Array, RecurrentState]:
        """(logits of the symbol after each one, the state after them).

        Nothing is reset within `ids`, as in exported models.  Where a run tells documents apart, give each by itself
        and without a state, beginning with the last symbol of the separator before it.

        Args:
          ids: symbol ids `[T]` as they are read, or `[B, T]` of B texts side by side; of NumPy or JAX.
          state: that of the call before; None before a text or document begins.

        Returns:
          Logits `[T, V]`, or `[B, T, V]`, and the state to be handed on.

        Raises:
          ValueError: an id is none of the vocabulary's, or the state none of this model's.
        """
        if not isinstance(ids, jax.core.Tracer):  # within a jax.jit they have no values yet
            self.vocabulary.require_ids(np.asarray(ids))
        ids_BT = jnp.atleast_2d(jnp.asarray(ids, jnp.int32))
        if state is None:
            state = trace.first_state(self.config.model, self.params, len(ids_BT))
        trace.require_state(self.config.model, state, len(ids_BT))
        if not ids_BT.size:
            return jnp.zeros((*np.shape(ids), self.vocabulary.size)), state
        state, logits_BTV = _logits(self.params, state, ids_BT, self.config.model)
        return (logits_BTV if np.ndim(ids) == 2 else logits_BTV[0]), state

    def sample(
        self,
        prompt: str = "",
        length: int = 1000,
        *,
        num_samples: int = 1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | None = None,
        clamp: Clamp = NOTHING,
    ) -> str | list[str]:
        """The prompt with its continuation, which of a backward model precedes it; of several samples, a list.

        Arguments as of `stream`.
        """
        samples, made = self._begin(prompt, length, num_samples, Sampling(temperature, top_k, top_p), seed, stop, clamp)
        for _ in made:
            pass
        texts = [sample.take(last=True) for sample in samples]
        return texts[0] if num_samples == 1 else texts

    def stream(
        self,
        prompt: str = "",
        length: int = 1000,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | None = None,
        clamp: Clamp = NOTHING,
    ) -> Iterator[str]:
        """Yields the prompt, then its continuation as it is made, the text of `sample` and `launch.sample`.

        Of a backward model the text comes as a whole, at the end.

        Args:
          length: symbols to write after the prompt.
          temperature: divides the logits; 0 takes the most probable symbol.
          top_k, top_p: choose among the most probable symbols only; 0 and 1.0: among all.
          seed: 0 to 2**32 - 1; the same seed makes the same text.
          stop: the text ends before this string; by default, where the run tells documents apart, before their
            separator.
          clamp: unit -> value of its state, such as {"1:317": 1.0}: held from the end of the prompt on.

        Raises:
          TypeError: the prompt or `stop` is no string, or `clamp` no mapping.
          ValueError: a symbol of the prompt or of `stop` is not in the vocabulary, or a number is none or out of range.
        """
        (sample,), made = self._begin(prompt, length, 1, Sampling(temperature, top_k, top_p), seed, stop, clamp)
        yield sample.take()
        for _ in made:
            yield sample.take()
        yield sample.take(last=True)

    def export(
        self,
        output: str | os.PathLike[str],
        format: str = "safetensors",
        held_out: evaluate_lib.Split | Corpus | None = None,
    ) -> Path:
        """Writes the model as a directory that other programs read, and returns its path; as `launch.export`.

        Args:
          held_out: a split that a format which rounds the weights is scored on, or a corpus or mixture for its own.

        Raises:
          ValueError: the format has no place for such a model, `output` is there already, or `held_out` has another
            vocabulary than the model.
        """
        if held_out is not None:
            trace.require_vocabulary(self, held_out)
        exported = Exported(self.config, self.vocabulary, folded(self.params), self.step, self.run_dir, held_out)
        return export_lib.export(exported, arguments.path("output", output, "a directory to be made"), format)

    def _begin(
        self, prompt: str, length: int, count: int, sampling: Sampling, seed: int, stop: str | None, clamp: Clamp
    ) -> tuple[list[Sample], Iterator[None]]:
        return begin(
            *(self.config, self.params, self.vocabulary, self.separator, prompt, stop, sampling),
            rows=arguments.whole("num_samples", count, 1),
            length=arguments.whole("length", length, 0),
            seed=arguments.whole("seed", seed, 0, 2**32 - 1),
            held=units.held(clamp, self.config.model),
        )


@partial(compiler.jit, static_argnames="config")
def _logits(params, state, ids_BT, config):
    state, logits_TBV = language_model.apply(config, params, state, ids_BT, jnp.zeros(ids_BT.shape, bool))
    return state, logits_TBV.swapaxes(0, 1)
