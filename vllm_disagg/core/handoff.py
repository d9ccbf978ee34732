"""The handoff: what prefill gives decode, through the proxy, so that it may fetch one request's KV.

It is a capability. Only an engine that holds the deployment key can write one, the proxy cannot read anything it
needs from it, and decode checks it before it connects anywhere. Version history:

1  first version
2  tells how the KV is to be verified
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence

import msgspec

from vllm_disagg.config import VerifyMode
from vllm_disagg.core.types import BlockIds, EngineId, TransferId
from vllm_disagg.errors import InvalidHandoff

HANDOFF_VERSION = 2
MAX_ENCODED_BYTES = 4 * 1024 * 1024
_MAC_BYTES = 32


class Handoff(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """Where one prompt's KV lies, on whose authority, and for how long.

    Attributes:
        version: layout of this message.
        transfer_id: the request on both engines.
        engine_id: the run of the prefill engine that holds the blocks.
        control: `tcp://host:port` of that engine's control channel.
        block_ids: the blocks on prefill, in prompt order, one tuple per KV cache group.
        num_tokens: how many prompt tokens the blocks hold.
        prompt_digest: `prompt_digest` of those tokens; decode compares it with its own prompt.
        lease_s: seconds the blocks are kept from now unless renewed. A duration, since clocks differ.
        nonce: of this hold; prefill confirms a read only for the hold it was given for.
        verify: which blocks' content prefill can vouch for; decode compares them after the read.
    """

    version: int
    transfer_id: TransferId
    engine_id: EngineId
    control: str
    block_ids: BlockIds
    num_tokens: int
    prompt_digest: bytes
    lease_s: float
    nonce: str
    verify: VerifyMode = "off"

    def num_blocks(self, block_size: int) -> int:
        """Blocks that the prompt needs in each group."""
        return -(-self.num_tokens // block_size)


def seal(handoff: Handoff, key: bytes) -> str:
    """Sign and encode a handoff for its way through HTTP."""
    body = msgspec.msgpack.encode(handoff)
    return base64.urlsafe_b64encode(_mac(body, key) + body).decode("ascii")


def unseal(text: object, key: bytes) -> Handoff:
    """Check and decode a handoff that came through HTTP.

    Raises:
        InvalidHandoff: anything but a handoff that `seal` made with the same key.
    """
    if not isinstance(text, str) or len(text) > MAX_ENCODED_BYTES:
        raise InvalidHandoff("the handoff is not a string, or is too long")
    try:
        raw = base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        raise InvalidHandoff("the handoff is not base64") from error
    mac, body = raw[:_MAC_BYTES], raw[_MAC_BYTES:]
    if not hmac.compare_digest(mac, _mac(body, key)):
        raise InvalidHandoff(
            "the handoff is not signed with this deployment's key: give all engines the same --kv-key-file"
        )
    try:
        handoff = msgspec.msgpack.decode(body, type=Handoff)
    except (ValueError, RecursionError) as error:
        raise InvalidHandoff("the handoff has another layout: run the same vllm_disagg on all engines") from error
    if handoff.version != HANDOFF_VERSION:
        raise InvalidHandoff(f"the handoff has version {handoff.version}; this engine reads {HANDOFF_VERSION}")
    return handoff


def prompt_digest(token_ids: Sequence[int], *, salt: str = "") -> bytes:
    """A digest of a prompt, so that one request's KV is never used for another's prompt.

    Args:
        token_ids: the prompt's token ids.
        salt: whatever else the KV depends on: adapter name, cache salt.
    """
    digest = hashlib.blake2b(digest_size=16, person=b"disagg-prompt")
    digest.update(msgspec.msgpack.encode((salt, list(token_ids))))
    return digest.digest()


def check_fits(handoff: Handoff, *, token_ids: Sequence[int], salt: str, block_size: int, num_groups: int) -> None:
    """Refuse a handoff that is genuine but not for this request.

    Raises:
        InvalidHandoff: another prompt, another number of KV cache groups, or too few blocks for its tokens.
    """
    if len(handoff.block_ids) != num_groups:
        raise InvalidHandoff(f"the handoff has {len(handoff.block_ids)} KV cache groups; this engine has {num_groups}")
    if handoff.num_tokens != len(token_ids) or handoff.prompt_digest != prompt_digest(token_ids, salt=salt):
        raise InvalidHandoff("the handoff belongs to another prompt")
    needed = handoff.num_blocks(block_size)
    if any(len(group) < needed for group in handoff.block_ids):
        raise InvalidHandoff(f"the handoff holds fewer than the {needed} blocks its {handoff.num_tokens} tokens need")
    if any(block < 0 for group in handoff.block_ids for block in group):
        raise InvalidHandoff("the handoff names a negative block")


def _mac(body: bytes, key: bytes) -> bytes:
    return hmac.new(key, b"handoff:" + body, hashlib.sha256).digest()
