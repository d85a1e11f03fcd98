"""What a study searches: a small TOML file of settings, and the values that each may take.

[learning_rate]
low = 1e-3
high = 2e-2
log = true                  # evenly in the logarithm

[batch_size]
choices = [25, 50, 100]

[hidden_size]
parameters = 240_321        # not searched: as wide as the model can be with so many parameters
"""

import dataclasses
import tomllib
from typing import Any, NamedTuple

from charlstm import config as config_lib
from charlstm.config import Config
from charlstm.run import estimate
from data_pipeline.atomic_files import expand_user

SECTIONS = ("streams", "model", "optimizer")  # of the config; with another text or split, scores would not compare
FORMS = "low and high (and log), or choices, or parameters"


class Range(NamedTuple):
    low: float
    high: float
    log: bool


@dataclasses.dataclass(frozen=True)
class Space:
    """The settings searched, each with its range or its choices, and what holds the number of parameters.

    Attributes:
      fitted: the whole-number setting that is chosen so that the model has at most `parameters`; "" for none.
    """

    drawn: dict[str, Range | tuple[Any, ...]]
    fitted: str = ""
    parameters: int = 0


def read(path: str, config: Config) -> Space:
    """The space that the file `path` describes.

    Raises:
      ValueError: it is not such a file, or names what is no setting or no value of one.
    """
    try:
        tree = tomllib.loads(expand_user(path).read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"space={path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # of TOML or of UTF-8
        raise ValueError(f"space={path} is not a TOML file: {error}") from None
    flat = config_lib.flatten(config)
    drawn: dict[str, Range | tuple[Any, ...]] = {}
    fitted: dict[str, int] = {}
    for name, form in tree.items():
        where = f"{path}: {name}"
        if name not in flat or flat[name][0] not in SECTIONS:
            raise ValueError(f"{where} is not a setting of the streams, the model or the optimizer: see --helpshort")
        kind = type(getattr(getattr(config, flat[name][0]), name))
        keys = set(form) if isinstance(form, dict) else set()
        if keys == {"parameters"} and kind is int and type(form["parameters"]) is int:
            fitted[name] = form["parameters"]
        elif keys == {"choices"} and isinstance(form["choices"], list) and form["choices"]:
            drawn[name] = tuple(_of_kind(kind, value, where) for value in form["choices"])
        elif keys in ({"low", "high"}, {"low", "high", "log"}) and kind in (int, float):
            low, high = (_of_kind(kind, form[end], where) for end in ("low", "high"))
            log = form.get("log", False)
            if not (0 < low < high if log else low < high):
                raise ValueError(f"{where} is from low={low} to high={high}: low must be less{', and above 0' * log}")
            drawn[name] = Range(low, high, bool(log))
        else:
            raise ValueError(f"{where} = {form} is not of the form {FORMS}, or not for a setting like this")
    if not drawn:
        raise ValueError(f"space={path} has no setting to search: give one a low and a high, or choices")
    if len(fitted) > 1:
        raise ValueError(f"space={path} fits {' and '.join(fitted)} to a number of parameters: only one can be")
    for name, parameters in fitted.items():
        return Space(drawn, name, parameters)
    return Space(drawn)


def _of_kind(kind: type, value: Any, where: str) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where}: {value!r} is not a {kind.__name__}")
    return value


def values_of(trial: Any, space: Space, config: Config, vocabulary_size: int) -> dict[str, Any]:
    """The settings of an Optuna trial, which draws those it has not drawn yet; numbers to four digits.

    Raises:
      ValueError: they do not go together, or the model cannot be as small as it should.
    """
    values: dict[str, Any] = {}
    for name, form in space.drawn.items():
        if not isinstance(form, Range):
            values[name] = trial.suggest_categorical(name, form)
        elif isinstance(form.low, int):
            values[name] = trial.suggest_int(name, form.low, form.high, log=form.log)
        else:
            values[name] = float(f"{trial.suggest_float(name, form.low, form.high, log=form.log):.4g}")
    if space.fitted:
        values[space.fitted] = _largest(config_lib.replace(config, **values), space, vocabulary_size)
    config_lib.replace(config, **values)
    return values


def _largest(config: Config, space: Space, vocabulary_size: int) -> int:
    """The largest value of the fitted setting with which the model has no more parameters than it may."""

    def fits(value: int) -> bool:
        count = estimate.count_parameters(config_lib.replace(config, **{space.fitted: value}), vocabulary_size)
        return count <= space.parameters

    if not fits(1):
        raise ValueError(f"with {space.fitted}=1 the model has more than parameters={space.parameters} already")
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def own_values(space: Space, config: Config) -> dict[str, Any]:
    """The values that `config` itself has of the settings searched, where they lie in the space."""
    flat, own = config_lib.flatten(config), {}
    for name, form in space.drawn.items():
        value = getattr(getattr(config, flat[name][0]), name)
        if form.low <= value <= form.high if isinstance(form, Range) else value in form:
            own[name] = value
    return own
