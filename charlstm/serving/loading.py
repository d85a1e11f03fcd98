"""The model of a run as a server has it, and its newer checkpoints as they come."""

import dataclasses
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from charlstm.config import Config
from charlstm.inference.text import unknown_id
from charlstm.run import run_directory
from charlstm.run.checkpoint import Checkpoints
from charlstm.run.run_directory import Identity
from charlstm.serving.texts import Loaded
from data_pipeline.vocabulary import canonical_json

EVERY = 5.0  # seconds between two looks at the checkpoints


def load(
    run_dir: Path, config: Config, identity: Identity, mesh: Mesh, checkpoint: str, say: Callable[[str], None]
) -> Loaded:
    """The model of a run; arguments and errors as of `run_directory.restore_params`."""
    params, step = run_directory.restore_params(run_dir, config, identity, mesh, checkpoint, say)
    vocabulary = identity.vocabulary
    digest = hashlib.sha256(canonical_json([dataclasses.asdict(config.model), vocabulary.digest]))
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    separator = run_directory.separator(config, vocabulary)
    return Loaded(config.model, params, vocabulary, separator, unknown_id(vocabulary), step, digest.digest()[:16])


class Follower:
    """Looks for a better checkpoint of a run from time to time, in a thread."""

    def __init__(
        self, run_dir: Path, load: Callable[[], Loaded], step: int, use: Callable[[Loaded], None],
        say: Callable[[str], None], every: float = EVERY,
    ) -> None:  # fmt: skip
        """Starts.

        Args:
          load: returns the model of the best checkpoint.
          step: of the checkpoint that is used now.
          use: is given a better one.
        """
        self._run_dir, self._load, self._step, self._use, self._say, self._every = run_dir, load, step, use, say, every
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._ended.wait(self._every):
            try:
                self._look()
            except (OSError, ValueError, RuntimeError) as error:  # a checkpoint that is being removed, say
                self._say(f"{self._run_dir}: the best checkpoint cannot be read: {' '.join(str(error).split())}")

    def _look(self) -> None:
        with Checkpoints(self._run_dir / "checkpoints", writable=False, log=self._say) as checkpoints:
            best = checkpoints.best()
            if best is None:  # none was validated
                best = max(checkpoints.steps(), default=None)
        if best is None or best == self._step:
            return
        model = self._load()
        self._step = best
        self._use(model)
        self._say(f"{self._run_dir}: the checkpoint of step {model.step}, from the next request on")
