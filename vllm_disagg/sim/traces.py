"""Reading traces that others have published: Mooncake, ShareGPT, Azure, BurstGPT.

Columns are found by name, times start at 0, and requests are put in the order of their arrival. What cannot be read is
named with its file and line.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np

from vllm_disagg.errors import ConfigError
from vllm_disagg.sim.arrivals import Arrivals
from vllm_disagg.sim.workload import Workload, as_ints, shared_prefixes

TraceFormat = Literal["mooncake", "sharegpt", "azure", "burstgpt"]

MOONCAKE_CHUNK_TOKENS: Final = 512
"""Tokens per entry of `hash_ids`, as the published traces have it."""

CHARACTERS_PER_TOKEN: Final = 4.0
"""Of English text, about, for ShareGPT without a tokenizer."""

MOST_TOKENS: Final = 10**9
"""No prompt and no answer is as long; whatever is has got into the wrong column."""

_LAST_MOMENT: Final = 1e15
_MAX_RECORD: Final = 64 * 2**20


def read_trace(path: str | Path, *, kind: TraceFormat | None = None) -> Workload:
    """Read a trace; its kind is recognised from its beginning unless given.

    Raises:
        ConfigError: it cannot be read, is of no known kind, is empty, or a record is malformed.
    """
    path = Path(path)
    found = kind or _kind_of(path)
    if found not in get_args(TraceFormat):
        raise ConfigError(f"the kind of trace must be one of {', '.join(get_args(TraceFormat))}, not {found!r}")
    if found == "mooncake":
        return read_mooncake(path)
    if found == "sharegpt":
        return read_sharegpt(path)
    return read_azure(path) if found == "azure" else read_burstgpt(path)


def read_mooncake(path: Path, *, chunk_tokens: int = MOONCAKE_CHUNK_TOKENS) -> Workload:
    """Mooncake's JSONL: `timestamp` in milliseconds, `input_length`, `output_length`, and optionally `hash_ids`, one
    for each `chunk_tokens` of the prompt, equal where prompts begin equally. The last, partial chunk is not used.
    """
    rows: list[tuple[float, int, int]] = []
    chunks: list[list[int]] = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        record = _json(line, where)
        prompt = _count(record, "input_length", where)
        moment_s = _moment(record.get("timestamp"), "timestamp", where) / 1e3
        rows.append((moment_s, prompt, _count(record, "output_length", where)))
        ids = record.get("hash_ids") or []
        if not isinstance(ids, list) or not all(isinstance(item, int) and abs(item) < 2**63 for item in ids):
            raise ConfigError(f"{where}: hash_ids must be a list of whole numbers of 64 bits")
        chunks.append(ids[: prompt // chunk_tokens])
    return _workload(rows, f"Mooncake trace {path.name}", chunks=chunks, chunk_tokens=chunk_tokens)


def read_azure(path: Path) -> Workload:
    """Azure's CSV: `TIMESTAMP` such as `2023-11-16 18:17:03.9799600`, `ContextTokens`, `GeneratedTokens`."""
    rows = []
    for where, row in _csv_rows(path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens")):
        try:
            moment = datetime.fromisoformat(row["TIMESTAMP"])
        except ValueError as error:
            raise ConfigError(f"{where}: TIMESTAMP {row['TIMESTAMP']!r} is not a date and time") from error
        moment_s = (moment.replace(tzinfo=None) - datetime(1970, 1, 1)).total_seconds()
        output = _whole(row["GeneratedTokens"], "GeneratedTokens", where)
        if output > 0:
            rows.append((moment_s, _whole(row["ContextTokens"], "ContextTokens", where), output))
    return _workload(rows, f"Azure trace {path.name}")


def read_burstgpt(path: Path, *, model: str | None = None) -> Workload:
    """BurstGPT's CSV: `Timestamp` in seconds, `Request tokens`, `Response tokens`, `Model`, whatever else stands
    between. Failed requests, which have no response tokens, are left out.

    Args:
        path: the file.
        model: only this model's requests, such as `ChatGPT`; None for all.
    """
    rows = []
    for where, row in _csv_rows(path, ("Timestamp", "Model", "Request tokens", "Response tokens")):
        output = _whole(row["Response tokens"], "Response tokens", where)
        if output > 0 and model in (None, row["Model"]):
            prompt = _whole(row["Request tokens"], "Request tokens", where)
            rows.append((_moment(_float(row["Timestamp"], "Timestamp", where), "Timestamp", where), prompt, output))
    return _workload(rows, f"BurstGPT trace {path.name}")


def read_sharegpt(
    path: Path,
    *,
    count_tokens: Callable[[str], int] | None = None,
    seed: int = 0,
    max_total: int = 2047,
    max_requests: int | None = None,
) -> Workload:
    """ShareGPT's JSON, also where the file is cut off: its whole records are used. Prepared as DistServe does
    (`0-prepare-dataset.py`): of a conversation with at least 3 turns the prompt is the first k turns, k drawn, and the
    output is the next one; dropped if both are shorter than 4 tokens or they are too long together. ShareGPT has no
    times: arrivals are a Poisson process of rate 1.

    Args:
        path: the file.
        count_tokens: a tokenizer; None to estimate from the number of characters, which `source` then says.
        seed: of k and of the arrivals.
        max_total: prompt and output together, tokens.
        max_requests: stop after so many.
    """
    rng = np.random.default_rng([seed, 0])
    count = count_tokens or (lambda text: max(1, round(len(text) / CHARACTERS_PER_TOKEN)))
    pairs: list[tuple[int, int]] = []
    for record in whole_records(path):
        turns = record.get("conversations") if isinstance(record, Mapping) else None
        if not isinstance(turns, list) or len(turns) < 3:
            continue
        texts = [str(turn.get("value", "")) if isinstance(turn, Mapping) else "" for turn in turns]
        k = int(rng.integers(1, min(len(texts) - 1, 1000) + 1))
        prompt, output = count("".join(texts[:k])), count(texts[k])
        if not (prompt < 4 and output < 4) and prompt + output <= max_total and prompt and output:
            pairs.append((prompt, output))
        if max_requests is not None and len(pairs) >= max_requests:
            break
    if not pairs:
        raise ConfigError(f"{path}: no usable conversation; expected a JSON list of objects with `conversations`")
    times = Arrivals().times(len(pairs), 1.0, np.random.default_rng([seed, 1]))
    source = f"ShareGPT {path.name}" + ("" if count_tokens else ", lengths estimated from characters")
    return Workload(
        arrival_s=times,
        prompt_tokens=as_ints([prompt for prompt, _ in pairs]),
        output_tokens=as_ints([output for _, output in pairs]),
        rate=1.0,
        source=source,
    )


def whole_records(path: Path, *, chunk_chars: int = 1 << 20) -> Iterator[Any]:
    """The records of a JSON list, one by one, up to its end or to where the file is cut off.

    Raises:
        ConfigError: the file cannot be read or does not begin a list.
    """
    decoder = json.JSONDecoder()
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            buffer = file.read(chunk_chars).lstrip("\ufeff \n\r\t")
            if not buffer.startswith("["):
                raise ConfigError(f"{path}: expected a JSON list")
            position, wanted = 1, chunk_chars
            while True:
                while position < len(buffer) and buffer[position] in " \n\r\t,":
                    position += 1
                try:
                    record, position = decoder.raw_decode(buffer, position)
                except json.JSONDecodeError:
                    more = file.read(wanted)
                    if not more or len(buffer) - position > _MAX_RECORD:
                        return  # the closing bracket, or the cut
                    buffer, position, wanted = buffer[position:] + more, 0, wanted * 2
                    continue
                wanted = chunk_chars
                yield record
                if position > chunk_chars:
                    buffer, position = buffer[position:], 0
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def _kind_of(path: Path) -> str:
    with_first = next(iter(_lines(path)), "").lstrip("\ufeff").strip()
    if with_first.startswith("["):
        return "sharegpt"
    if with_first.startswith("{"):
        return "mooncake"
    columns = [name.strip() for name in with_first.split(",")]
    if "ContextTokens" in columns:
        return "azure"
    if "Request tokens" in columns:
        return "burstgpt"
    raise ConfigError(f"{path}: not a trace of a known kind ({', '.join(get_args(TraceFormat))}), or empty")


def _workload(
    rows: list[tuple[float, int, int]], source: str, *, chunks: list[list[int]] | None = None, chunk_tokens: int = 1
) -> Workload:
    """Sort by time and start at 0. A trace whose requests all come at once gets the rate 1."""
    if not rows:
        raise ConfigError(f"{source}: no requests in it")
    order = np.argsort([row[0] for row in rows], kind="stable")
    times = np.array([rows[index][0] for index in order])
    times -= times[0]
    return Workload(
        arrival_s=times,
        prompt_tokens=as_ints([rows[index][1] for index in order]),
        output_tokens=as_ints([rows[index][2] for index in order]),
        rate=(len(rows) - 1) / times[-1] if times[-1] > 0 else 1.0,
        source=source,
        prefixes=shared_prefixes([chunks[index] for index in order], chunk_tokens) if chunks else None,
    )


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from file
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; expected a trace ({', '.join(get_args(TraceFormat))})") from error


def _csv_rows(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    reader = csv.DictReader(_lines(path))
    names = [(name or "").strip().lstrip("\ufeff") for name in reader.fieldnames or ()]
    if missing := [name for name in needed if name not in names]:
        raise ConfigError(f"{path}: no column {missing[0]!r}; found {', '.join(names) or 'nothing'}")
    reader.fieldnames = names
    for row in _readable(reader, path):
        where = f"{path}:{reader.line_num}"
        if any(row[name] is None for name in needed):
            raise ConfigError(f"{where}: too few columns")
        yield where, row


def _readable(reader: csv.DictReader[str], path: Path) -> Iterator[dict[str, str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise ConfigError(f"{path}:{reader.line_num}: not a line of a table: {error}") from error


def _json(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where}: not JSON: {error}; expected an object on each line, with timestamp, input_length, output_length"
        ) from error
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: expected an object, not {line.strip()[:60]}")
    return record


def _moment(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LAST_MOMENT:
        raise ConfigError(f"{where}: {name} must be a number from 0 on, not {value!r}")
    return float(value)


def _count(record: Mapping[str, Any], name: str, where: str) -> int:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_TOKENS:
        raise ConfigError(f"{where}: {name} must be a whole number from 1 to {MOST_TOKENS}, not {value!r}")
    return value


def _float(text: str, name: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{where}: {name} must be a number, not {text!r}")
    return value


def _whole(text: str, name: str, where: str) -> int:
    value = _float(text, name, where)
    if value != int(value) or not 0 <= value <= MOST_TOKENS:
        raise ConfigError(f"{where}: {name} must be a whole number from 0 to {MOST_TOKENS}, not {text!r}")
    return int(value)
