"""The prompt's KV really comes from prefill: decode receives it and does not compute it."""

from __future__ import annotations

from tests.e2e import cases
from tests.e2e.client import Case, compare
from tests.e2e.conftest import Deployment

RECEIVED = "vllm_disagg_kv_tokens_received_total"
COMPUTED = "vllm:iteration_tokens_total_sum"


async def test_decode_receives_every_prompt_token_it_has_not_cached(deployment: Deployment) -> None:
    lengths = [33, 64, 65, 200, 511]
    received = deployment.decode.metrics(RECEIVED)[RECEIVED]
    before = deployment.decode.metrics(COMPUTED)[COMPUTED]
    asked = [Case(name=str(n), body={"prompt": cases.prompt_of(n, 700 + n), "max_tokens": 4}) for n in lengths]

    verdict = await compare(deployment.proxy.url, deployment.undivided.url, asked, at_once=1)

    assert verdict.different == []
    assert deployment.decode.metrics(RECEIVED)[RECEIVED] - received == sum(lengths)
    held = deployment.prefill.metrics("vllm_disagg_kv_held_blocks")["vllm_disagg_kv_held_blocks"]
    assert held == 0
    # Of each prompt the last token is computed here. vLLM counts it where the KV came before the request was looked at,
    # and with a parked request it does not; each generated token counts once.
    computed = deployment.decode.metrics(COMPUTED)[COMPUTED] - before
    print(f"received {sum(lengths)} prompt tokens, computed {computed} tokens in all")
    assert len(lengths) * 4 <= computed <= len(lengths) * 5
