"""The learning rate as a pure function of the step number, and of what validation has said.

With r = learning_rate, f = final_fraction, d = decay_rate (usual_decay_rate where that is 0), N = decay_steps
(num_steps where that is 0) and W = warmup_steps, the rate of step t (t = 0 is the first update) is

    r  *  min(1, (t + 1) / W)  *  one of

    constant     1
    linear       f + (1 - f) x                   x = (N - t) / (N - W), held within 0 and 1: the part still to go
    cosine       f + (1 - f) sin^2(pi x / 2)     sin^2(pi x / 2) = (1 + cos(pi (1 - x))) / 2,
                                                 Loshchilov & Hutter 2017, eq. 5
    exponential  d^max(0, epoch + 1 - decay_start_epoch)       epoch = t // steps_per_epoch
    step         d^(t // N), or d^(how many of drop_epochs are <= epoch): PyTorch's MultiStepLR
    plateau      d once validation no longer improves, and 1 before (plateau.py); Melis et al. 2018, section 4

All schedules count the run's steps, warm-up included: linear and cosine leave the full
rate when warm-up ends and reach f at step N whatever the warm-up, and stay there.  exponential is char-rnn's: with
decay_start_epoch=10 the first decay comes when 10 whole epochs have been read.

Differences of steps are taken in int32, and only then divided: float32 cannot tell steps apart beyond 2^24.
"""

import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from charlstm.config.training import OptimizerConfig, TrainingConfig, parse_epochs
from charlstm.types import PlateauState

Schedule = Callable[[jax.Array, PlateauState], jax.Array]

LAST_STEP = 2**31 - 1  # of an int32


def make(config: OptimizerConfig, steps_per_epoch: int, num_steps: int) -> Schedule:
    """The schedule that `config` describes.

    Args:
      config: the settings named above.
      steps_per_epoch: updates that read the training split once; 1 or more.
      num_steps: updates of the whole run; stands in for decay_steps=0.

    Returns:
      A pure function, jittable, from the step (int32 []) and the plateau state to the learning rate (float32 []).
    """
    assert steps_per_epoch >= 1 and num_steps >= 1, f"{steps_per_epoch=} {num_steps=}"
    decay = _decay(config, min(steps_per_epoch, LAST_STEP), min(config.decay_steps or num_steps, LAST_STEP))
    warmup_steps = min(config.warmup_steps, LAST_STEP)

    def learning_rate(step: jax.Array, plateau_state: PlateauState) -> jax.Array:
        rate = jnp.float32(config.learning_rate) * decay(step, plateau_state)
        if warmup_steps:
            # minimum first: step + 1 must not wrap round at the last int32.
            rate *= (jnp.minimum(step, warmup_steps - 1) + 1).astype(jnp.float32) / warmup_steps
        return rate

    return learning_rate


def _decay(config: OptimizerConfig, steps_per_epoch: int, decay_steps: int) -> Schedule:
    """The last factor of the rate: a float32 that is 1 at the full rate."""
    final = config.final_fraction
    span = max(1, decay_steps - config.warmup_steps)  # a run may end within its warm-up

    def to_go(step: jax.Array) -> jax.Array:
        return jnp.clip(decay_steps - step, 0, span).astype(jnp.float32) / span

    def between(x: jax.Array) -> jax.Array:
        return x + final * (1 - x)  # f + (1 - f) x, exact at both ends

    def decayed(times: jax.Array) -> jax.Array:
        return jnp.exp(times.astype(jnp.float32) * math.log(config.decay_rate or config.usual_decay_rate))

    if config.schedule == "constant":
        return lambda step, _: jnp.ones((), jnp.float32)
    if config.schedule == "linear":
        return lambda step, _: between(to_go(step))
    if config.schedule == "cosine":
        return lambda step, _: between(jnp.square(jnp.sin(math.pi / 2 * to_go(step))))
    if config.schedule == "exponential":
        return lambda step, _: decayed(jnp.maximum(0, step // steps_per_epoch + 1 - config.decay_start_epoch))
    if config.schedule == "plateau":
        return lambda _, plateau_state: decayed(plateau_state.dropped)
    assert config.schedule == "step", f"schedule={config.schedule!r} is a choice of OptimizerConfig without a formula"
    if epochs := parse_epochs(config.drop_epochs):
        return lambda step, _: decayed((jnp.asarray(epochs, jnp.int32) <= step // steps_per_epoch).sum())
    return lambda step, _: decayed(step // decay_steps)


def final_rate(config: OptimizerConfig, step: int) -> float | None:
    """The learning rate of all steps from `step` on where a decay has ended by then; else None.

    Args:
      config: with decay_steps, or 0 if the decay ends with `step`.
    """
    ended = config.schedule in ("linear", "cosine") and step >= config.decay_steps
    return config.learning_rate * config.final_fraction if ended else None


def remarks(config: OptimizerConfig, training: TrainingConfig, steps_per_epoch: int, resumed: bool) -> Iterator[str]:
    """Remarks on a schedule that may not be meant for a run of this length, a sentence each.

    Args:
      resumed: the run goes on, with the decay_steps that it began with.
    """
    num_steps = training.num_steps
    end = config.decay_steps or num_steps
    if (final := final_rate(config, end)) is not None and end < num_steps:
        remedy = (
            f"for a decay over {num_steps} steps begin a new run, in another run_dir"
            if resumed
            else "--decay_steps=0 is the whole run"
        )
        yield (
            f"the learning rate is {final:g} from step {end} on, for {(num_steps - end) / num_steps:.0%} of the "
            f"{num_steps} steps{', which learn nothing' if not final else ''}, as decay_steps={end}: {remedy}"
        )
    if config.warmup_steps > num_steps:
        yield (
            f"the learning rate comes to {num_steps / config.warmup_steps:.0%} of {config.learning_rate:g} and no "
            f"further, as warmup_steps={config.warmup_steps} and num_steps={num_steps}"
        )
    first = _first_drop(config, steps_per_epoch, end)
    if first is not None and first >= num_steps:
        yield (
            f"the learning rate never drops: with schedule={config.schedule} it would first drop at step {first}, and "
            f"num_steps={num_steps}"
        )
    waits = {"the learning rate never drops": (config.plateau_patience, config.plateau_latest, "schedule=plateau")}
    waits["the average never begins"] = config.average_patience, config.average_latest, "average=asgd"
    for what, (patience, latest, flag) in waits.items():
        # Those before the last update.
        evaluations = (num_steps - 1) // training.evaluate_every if training.evaluate_every else 0
        needed = min(patience + 1, latest or patience + 1)
        if flag not in (f"schedule={config.schedule}", f"average={config.average}") or not patience:
            continue
        stops_first = 0 < training.stop_after <= patience and not 0 < latest <= evaluations
        if stops_first and not resumed:  # which may have dropped, or begun to average, already
            yield (
                f"{what}: {flag} waits for {patience} evaluations without gain, and stop_after={training.stop_after} "
                "ends the run no later"
            )
        elif evaluations < needed:
            yield (
                f"{what}: {flag} waits for {needed} evaluations or more, and the run has {evaluations}, as "
                f"evaluate_every={training.evaluate_every} and num_steps={num_steps}"
            )


def _first_drop(config: OptimizerConfig, steps_per_epoch: int, decay_steps: int) -> int | None:
    """The step at which an exponential or stepwise schedule first leaves the full rate; None of any other."""
    if config.schedule == "exponential":
        return config.decay_start_epoch * steps_per_epoch
    if config.schedule != "step":
        return None
    epochs = parse_epochs(config.drop_epochs)
    return epochs[0] * steps_per_epoch if epochs else decay_steps
