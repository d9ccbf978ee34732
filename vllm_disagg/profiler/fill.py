"""KV that nobody has computed: long contexts for decoding without the time that their prompts would take.

vLLM's `DecodeBenchConnector` does this for every request; here a request has to ask for it, so that one engine can be
measured with prompts and without. Answers to such requests mean nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnector

if TYPE_CHECKING:
    from vllm.v1.request import Request

FILL_KEY: Final = "vllm_disagg_fill"
"""In a request's `kv_transfer_params`: true for a request whose prompt counts as computed."""


class FillOnDemand(DecodeBenchConnector):
    """Chosen by `--kv-transfer-config`."""

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """All but the last token of a request that asks for it."""
        if not (request.kv_transfer_params or {}).get(FILL_KEY):
            return 0, False
        found: tuple[int | None, bool] = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return found

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """KV is filled before the layers run, never between them."""
        return False
