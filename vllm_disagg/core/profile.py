"""A profile: step times and KV capacity of one model on one kind of device, and where they come from.

Two JSON documents can be read: our own (`FORMAT`), which `docs/emulation.md` describes, and the table of fitted
coefficients that DistServe published for OPT on A100 GPUs (`from_distserve`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from vllm_disagg.core.latency import LatencyModel, Regime, work_of
from vllm_disagg.core.link import Link
from vllm_disagg.errors import ConfigError

FORMAT: Final = "vllm-disagg-profile"
VERSION: Final = 1

Kind = Literal["measured", "published", "guess"]
"""Measured by the user here, fitted and published by others, or derived from data sheets."""

_COEFFICIENTS: Final = ("constant", "per_token", "per_area", "per_prefill", "per_decode", "per_context")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the KV cache and the parallelism of a model depend on.

    Args:
        name: as the model's own configuration names it, or a path.
        num_layers, num_heads, num_kv_heads, head_size, hidden_size: the usual meanings.
        weight_bytes: memory of all weights, undivided.
        kv_bytes_per_token: KV cache of one token over all layers and heads, bytes.
        max_model_len: longest context, tokens.
    """

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    weight_bytes: int
    kv_bytes_per_token: int
    max_model_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelEntry:
    """One tensor-parallel degree.

    Args:
        tp: tensor-parallel degree.
        latency: step times at pipeline degree 1.
        kv_capacity_tokens: pipeline degree to the tokens whose KV fits, over all ranks.
        residuals: what the fit left over, for people; free names to numbers.
        measurement: how it was measured, where that is known: `docs/profile.md` describes what `vllm-disagg profile`
            writes.
    """

    tp: int
    latency: LatencyModel
    kv_capacity_tokens: Mapping[int, int]
    residuals: Mapping[str, float] = field(default_factory=dict)
    measurement: Mapping[str, Any] = field(default_factory=dict)

    @property
    def between_steps_s(self) -> float | None:
        """The host's time from one step to the next; None where that was not measured."""
        return _between_steps_s(_Fields(self.measurement, "measurement"))

    @property
    def link(self) -> Link | None:
        """How KV travels from one rank to another; None where that was not measured."""
        return _link(_Fields(self.measurement, "measurement"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """All that is known of one model on one kind of device.

    Args:
        model: its shape.
        device: such as `A100-SXM4-80GB`.
        device_memory_bytes: memory of one device.
        kind: how far to trust it.
        source: where the numbers come from, one paragraph.
        entries: by tensor-parallel degree.
    """

    model: ModelShape
    device: str
    device_memory_bytes: int
    kind: Kind
    source: str
    entries: Mapping[int, ParallelEntry]

    def entry(self, tp: int) -> ParallelEntry:
        """The numbers of one tensor-parallel degree.

        Raises:
            ConfigError: the profile has none; the text names those it has.
        """
        if tp not in self.entries:
            raise ConfigError(
                f"the profile of {self.model.name} on {self.device} has no tensor-parallel degree {tp}, "
                f"only {', '.join(map(str, sorted(self.entries)))}"
            )
        return self.entries[tp]

    def kv_capacity_tokens(self, tp: int, pp: int) -> int:
        """Tokens whose KV fits. A pipeline degree that is not listed is reckoned from weights and memory.

        Raises:
            ConfigError: no such tensor-parallel degree, or the model does not fit.
        """
        listed = self.entry(tp).kv_capacity_tokens
        if pp in listed:
            return listed[pp]
        room = kv_room_bytes(self.model, device_memory_bytes=self.device_memory_bytes, num_devices=tp * pp)
        if room < self.model.kv_bytes_per_token:
            raise ConfigError(f"{self.model.name} does not fit {tp * pp} x {self.device} with room for KV")
        return room // self.model.kv_bytes_per_token


def kv_room_bytes(model: ModelShape, *, device_memory_bytes: int, num_devices: int, utilization: float = 0.95) -> int:
    """Bytes for KV over all devices: DistServe's rule, memory * 0.95 - 1 % - weights (`profile_memory.py`)."""
    return int(num_devices * device_memory_bytes * (utilization - 0.01)) - model.weight_bytes


def parse_profile(document: Any, *, origin: str) -> Profile:
    """Read our own format.

    Args:
        document: the parsed JSON.
        origin: the file, for error texts.

    Raises:
        ConfigError: a field is missing, of a wrong type, not finite, or makes no sense; the text names it.
    """
    top = _Fields(document, origin)
    if top.text("format") != FORMAT or top.whole("version") != VERSION:
        raise ConfigError(
            f"{origin}: expected format {FORMAT!r} version {VERSION}, "
            f"not {top.text('format')!r} version {top.whole('version')}"
        )
    kind = top.text("kind")
    if kind not in get_args(Kind):
        raise ConfigError(f"{origin}: `kind` is {kind!r}, expected one of {', '.join(get_args(Kind))}")
    model = top.within("model")
    entries = [_entry(item) for item in top.items("entries")]
    if not entries:
        raise ConfigError(f"{origin}: `entries` is empty, expected one for each tensor-parallel degree")
    _check_times(entries, model.whole("max_model_len"), origin)
    if len({entry.tp for entry in entries}) != len(entries):
        raise ConfigError(f"{origin}: two `entries` have the same `tp`")
    return Profile(
        model=ModelShape(
            name=model.text("name"),
            **{name: model.whole(name) for name in ModelShape.__dataclass_fields__ if name != "name"},
        ),
        device=top.text("device"),
        device_memory_bytes=top.whole("device_memory_bytes"),
        kind=kind,  # type: ignore[arg-type]
        source=top.text("source"),
        entries={entry.tp: entry for entry in entries},
    )


def profile_document(profile: Profile) -> dict[str, Any]:
    """The JSON document of a profile, in milliseconds; `parse_profile` reads it back."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": profile.kind,
        "source": profile.source,
        "device": profile.device,
        "device_memory_bytes": profile.device_memory_bytes,
        "model": {name: getattr(profile.model, name) for name in ModelShape.__dataclass_fields__},
        "entries": [
            {
                "tp": entry.tp,
                "kv_capacity_tokens": {str(pp): tokens for pp, tokens in sorted(entry.kv_capacity_tokens.items())},
                **{
                    name: [_regime_document(regime) for regime in regimes]
                    for name in ("prefill", "decode", "mixed")
                    if (regimes := getattr(entry.latency, name))
                },
                "residuals": dict(entry.residuals),
                **({"measurement": dict(entry.measurement)} if entry.measurement else {}),
            }
            for _, entry in sorted(profile.entries.items())
        ],
    }


def is_distserve(document: Any) -> bool:
    """Whether a parsed JSON document is DistServe's published table."""
    return isinstance(document, Mapping) and "kv_capacity_tokens" in document and "format" not in document


def from_distserve(
    document: Any, shape: ModelShape, *, origin: str, device: str = "a100_80g", engine: str = "distserve"
) -> Profile:
    """Read DistServe's published coefficients of one model.

    Args:
        document: the parsed table: device, engine, model, tensor-parallel degree, then `[a, b, c]` lists in
            milliseconds: prefill `a + b * tokens + c * sum of squared lengths`, decode `a + b * context + c * batch`.
        shape: of the model, which the table does not hold; `shape.name` selects.
        origin: the file, for error texts.
        device, engine: the outer keys.

    Raises:
        ConfigError: the table has no such model, or is malformed.
    """
    models = _Fields(document, origin).within(device).within(engine)
    table = models.within(shape.name)
    capacity: dict[int, dict[int, int]] = {}
    for row in _Fields(document, origin).items("kv_capacity_tokens"):
        if row.text("model") == shape.name:
            capacity.setdefault(row.whole("tp"), {})[row.whole("pp")] = row.whole("max_num_tokens")
    entries = {}
    for degree in table.names():
        fits, tp = table.within(degree), table.key_as_int(degree)
        threshold = fits.whole("decoding_large_small_bs_threshold")
        entries[tp] = ParallelEntry(
            tp=tp,
            latency=LatencyModel(
                prefill=(_published(fits.numbers("prefill", 3), "per_token_s", "per_area_s"),),
                decode=(
                    _published(fits.numbers("decoding_smallbs", 3), "per_context_s", "per_decode_s", up_to=threshold),
                    _published(fits.numbers("decoding_largebs", 3), "per_context_s", "per_decode_s"),
                ),
            ),
            kv_capacity_tokens=capacity.get(tp, {}),
        )
    source = document.get("source") if isinstance(document, Mapping) else None
    return Profile(
        model=shape,
        device=device,
        device_memory_bytes=80 * 2**30 if device == "a100_80g" else 0,
        kind="published",
        source=str(source or "DistServe's published fits"),
        entries=entries,
    )


def _published(numbers: Sequence[float], second: str, third: str, up_to: float = math.inf) -> Regime:
    a, b, c = (number / 1e3 for number in numbers)
    return Regime(up_to=up_to, constant_s=a, **{second: b, third: c})


def _entry(item: _Fields) -> ParallelEntry:
    capacity = item.within("kv_capacity_tokens")
    measurement = item.within("measurement") if item.has("measurement") else _Fields({}, "")
    _between_steps_s(measurement), _link(measurement)  # what is wrong with them is told before anything is done
    return ParallelEntry(
        tp=item.whole("tp"),
        latency=LatencyModel(
            prefill=_regimes(item, "prefill"),
            decode=_regimes(item, "decode"),
            mixed=_regimes(item, "mixed") if item.has("mixed") else (),
        ),
        kv_capacity_tokens={capacity.key_as_int(pp): capacity.whole(pp) for pp in capacity.names()},
        residuals={name: item.within("residuals").number(name) for name in item.within("residuals").names()}
        if item.has("residuals")
        else {},
        measurement=measurement.plain(),
    )


def _check_times(entries: Sequence[ParallelEntry], longest: int, origin: str) -> None:
    """Negative constants may be fitted to long steps, but a step that takes no time can be repeated for ever."""
    for entry in entries:
        for what, work in (("prefill", work_of([(0, max(2, longest))])), ("decode", work_of([(longest - 1, 1)]))):
            if not 0 < (seconds := entry.latency.step_s(work)) < math.inf:
                raise ConfigError(
                    f"{origin}: by `{what}` of tp {entry.tp} a step of one request of {longest} tokens takes "
                    f"{seconds:g} s; expected more than 0"
                )


def _between_steps_s(measurement: _Fields) -> float | None:
    name = "between_steps_s"
    return measurement.amount(name) if measurement.has(name, not_null=True) else None


def _link(measurement: _Fields) -> Link | None:
    if not measurement.has("transfer", not_null=True):
        return None
    told = measurement.within("transfer")
    if not (bytes_per_s := told.amount("bytes_per_s")):
        raise ConfigError(f"{told.where('bytes_per_s')}: nothing can travel at 0")
    return Link(bytes_per_s=bytes_per_s, latency_s=told.amount("latency_s") if told.has("latency_s") else 0.0)


def _regimes(item: _Fields, name: str) -> tuple[Regime, ...]:
    regimes = tuple(_regime(part) for part in item.items(name))
    limits = [regime.up_to for regime in regimes]
    if not regimes or limits[-1] != math.inf or limits != sorted(set(limits)):
        raise ConfigError(f"{item.where(name)}: `up_to` must rise from regime to regime, and the last must have none")
    return regimes


def _regime(part: _Fields) -> Regime:
    known = {f"{name}_ms" for name in _COEFFICIENTS} | {"up_to"}
    if strange := sorted(set(part.names()) - known):
        raise ConfigError(f"{part.where(strange[0])}: unknown; a regime has {', '.join(sorted(known))}")
    return Regime(
        up_to=part.number("up_to") if part.has("up_to") else math.inf,
        **{f"{name}_s": part.number(f"{name}_ms") / 1e3 for name in _COEFFICIENTS if part.has(f"{name}_ms")},
    )


def _regime_document(regime: Regime) -> dict[str, float]:
    document = {} if regime.up_to == math.inf else {"up_to": regime.up_to}
    return document | {
        f"{name}_ms": value * 1e3 for name in _COEFFICIENTS if (value := getattr(regime, f"{name}_s")) != 0.0
    }


class _Fields:
    """A JSON object read field by field; each error names the field's path and what was found there."""

    def __init__(self, value: Any, path: str) -> None:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected an object, not {_shown(value)}")
        self._value, self._path = value, path

    def where(self, name: str) -> str:
        return f"{self._path}: {name}" if ":" not in self._path else f"{self._path}.{name}"

    def names(self) -> list[str]:
        return list(self._value)

    def plain(self) -> dict[str, Any]:
        return dict(self._value)

    def has(self, name: str, *, not_null: bool = False) -> bool:
        return name in self._value and not (not_null and self._value[name] is None)

    def within(self, name: str) -> _Fields:
        return _Fields(self._get(name), self.where(name))

    def items(self, name: str) -> list[_Fields]:
        value = self._get(name)
        if not isinstance(value, list):
            raise ConfigError(f"{self.where(name)}: expected a list, not {_shown(value)}")
        return [_Fields(item, f"{self.where(name)}[{index}]") for index, item in enumerate(value)]

    def text(self, name: str) -> str:
        value = self._get(name)
        if not isinstance(value, str):
            raise ConfigError(f"{self.where(name)}: expected a text, not {_shown(value)}")
        return value

    def number(self, name: str) -> float:
        return _number(self._get(name), self.where(name))

    def amount(self, name: str) -> float:
        number = self.number(name)
        if number < 0:
            raise ConfigError(f"{self.where(name)}: expected 0 or more, not {_shown(number)}")
        return number

    def numbers(self, name: str, count: int) -> list[float]:
        value = self._get(name)
        if not isinstance(value, list) or len(value) != count:
            raise ConfigError(f"{self.where(name)}: expected {count} numbers, not {_shown(value)}")
        return [_number(item, self.where(name)) for item in value]

    def whole(self, name: str) -> int:
        value = self._get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{self.where(name)}: expected a whole number from 1 on, not {_shown(value)}")
        return value

    def key_as_int(self, name: str) -> int:
        if not name.isdecimal() or int(name) < 1:
            raise ConfigError(f"{self._path}: expected degrees of parallelism as names, not {name!r}")
        return int(name)

    def _get(self, name: str) -> Any:
        if name not in self._value:
            raise ConfigError(f"{self.where(name)}: missing; found {', '.join(map(str, self._value)) or 'nothing'}")
        return self._value[name]


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ConfigError(f"{where}: expected a finite number, not {_shown(value)}")
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
