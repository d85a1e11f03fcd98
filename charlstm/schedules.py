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
    plateau      d once validation no longer improves, and 1 before (progress.py); Melis et al. 2018, section 4

So every clock is the run's own step number, as its log shows it, warm-up included: linear and cosine leave the full
rate when warm-up ends and reach f at step N whatever the warm-up, and stay there.  exponential is char-rnn's: with
decay_start_epoch=10 the first decay comes when 10 whole epochs have been read.

Differences of steps are taken in int32, and only then divided: float32 cannot tell steps apart beyond 2^24.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from charlstm.training_config import OptimizerConfig, parse_epochs
from charlstm.types import Progress

Schedule = Callable[[jax.Array, Progress], jax.Array]

LAST_STEP = 2**31 - 1  # of an int32


def make(config: OptimizerConfig, steps_per_epoch: int, num_steps: int) -> Schedule:
    """The schedule that `config` describes.

    Args:
      config: the settings named above.
      steps_per_epoch: updates that read the training split once; 1 or more.
      num_steps: updates of the whole run; stands in for decay_steps=0.

    Returns:
      A pure function, jittable, from the step (int32 []) and the progress to the learning rate (float32 []).
    """
    assert steps_per_epoch >= 1 and num_steps >= 1, f"{steps_per_epoch=} {num_steps=}"
    decay = _decay(config, min(steps_per_epoch, LAST_STEP), min(config.decay_steps or num_steps, LAST_STEP))
    warmup_steps = min(config.warmup_steps, LAST_STEP)

    def learning_rate(step: jax.Array, progress: Progress) -> jax.Array:
        rate = jnp.float32(config.learning_rate) * decay(step, progress)
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
        return lambda _, progress: decayed(progress.dropped)
    assert config.schedule == "step", f"schedule={config.schedule!r} is a choice of OptimizerConfig without a formula"
    if epochs := parse_epochs(config.drop_epochs):
        return lambda step, _: decayed((jnp.asarray(epochs, jnp.int32) <= step // steps_per_epoch).sum())
    return lambda step, _: decayed(step // decay_steps)
