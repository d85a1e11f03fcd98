"""Frozen settings of a run: everything that does not change, its checks, and its json."""

import dataclasses
import json
from typing import Any

from data_pipeline.settings import CorpusSettings, StreamSettings, check_choices, setting

# What steps, sizes and rates are on the device: int32 and float32.
LARGEST_INT, LARGEST_FLOAT = 2**31 - 1, 3.4e38


def _check_numbers(settings: Any) -> None:
    """Raises ValueError where a number of the dataclass `settings` is one that no computation can take."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:  # not a number is not, either
            raise ValueError(f"{field.name}={value} is not a finite float32")
        if isinstance(value, int) and abs(value) > LARGEST_INT:
            raise ValueError(f"{field.name}={value} must be at most {LARGEST_INT}")


def _check_at_least(settings: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value < least:
            words = f"at least {least}" if least else "0 or more"
            raise ValueError(f"{name}={value} must be {words}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The recurrent language model."""

    cell: str = setting("lstm", "The recurrent cell.", choices=("lstm", "gru", "rnn"))
    num_layers: int = setting(2, "L: recurrent layers.")
    hidden_size: int = setting(256, "H: hidden units of each layer.")
    embedding_size: int = setting(0, "E: width of the symbol embedding; 0 feeds one-hot symbols, as char-rnn does.")
    tie_embeddings: bool = setting(False, "The soft-max uses the embedding's own weights (needs E = H).")
    skip: bool = setting(False, "The sum of all layers' outputs feeds the soft-max, not the last layer's alone.")
    dropout: float = setting(0.0, "Dropout between layers and before the soft-max; masks are constant over a window.")
    forget_bias: float = setting(1.0, "Initial bias of the LSTM's forget gate.")
    initializer: str = setting(
        "pytorch",
        "Weights at the start: pytorch (uniform +-1/sqrt(H)), uniform (+-init_scale), normal (deviation init_scale), "
        "glorot, or orthogonal (recurrent weights; the others glorot).",
        choices=("pytorch", "uniform", "normal", "glorot", "orthogonal"),
    )
    init_scale: float = setting(0.08, "Scale of --initializer=uniform and normal.")
    compute_dtype: str = setting(
        "float32",
        "Type of the matrix products' operands; master parameters, recurrent state and soft-max stay float32.",
        choices=("float32", "bfloat16"),
    )

    def __post_init__(self) -> None:
        check_choices(self)
        _check_numbers(self)
        _check_at_least(self, 1, "num_layers", "hidden_size")
        _check_at_least(self, 0, "init_scale")
        if self.embedding_size < 0:
            raise ValueError(f"embedding_size={self.embedding_size} must be 0 (one-hot) or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and less than 1")
        if self.tie_embeddings and self.embedding_size != self.hidden_size:
            raise ValueError(
                f"tie_embeddings needs embedding_size={self.embedding_size} to equal hidden_size={self.hidden_size}"
            )


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
    schedule: str = setting(
        "constant",
        "Learning rate over time: constant; linear or cosine (to final_fraction at decay_steps); exponential (times "
        "decay_rate each epoch from decay_start_epoch on, char-rnn's); step (times decay_rate each decay_steps).",
        choices=("constant", "linear", "cosine", "exponential", "step"),
    )
    warmup_steps: int = setting(0, "Steps of linear warm-up from 0, before any schedule.")
    decay_steps: int = setting(0, "linear, cosine: where the decay ends; step: its period; 0 means num_steps.")
    decay_rate: float = setting(0.97, "exponential, step: factor of one decay.")
    decay_start_epoch: int = setting(10, "exponential: epochs at the full rate; the first decay follows them.")
    final_fraction: float = setting(0.0, "linear, cosine: learning rate at the end, as a fraction of learning_rate.")
    clip_norm: float = setting(0.0, "Scale the gradient down to this global norm; 0: off.  Done before clip_value.")
    clip_value: float = setting(0.0, "Clip each element of the gradient to +-this; 0: off.")

    def __post_init__(self) -> None:
        check_choices(self)
        _check_numbers(self)
        _check_at_least(self, 0, "learning_rate", "weight_decay", "final_fraction", "clip_norm", "clip_value")
        _check_at_least(self, 0, "warmup_steps", "decay_steps", "decay_start_epoch")
        if not self.epsilon > 0 and self.optimizer != "sgd":
            raise ValueError(f"epsilon={self.epsilon} must be more than 0 for optimizer={self.optimizer}: use 1e-8")
        if not self.decay_rate > 0 and self.schedule in ("exponential", "step"):
            raise ValueError(f"decay_rate={self.decay_rate} must be more than 0 for schedule={self.schedule}: use .97")
        for name in ("momentum", "rms_decay", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and less than 1")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The run: how long, over how many shards, how often to look."""

    seed: int = setting(0, "Seed of initial parameters, dropout and stream offsets.")
    num_steps: int = setting(1000, "Updates of the whole run.", free=True)
    logical_shards: int = setting(
        0,
        "M: groups that the B streams are split into; each group's gradient is computed by itself, so M above the "
        "number of devices is gradient accumulation.  Fixed for a run; 0 means the number of devices it starts on.",
    )
    reduction: str = setting(
        "exact",
        "exact: the same bits on any number of devices that divides M; fast: one plain all-reduce, on any number.",
        choices=("exact", "fast"),
        free=True,  # the sum is the same but for rounding
    )
    on_divergence: str = setting(
        "stop",
        "What an update that is not sound leads to (a loss, gradient or parameter that is not finite, a spike of the "
        "loss, a poisoned row of recurrent state): stop; skip the update and zero poisoned rows; or rollback, to the "
        "newest checkpoint, leaving out the windows read since.",
        choices=("stop", "skip", "rollback"),
        free=True,
    )
    spike_factor: float = setting(
        0.0, "A loss of more than this many times the usual one, of some 50 updates, is a spike; 0: none is.", free=True
    )
    max_skips: int = setting(10, "skip: updates skipped one after the other before the run stops.", free=True)
    max_rollbacks: int = setting(3, "rollback: how often a run goes back before it stops.", free=True)
    check_replicas_every: int = setting(
        0,
        "Steps between comparisons of the devices' copies of parameters and optimizer state, which is also done before "
        "every save; 0: never.",
        free=True,
    )
    log_every: int = setting(100, "Steps between lines of log.txt and metrics.jsonl.", free=True)
    evaluate_every: int = setting(
        1000, "Steps between evaluations of the validation split; 0: only at the end.", free=True
    )
    checkpoint_every: int = setting(1000, "Steps between checkpoints; 0: only at the end.", free=True)
    max_failed_saves: int = setting(
        0, "Checkpoints that may fail to be saved, one after the other, before the run stops; 0: any number.", free=True
    )
    keep_checkpoints: int = setting(3, "Newest checkpoints kept; the best on validation is kept besides.", free=True)

    def __post_init__(self) -> None:
        check_choices(self)
        _check_numbers(self)
        _check_at_least(self, 1, "num_steps", "log_every", "keep_checkpoints")
        _check_at_least(self, 0, "max_skips", "max_rollbacks", "check_replicas_every")
        if self.spike_factor and not self.spike_factor > 1:
            raise ValueError(f"spike_factor={self.spike_factor} must be more than 1, or 0 for none")
        _check_at_least(self, 0, "seed", "logical_shards", "evaluate_every", "checkpoint_every", "max_failed_saves")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How a held-out split is scored."""

    piece: int = setting(
        8192,
        "The split is scored in pieces of this many symbols, side by side; part of what the figure means.",
        free=True,
    )
    burn_in: int = setting(1024, "Symbols read before each piece to warm the recurrent state, not scored.", free=True)
    evaluation_batch_size: int = setting(64, "Pieces scored side by side; does not change the figure.", free=True)

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_at_least(self, 1, "piece", "evaluation_batch_size")
        _check_at_least(self, 0, "burn_in")


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole of a run's settings; `config.json` in the run directory."""

    corpus: CorpusSettings = CorpusSettings()
    streams: StreamSettings = StreamSettings()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        _check_numbers(self.corpus)
        _check_numbers(self.streams)


def flatten(config: Config) -> dict[str, tuple[str, dataclasses.Field]]:
    """Every setting: its flat name -> (its section, its field).  Names are unique over the tree."""
    flat: dict[str, tuple[str, dataclasses.Field]] = {}
    for section in dataclasses.fields(config):
        for field in dataclasses.fields(getattr(config, section.name)):
            assert field.name not in flat, f"{field.name} stands in two sections"
            flat[field.name] = (section.name, field)
    return flat


def replace(config: Config, **values: Any) -> Config:
    """`config` with settings replaced, each named by its flat name.  Checks run again."""
    flat = flatten(config)
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        sections.setdefault(flat[name][0], {})[name] = value
    return dataclasses.replace(
        config, **{s: dataclasses.replace(getattr(config, s), **changed) for s, changed in sections.items()}
    )


def resolve(config: Config, device_count: int) -> Config:
    """`config` with the zeros that mean "the obvious number" filled in, as a run fixes them when it starts."""
    training, optimizer = config.training, config.optimizer
    return replace(
        config,
        logical_shards=training.logical_shards or device_count,
        decay_steps=optimizer.decay_steps or training.num_steps,
    )


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, source: str) -> Config:
    """The config that `to_json` wrote.

    Raises:
      ValueError: `text` is not such a config; the message names `source` and what is wrong.
    """
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not json: {error}") from None
    defaults = Config()
    if not isinstance(tree, dict):
        raise ValueError(f"{source} is not the config of a run: not a json object")
    sections = {}
    for section in dataclasses.fields(Config):
        current = getattr(defaults, section.name)
        values = tree.pop(section.name, None)
        if not isinstance(values, dict):
            raise ValueError(f"{source} is not the config of a run: section {section.name!r} is missing")
        known = {f.name: type(getattr(current, f.name)) for f in dataclasses.fields(current)}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"{source}: unknown setting {name!r} in section {section.name!r}")
            if type(value) is not known[name] and not (known[name] is float and type(value) is int):
                raise ValueError(f"{source}: {section.name}.{name}={value!r} is not a {known[name].__name__}")
        try:
            sections[section.name] = dataclasses.replace(current, **values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
    if tree:
        raise ValueError(f"{source}: unknown section {next(iter(tree))!r}")
    try:
        return Config(**sections)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def differences(run: Config, now: Config) -> tuple[list[str], list[str]]:
    """What `now` would change of a run made with `run`: (forbidden, free), each a list of "name: old -> new".

    A zero that `resolve` fills in is no difference.
    """
    forbidden: list[str] = []
    free: list[str] = []
    for name, (section, field) in flatten(run).items():
        old, new = getattr(getattr(run, section), name), getattr(getattr(now, section), name)
        if old != new and not (name in ("logical_shards", "decay_steps") and new == 0):
            (free if field.metadata["free"] else forbidden).append(f"{name}: {old} -> {new}")
    return forbidden, free
