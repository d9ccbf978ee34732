"""A streaming chat through the proxy: any OpenAI client works unchanged.

python examples/openai_client.py [URL] [QUESTION]
"""

import json
import sys
import urllib.request
from collections.abc import Iterator


def with_openai(url: str, question: str) -> Iterator[str]:
    """Through the `openai` package."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": question}]
    for event in client.chat.completions.create(model=model, messages=messages, stream=True, max_tokens=128):
        yield event.choices[0].delta.content or ""


def with_the_standard_library(url: str, question: str) -> Iterator[str]:
    """The same over plain HTTP."""
    with urllib.request.urlopen(f"{url}/v1/models") as answer:  # noqa: S310 - the URL is the caller's
        model = json.load(answer)["data"][0]["id"]
    body = {"model": model, "messages": [{"role": "user", "content": question}], "stream": True, "max_tokens": 128}
    request = urllib.request.Request(  # noqa: S310
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:  # noqa: S310
        for line in answer:
            if line.startswith(b"data: {"):
                yield json.loads(line[len(b"data: ") :])["choices"][0]["delta"].get("content") or ""


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    question = sys.argv[2] if len(sys.argv) > 2 else "What is the capital of France?"
    try:
        import openai  # noqa: F401 - only whether it is there
    except ImportError:
        stream = with_the_standard_library(url, question)
    else:
        stream = with_openai(url, question)
    for text in stream:
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
