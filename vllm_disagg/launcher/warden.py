"""The warden: a tiny process between the launcher and one engine that leaves nothing of it behind.

An engine is a tree of processes, and parts of it outlive a killed parent. The warden starts the engine in a session of
its own, adopts whatever the engine's processes leave behind, and when the launcher is gone, however it went, or asks
for it, or the engine's first process ends, it ends all of them before it ends itself.

    launcher --stdin pipe, held open--> warden --own session, dies with the warden--> engine --> its children

It is run as a plain file, without this package or site-packages, so that it costs a few milliseconds and megabytes:

    python -I -S warden.py LOG_FILE GRACE_S CPUS COMMAND [ARGUMENT...]

CPUS are the logical CPUs that the engine and all its processes may use, as `0,1`; `-` means any.

It writes the engine's pid and a newline to stdout. SIGTERM, SIGINT or the end of stdin stop the engine: SIGTERM to its
first process, SIGKILL to whatever is left after GRACE_S. SIGUSR1 kills at once. Its exit status is the engine's, with
128 + signal for a death by signal as in a shell.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LEFTOVER_GRACE_S = 2.0
_POLL_S = 0.05


def main(arguments: list[str]) -> int:
    """Run the command to its end and clean up after it. Returns the exit status to use."""
    log_file, grace_s, cpus, command = arguments[0], float(arguments[1]), arguments[2], arguments[3:]
    if cpus != "-":
        os.sched_setaffinity(0, map(int, cpus.split(",")))  # inherited by everything it starts
    wake = _wake_on_signals()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    engine = _start(command, log_file)
    if engine is None:
        return 127
    _report(engine.pid)
    kill_now = _wait_for_end_or_stop(engine.pid, wake)
    if not kill_now and _alive(engine.pid):
        os.kill(engine.pid, signal.SIGTERM)
        kill_now = _wait_until_gone(engine.pid, wake, grace_s)
    status = _kill_and_reap(engine)
    _end_leftovers(engine.pid, 0.0 if kill_now else _LEFTOVER_GRACE_S)
    return status


_signals: list[int] = []


def _wake_on_signals() -> int:
    """A descriptor that becomes readable at each signal, so that one `select` waits for everything."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(number, lambda caught, _frame: _signals.append(caught))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader


def _start(command: list[str], log_file: str) -> subprocess.Popen[bytes] | None:
    with open(log_file, "ab", buffering=0) as log:  # noqa: PTH123 - pathlib would double the start-up time
        try:
            return subprocess.Popen(  # noqa: S603 - the launcher's own command line
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_me,
            )
        except OSError as error:
            log.write(f"cannot start {command[0]}: {error.strerror}\n".encode())
            return None


def _die_with_me() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _report(pid: int) -> None:
    with contextlib.suppress(OSError):  # the launcher may be gone already: then stdin ends at once as well
        os.write(1, b"%d\n" % pid)


def _wait_for_end_or_stop(pid: int, wake: int) -> bool:
    """Wait until the engine has ended or is to be stopped. True when it is to be killed at once."""
    while _alive(pid):
        readable, _, _ = select.select([0, wake], [], [], None)
        _drain(wake, readable)
        if signal.SIGUSR1 in _signals:
            return True
        if signal.SIGTERM in _signals or signal.SIGINT in _signals:
            return False
        if 0 in readable and not os.read(0, 4096):
            return False
    return False


def _wait_until_gone(pid: int, wake: int, grace_s: float) -> bool:
    """Wait for the engine's first process to end. True when its time is over or it is to be killed at once."""
    deadline_s = time.monotonic() + grace_s
    while _alive(pid):
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or signal.SIGUSR1 in _signals:
            return True
        readable, _, _ = select.select([wake], [], [], left_s)
        _drain(wake, readable)
    return False


def _drain(wake: int, readable: list[int]) -> None:
    if wake in readable:
        with contextlib.suppress(BlockingIOError):
            os.read(wake, 4096)


def _alive(pid: int) -> bool:
    """Whether our child has not ended. Leaves its status for `_kill_and_reap`."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _kill_and_reap(engine: subprocess.Popen[bytes]) -> int:
    engine.kill()  # nothing happens to one that has ended
    code = engine.wait()
    return code if code >= 0 else 128 - code


def _end_leftovers(group: int, grace_s: float) -> None:
    """End every process that descends from the engine: asked first, then killed, until the kernel knows of none."""
    deadline_s = time.monotonic() + grace_s
    asked = False
    while _has_children():
        killing = time.monotonic() >= deadline_s
        if killing or not asked:
            _signal_all(group, signal.SIGKILL if killing else signal.SIGTERM)
            asked = True
        time.sleep(_POLL_S)


def _has_children() -> bool:
    """Reap what has ended. False when no descendant is left: orphans of orphans become our children, too."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
        return True
    return False


def _signal_all(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
    for pid in _descendants(os.getpid()):  # those that left the group
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208 - pathlib would double the start-up time
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123 - as above
            parent = int(file.read().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(name))
    found: list[int] = []
    queue = [root]
    while queue:
        mine = children.get(queue.pop(), [])
        found.extend(mine)
        queue.extend(mine)
    return found


def _prctl(option: int, value: int) -> None:
    """Linux's prctl. Elsewhere nothing: there only the session and the pipe protect."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
