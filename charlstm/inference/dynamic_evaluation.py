"""Dynamic evaluation: the model goes on learning from the text that it is scored on, after each score.

Source: Krause, Kahembwe, Murray and Renals, Dynamic Evaluation of Neural Sequence Models, ICML 2018 (arXiv:1709.07432).

The split is read from its beginning to its end as one stream, in windows of a few symbols, with carried state.  Each
window is scored with the parameters θ that the text before it has led to, and only then learned from:

    g = gradient by θ of the window's mean loss, in nats
    θ <- θ - η g / (sqrt(MS) + ε) + λ (θ_0 - θ)

θ_0 are the trained parameters, where the split begins and what λ draws back to; MS is the mean of g² over windows of
the training text, read with θ_0 in the same way, one window at a time: a measure of how large g usually is, parameter
by parameter.  (The authors' best variant also scales λ, by sqrt(MS) over its mean over all parameters.)

This is a sequence by its nature, each update waiting for the one before: it runs on one device.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from charlstm.config import Config
from charlstm.inference.evaluate import Split, nats_at_temperatures, scores
from charlstm.inference.score import Score
from charlstm.model import language_model
from charlstm.model.ops import compiler
from charlstm.training.loss import cross_entropy
from charlstm.types import ModelParams
from data_pipeline.batch import Batch, Separator
from data_pipeline.eval_chunks import ChunkPlan, read_chunks
from data_pipeline.settings import check_at_least, check_numbers, setting

CHUNK = 256  # windows learned from in one call of the device
PLACES = 64  # of the training text, evenly spaced, at which MS is measured
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class DynamicEvaluationConfig:
    """Learning from the text that is scored."""

    dynamic_window: int = setting(5, "Symbols that are scored, then learned from.")
    dynamic_learning_rate: float = setting(5e-5, "eta: how far a gradient of its usual size moves a parameter.")
    dynamic_decay: float = setting(0.002, "lambda: how far each update goes back to the trained parameters.")
    dynamic_epsilon: float = setting(
        2e-5, "eps: added to the usual size, so that a parameter that seldom has a gradient does not leap."
    )
    dynamic_batches: int = setting(
        100, "The usual size is measured on so many batches of 64 windows, spread over the training text."
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        check_at_least(self, 1, "dynamic_window", "dynamic_batches")
        check_at_least(self, 0, "dynamic_learning_rate")
        if not 0 <= self.dynamic_decay <= 1:
            raise ValueError(f"dynamic_decay={self.dynamic_decay} must be from 0 to 1")
        if not self.dynamic_epsilon > 0:  # a parameter may never have had a gradient
            raise ValueError(f"dynamic_epsilon={self.dynamic_epsilon} must be more than 0: use 2e-5")


def mean_square(
    config: Config,
    settings: DynamicEvaluationConfig,
    params: ModelParams,
    train: Split,
    separator: Separator = (),
    progress: Progress = lambda done, total: None,
) -> ModelParams:
    """MS: the mean over windows of the training text of the squared gradient, shaped like the parameters.

    The windows follow each other from zero state at 64 places of the text.

    Args:
      params: θ_0, on one device.
      separator: what ends a document; its last symbol is read with zero state.
      progress: is told of how many batches are done, of how many: none at first.
    """
    plan = ChunkPlan(len(train), -(-len(train) // PLACES), 0, PLACES, settings.dynamic_window)
    total, windows = jax.tree.map(jnp.zeros_like, params), 0
    carry = language_model.zero_state(config.model, PLACES, params.b_out.dtype)
    batches = min(settings.dynamic_batches, plan.windows)
    chunks = read_chunks(train, plan, range(PLACES), separator)
    for number, (batch, scored_BT) in zip(range(batches), chunks, strict=False):
        progress(number, batches)
        total, carry = _add_squares(total, carry, params, batch, scored_BT, config.model)
        windows += int(scored_BT.any(1).sum())
        jax.block_until_ready(total)  # what is told is done
    progress(batches, batches)
    return jax.tree.map(lambda square: square / windows, total)


def score(
    config: Config,
    settings: DynamicEvaluationConfig,
    params: ModelParams,
    mean_square: ModelParams,
    split: Split,
    separator: Separator = (),
    temperatures: Sequence[float] = (1.0,),
    progress: Progress = lambda done, total: None,
) -> list[Score]:
    """The score of the whole of `split` at each softmax temperature; what is learned does not depend on these.

    Every symbol is scored once, as by `evaluate.make_evaluator`; symbol 0 costs log2(V) bits.

    Args:
      params: θ_0, on one device; they are left as they are.
      mean_square: MS.
      separator: what ends a document; its last symbol is read with zero state.
      progress: is told of how many symbols have been scored, of how many: none at first.

    Raises:
      ValueError: the loss is not finite any more: the learning rate is too high.
    """
    N, dtype = len(split), params.b_out.dtype
    plan = ChunkPlan(N, N, 0, 1, CHUNK * settings.dynamic_window)
    rates = jax.tree.map(
        lambda ms: settings.dynamic_learning_rate / (jnp.sqrt(ms) + settings.dynamic_epsilon), mean_square
    )
    decay, learned = jnp.asarray(settings.dynamic_decay, dtype), jax.tree.map(jnp.copy, params)
    carry = language_model.zero_state(config.model, 1, dtype)
    total_K = np.zeros(len(temperatures))
    for number, (batch, scored_1T) in enumerate(read_chunks(split, plan, range(1), separator)):
        progress(min(number * plan.window, N), N)
        windows = jax.tree.map(lambda a_1T: a_1T.reshape(CHUNK, 1, -1), (batch, scored_1T))
        learned, carry, nats_RK = _learn(
            learned, carry, windows, params, rates, decay, config.model, tuple(temperatures)
        )
        total_K += np.asarray(nats_RK).sum(0, dtype=np.float64)
        if not np.isfinite(total_K).all():
            raise ValueError(
                f"with dynamic_learning_rate={settings.dynamic_learning_rate} the loss is not finite within "
                f"{min((number + 1) * plan.window, N):,} symbols: lower it"
            )
    progress(N, N)
    return scores(total_K, params.b_out.shape[0], split)


def _loss(params, carry, batch: Batch, scored_BT, config):
    """The mean over the scored symbols of a window; the state after it, and its logits."""
    carry, logits_TBV = language_model.apply(config, params, carry, batch.inputs, batch.reset)
    nats_TB = jnp.where(scored_BT.T, cross_entropy(logits_TBV, batch.targets.T), 0)
    count = jnp.maximum(scored_BT.sum(dtype=nats_TB.dtype), 1)
    return nats_TB.sum() / count, (carry, logits_TBV)


@partial(compiler.jit, static_argnames="config", donate_argnames=("total", "carry"))
def _add_squares(total, carry, params, batch: Batch, scored_BT, config):
    """Adds the squared gradients of a window of every row, one row after the other."""

    def add(total, row):
        carry, batch, scored_1T = jax.tree.map(lambda a: a[None], row)
        gradient, (carry, _) = jax.grad(_loss, has_aux=True)(params, carry, batch, scored_1T, config)
        total = jax.tree.map(lambda s, g: s + jnp.square(g), total, gradient)
        return total, jax.tree.map(lambda a: a[0], carry)

    return jax.lax.scan(add, total, (carry, batch, scored_BT))


@partial(compiler.jit, static_argnames=("config", "temperatures"), donate_argnames=("learned", "carry"))
def _learn(learned, carry, windows, params, rates, decay, config, temperatures):
    """Scores and learns from one window after the other: (parameters, state, nats_RK of R windows)."""

    def read(before, window):
        learned, carry = before
        batch, scored_1T = window
        gradient, (carry, logits_T1V) = jax.grad(_loss, has_aux=True)(learned, carry, batch, scored_1T, config)
        nats_KT1 = nats_at_temperatures(temperatures, logits_T1V, batch.targets.T)
        learned = jax.tree.map(
            lambda p, rate, g, trained: p - rate * g + decay * (trained - p), learned, rates, gradient, params
        )
        return (learned, carry), jnp.where(scored_1T.T[None], nats_KT1, 0).sum((1, 2))

    (learned, carry), nats_RK = jax.lax.scan(read, (learned, carry), windows)
    return learned, carry, nats_RK
