"""All the frozen settings of a run as one tree, and its json."""

import dataclasses
import importlib.resources
import json
import os
from pathlib import Path
from typing import Any

from charlstm.config import arguments, flagfile
from charlstm.config.model import ModelConfig
from charlstm.config.training import EvaluationConfig, OptimizerConfig, TrainingConfig
from data_pipeline.settings import CorpusSettings, StreamSettings, check_numbers
from data_pipeline.vocabulary import escaped_bytes

# Settings that determine when the validation split is scored, and the exact bits of the score.
EVALUATION_SETTINGS = ("evaluate_every", "evaluate_symbols", "eval_chunk", "burn_in", "evaluation_batch_size")
# Those of them that say what a score is of: scores with other values do not compare.
SCORE_SETTINGS = ("evaluate_symbols", "eval_chunk", "burn_in")
# Values that mean automatic: the run chooses the setting when it starts.
AUTOMATIC = {"logical_shards": 0, "decay_steps": 0, "decay_rate": 0, "lstm_backend": "auto", "segment": -1}
VERSION = 2  # of config.json: 1 had other names of settings


@dataclasses.dataclass(frozen=True, init=False)
class Config:
    """The whole of a run's settings; `config.json` in the run directory.

    `Config(hidden_size=512, num_steps=2000)` takes every setting by the name of its flag, and whole sections as well.
    """

    corpus: CorpusSettings = CorpusSettings()
    streams: StreamSettings = StreamSettings()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __init__(self, **settings: Any) -> None:
        """Takes sections and settings by name; what is not given has its default.

        Raises:
          ValueError: there is no such setting, or it cannot have that value.
        """
        fields = dataclasses.fields(self)
        sections: dict[str, Any] = {field.name: field.default for field in fields}
        for name in sections.keys() & settings.keys():
            if isinstance(settings[name], type(sections[name])):
                sections[name] = settings.pop(name)
        for name, section in _with_settings(sections, settings).items():
            object.__setattr__(self, name, section)
        self._check()

    @classmethod
    def from_flagfile(cls, path: str | os.PathLike[str]) -> "Config":
        """The settings in a flagfile: a line --name=value each.  Raises ValueError as the programs do."""
        kinds = {name: field.type for name, (_, field) in flatten(cls()).items()}
        return cls(**flagfile.read(Path(arguments.path("path", path, "a flagfile")), kinds))

    @classmethod
    def recipe(cls, name: str, **changed: Any) -> "Config":
        """The settings of a flagfile that comes with the project, such as "tinyshakespeare", but those `changed`.

        Raises:
          ValueError: there is none of that name; the message has those that there are.
        """
        folder = importlib.resources.files("configs")
        names = sorted(file.name.removesuffix(".flags") for file in folder.iterdir() if file.name.endswith(".flags"))
        if name not in names:
            raise ValueError(f"there is no recipe {name!r}, only {', '.join(names)}")
        with importlib.resources.as_file(folder / f"{name}.flags") as path:
            return replace(cls.from_flagfile(path), **changed)

    def _check(self) -> None:
        check_numbers(self.corpus)
        check_numbers(self.streams)
        flag = needs_validation(self)
        if flag and not self.training.evaluate_every:
            raise ValueError(f"{flag} goes by validation scores, and with evaluate_every=0 there are none: use 400")


def needs_validation(config: Config) -> str:
    """The flag for which a run must score its validation split as it trains; "" if none."""
    stop_after = config.training.stop_after
    return config.optimizer.validation_driven_by or (f"stop_after={stop_after}" if stop_after else "")


def flatten(config: Config) -> dict[str, tuple[str, dataclasses.Field]]:
    """Every setting: its flat name -> (its section, its field).  Names are unique over the tree."""
    flat: dict[str, tuple[str, dataclasses.Field]] = {}
    for section in dataclasses.fields(config):
        for field in dataclasses.fields(getattr(config, section.name)):
            assert field.name not in flat, f"{field.name} stands in two sections"
            flat[field.name] = (section.name, field)
    return flat


def replace(config: Config, **values: Any) -> Config:
    """`config` with settings replaced, each named by its flat name.  Raises ValueError as `Config` does."""
    sections = {section.name: getattr(config, section.name) for section in dataclasses.fields(config)}
    return Config(**_with_settings(sections, values))


def _with_settings(sections: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """`sections` with settings replaced.  Raises ValueError for an unknown setting, or a value of another type."""
    home = {field.name: (name, field) for name, section in sections.items() for field in dataclasses.fields(section)}
    given: dict[str, dict[str, Any]] = {name: {} for name in sections}
    for name, value in settings.items():
        if name not in home:
            raise ValueError(arguments.unknown_setting(name, home))
        section, field = home[name]
        kind = field.type
        assert isinstance(kind, type)
        given[section][name] = arguments.of_kind(name, value, kind)
    return {name: dataclasses.replace(section, **given[name]) for name, section in sections.items()}


def to_flags(config: Config) -> list[str]:
    """Returns the flags of the settings that differ from the defaults; `Config.from_flagfile` reads them back."""
    usual, lines = Config(), []
    for name, (section, _) in flatten(config).items():
        value, default = (getattr(getattr(tree, section), name) for tree in (config, usual))
        if value != default:
            lines.append(f"--{name}={flagfile.quote(str(value).lower() if isinstance(value, bool) else str(value))}")
    return lines


def fill_automatic(config: Config, device_count: int) -> Config:
    """Fills in settings left at 0 (automatic): logical_shards, decay_steps, decay_rate."""
    training, optimizer = config.training, config.optimizer
    return replace(
        config,
        logical_shards=training.logical_shards or device_count,
        decay_steps=optimizer.decay_steps or training.num_steps,
        decay_rate=optimizer.decay_rate or optimizer.usual_decay_rate,
    )


def to_json(config: Config) -> str:
    return json.dumps({"version": VERSION, **dataclasses.asdict(config)}, indent=2) + "\n"


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
    version, names = tree.pop("version", 1), [section.name for section in dataclasses.fields(Config)]
    if version != VERSION and tree.keys() >= set(names):
        raise ValueError(f"{source} is of version {version}, and this program reads {VERSION}: use its own one")
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
            arguments.of_kind(f"{source}: {section.name}.{name}", value, known[name])
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


def diff(run: Config, now: Config) -> tuple[list[str], list[str]]:
    """Lists what `now` would change of a run made with `run`: (forbidden, mutable), each a list of "name: old -> new".

    A setting of `now` that is AUTOMATIC is no difference, nor is another spelling of a separator.  If validation drives
    the learning rate or the average, a change of EVALUATION_SETTINGS is forbidden.
    """
    held = EVALUATION_SETTINGS if run.optimizer.validation_driven_by else ()
    forbidden: list[str] = []
    mutable: list[str] = []
    for name, (section, field) in flatten(run).items():
        old, new = getattr(getattr(run, section), name), getattr(getattr(now, section), name)
        if old != new and new != AUTOMATIC.get(name) and not _is_same_separator(name, old, new):
            (mutable if field.metadata["mutable"] and name not in held else forbidden).append(f"{name}: {old} -> {new}")
    return forbidden, mutable


def score_changes(run: Config, now: Config) -> str:
    """Lists, as `diff`, the SCORE_SETTINGS that `now` changes; "" if none, and scores of both compare."""
    return "; ".join(change for change in diff(run, now)[1] if change.startswith(SCORE_SETTINGS))


def _is_same_separator(name: str, old: Any, new: Any) -> bool:
    try:
        return name.endswith("_separator") and escaped_bytes(old) == escaped_bytes(new)
    except ValueError:  # a separator that nothing reads is not checked
        return False
