"""Search spaces: keys of the configuration by their path, each with the values to try.

``KEY=SPACE`` with one of

- ``[10, 20, 30]``: one of these values, in TOML syntax;
- ``uniform(a, b)``: a number between a and b, an integer if the key takes integers;
- ``log(a, b)``: the same, uniform in the logarithm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from ilqr_training.config import TrainConfig, check
from ilqr_vae.errors import ConfigError
from ilqr_vae.files import with_settings

_RANGE = re.compile(r"(uniform|log)\(\s*([^,]+?)\s*,\s*([^,]+?)\s*\)")
_FORMS = "KEY=[VALUE, ...], KEY=uniform(LOW, HIGH) or KEY=log(LOW, HIGH)"


class Axis(msgspec.Struct, frozen=True, kw_only=True):
    """The values to try for one key.

    Attributes:
        kind: ``choice`` of ``values``, or ``uniform`` or ``log`` between the two values.
        whole: whether the key takes integers only.
    """

    key: str
    kind: Literal["choice", "uniform", "log"]
    values: tuple[Any, ...]
    whole: bool = False

    @property
    def domain(self) -> Any:
        """Return the Ray Tune domain of this axis."""
        from ray import tune

        if self.kind == "choice":
            return tune.choice(list(self.values))
        low, high = self.values
        if self.whole:
            draw = tune.lograndint if self.kind == "log" else tune.randint
            return draw(int(low), int(high) + 1)
        return (tune.loguniform if self.kind == "log" else tune.uniform)(low, high)

    def clipped(self, value: Any) -> Any:
        """Return the nearest value that the axis allows."""
        if self.kind == "choice":
            return value
        low, high = self.values
        value = min(max(value, low), high)
        return round(value) if self.whole else value


def at(config: TrainConfig, point: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration at a point. Raises ConfigError naming an invalid key."""
    return check(with_settings(config, dict(point)))


def parse(searched: Sequence[str], config: TrainConfig) -> tuple[Axis, ...]:
    """Parse the axes of a search, and check each of their values on the configuration.

    Raises:
        ConfigError: a text has none of the forms, a key is unknown, or a value is not valid for it.
    """
    axes = [_axis(text, config) for text in searched]
    keys = [axis.key for axis in axes]
    if len(set(keys)) < len(keys):
        raise ConfigError("--search", expected="each key once", got=", ".join(keys))
    for axis in axes:
        for value in axis.values:
            at(config, {axis.key: value})
    return tuple(axes)


def _axis(text: str, config: TrainConfig) -> Axis:
    key, equals, space = text.partition("=")
    key, space = key.strip(), space.strip()
    if not (key and equals and space):
        raise ConfigError("--search", expected=_FORMS, got=repr(text))
    try:
        if found := _RANGE.fullmatch(space):
            low, high = float(found[2]), float(found[3])
            whole = isinstance(_value(config, key), int)
            if not (low < high and (found[1] == "uniform" or low > 0)):
                raise ValueError
            ends = (int(low), int(high)) if whole else (low, high)
            kind: Any = found[1]
            return Axis(key=key, kind=kind, values=ends, whole=whole)
        values = msgspec.toml.decode(f"values = {space}", type=dict[str, list[Any]])["values"]
        if not values:
            raise ValueError
    except (ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise ConfigError("--search", expected=_FORMS, got=repr(text)) from error
    return Axis(key=key, kind="choice", values=tuple(values))


def _value(config: TrainConfig, key: str) -> Any:
    """Return the current value of the key, as a number if it may be one."""
    value: Any = msgspec.to_builtins(config)
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return None if isinstance(value, bool) else value
