"""Search spaces of a study: a TOML file of settings, and the values that each may take.

[learning_rate]
low = 1e-3
high = 2e-2
log = true                  # uniform in the logarithm

[batch_size]
choices = [25, 50, 100]

[hidden_size]
parameters = 240_321        # not searched: the largest value with at most that many parameters
"""

import bisect
import tomllib
from typing import Any, NamedTuple

from charlstm import config as config_lib
from charlstm.config import Config
from charlstm.config.arguments import in_words
from charlstm.run import estimate
from data_pipeline.atomic_files import expand_user

SECTIONS = ("streams", "model", "optimizer")  # of the config; with another text or split, scores would not compare


class Space(NamedTuple):
    """A search space.

    Attributes:
      drawn: setting -> {"low": ., "high": ., "log": .} or {"choices": [.]}.
      fitted: the setting that is chosen to give the model a number of parameters, "" for none; and that number.
    """

    drawn: dict[str, dict[str, Any]]
    fitted: str = ""
    parameters: int = 0


def read(path: str, config: Config) -> Space:
    """Reads a space.  Raises ValueError if it is no TOML file, or has an unknown setting or an unsuitable value."""
    try:
        tree = tomllib.loads(expand_user(path).read_text("utf-8"))
    except ValueError as error:  # of TOML or of UTF-8
        raise ValueError(f"space={path} is not a TOML file: {error}") from None
    sections = config_lib.flatten(config)
    drawn: dict[str, dict[str, Any]] = {}
    fitted: dict[str, int] = {}
    for name, form in tree.items():
        where = f"{path}: {name}"
        if name not in sections or sections[name][0] not in SECTIONS:
            raise ValueError(f"{where} is not a setting of the streams, the model or the optimizer: see --helpshort")
        if name == "mixture":
            raise ValueError(f"{where} is the text: with another one, scores would not compare")
        kind = type(_value(config, name))
        match form:
            case {"parameters": int(count)} if kind is int and len(form) == 1:
                fitted[name] = count
            case {"choices": [_, *_] as choices} if len(form) == 1:
                drawn[name] = {"choices": [_of_kind(kind, value, where) for value in choices]}
            case {"low": low, "high": high} if kind in (int, float) and form.keys() <= {"low", "high", "log"}:
                low, high, log = _of_kind(kind, low, where), _of_kind(kind, high, where), bool(form.get("log"))
                if low >= high or (log and low <= 0):
                    least = ", and above 0" * log
                    raise ValueError(f"{where} is from low={low} to high={high}: low must be less{least}")
                drawn[name] = {"low": low, "high": high, "log": log}
            case _:
                forms = "low and high (and log), or choices, or parameters"
                raise ValueError(f"{where} = {form} is not of the form {forms}, or not for a setting like this")
    if not drawn:
        raise ValueError(f"space={path} has no setting to search: give one a low and a high, or choices")
    if len(fitted) > 1:
        raise ValueError(f"space={path} fits {' and '.join(fitted)} to a number of parameters: only one can be")
    return Space(drawn, *next(iter(fitted.items()), ()))


def _value(config: Config, name: str) -> Any:
    return getattr(getattr(config, config_lib.flatten(config)[name][0]), name)


def _of_kind(kind: type, value: Any, where: str) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where}: {value!r} is not {in_words(kind)}")
    return value


def own_values(space: Space, config: Config) -> dict[str, Any]:
    """Returns the values of `config` itself that lie in the space."""
    own = {}
    for name, form in space.drawn.items():
        value = _value(config, name)
        if form["low"] <= value <= form["high"] if "low" in form else value in form["choices"]:
            own[name] = value
    return own


def draw(trial: Any, space: Space, config: Config, vocabulary_size: int) -> dict[str, Any]:
    """Draws the settings of a trial, numbers to four digits but within their bounds.

    Raises:
      ValueError: they contradict each other.
    """
    values: dict[str, Any] = {}
    for name, form in space.drawn.items():
        if "choices" in form:
            values[name] = trial.suggest_categorical(name, **form)
        elif isinstance(form["low"], int):
            values[name] = trial.suggest_int(name, **form)
        else:
            rounded = float(f"{trial.suggest_float(name, **form):.4g}")
            values[name] = min(max(rounded, form["low"]), form["high"])  # an ema_decay of .99997 is not 1
    config = config_lib.replace(config, **values)
    if space.fitted:
        values[space.fitted] = _largest(config, space, vocabulary_size)
    return values


def _largest(config: Config, space: Space, vocabulary_size: int) -> int:
    """Returns the largest value of the fitted setting with which the model has at most `space.parameters`."""
    name, most = space.fitted, space.parameters

    def count(value: int) -> int:
        return estimate.count_parameters(config_lib.replace(config, **{name: value}), vocabulary_size)

    def is_too_large(value: int) -> bool:
        try:
            return count(value) > most
        except ValueError:  # it is refused, and so is any larger one
            return True

    try:
        least, next_one = count(1), count(2)
    except ValueError as error:
        raise ValueError(
            f"{name} cannot be fitted to parameters={most}, as not every value is allowed: {error}"
        ) from None
    if least == next_one:
        raise ValueError(f"{name} cannot be fitted to parameters={most}: it does not change their number")
    if least > most:
        raise ValueError(f"with {name}=1 the model has more than parameters={most} already")
    end = next(2**n for n in range(64) if is_too_large(2**n))
    return bisect.bisect(range(1, end), False, key=is_too_large)
