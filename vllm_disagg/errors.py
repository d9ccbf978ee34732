"""Every exception of the project.

    DisaggError
    |-- ConfigError            the user edits a setting or a flag; commands print it on one line and exit 2
    |   `-- KeyFileError       the deployment key cannot be read or made
    |-- NoFeasiblePlacement    an answer, not a crash: nothing meets the targets, or the model fits nowhere
    |-- VllmUnavailable        no vLLM here, or one whose seams have moved
    |-- IncompatiblePeer       two engines do not fit; both refuse at the handshake and name the factor
    |-- TransferError          this request recomputes its prompt on the decode instance
    |   |-- InvalidHandoff     the handoff is malformed, forged, or belongs to another prompt
    |   `-- TransportError     the transport or its peer failed
    |-- InstanceError          one engine cannot serve this request; the proxy tries another
    `-- LaunchError            a process of `vllm-disagg up` did not start or died

User input raises these. Inside the engine's loop failures travel as data (`failed_recving`), never as exceptions.
"""

from __future__ import annotations

from typing import ClassVar


class DisaggError(Exception):
    """Base of all errors this project raises."""


class ConfigError(DisaggError):
    """A setting, flag or file the user can correct. The text names the value and what would be accepted."""


class KeyFileError(ConfigError):
    """The deployment key is missing, unreadable, too short, or readable by others."""


class NoFeasiblePlacement(DisaggError):
    """No placement can do what was asked. The text says what stands in the way and what the nearest is that can be."""


class VllmUnavailable(DisaggError):
    """An engine part was used where vLLM is missing or is a version whose extension points have moved."""


class IncompatiblePeer(DisaggError):
    """A prefill and a decode engine whose KV caches cannot be exchanged."""

    def __init__(self, factor: str, *, ours: str, theirs: str) -> None:
        self.factor, self.ours, self.theirs = factor, ours, theirs
        super().__init__(
            f"the engines do not fit: {factor} is {ours!r} here and {theirs!r} at the peer; "
            f"start both with the same {factor}"
        )


class TransferError(DisaggError):
    """The KV of one request did not arrive. That request recomputes; `cause` is its label in the metrics."""

    cause: ClassVar[str]


class InvalidHandoff(TransferError):
    """The handoff cannot be trusted or is not for this request."""

    cause = "invalid_handoff"


class TransportError(TransferError):
    """The transport refused a transfer, or its peer went away."""

    cause = "transport"


class InstanceError(DisaggError):
    """An engine could not serve a request: unreachable, overloaded, or it answered with a server error."""


class LaunchError(DisaggError):
    """A launched process did not become ready, or died. The text carries the last lines of its log."""
