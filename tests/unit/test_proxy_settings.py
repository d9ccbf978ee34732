"""Settings that a user can correct are refused with one clear line."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_disagg.config import ProxySettings
from vllm_disagg.core.policy import LOCAL_REASONS, REFUSE_REASONS
from vllm_disagg.errors import ConfigError
from vllm_disagg.proxy import create_app, run
from vllm_disagg.proxy.metrics import METRICS
from vllm_disagg.proxy.timing import STAGES

DOCS = Path(__file__).parents[2] / "docs" / "proxy.md"


@pytest.mark.parametrize(
    "url", ["h:1", "ftp://h", "http://", "http://u:p@h", "http://h?x=1", "http://h:0", "http://h:99999", "http://[::1"]
)
def test_engine_urls_are_checked(url: str) -> None:
    with pytest.raises(ConfigError, match="must be a URL like http://host:port"):
        ProxySettings(decode=(url,))


def test_a_final_slash_is_dropped_and_no_instance_is_listed_twice() -> None:
    assert ProxySettings(decode=("http://h:1/",)).decode == ("http://h:1",)
    with pytest.raises(ConfigError, match="listed twice"):
        ProxySettings(prefill=("http://h:1",), decode=("http://h:1/",))


def test_a_proxy_needs_a_decode_instance() -> None:
    with pytest.raises(ConfigError, match="at least one decode instance"):
        create_app(ProxySettings(prefill=("http://h:1",)))


def test_a_busy_port_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            run(ProxySettings(decode=("http://127.0.0.1:1",), port=port))
    assert str(caught.value) == (
        f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --host or --port"
    )


def test_the_proxy_imports_neither_torch_nor_vllm() -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['vllm'] = None; import vllm_disagg.proxy"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_docs_name_every_metric_reason_stage_and_header() -> None:
    text = DOCS.read_text(encoding="utf-8")
    headers = ["X-Disagg-Route", "X-Disagg-Reason", "Server-Timing", "X-Request-Id", "Retry-After"]
    for name in [*METRICS, *LOCAL_REASONS, *REFUSE_REASONS, *STAGES, *headers]:
        assert re.search(rf"`{re.escape(name)}`", text), name
