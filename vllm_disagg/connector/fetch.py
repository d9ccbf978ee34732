"""One request that came with a handoff, and which handoffs are taken at all."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_disagg.connector.pull import Cause, Settled
from vllm_disagg.connector.recent import RecentIds
from vllm_disagg.connector.request_facts import prompt_salt
from vllm_disagg.core.handoff import Handoff, check_fits, unseal
from vllm_disagg.core.lifetime import State
from vllm_disagg.core.types import BlockIds
from vllm_disagg.core.verify import DigestJob, chosen
from vllm_disagg.errors import InvalidHandoff

if TYPE_CHECKING:
    from vllm.v1.request import Request

_USED_S = 3600.0
"""How long a handoff is remembered as used. Its hold ends long before: at ten leases."""


@dataclass(slots=True, kw_only=True)
class Fetch:
    """One request that came with a handoff, for as long as it uses that KV."""

    request_id: str
    handoff: Handoff
    state: State
    announced_s: float
    early: bool = False
    """Its KV comes, or lies, in blocks that are not the request's yet."""
    blocks: BlockIds = ()
    first: int = 0
    """Of an early one: the prompt's block whose KV comes into the first of `blocks`."""
    kept: tuple[int, ...] = ()
    """Of an early one: cached blocks before that, which are kept from eviction until vLLM has given them to it."""
    num_tokens: int = 0
    parked_s: float = 0.0
    refused: Cause | None = None
    settled: Settled | None = None
    """Of an early one: what became of it."""
    claimed: bool = False
    """Of an early one: vLLM's main thread has heard of the request."""


class Handoffs:
    """Those of one decode engine. Any thread may use it.

    Args:
        key: the deployment key.
        block_size: tokens per block.
        num_groups: KV cache groups of the engine.
    """

    def __init__(self, *, key: bytes, block_size: int, num_groups: int) -> None:
        self._key, self.block_size, self._num_groups = key, block_size, num_groups
        self._used = RecentIds(keep_s=_USED_S)

    def checked(self, request: Request, text: object) -> Handoff:
        """A request's handoff, if it is genuine and for its own prompt.

        Raises:
            InvalidHandoff: it is not.
        """
        handoff = unseal(text, self._key)
        if request.prompt_token_ids is None or request.prompt_embeds is not None:
            raise InvalidHandoff("the prompt is not made of token ids alone")
        check_fits(
            handoff,
            token_ids=request.prompt_token_ids,
            salt=prompt_salt(request),
            block_size=self.block_size,
            num_groups=self._num_groups,
        )
        return handoff

    def accepted(self, request: Request, text: object) -> Handoff:
        """The same, and used with it.

        Raises:
            InvalidHandoff: it is not genuine, not its own, or was used before.
        """
        handoff = self.checked(request, text)
        if not self.use(handoff):
            raise InvalidHandoff("the handoff was used before: it works once")
        return handoff

    def unused(self, text: object) -> Handoff | None:
        """A genuine handoff, used with this; None for any other, and for one that was used before."""
        try:
            handoff = unseal(text, self._key)
        except InvalidHandoff:
            return None
        return handoff if self.use(handoff) else None

    def use(self, handoff: Handoff) -> bool:
        """Use a handoff up. False if that was done before."""
        return self._used.add(handoff.transfer_id, now_s=time.monotonic())

    def to_verify(self, handoff: Handoff, blocks: BlockIds, first: int) -> DigestJob | None:
        """The digests that are to be made of what comes into `blocks`, from the prompt's block `first` on."""
        places = chosen(handoff.verify, handoff.nonce, handoff.num_blocks(self.block_size), first=first)
        if not places:
            return None
        return DigestJob(
            transfer_id=handoff.transfer_id,
            nonce=handoff.nonce,
            places=places,
            blocks=tuple(tuple(group[place - first] for place in places) for group in blocks),
        )
