"""Names of units: LAYER:UNIT, or LAYER.ARRAY:UNIT, such as 1:317 or 2.f:5."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from charlstm.config.arguments import scalar
from charlstm.config.model import ModelConfig
from charlstm.model.layer import Held

GATES = {"lstm": "ifgo", "layer_norm_lstm": "ifgo", "mlstm": "ifgom", "gru": "run", "rnn": ""}
SIGMOID = "iforu"  # gates between 0 and 1


class Unit(NamedTuple):
    """One unit: its layer, counted from 1; c, h or a gate; and its number in the layer, counted from 0."""

    layer: int
    array: str
    number: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.array}:{self.number}"

    @property
    def name(self) -> str:
        """The array of `model.trace` that has it, such as "1.c"."""
        return f"{self.layer}.{self.array}"


def main_array(config: ModelConfig) -> str:
    """Returns what a unit without an array means: c where the cell has one, else h."""
    return "c" if config.cell.endswith("lstm") else "h"


def arrays_of(config: ModelConfig) -> tuple[str, ...]:
    """Returns the arrays of a layer, the main one first."""
    main = main_array(config)
    return (main, *("h" if main == "c" else ""), *GATES[config.cell])


def parse(text: str | Unit, config: ModelConfig) -> Unit:
    """Returns the unit of a name.

    Raises:
      ValueError: it is no name of a unit, or there is none of that name; says how many there are.
    """
    found = re.fullmatch(r"(\d+)(?:\.([a-z]))?:(\d+)", str(text).strip())
    if not found:
        raise ValueError(f"{text!r} names no unit: write LAYER:UNIT, such as 1:0, or LAYER.ARRAY:UNIT, such as 1.h:0")
    unit = Unit(int(found[1]), found[2] or main_array(config), int(found[3]))
    if not 1 <= unit.layer <= len(config.widths):
        raise ValueError(f"there is no unit {text}: the layers are 1 to {len(config.widths)}")
    if unit.number >= (width := config.widths[unit.layer - 1]):
        raise ValueError(f"there is no unit {text}: the {width} units of layer {unit.layer} are 0 to {width - 1}")
    if unit.array not in arrays_of(config):
        raise ValueError(
            f"there is no unit {text}: the arrays of cell={config.cell} are {', '.join(arrays_of(config))}"
        )
    return unit


def held(clamp: Mapping[str | Unit, float], config: ModelConfig) -> tuple[Held, ...]:
    """Returns what `language_model.trace` holds, of each layer; () for none.

    Raises:
      TypeError: it is no mapping.
      ValueError: there is no such unit, it is no state (c or h) or given twice, or a value is not finite.
    """
    if not isinstance(clamp, Mapping):
        raise TypeError(f"clamp={clamp!r} is no dict: give units with their values, such as {{'1:0': 1.0}}")
    layers: list[list[tuple[str, int, float]]] = [[] for _ in config.widths]
    seen = set[Unit]()
    for name, value in clamp.items():
        unit, value = parse(name, config), scalar(value)
        if unit.array not in ("c", "h"):
            raise ValueError(f"{unit} cannot be held: only states can, {main_array(config)} or h")
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{unit} cannot be held at {value!r}: give a finite number")
        if unit in seen:
            raise ValueError(f"{unit} cannot be held at two values: give it once")
        seen.add(unit)
        layers[unit.layer - 1].append((unit.array, unit.number, float(value)))
    return tuple(map(tuple, layers)) if clamp else ()


def parse_clamp(text: str) -> dict[str | Unit, float]:
    """Parses UNIT:VALUE, several separated by commas, such as "1:317:+1,2.h:5:-0.5".  Raises ValueError."""
    found: dict[str | Unit, float] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.rpartition(":")
        if name.strip() in found:
            raise ValueError(f"clamp={text!r} has {name.strip()} twice: give it once")
        try:
            found[name.strip()] = float(value if ":" in name else "")
        except ValueError:
            raise ValueError(f"clamp={part!r} has no value: write LAYER:UNIT:VALUE, such as 1:317:+1") from None
    return found


def shown(config: ModelConfig, name: str, array: Any) -> jax.Array:
    """Returns the values that are shown, within -1 and 1: c and rectified h through tanh, all others as they are."""
    is_unbounded = name == "c" or (name == "h" and config.variant == "relu") or name == "m"
    return jnp.tanh(array) if is_unbounded else array


def quantized(values: jax.Array) -> jax.Array:
    """Returns values within -1 and 1 as uint8, 0 to 254, where 127 is 0."""
    return jnp.round(jnp.clip(values, -1, 1) * 127 + 127).astype(jnp.uint8)


def all_units(config: ModelConfig) -> list[Unit]:
    """Returns the units of all layers, by their main array, in the order of every array `[., units]` here."""
    return [Unit(n, main_array(config), u) for n, width in enumerate(config.widths, 1) for u in range(width)]


LEVELS = (np.arange(255) - 127) / 127  # the values that `quantized` tells apart
