"""Search spaces: keys of the configuration by their path, each with the values it may have.

``KEY=SPACE`` with one of

- ``[10, 20, 30]``: one of these values, as TOML writes them;
- ``uniform(a, b)``: a number between a and b, a whole one where the key takes whole ones;
- ``log(a, b)``: the same, uniform in its logarithm.
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
    """The values of one key.

    Attributes:
        kind: ``choice`` of ``values``, or ``uniform`` or ``log`` between the two of them.
        whole: whether the key takes whole numbers alone.
    """

    key: str
    kind: Literal["choice", "uniform", "log"]
    values: tuple[Any, ...]
    whole: bool = False

    @property
    def domain(self) -> Any:
        """What Ray Tune draws from."""
        from ray import tune

        if self.kind == "choice":
            return tune.choice(list(self.values))
        low, high = self.values
        if self.whole:
            draw = tune.lograndint if self.kind == "log" else tune.randint
            return draw(int(low), int(high) + 1)
        return (tune.loguniform if self.kind == "log" else tune.uniform)(low, high)

    def clipped(self, value: Any) -> Any:
        """The nearest value that the axis has."""
        if self.kind == "choice":
            return value
        low, high = self.values
        value = min(max(value, low), high)
        return round(value) if self.whole else value


def at(config: TrainConfig, point: Mapping[str, Any]) -> TrainConfig:
    """The configuration at a point of the space. Raises ConfigError naming the key."""
    return check(with_settings(config, dict(point)))


def parse(searched: Sequence[str], config: TrainConfig) -> tuple[Axis, ...]:
    """The axes of a search, each of its ends or values tried on the configuration.

    Raises:
        ConfigError: a text that is none of the forms, an unknown key, or a value that it cannot
            have.
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
    """What the key has now; a number where it may have one. False is a whole number of none."""
    value: Any = msgspec.to_builtins(config)
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return None if isinstance(value, bool) else value
