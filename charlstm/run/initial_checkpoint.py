"""Initial parameters from another run (--initial_checkpoint): a run takes them once and never others.

initial_checkpoint.json     in the run directory: what the flag named, the step that was taken, the parameters' digest

A run that is killed before its first own checkpoint starts from the same parameters again, though the other run may
have gone on and have newer ones.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from charlstm.config import Config
from charlstm.run import digest, run_directory
from charlstm.run.checkpoint import Checkpoints
from charlstm.run.run_directory import Identity, Initial
from charlstm.training import train_state
from charlstm.types import ModelParams


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
    other_config, other_identity = run_directory.read(other_dir)
    if other_identity.vocabulary != identity.vocabulary:
        raise ValueError(
            f"initial_checkpoint={other_dir} has {other_identity.vocabulary_in_short} and this corpus "
            f"{identity.vocabulary_in_short}: its parameters would mean other symbols"
        )
    if other_config.streams.reverse != config.streams.reverse:
        say(
            f"{other_dir} reads the text {'backward' if other_config.streams.reverse else 'forward'}, this run does not"
        )
    item = other_config.optimizer.eval_params_field
    params, meta = _params(other_dir, item, step, config, identity, mesh, say)
    what = "the average of the parameters" if item == "average" else "the parameters"
    say(f"starting from {what} of step {meta['step']} of {other_dir}")
    return Taken(params, Initial(str(named), str(other_dir), meta["step"], item, digest.state_digest(params)))


def take_again(
    run_dir: Path, initial: Initial, config: Config, identity: Identity, mesh: Mesh, say: Callable[[str], None]
) -> ModelParams:
    """The parameters that the run in `run_dir` has started from.  Raises ValueError where they are there no longer."""
    other_dir, item, step = Path(initial.other), initial.item, initial.step
    try:
        params, _ = _params(other_dir, item, step, config, identity, mesh, say)
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
) -> tuple[ModelParams, dict[str, Any]]:
    abstract = train_state.abstract(config, identity.vocabulary.size, mesh).params
    with Checkpoints(run_dir / "checkpoints", writable=False, log=say) as source:
        return source.restore_params(abstract, step=step, item=item)
