"""Values of a `config.json`, each checked where it is read; what breaks a rule is refused by name."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxserve.parallel.errors import ConfigError

_LARGEST = 2**31 - 1  # sizes and positions are int32 on devices


@dataclass(frozen=True)
class Keys:
    """The keys of `config.json`, or of an object in it.

    A `default` stands for a value that is absent or null, under the same rule; without one the key is needed. What
    reads a value raises ConfigError with the key, the value and the rule.
    """

    raw: Mapping[str, Any]
    kind: str  # what needs the keys: "model_type 'qwen3'"
    where: str = "config.json"

    def __contains__(self, key: str) -> bool:
        return self.raw.get(key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is, unchecked."""
        return self.raw[key] if key in self else default

    def whole(self, key: str, default: int | None = None, at_least: int = 1, at_most: int = _LARGEST) -> int:
        value = self._value(key, default)
        if type(value) is not int or value < at_least:  # True is an int, but none that was meant
            raise self.wrong(key, f"it must be a whole number, {at_least} or more")
        return self._limited(key, value, at_most)

    def wholes(self, key: str, or_one: bool = False) -> tuple[int, ...]:
        """A list of whole numbers, 0 or more; empty if absent or null. `or_one`: a number alone is a list of one."""
        value = self.get(key, [])
        if not or_one and not isinstance(value, list):
            raise self.wrong(key, "it must be a list of whole numbers")
        values = value if isinstance(value, list) else [value]
        return tuple(replace(self, raw={key: each}).whole(key, at_least=0) for each in values)

    def number(
        self, key: str, default: float | None = None, above: float = 0.0, at_least: float | None = None
    ) -> float:
        """A number above `above`, or where `at_least` is given, of at least that."""
        value = self._value(key, default)
        rule = f"above {above:g}" if at_least is None else f"{at_least:g} or more"
        fits = type(value) in (int, float) and (value > above if at_least is None else value >= at_least)
        if not fits:  # nor does NaN
            raise self.wrong(key, f"it must be a number, {rule}")
        return float(self._limited(key, value, _LARGEST))

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "it must be true or false")
        return value

    def only(self, key: str, *supported: Any) -> None:
        """Refuses a value that is neither absent nor null nor one of these."""
        if key in self and self.raw[key] not in supported:
            raise self.wrong(key, f"it is not supported; supported: {', '.join(map(str, supported))}")

    def inner(self, key: str, kind: str) -> "Keys":
        """The keys of an object, none if it is absent or null."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise self.wrong(key, "it must be an object, of keys and values")
        return Keys(value, kind, f"{self.where}, {key}")

    def wrong(self, key: str, rule: str) -> ConfigError:
        """The error that says so, to be raised."""
        return ConfigError(f"{self.where}: {key} = {self.raw.get(key)!r}: {rule}")

    def _value(self, key: str, default: Any) -> Any:
        if default is not None:
            return self.get(key, default)
        if key not in self.raw:
            raise ConfigError(f"{self.where} lacks {key!r}, which {self.kind} needs")
        return self.raw[key]

    def _limited(self, key: str, value: Any, at_most: int) -> Any:
        if value > at_most:
            raise self.wrong(key, f"it must be at most {at_most}")
        return value
