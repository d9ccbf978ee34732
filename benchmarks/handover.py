"""From prefill's end to decode's first token: ours, and vLLM's own `NixlConnector`, side by side in one run.

    taskset -c 0,1 python -m benchmarks.handover

Each side is a prefill and a decode engine of SmolLM2-135M. All sides exist all the time, and take turns; one at rest
sleeps. There is no proxy: this script sends the prompt to prefill and then, with what prefill has answered, to decode.
A hand-over lasts from prefill's answer to decode's first token. The step that computes this token is not hand-over: the
median of the gaps between the request's later tokens is taken off.

Decode is idle but for the measured request, or has streams of its own, which it computes without any prefill.

vLLM's connector gets two allowances, without which it is no peer on a small CPU machine: its worker is not bound to the
machine's last core, and NIXL's progress thread, which would spin on a core, is off, as it is in ours.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import numpy as np

from benchmarks.machine import OtherLoad, Stolen, fact_list, facts, table
from tests.e2e.engines import Server, engine
from vllm_disagg.core.keys import create_key_file
from vllm_disagg.core.types import new_transfer_id
from vllm_disagg.demo.model import smollm2_path
from vllm_disagg.launcher.machine import free_ports

OURS, IN_TREE, LATE, OTHER = "ours", "NixlConnector", "ours, no early reads", "ours, other checkout"
TARGET: Final = 0.5
"""Ours over vLLM's own, at most."""

OUTPUT_TOKENS = 8
STREAM_PROMPT, STREAM_TOKENS = 32, 700
TOKEN_IDS = (1000, 40000)
FLAGS = ("--max-model-len", "4096", "--max-num-batched-tokens", "2560", "--no-enable-prefix-caching")

ALLOWANCES = '''
"""What vLLM's NixlConnector is allowed in `benchmarks/handover.py`."""
import os, sys

_set = os.sched_setaffinity

def sched_setaffinity(pid, cores):
    if not sys._getframe(1).f_code.co_filename.endswith("nixl/base_worker.py"):
        _set(pid, cores)

os.sched_setaffinity = sched_setaffinity
try:
    from nixl._api import nixl_agent_config
except ImportError:
    pass
else:
    _init = nixl_agent_config.__init__

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("enable_prog_thread", False)
        _init(self, *args, **kwargs)

    nixl_agent_config.__init__ = __init__
'''
"""Python runs a `sitecustomize` of this content in each process of those engines."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the compared deployments."""

    name: str
    prefill: Server
    decode: Server

    def prefill_params(self) -> dict[str, Any]:
        """What asks prefill to keep the KV."""
        if self.name == IN_TREE:
            empty = dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
            return {"do_remote_decode": True, "do_remote_prefill": False, **empty}
        return {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": new_transfer_id()}


@dataclass(frozen=True, kw_only=True)
class Handover:
    """One request."""

    side: str
    num_prompt_tokens: int
    num_streams: int
    repetition: int
    first_token_s: float
    """From prefill's answer."""
    step_s: float
    """Median gap between later tokens."""

    @property
    def handover_s(self) -> float:
        """Without the step that computes the token."""
        return self.first_token_s - self.step_s


@contextmanager
def side(name: str, folder: Path, checkout: Path | None) -> Iterator[Side]:
    """A deployment, ready.

    Args:
        checkout: of another version of this project, for `OTHER`.
    """
    folder.mkdir()
    key_file = folder / "key"
    create_key_file(key_file)
    with ExitStack() as stack:
        servers = []
        for index, role in enumerate(("prefill", "decode")):
            made = engine(
                role, model=smollm2_path(), index=index, folder=folder, key_file=key_file,
                role=None if name == IN_TREE else role,
                flags=(*FLAGS, *(("--no-kv-early-reads",) if (name, role) == (LATE, "decode") else ())),
            )  # fmt: skip
            if name == IN_TREE:
                made = in_tree(made, folder)
            elif name == OTHER:
                made = of_checkout(made, checkout)
            servers.append(made)
            stack.callback(made.kill)
            made.start()
        for made in servers:
            made.wait_until_ready()
        yield Side(name=name, prefill=servers[0], decode=servers[1])


def in_tree(server: Server, folder: Path) -> Server:
    """The same engine with vLLM's connector."""
    (folder / "sitecustomize.py").write_text(ALLOWANCES)
    config = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    search = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    env = {"PYTHONPATH": search, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_ports(1)[0])}
    argv = [*server.argv, "--kv-transfer-config", json.dumps(config)]
    return Server(name=server.name, argv=argv, log=server.log, env={**server.env, **env}, port=server.port)


def of_checkout(server: Server, checkout: Path) -> Server:
    """The same engine with another version of this project."""
    python, *arguments = server.argv  # -P: not from the folder that this runs in
    env = {**server.env, "PYTHONPATH": str(checkout)}
    return Server(name=server.name, argv=[python, "-P", *arguments], log=server.log, env=env, port=server.port)


def body(prompt: Sequence[int], num_tokens: int, **more: Any) -> dict[str, Any]:
    """A request for so many tokens, greedy."""
    return {
        "model": "model", "prompt": list(prompt), "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0,
        "return_token_ids": True, **more,
    }  # fmt: skip


async def generate(http: aiohttp.ClientSession, server: Server, request: Mapping[str, Any]) -> list[float]:
    """When each token came, on the monotonic clock."""
    times: list[float] = []
    async with http.post(server.url + "/v1/completions", json={**request, "stream": True}) as response:
        response.raise_for_status()
        async for line in response.content:
            now_s = time.perf_counter()
            if line.startswith(b"data: {"):
                event = json.loads(line[len(b"data: ") :])
                assert "error" not in event, event
                for choice in event["choices"]:
                    times += [now_s] * len(choice.get("token_ids") or ())
    return times


async def hand_over(http: aiohttp.ClientSession, on: Side, prompt: Sequence[int]) -> tuple[float, float]:
    """Seconds from prefill's answer to decode's first token, and of a step."""
    request = body(prompt, 1, kv_transfer_params=on.prefill_params())
    async with http.post(on.prefill.url + "/v1/completions", json=request) as response:
        response.raise_for_status()
        params = json.loads(await response.read())["kv_transfer_params"]
    start_s = time.perf_counter()
    times = await generate(http, on.decode, body(prompt, OUTPUT_TOKENS, kv_transfer_params=params))
    assert len(times) == OUTPUT_TOKENS, f"{on.name}: {len(times)} tokens"
    return times[0] - start_s, statistics.median(np.diff(times).tolist())


@asynccontextmanager
async def streams(http: aiohttp.ClientSession, server: Server, number: int, random: Any) -> AsyncIterator[None]:
    """So many requests that decode at any time, once this has begun."""
    began = [asyncio.Event() for _ in range(number)]

    async def stream(index: int) -> None:
        while True:
            prompt = random.integers(*TOKEN_IDS, STREAM_PROMPT).tolist()
            await generate(http, server, body(prompt, 2))  # whether the engine still answers
            began[index].set()
            await generate(http, server, body(prompt, STREAM_TOKENS + 40 * index))

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(stream(index)) for index in range(number)]
        for event in began:
            await event.wait()
        await asyncio.sleep(1.0 if number else 0.0)
        yield
        for task in tasks:
            task.cancel()


async def measure(sides: Sequence[Side], options: argparse.Namespace) -> list[Handover]:
    """All cells, sides in turn."""
    random = np.random.default_rng(options.seed)
    found: list[Handover] = []
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
        for on in sides:
            for num_tokens in options.prompts:
                await hand_over(http, on, random.integers(*TOKEN_IDS, num_tokens).tolist())
        for repetition in range(options.repetitions):
            for num_streams in options.streams:
                for on in sides if repetition % 2 == 0 else sides[::-1]:
                    async with streams(http, on.decode, num_streams, random):
                        for number in range(options.requests * len(options.prompts)):
                            num_tokens = options.prompts[number % len(options.prompts)]
                            prompt = random.integers(*TOKEN_IDS, num_tokens).tolist()
                            first_token_s, step_s = await hand_over(http, on, prompt)
                            found.append(
                                Handover(
                                    side=on.name,
                                    num_prompt_tokens=num_tokens,
                                    num_streams=num_streams,
                                    repetition=repetition,
                                    first_token_s=first_token_s,
                                    step_s=step_s,
                                )
                            )
                    print(progress_line(found, on.name, repetition, num_streams), flush=True)
    return found


def progress_line(found: Sequence[Handover], name: str, repetition: int, num_streams: int) -> str:
    """What a part of the run says at once."""
    here = [item for item in found if (item.side, item.repetition, item.num_streams) == (name, repetition, num_streams)]
    medians = ", ".join(
        f"{num_tokens}: "
        f"{statistics.median(item.handover_s for item in here if item.num_prompt_tokens == num_tokens):.3f}"
        for num_tokens in sorted({item.num_prompt_tokens for item in here})
    )
    return f"repetition {repetition + 1}, {num_streams} streams, {name}: hand-over by prompt tokens, s: {medians}"


def rows(found: Sequence[Handover], names: Sequence[str]) -> list[tuple[str, ...]]:
    """A row for each cell."""
    made: list[tuple[str, ...]] = []
    for num_streams, num_tokens in sorted({(item.num_streams, item.num_prompt_tokens) for item in found}):
        cell = [item for item in found if (item.num_streams, item.num_prompt_tokens) == (num_streams, num_tokens)]
        of = {name: [item for item in cell if item.side == name] for name in names}
        medians = {name: statistics.median(item.handover_s for item in of[name]) for name in names}
        ratios = [
            statistics.median(item.handover_s for item in of[OURS] if item.repetition == number)
            / statistics.median(item.handover_s for item in of[IN_TREE] if item.repetition == number)
            for number in sorted({item.repetition for item in cell})
        ]
        ratio = medians[OURS] / medians[IN_TREE]
        missed = "" if ratio <= TARGET else " (missed)"
        made.append(
            (
                str(num_streams), str(num_tokens), str(len(of[OURS])),
                *(quartiles([item.handover_s for item in of[name]]) for name in names),
                *(f"{statistics.median(item.step_s for item in of[name]) * 1e3:.0f}" for name in names),
                f"{ratio:.2f} ({', '.join(f'{each:.2f}' for each in ratios)}){missed}",
            )
        )  # fmt: skip
    return made


def quartiles(seconds: Sequence[float]) -> str:
    """Median and quartiles, in milliseconds."""
    low, middle, high = np.percentile(seconds, (25, 50, 75)) * 1e3
    return f"{middle:.0f} ({low:.0f}-{high:.0f})"


def report(found: Sequence[Handover], names: Sequence[str], options: argparse.Namespace, about: dict[str, str]) -> str:
    """The result as Markdown."""
    head = (
        "streams", "prompt tokens", "requests", *(f"{name}, ms" for name in names),
        *(f"step, {name}, ms" for name in names), f"ours / {IN_TREE}",
    )  # fmt: skip
    return (
        "# Hand-over: from prefill's end to decode's first token\n\n"
        f"{fact_list(about)}\n"
        "- engines: SmolLM2-135M-Instruct, float32, `--enforce-eager`; each computes on a core of its own, which its "
        "other processes share\n"
        f"- requests: random prompts, {OUTPUT_TOKENS} output tokens, one after the other; {options.repetitions} "
        f"repetitions of {options.requests} for each cell, sides in turn; seed {options.seed}\n"
        f"- streams: on decode, {STREAM_PROMPT} prompt tokens, {STREAM_TOKENS} and more output tokens each\n"
        f"- {IN_TREE}: worker not bound to the last core, no progress thread\n\n"
        "Median and quartiles of the time from prefill's answer to decode's first token, less one step. The ratio is\n"
        f"of medians, in brackets that of each repetition; the aim is {TARGET:g}.\n\n"
        f"{table(head, rows(found, names))}\n"
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.handover",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prompts", type=_numbers, default=(128, 512, 2048), help="prompt tokens: 128,512,2048")
    parser.add_argument("--streams", type=_numbers, default=(0, 8), help="streams on decode: 0,8")
    parser.add_argument("--requests", type=int, default=5, help="of each cell and repetition (default: 5)")
    parser.add_argument("--repetitions", type=int, default=3, help="(default: 3)")
    parser.add_argument("--without-early", action="store_true", help="also ours with --no-kv-early-reads")
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="also another version of this project")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts (default: 1)")
    parser.add_argument("--out", type=Path, help="write PATH.md and PATH.json")
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("needs two cores")
    return options


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def main() -> None:
    """Measure, print, and write the result if asked to."""
    options = parse()
    stolen = Stolen(sorted(os.sched_getaffinity(0)))
    with OtherLoad() as other_load, tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        wanted = [OURS, IN_TREE, *([LATE] if options.without_early else []), *([OTHER] if options.beside else [])]
        sides = [
            stack.enter_context(side(name, Path(scratch) / str(index), options.beside))
            for index, name in enumerate(wanted)
        ]
        try:
            found = asyncio.run(measure(sides, options))
        except BaseException:
            for made in sides:
                for server in (made.prefill, made.decode):
                    print(f"--- {made.name} {server.name}\n{server.log.read_text()[-3000:]}", file=sys.stderr)
            raise
    about = {**facts("benchmarks.handover", other_load), "cores stolen meanwhile": f"{stolen.share():.1%}"}
    text = report(found, wanted, options, about)
    print(text)
    if options.out is not None:
        options.out.with_suffix(".md").write_text(text)
        data = {"facts": about, "handovers": [asdict(item) for item in found]}
        options.out.with_suffix(".json").write_text(json.dumps(data) + "\n")


if __name__ == "__main__":
    main()
