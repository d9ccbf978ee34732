"""Two hosts in one machine: network namespaces with a switch between them that a test can silence.

    test's namespace --veth-- prefill's --veth--+
          |                                     switch, in a namespace of its own
          `----------veth---- decode's  --veth--+

HTTP takes the direct way, so that only what the engines say to each other is cut. A cut link says nothing: packets
vanish, and no connection is closed.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

_numbers = itertools.count()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


def cannot_make_networks() -> str:
    """Why not; empty if they can be made."""
    if shutil.which("ip") is None:
        return "no `ip` command"
    name = f"vd{os.getpid()}x"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here: {error.stderr.decode().strip()}"
    return ""


@dataclass(frozen=True)
class Host:
    """One namespace: `http` is its address for the test, `data` the one for the other host."""

    name: str
    http: str
    data: str

    def inside(self, argv: Sequence[str]) -> list[str]:
        """The command, to run in this host."""
        return ["ip", "netns", "exec", self.name, *argv]


@dataclass(frozen=True)
class Network:
    """Hosts behind one switch."""

    switch: str
    hosts: tuple[Host, ...]

    def cut(self) -> None:
        """From now on the first host and the others do not hear of each other."""
        ip("-n", self.switch, "link", "set", "p0", "nomaster")

    def heal(self) -> None:
        """The switch passes everything on again."""
        ip("-n", self.switch, "link", "set", "p0", "master", "br0")


@contextmanager
def network(num_hosts: int = 2) -> Iterator[Network]:
    """Make it, and take it away again."""
    tag = f"vd{os.getpid()}n{next(_numbers)}"
    subnet = 64 + os.getpid() % 128
    switch = f"{tag}s"
    hosts = tuple(
        Host(f"{tag}h{index}", f"10.{subnet}.{10 + index}.2", f"10.{subnet}.1.{10 + index}")
        for index in range(num_hosts)
    )
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "br0", "type", "bridge")
        ip("-n", switch, "link", "set", "br0", "up")
        for index, host in enumerate(hosts):
            ip("netns", "add", host.name)
            ip("-n", host.name, "link", "set", "lo", "up")
            ip("-n", switch, "link", "add", f"p{index}", "type", "veth", "peer", "name", "kv0", "netns", host.name)
            ip("-n", switch, "link", "set", f"p{index}", "master", "br0", "up")
            ip("-n", host.name, "addr", "add", f"{host.data}/24", "dev", "kv0")
            ip("-n", host.name, "link", "set", "kv0", "up")
            near = f"{tag[-9:]}w{index}"
            ip("link", "add", near, "type", "veth", "peer", "name", "web0", "netns", host.name)
            ip("addr", "add", f"10.{subnet}.{10 + index}.1/24", "dev", near)
            ip("link", "set", near, "up")
            ip("-n", host.name, "addr", "add", f"{host.http}/24", "dev", "web0")
            ip("-n", host.name, "link", "set", "web0", "up")
        yield Network(switch, hosts)
    finally:
        for name in (switch, *(host.name for host in hosts)):
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)  # its links go with it
