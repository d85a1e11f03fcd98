"""The update rules, as pairs of pure functions, and the clipping that goes before them.

In all of them p is the parameter, g its clipped gradient plus l2 p, r the learning rate, e `epsilon`.  Every operation
is elementwise and the same on every device, so the replicated parameters stay equal without communication.

    sgd       v = momentum v + g                            p = p - r v                      Polyak 1964
    adagrad   s = s + g^2                                   p = p - r g / (sqrt(s) + e)      Duchi et al. 2011, fig. 1
    rmsprop   s = rms_decay s + (1 - rms_decay) g^2         p = p - r g / (sqrt(s) + e)      Hinton 2012, lecture 6e
    adam      m = beta1 m + (1 - beta1) g                                                    Kingma & Ba 2015, alg. 1
              s = beta2 s + (1 - beta2) g^2
              u = m / (1 - beta1^n) / (sqrt(s / (1 - beta2^n)) + e)    at the n-th update
              p = p - r u
    adamw     as adam, with                                 p = p - r (u + weight_decay p)   Loshchilov & Hutter 2019

v, s and m start at 0.  The epsilon stands outside the root, in all four: rmsprop is therefore that of Torch and
char-rnn (`optim.rmsprop`), and adagrad that of PyTorch, not min-char-rnn's sqrt(s + e).  The decay of adamw is scaled
by the learning rate and takes every parameter, biases too, as PyTorch's does.  So does l2, which is PyTorch's
`weight_decay` of all but its AdamW: the gradient of l2 |p|^2 / 2, which clipping does not see.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from charlstm.config.training import OptimizerConfig

Tree = Any  # of arrays: the parameters, or what has their structure


class Optimizer(NamedTuple):
    """One update rule.  Both functions are pure and may be traced."""

    init: Callable[[Tree], Any]  # params -> opt_state
    update: Callable[[Tree, Any, Tree, jax.Array], tuple[Tree, Any]]  # (g, opt_state, p, r []) -> (new p, new state)


class Rule(NamedTuple):
    """An update rule: its maker, and the size of its state."""

    make: Callable[[OptimizerConfig], Optimizer]
    moments: int  # arrays in the state for each one of the parameters


class SgdState(NamedTuple):
    velocity: Tree  # v, shaped like the parameters, as are all below


class AdagradState(NamedTuple):
    sum_of_squares: Tree  # s


class RmspropState(NamedTuple):
    mean_square: Tree  # s


class AdamState(NamedTuple):
    updates: jax.Array  # n, int32 []: updates made
    mean: Tree  # m
    mean_square: Tree  # s


def make(config: OptimizerConfig) -> Optimizer:
    """The optimizer that `config.optimizer` names, with its coupled L2.

    State and new parameters have the dtype of the parameters (float32 in training); gradients and the learning rate,
    a scalar array, must come in that dtype too.

    """
    rule = RULES[config.optimizer].make(config)
    if not config.l2:
        return rule

    def update(grads, state, params, learning_rate):
        return rule.update(jax.tree.map(with_l2, grads, params), state, params, learning_rate)

    def with_l2(g, p):
        # The `where`s change no value: NaN stays NaN.  They keep XLA from fusing the multiplication and the addition
        # into one FMA, which it would do for some numbers of devices and not for others.
        return jnp.where(jnp.isnan(p), 0, g) + jnp.where(jnp.isnan(g), 0, config.l2 * p)

    return Optimizer(rule.init, update)


def global_norm(tree: Tree) -> jax.Array:
    """The Euclidean norm of all elements of all leaves together, a scalar of the leaves' dtype.

    The squares of a float32 tree overflow where the norm passes 1.8e19: the norm is then inf, as it is for a tree with
    an inf in it.  Such a run has diverged, and is to be stopped for it.
    """
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def clip(grads: Tree, norm: jax.Array, config: OptimizerConfig) -> Tree:
    """`grads` scaled down to the global norm clip_norm, then each element held within +-clip_value; 0 turns either off.

    Args:
      grads: the gradients.
      norm: `global_norm(grads)`.  (Asked for because the training step reports it as well.)
      config: has clip_norm and clip_value.

    A tree within the limits comes back with the same bits.  A norm that is not finite is not
    repaired.  With clip_norm, inf and nan elements become nan; finite elements become 0 if the norm is inf, and nan
    if it is nan.  Check the norm first.
    """
    if config.clip_norm > 0:
        scale = config.clip_norm / jnp.maximum(norm, config.clip_norm)
        grads = jax.tree.map(lambda g: g * scale, grads)
    if config.clip_value > 0:
        grads = jax.tree.map(lambda g: jnp.clip(g, -config.clip_value, config.clip_value), grads)
    return grads


def _zeros(params: Tree) -> Tree:
    return jax.tree.map(jnp.zeros_like, params)


def _sgd(momentum: float) -> Optimizer:
    def update(grads, state, params, learning_rate):
        velocity = jax.tree.map(lambda g, v: momentum * v + g, grads, state.velocity)
        params = jax.tree.map(lambda p, v: p - learning_rate * v, params, velocity)
        return params, SgdState(velocity)

    return Optimizer(lambda params: SgdState(_zeros(params)), update)


def _adagrad(epsilon: float) -> Optimizer:
    def update(grads, state, params, learning_rate):
        squares = jax.tree.map(lambda g, s: s + g * g, grads, state.sum_of_squares)
        params = _scaled_descent(params, grads, squares, learning_rate, epsilon)
        return params, AdagradState(squares)

    return Optimizer(lambda params: AdagradState(_zeros(params)), update)


def _rmsprop(decay: float, epsilon: float) -> Optimizer:
    def update(grads, state, params, learning_rate):
        squares = jax.tree.map(lambda g, s: decay * s + (1 - decay) * (g * g), grads, state.mean_square)
        params = _scaled_descent(params, grads, squares, learning_rate, epsilon)
        return params, RmspropState(squares)

    return Optimizer(lambda params: RmspropState(_zeros(params)), update)


def _scaled_descent(params: Tree, grads: Tree, squares: Tree, learning_rate: jax.Array, epsilon: float) -> Tree:
    return jax.tree.map(lambda p, g, s: p - learning_rate * g / (jnp.sqrt(s) + epsilon), params, grads, squares)


def _adam(beta1: float, beta2: float, epsilon: float, weight_decay: float) -> Optimizer:
    def init(params):
        return AdamState(jnp.zeros((), jnp.int32), _zeros(params), _zeros(params))

    def update(grads, state, params, learning_rate):
        updates = state.updates + 1
        n = updates.astype(learning_rate.dtype)
        mean = jax.tree.map(lambda g, m: beta1 * m + (1 - beta1) * g, grads, state.mean)
        mean_square = jax.tree.map(lambda g, s: beta2 * s + (1 - beta2) * (g * g), grads, state.mean_square)
        correction1 = bias_correction(beta1, n)
        correction2 = bias_correction(beta2, n)

        def descend(p, m, s):
            u = (m / correction1) / (jnp.sqrt(s / correction2) + epsilon)
            return p - learning_rate * (u + weight_decay * p if weight_decay else u)

        return jax.tree.map(descend, params, mean, mean_square), AdamState(updates, mean, mean_square)

    return Optimizer(init, update)


def bias_correction(beta: float, n: jax.Array) -> jax.Array:
    """1 - beta^n.  Subtracted as written, float32 would keep only three or four digits of it at beta = .9999."""
    return -jnp.expm1(n * math.log(beta)) if beta else jnp.ones_like(n)


# By the names that `OptimizerConfig.optimizer` has to choose from.
RULES = {
    "sgd": Rule(lambda c: _sgd(c.momentum), moments=1),
    "adagrad": Rule(lambda c: _adagrad(c.epsilon), moments=1),
    "rmsprop": Rule(lambda c: _rmsprop(c.rms_decay, c.epsilon), moments=1),
    "adam": Rule(lambda c: _adam(c.beta1, c.beta2, c.epsilon, weight_decay=0.0), moments=2),
    "adamw": Rule(lambda c: _adam(c.beta1, c.beta2, c.epsilon, c.weight_decay), moments=2),
}
