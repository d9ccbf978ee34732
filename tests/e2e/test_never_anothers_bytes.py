"""Whatever is done to a handoff, to an engine or to the network between two: no token is ever wrong, nobody waits past
the deadline, and every request is counted under what happened to it.

Prefill's cache is small and is overwritten with other prompts wherever a hold may have ended, so that bytes read too
late are another request's. The legs are made by hand (`tests.e2e.legs`), as an attacker or a broken proxy would. The
right answers are known beforehand (`tests.e2e.book`). Real engines run a random Llama of four layers, whose tokens
change with every block, and which is fast enough to overwrite all of them within seconds on one core.
"""

from __future__ import annotations

import asyncio
import base64
import random
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil
import pytest

from tests.e2e import cases
from tests.e2e.book import Book, learn
from tests.e2e.client import Case, Reference, ask
from tests.e2e.engines import EmulatedEngine, ForkHost, Server, emulated_engine, engine, fork_host
from tests.e2e.legs import Held, Tally, case_of, causes, fetch, fetch_all, hold
from tests.e2e.network import Host, Network, cannot_make_networks, network
from vllm_disagg.core.handoff import Handoff, seal, unseal
from vllm_disagg.core.keys import create_key_file, load_key
from vllm_disagg.core.types import EngineId
from vllm_disagg.demo.model import tiny_llama_path

LEASE_S, PULL_TIMEOUT_S, HELLO_S = 2.0, 2.0, 5.0
NUM_BLOCKS = 192
SLACK_S = 12.0
"""A loaded machine's share: answers are also computed, and the machine stands still for a second now and then."""

MOST_FLOOD_S = 40.0
RESTING = "peer_resting"
STEPS = "vllm_disagg_kv_transitions_total"

REFUSED_S = SLACK_S
READ_S = HELLO_S + PULL_TIMEOUT_S + SLACK_S
"""The stated deadlines: a refused handoff waits for nobody; a fetch for one greeting and one pull at most."""


UCX_GIVES_UP = "Fatal: unexpected error: Endpoint timeout"
"""What UCX says when it ends an owner whose reader has gone (docs/transport.md)."""


@dataclass
class Site:
    """A prefill engine, and two decode engines of which one is only asked by attackers."""

    prefill: Server
    decode: Server
    other: Server
    key: bytes
    book: Book
    name: str = ""
    wave: int = 24
    """Requests at a time; their blocks fit prefill's cache."""
    flood_tokens: int = 1000
    network: Network | None = None
    revived: int = 0
    next_filler: int = 500_000
    tallies: list[Tally] = field(default_factory=list)

    async def prepared(self, http: aiohttp.ClientSession, count: int) -> tuple[list[Reference], list[Held]]:
        """Right answers, and the requests that they belong to after their first leg."""
        known = self.book.take(count)
        return [right for _, right in known], await self.held(http, [case for case, _ in known])

    def fillers(self, count: int, length: int) -> list[Case]:
        """Requests whose answers do not matter."""
        self.next_filler += count
        return [case_of(self.next_filler + index, length, self.book.vocabulary) for index in range(count)]

    async def held(self, http: aiohttp.ClientSession, asked: Sequence[Case]) -> list[Held]:
        """The first leg of all of them; once more if prefill has just ended."""
        for _ in range(2):
            held = await asyncio.gather(*(hold(http, self.prefill, case) for case in asked), return_exceptions=True)
            failed = [item for item in held if isinstance(item, BaseException)]
            if not failed:
                return [item for item in held if isinstance(item, Held)]
            if not await self.revive(http):
                raise failed[0]
        raise AssertionError("prefill ends again and again")

    async def flood(self, http: aiohttp.ClientSession) -> None:
        """Write other prompts over every block of prefill that nobody holds, at least once. A prefill engine that has
        ended has nothing left to be read."""
        count = -(-NUM_BLOCKS * 32 // self.flood_tokens) + 1
        for case in self.fillers(count, self.flood_tokens):
            one = replace(case, body={**case.body, "max_tokens": 1})
            try:
                await ask(http, self.prefill.url, one)
            except (AssertionError, aiohttp.ClientError):
                if await self.revive(http):
                    return
                raise

    async def revive(self, http: aiohttp.ClientSession) -> bool:
        """UCX forced onto TCP may end an owner whose reader gave up (docs/transport.md): then start it again, as `up`
        does. Whether that was needed."""
        await asyncio.sleep(0.5)
        if prefill_lives(self.prefill):
            return False
        told = self.prefill.log.read_text(errors="replace")
        assert told.count(UCX_GIVES_UP) > self.revived, f"prefill has ended, and not by UCX:\n{told[-3000:]}"
        self.revived += 1
        await restart(self.prefill)
        return True

    async def pairs_again(self, http: aiohttp.ClientSession) -> None:
        """Until decode fetches from prefill again: quarantine ends by a probe."""
        for _ in range(90):
            await self.revive(http)
            before = causes(self.decode)["received"]
            try:
                (held,) = await self.held(http, self.fillers(1, 64))
            except (AssertionError, aiohttp.ClientError):
                continue  # it is ending
            await fetch(http, self.decode, held)
            if causes(self.decode)["received"] > before:
                return
            await asyncio.sleep(0.5)  # bounded polling through both engines
        raise AssertionError("decode never fetched from prefill again")


@contextmanager
def frozen(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """They stand still."""
    try:
        for process in processes:
            process.suspend()
        yield
    finally:
        for process in processes:
            process.resume()


def prefill_lives(server: Server) -> bool:
    assert server.popen is not None
    try:
        with urllib.request.urlopen(server.url + "/health", timeout=10) as answer:
            return server.popen.poll() is None and answer.status == 200
    except OSError:
        return False


def holds_expired(prefill: Server) -> float:
    return prefill.metrics(STEPS).get(f"{STEPS}{{held.expired}}", 0.0)


async def restart(server: Server) -> None:
    server.kill()
    server.start()
    await asyncio.to_thread(server.wait_until_ready)


@asynccontextmanager
async def scenario(site: Site, name: str, http: aiohttp.ClientSession) -> AsyncIterator[Tally]:
    """Count what decode counts meanwhile."""
    tally, before = Tally(name), causes(site.decode)
    yield tally
    for _ in range(50):  # an engine publishes with its steps
        after = causes(site.decode)
        grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
        tally.counted = {name: value for name, value in grown.items() if value}
        if sum(tally.counted.values()) >= tally.asked:
            break
        await asyncio.sleep(0.1)
    print(f"\n{tally}", flush=True)
    site.tallies.append(tally)
    assert tally.verdict.different == []
    assert tally.hung == 0
    assert sum(tally.counted.values()) == tally.asked, "each request is counted once, as received or under its cause"


def waves(count: int, size: int) -> Iterator[int]:
    for begun in range(0, count, size):
        yield min(size, count - begun)


# What can be done to a handoff.


async def replayed(site: Site, count: int, rng: random.Random, http: aiohttp.ClientSession) -> None:
    """On the same engine, after prefill has written over the blocks."""
    for size in waves(count, site.wave):
        right, helds = await site.prepared(http, size)
        await asyncio.gather(*(fetch(http, site.decode, held) for held in helds))
        await site.flood(http)
        async with scenario(site, "replayed", http) as tally:
            await fetch_all(http, site.decode, helds, right, tally, within_s=REFUSED_S)
        assert tally.counted == {"invalid_handoff": size}


async def used_elsewhere(site: Site, count: int, rng: random.Random, http: aiohttp.ClientSession) -> None:
    """By another decode engine first: this one has never seen it, and really reads what is there now."""
    for size in waves(count, site.wave):
        right, helds = await site.prepared(http, size)
        await asyncio.gather(*(fetch(http, site.other, held) for held in helds))
        await site.flood(http)
        async with scenario(site, "used on another decode engine", http) as tally:
            await fetch_all(http, site.decode, helds, right, tally, within_s=READ_S)
        assert tally.counted == {"lease_expired": size}


async def swapped(site: Site, count: int, rng: random.Random, http: aiohttp.ClientSession) -> None:
    """Each request with its neighbour's handoff."""
    for size in waves(count, site.wave):
        right, helds = await site.prepared(http, size)
        stolen = [helds[index - 1].stolen_by(held) for index, held in enumerate(helds)]
        async with scenario(site, "swapped", http) as tally:
            await fetch_all(http, site.decode, stolen, right, tally, within_s=REFUSED_S)
        assert tally.counted == ({"invalid_handoff": size} if size > 1 else {"received": 1})
        await asyncio.sleep(LEASE_S + 0.5)


def forgeries(handoff: str, neighbour: str, key: bytes) -> list[Callable[[random.Random], Any]]:
    raw, told = bytearray(base64.urlsafe_b64decode(handoff)), unseal(handoff, key)
    stranger = bytes(32)

    def encoded(body: bytes) -> str:
        return base64.urlsafe_b64encode(body).decode()

    def flipped(rng: random.Random) -> str:
        at = rng.randrange(len(raw))
        return encoded(bytes(raw[:at]) + bytes([raw[at] ^ 1 << rng.randrange(8)]) + bytes(raw[at + 1 :]))

    def rewritten(changed: Handoff) -> str:
        """Another content under the old signature."""
        return encoded(bytes(raw[:32]) + msgspec.msgpack.encode(changed))

    def replaced(**values: Any) -> Callable[[random.Random], str]:
        return lambda rng: rewritten(msgspec.structs.replace(told, **values))

    moved = tuple(tuple(block + 1 for block in group) for group in told.block_ids)
    return [
        flipped,
        flipped,
        lambda rng: handoff[: rng.randrange(len(handoff))],
        lambda rng: handoff + "AAAA",
        lambda rng: encoded(bytes(raw[:32])) + neighbour[len(encoded(bytes(raw[:32]))) :],
        replaced(block_ids=moved),
        replaced(control="tcp://10.255.255.1:9"),
        replaced(engine_id=EngineId("another")),
        replaced(lease_s=1e9),
        lambda rng: seal(told, stranger),
        lambda rng: {"block_ids": [[1, 2, 3]], "remote_host": "10.255.255.1"},
        lambda rng: rng.randbytes(40).hex(),
    ]


async def edited(site: Site, count: int, rng: random.Random, http: aiohttp.ClientSession) -> None:
    """A changed byte, a changed field, another signature, another type."""
    number = 0
    for size in waves(count, site.wave):
        right, helds = await site.prepared(http, size)
        forged = []
        for index, held in enumerate(helds):
            kinds = forgeries(held.handoff, helds[index - 1].handoff, site.key)
            forged.append(replace(held, handoff=kinds[number % len(kinds)](rng)))
            number += 1
        async with scenario(site, "edited", http) as tally:
            await fetch_all(http, site.decode, forged, right, tally, within_s=REFUSED_S)
        assert tally.counted == {"invalid_handoff": size}
        await asyncio.sleep(LEASE_S + 0.5)


async def expired(site: Site, count: int, rng: random.Random, http: aiohttp.ClientSession) -> None:
    """Used only after its lease, when other prompts lie there."""
    for size in waves(count, site.wave):
        right, helds = await site.prepared(http, size)
        await asyncio.sleep(LEASE_S + 0.5)
        await site.flood(http)
        async with scenario(site, "expired", http) as tally:
            await fetch_all(http, site.decode, helds, right, tally, within_s=READ_S)
        assert tally.counted == {"lease_expired": size}


# What can happen to engines and the network.


async def restarted(site: Site, count: int, rng: random.Random, http: aiohttp.ClientSession) -> None:
    """The handoff's engine has ended, and another one listens and computes there."""
    for size in waves(count, site.wave):
        right, helds = await site.prepared(http, size)
        await restart(site.prefill)
        await site.flood(http)
        async with scenario(site, "prefill restarted", http) as tally:
            await fetch_all(http, site.decode, helds, right, tally, within_s=READ_S)
        assert set(tally.counted) <= {"peer_lost", "handshake_timeout"}


async def disturbed(
    site: Site,
    name: str,
    count: int,
    rng: random.Random,
    http: aiohttp.ClientSession,
    disturb: Callable[[Sequence[psutil.Process], asyncio.Task[None]], Awaitable[None]],
    *,
    victim: Server | None = None,
    within_s: float,
    spread_s: float,
) -> Counter[str]:
    """Send waves of requests, most of them at about the same time, and disturb each wave just then. Returns what decode
    counted."""
    total = Counter[str]()
    if isinstance(site.decode, EmulatedEngine):  # fast as it is, it would rarely be caught with more than one request
        site.decode.inject({"kind": "slow", "factor": 20.0})
    for size in waves(count, site.wave):
        await site.pairs_again(http)
        right, helds = await site.prepared(http, size)
        processes = victim.tree() if victim is not None else []  # takes a while to find
        async with scenario(site, name, http) as tally, asyncio.TaskGroup() as tasks:
            sending = tasks.create_task(
                fetch_all(
                    http, site.decode, helds, right, tally, within_s=within_s,
                    spread_s=[max(0.0, rng.gauss(0.5, spread_s)) for _ in helds],
                )
            )  # fmt: skip
            await asyncio.sleep(0.5)
            await disturb(processes, sending)
        total.update(tally.counted)
        await site.revive(http)
    if isinstance(site.decode, EmulatedEngine):
        site.decode.inject()
    return total


async def decode_frozen(site: Site, count: int, rng: random.Random, http: aiohttp.ClientSession) -> None:
    """With requests in every state, for longer than the lease; it goes on as if nothing had been."""
    longest_s, num_expired = 0.0, 0.0

    async def freeze(processes: Sequence[psutil.Process], _: asyncio.Task[None]) -> None:
        nonlocal longest_s, num_expired
        begun_s, before, num_revived = time.monotonic(), holds_expired(site.prefill), site.revived
        with frozen(processes):
            await asyncio.sleep(LEASE_S + 0.5)
            await site.flood(http)
            if site.revived == num_revived:
                num_expired += holds_expired(site.prefill) - before
        longest_s = max(longest_s, time.monotonic() - begun_s)

    total = await disturbed(
        site,
        "decode frozen",
        count,
        rng,
        http,
        freeze,
        victim=site.decode,
        within_s=READ_S + LEASE_S + MOST_FLOOD_S,
        spread_s=0.06,
    )
    assert longest_s < LEASE_S + MOST_FLOOD_S, "the flood took longer than the bound allows for"
    assert num_expired > 0 or site.revived, "no hold ended while decode stood still"
    assert total["received"] < count
    assert set(total) <= {"received", "lease_expired", "pull_timeout", "peer_silent", "peer_lost", "transport", RESTING}


async def prefill_frozen(site: Site, count: int, rng: random.Random, http: aiohttp.ClientSession) -> None:
    """While requests are being fetched, until all of them are answered; then other prompts come."""

    async def freeze(processes: Sequence[psutil.Process], sending: asyncio.Task[None]) -> None:
        with frozen(processes):
            await sending

    total = await disturbed(
        site, "prefill frozen", count, rng, http, freeze, victim=site.prefill, within_s=READ_S, spread_s=0.06
    )
    assert total["pull_timeout"] > 0
    allowed = {"received", "pull_timeout", "peer_silent", "handshake_timeout", "peer_lost", "lease_expired", RESTING}
    assert set(total) <= allowed


async def link_cut(site: Site, count: int, rng: random.Random, http: aiohttp.ClientSession) -> None:
    """The network between prefill and decode is silent for longer than the lease, then heals."""
    network = site.network
    assert network is not None

    async def cut(_: object, __: object) -> None:
        network.cut()
        try:
            await asyncio.sleep(LEASE_S + 0.5)
            await site.flood(http)
        finally:
            network.heal()

    total = await disturbed(site, "link cut and healed", count, rng, http, cut, within_s=READ_S, spread_s=0.3)
    assert total["pull_timeout"] > 0
    assert total["received"] > 0


HANDOFFS = (replayed, used_elsewhere, swapped, edited, expired)
ENGINES = (restarted, decode_frozen, prefill_frozen)


async def suffer(site: Site, scenarios: Sequence[Any], count: int, seed: int) -> list[Tally]:
    """All of them, one after the other, this many requests each."""
    rng = random.Random(seed)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        for each in scenarios:
            await site.pairs_again(http)
            await each(site, count, rng, http)
    for server in (site.decode, site.other):
        server.assert_alive()
    total, slowest_s = sum(tally.asked for tally in site.tallies), max(tally.slowest_s for tally in site.tallies)
    print(
        f"\n{site.name}: {total} requests, the slowest {slowest_s:.1f} s; "
        f"prefill started again after UCX had ended it: {site.revived} times",
        flush=True,
    )
    return site.tallies


PREFILL_FLAGS = (
    "--kv-lease-s", str(LEASE_S), "--kv-pull-timeout-s", str(PULL_TIMEOUT_S),
    "--num-gpu-blocks-override", str(NUM_BLOCKS),
)  # fmt: skip
DECODE_FLAGS = ("--kv-pull-timeout-s", str(PULL_TIMEOUT_S), "--max-num-seqs", "8")


Start = Callable[[str, str | None, Sequence[str]], Server]
"""Name, role and flags; made, not started."""


async def started(
    stack: ExitStack,
    start: Start,
    key_file: Path,
    *,
    num_requests: int,
    seed: int,
    vocabulary: range = cases.VOCABULARY,
    **values: Any,
) -> Site:
    """Learn this many right answers, then start the engines under test."""
    book = await learn(start("undivided", None, ()), num_requests, seed=seed, vocabulary=vocabulary)
    servers = [
        start("prefill", "prefill", PREFILL_FLAGS),
        start("decode", "decode", DECODE_FLAGS),
        start("other", "decode", DECODE_FLAGS),
    ]
    for server in servers:
        stack.callback(server.kill)
        server.start()
    for server in servers:
        await asyncio.to_thread(server.wait_until_ready)
    return Site(*servers, key=load_key(str(key_file)), book=book, **values)


@asynccontextmanager
async def emulated_site(
    folder: Path,
    host: ForkHost,
    *flags: str,
    num_requests: int,
    seed: int,
    env: dict[str, str] | None = None,
    name: str = "emulated",
) -> AsyncIterator[Site]:
    key_file = folder / "key"
    create_key_file(key_file)
    with ExitStack() as stack:

        def start(called: str, role: str | None, extra: Sequence[str]) -> Server:
            given = [] if role is None else flags
            made = emulated_engine(
                called, host=host, folder=folder, key_file=key_file, role=role, flags=[*extra, *given]
            )
            made.env.update(env or {})
            return made

        yield await started(stack, start, key_file, num_requests=num_requests, seed=seed, name=name)


def real_engine(called: str, role: str | None, flags: Sequence[str], *, folder: Path, key_file: Path) -> Server:
    model = tiny_llama_path(num_layers=4)
    small = ["--kv-cache-memory-bytes", str(100_000_000), *flags]
    index = ("prefill", "decode", "other", "undivided").index(called)
    return engine(called, model=model, index=index, folder=folder, key_file=key_file, role=role, flags=small)


async def test_a_part_on_emulated_engines(host: ForkHost, tmp_path: Path) -> None:
    scenarios = (*HANDOFFS, *ENGINES)
    async with emulated_site(tmp_path, host, num_requests=8 * len(scenarios), seed=1) as site:
        await suffer(site, scenarios, 8, seed=1)


TRANSPORTS = {
    "nixl over tcp": (("--kv-transport", "nixl"), {"UCX_TLS": "tcp"}),
    "auto over tcp": ((), {"UCX_TLS": "tcp"}),
}
"""NIXL where UCX emulates reads, whose owner a reader may end; and what is chosen there instead."""


@pytest.mark.full
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_thousand_on_emulated_engines(host: ForkHost, tmp_path: Path, transport: str) -> None:
    flags, env = TRANSPORTS[transport]
    scenarios = (*HANDOFFS, *ENGINES)
    count = 126
    async with emulated_site(
        tmp_path, host, *flags, num_requests=count * len(scenarios), seed=2, env=env, name=f"emulated, {transport}"
    ) as site:
        tallies = await suffer(site, scenarios, count, seed=2)
    assert sum(tally.asked for tally in tallies) >= 1000


@pytest.mark.full
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_hundred_on_real_engines(tmp_path: Path, transport: str) -> None:
    flags, env = TRANSPORTS[transport]
    scenarios = (*HANDOFFS, *ENGINES)
    count = 24
    key_file = tmp_path / "key"
    create_key_file(key_file)

    def start(called: str, role: str | None, extra: Sequence[str]) -> Server:
        given = [*extra, *([] if role is None else flags)]
        made = real_engine(called, role, given, folder=tmp_path, key_file=key_file)
        made.env.update(env)
        return made

    with ExitStack() as stack:
        site = await started(
            stack, start, key_file, num_requests=count * len(scenarios), seed=3, vocabulary=cases.BYTES, wave=12,
            name=f"real, {transport}",
        )  # fmt: skip
        tallies = await suffer(site, scenarios, count, seed=3)
    assert sum(tally.asked for tally in tallies) >= 100


# A link to cut needs two hosts; UCX takes TCP between them, since it is told to.


@contextmanager
def two_hosts() -> Iterator[Network]:
    if reason := cannot_make_networks():
        pytest.skip(reason)
    with network() as made:
        yield made


def between_hosts(made: Server, flags: Sequence[str], host: Host) -> Server:
    """The engine as it is started on that host."""
    made.address = host.http
    made.argv = [*made.argv, *flags]
    made.env.update({"UCX_TLS": "tcp", "UCX_NET_DEVICES": "kv0", "GLOO_SOCKET_IFNAME": "kv0"})
    return made


@pytest.mark.full
@pytest.mark.parametrize("transport", ["nixl", "auto"])
async def test_a_link_that_is_cut_and_heals_between_emulated_engines(tmp_path: Path, transport: str) -> None:
    key_file = tmp_path / "key"
    create_key_file(key_file)
    with two_hosts() as net, ExitStack() as stack:
        places = {"prefill": net.hosts[0], "decode": net.hosts[1]}

        def start(name: str, role: str | None, extra: Sequence[str]) -> Server:
            (tmp_path / name).mkdir()
            host, place = fork_host(tmp_path / name), places.get(name)
            if place is not None:
                host.argv = place.inside(host.argv)
            stack.callback(host.kill)
            host.start()
            host.wait_until_ready()
            made = emulated_engine(
                name, host=host, folder=tmp_path / name, key_file=key_file, role=role, flags=extra,
                address=place.http if place is not None else "127.0.0.1",
            )  # fmt: skip
            made.alone_on = host
            if place is None or role is None:
                return made
            return between_hosts(made, ["--kv-transport", transport, "--kv-control-host", place.data], place)

        site = await started(
            stack, start, key_file, num_requests=126, seed=4, network=net, name=f"emulated, {transport} over a cut link"
        )
        tallies = await suffer(site, (link_cut,), 126, seed=4)
    assert sum(tally.asked for tally in tallies) >= 126


@pytest.mark.full
@pytest.mark.parametrize("transport", ["nixl", "auto"])
async def test_a_link_that_is_cut_and_heals_between_real_engines(tmp_path: Path, transport: str) -> None:
    key_file = tmp_path / "key"
    create_key_file(key_file)
    with two_hosts() as net, ExitStack() as stack:
        places = {"prefill": net.hosts[0], "decode": net.hosts[1]}

        def start(called: str, role: str | None, extra: Sequence[str]) -> Server:
            made, place = real_engine(called, role, extra, folder=tmp_path, key_file=key_file), places.get(called)
            if place is None:
                return made
            made.argv = place.inside([place.http if word == "127.0.0.1" else word for word in made.argv])
            return between_hosts(made, ["--kv-transport", transport, "--kv-control-host", place.data], place)

        site = await started(
            stack, start, key_file, num_requests=24, seed=5, vocabulary=cases.BYTES, wave=12, network=net,
            name=f"real, {transport} over a cut link",
        )  # fmt: skip
        await suffer(site, (link_cut,), 24, seed=5)
