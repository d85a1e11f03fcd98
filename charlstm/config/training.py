"""Frozen settings of the optimizer, of the training run, and of evaluation."""

import dataclasses

from data_pipeline.settings import LARGEST_INT, check_at_least, check_choices, check_numbers, setting


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update, its learning rate over time, and clipping."""

    optimizer: str = setting("adam", "The update rule.", choices=("sgd", "adagrad", "rmsprop", "adam", "adamw"))
    learning_rate: float = setting(2e-3, "Learning rate after warm-up.")
    momentum: float = setting(0.0, "sgd: momentum.")
    rms_decay: float = setting(0.95, "rmsprop: decay of the mean squared gradient.")
    beta1: float = setting(0.9, "adam, adamw: decay of the mean gradient.")
    beta2: float = setting(0.999, "adam, adamw: decay of the mean squared gradient.")
    epsilon: float = setting(1e-8, "adagrad, rmsprop, adam, adamw: added to the root in the denominator.")
    weight_decay: float = setting(0.01, "adamw: decoupled weight decay, scaled by the learning rate.")
    l2: float = setting(
        0.0,
        "Coupled L2: this times the parameter is added to its gradient, once that is clipped (PyTorch's weight_decay).",
    )
    activation_penalty: float = setting(
        0.0, "AR of AWD-LSTM: this times the mean square of the softmax input, after dropout, is added to the loss."
    )
    activation_change_penalty: float = setting(
        0.0, "TAR of AWD-LSTM: the same for its change from one symbol to the next, before dropout."
    )
    schedule: str = setting(
        "constant",
        "Learning rate over time: constant; linear or cosine (to final_fraction at decay_steps); exponential (times "
        "decay_rate each epoch from decay_start_epoch on, char-rnn's); step (times decay_rate each decay_steps, "
        "or after each of drop_epochs); plateau (times decay_rate, once, when validation no longer improves).",
        choices=("constant", "linear", "cosine", "exponential", "step", "plateau"),
    )
    warmup_steps: int = setting(0, "Steps of linear warm-up from 0, before any schedule.")
    decay_steps: int = setting(0, "linear, cosine: where the decay ends; step: its period; 0 means num_steps.")
    drop_epochs: str = setting(
        "", "step: the rate drops after each of these epochs, such as 25,35, and not each decay_steps."
    )
    decay_rate: float = setting(
        0.0, "exponential, step, plateau: factor of one decay; 0 means .1 for plateau and for drop_epochs, else .97."
    )
    decay_start_epoch: int = setting(10, "exponential: epochs at the full rate; the first decay follows them.")
    final_fraction: float = setting(0.0, "linear, cosine: learning rate at the end, as a fraction of learning_rate.")
    plateau_patience: int = setting(13, "plateau: evaluations without gain after which the rate drops.")
    plateau_latest: int = setting(0, "plateau: the evaluation after which it drops in any case; 0: none.")
    average: str = setting(
        "none",
        "An average of the parameters, which is then what is evaluated and sampled: none; ema (exponential); asgd (the "
        "mean of all since validation stopped improving).",
        choices=("none", "ema", "asgd"),
    )
    ema_decay: float = setting(0.999, "ema: weight of the average so far at each update; 0: only the newest counts.")
    average_patience: int = setting(
        10, "asgd: evaluations without gain after which the average begins; 0: it begins with the first update."
    )
    average_latest: int = setting(0, "asgd: the evaluation after which it begins in any case; 0: none.")
    clip_norm: float = setting(0.0, "Scale the gradient down to this global norm; 0: off.  Done before clip_value.")
    clip_value: float = setting(0.0, "Clip each element of the gradient to +-this; 0: off.")

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(self)
        check_at_least(self, 0, "learning_rate", "weight_decay", "final_fraction", "clip_norm", "clip_value")
        check_at_least(self, 0, "l2", "activation_penalty", "activation_change_penalty")
        check_at_least(self, 0, "warmup_steps", "decay_steps", "decay_rate", "decay_start_epoch")
        if not self.epsilon > 0 and self.optimizer != "sgd":
            raise ValueError(f"epsilon={self.epsilon} must be more than 0 for optimizer={self.optimizer}: use 1e-8")
        check_at_least(self, 1, "plateau_patience")
        check_at_least(self, 0, "plateau_latest", "average_patience", "average_latest")
        parse_epochs(self.drop_epochs)
        for name in ("momentum", "rms_decay", "beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and less than 1")

    @property
    def usual_decay_rate(self) -> float:
        """Default decay factor: 0.1 for one-off drops, 0.97 for periodic decay."""
        seldom = self.schedule == "plateau" or (self.schedule == "step" and self.drop_epochs)
        return 0.1 if seldom else 0.97

    @property
    def eval_params_field(self) -> str:
        """Field of the state that is evaluated: "average" if one is kept, else "params"."""
        return "params" if self.average == "none" else "average"

    @property
    def validation_driven_by(self) -> str:
        """The flag that ties the learning rate or the average to validation scores, as name=value; "" if none."""
        if self.schedule == "plateau":
            return "schedule=plateau"
        return "average=asgd" if self.average == "asgd" and self.average_patience else ""


def parse_epochs(drop_epochs: str) -> list[int]:
    """The numbers of `25,35`; none of an empty text.  Raises ValueError where they are not rising, from 1 on."""
    try:
        epochs = [int(epoch) for epoch in drop_epochs.split(",")] if drop_epochs else []
    except ValueError:
        epochs = [0]
    if epochs != sorted(set(epochs)) or not all(0 < epoch <= LARGEST_INT for epoch in epochs):
        raise ValueError(f"drop_epochs={drop_epochs!r} is not a list of epochs, each after the one before: use 25,35")
    return epochs


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The run: how long, over how many shards, how often to look."""

    seed: int = setting(0, "Seed of initial parameters, dropout and stream offsets.")
    num_steps: int = setting(1000, "Updates of the whole run.", mutable=True)
    logical_shards: int = setting(
        0,
        "M: groups that the B streams are split into; each group's gradient is computed by itself, so M above the "
        "number of devices is gradient accumulation.  Fixed for a run; 0 means the number of devices it starts on.",
    )
    reduction: str = setting(
        "exact",
        "exact: the same bits on any number of devices that divides M; fast: one plain all-reduce, on any number that "
        "divides B.",
        choices=("exact", "fast"),
        mutable=True,  # the sum is the same but for rounding
    )
    on_divergence: str = setting(
        "stop",
        "Reaction to an update that is not accepted (a loss, gradient or parameter that is not finite, a spike of the "
        "loss, a non-finite row of recurrent state): stop; skip the update and zero such rows; or rollback, to the "
        "newest checkpoint that was due, leaving out the windows read since.",
        choices=("stop", "skip", "rollback"),
        mutable=True,
    )
    spike_factor: float = setting(
        0.0,
        "A loss above this times its moving average (over about 50 updates) is a spike; 0: no loss is.",
        mutable=True,
    )
    max_skips: int = setting(10, "skip: updates skipped one after the other before the run stops.", mutable=True)
    max_rollbacks: int = setting(3, "rollback: how often a run goes back before it stops.", mutable=True)
    check_replicas_every: int = setting(
        0,
        "Steps between comparisons of the devices' copies of parameters, their average and optimizer state; 0: only "
        "before every save.",
        mutable=True,
    )
    log_every: int = setting(100, "Steps between lines of log.txt and metrics.jsonl.", mutable=True)
    evaluate_every: int = setting(
        1000, "Steps between evaluations of the validation split; 0: only at the end.", mutable=True
    )
    evaluate_symbols: int = setting(
        2_000_000,
        "Symbols of the validation split that are scored as the run trains, in chunks evenly spaced over it; 0: all, "
        "as launch.evaluate does.",
        mutable=True,
    )
    stop_after: int = setting(
        0, "Early stopping: evaluations in a row without improvement that end the run; 0: off.", mutable=True
    )
    checkpoint_every: int = setting(1000, "Steps between checkpoints; 0: only at the end.", mutable=True)
    max_failed_saves: int = setting(
        0,
        "Stop the run when this many saves in a row have failed; 0: never.",
        mutable=True,
    )
    sample_every: int = setting(
        -1,
        "Steps between samples of the text that the model writes, kept in samples.jsonl; -1: at evaluations; 0: never.",
        mutable=True,
    )
    sample_prompt: str = setting(
        "",
        "What these samples continue; if empty, they begin a line, or with --reset_state=document a document.",
        mutable=True,
    )
    sample_length: int = setting(300, "Symbols of each of these samples.", mutable=True)
    sample_temperature: float = setting(0.8, "Divides the logits of these samples; 0: the most probable.", mutable=True)
    keep_checkpoints: int = setting(
        3,
        "Newest checkpoints kept; the best on validation is kept besides, and for rollback the newest that was due.",
        mutable=True,
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(self)
        check_at_least(self, 1, "num_steps", "log_every", "keep_checkpoints")
        check_at_least(self, 0, "max_skips", "max_rollbacks", "check_replicas_every")
        if self.spike_factor and not self.spike_factor > 1:
            raise ValueError(f"spike_factor={self.spike_factor} must be more than 1, or 0 for none")
        check_at_least(self, 0, "seed", "logical_shards", "evaluate_every", "checkpoint_every", "max_failed_saves")
        check_at_least(self, -1, "sample_every")
        check_at_least(self, 0, "sample_length", "sample_temperature", "stop_after", "evaluate_symbols")

    @property
    def sampled_every(self) -> int | None:
        """Steps between samples, as between evaluations; None: there are no samples."""
        return None if self.sample_every == 0 else self.evaluate_every if self.sample_every < 0 else self.sample_every


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Scoring of a held-out split."""

    eval_chunk: int = setting(
        8192,
        "The split is scored in chunks of this many symbols, side by side; part of what the figure means.",
        mutable=True,
    )
    burn_in: int = setting(
        1024, "Symbols read before each chunk to warm the recurrent state, not scored.", mutable=True
    )
    evaluation_batch_size: int = setting(64, "Chunks scored side by side; does not change the figure.", mutable=True)

    def __post_init__(self) -> None:
        check_numbers(self)
        check_at_least(self, 1, "eval_chunk", "evaluation_batch_size")
        check_at_least(self, 0, "burn_in")
