"""The models that contestants serve: the bundled one on CPUs, and shapes without weights on GPUs."""

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deployments
from benchmarks.workloads import DIMENSION, MAX_MODEL_LEN, MODEL, model_folder
from deployments.config.load import load_workers
from deployments.machine import cores_here, cpu_dtype, own_cores
from deployments.plan.placement import Machine, openmp_environment
from deployments.plan.plan import WorkerPlan, make_plans
from tests.harness import gallery, layouts, workers

BUNDLED = Path(deployments.__file__).parent / "workers" / f"{MODEL}.toml"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")
SHAPE_MAX_MODEL_LEN = 2048

# Dense bf16, in FLOP/s, by a part of the name that the driver gives; from the data sheets.
PEAKS: Mapping[str, float] = {
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}


@dataclass(frozen=True)
class Subject:
    """A model folder, its worker file, and where it runs."""

    name: str
    folder: str
    worker_file: Path
    max_model_len: int
    dimension: int
    gpus: int = 0
    parameters: float = 0.0  # those that multiply for each token: all but the vocabulary's

    def plan(self) -> WorkerPlan:
        """Return our plan of it on this machine."""
        machine = Machine(cores_here(), self.gpus, cores_here())
        return make_plans(load_workers(self.worker_file), machine)[0]

    def engine_settings(self) -> dict[str, Any]:
        """Return the engine's settings, which are those of our plan, for whoever has such an engine."""
        dtype = "bfloat16" if self.gpus else cpu_dtype()
        return {**self.plan().engine_args, "dtype": dtype, "max_model_len": self.max_model_len}


def bundled() -> Subject:
    """Return the bundled model."""
    return Subject(MODEL, model_folder(), BUNDLED, MAX_MODEL_LEN, DIMENSION)


def tiny(folder: Path) -> Subject:
    """Write a random BERT of two layers, which costs next to nothing: what it takes is the server's."""
    name = "tiny-bert"
    layout = gallery.VLLM["bert-mean-dense"]
    model = layouts.make(folder / name, layout)
    worker = folder / f"{name}.toml"
    worker.write_text(workers.vllm(name, model))
    return Subject(name, str(model), worker, layouts.POSITIONS, layout.dense[0][0])


@dataclass(frozen=True)
class Shape:
    """A Qwen3's sizes, as its model card has them."""

    name: str
    hidden: int
    layers: int
    heads: int
    intermediate: int
    tied: bool
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 151_669

    @property
    def parameters(self) -> float:
        """Weights of all layers: attention's four matrices and the three of the MLP."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return float(self.layers * (attention + 3 * self.hidden * self.intermediate))

    def write(self, folder: Path, gpus: int) -> Subject:
        """Write a model folder without weights, with the bundled model's tokenizer, and its worker file."""
        model = folder / self.name
        model.mkdir()
        config = {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000,
            "max_position_embeddings": 32_768,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocabulary,
        }
        (model / "config.json").write_text(json.dumps(config))
        for file in TOKENIZER_FILES:
            if (source := Path(model_folder(), file)).is_file():
                shutil.copy(source, model / file)
        worker = folder / f"{self.name}.toml"
        worker.write_text(
            "edition = 1\n"
            f'[generator]\ntype = "vllm"\nmodel_path = "{model}"\nmax_model_len = {SHAPE_MAX_MODEL_LEN}\n'
            'engine_args = {load_format = "dummy", dtype = "bfloat16"}\n'
            f'[queue]\ncheckpoint_name = "{self.name}"\n'
            f'[queue.models."{self.name}".embedding_task]\nsupported = true\n'
            f"[deployment]\nnum_gpus = {min(1, gpus)}\n"
        )
        return Subject(self.name, str(model), worker, SHAPE_MAX_MODEL_LEN, self.hidden, gpus, self.parameters)


SHAPES = (
    Shape("qwen3-embedding-0.6b", 1024, 28, 16, 3072, tied=True),
    Shape("qwen3-embedding-8b", 4096, 36, 32, 12_288, tied=False),
)


def gpu_names() -> list[str]:
    """Return the names of this machine's GPUs, as the driver gives them; nothing without a driver."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def peak_of(gpu: str) -> float | None:
    """Return a GPU's dense bf16 peak in FLOP/s, where it is known."""
    return next((peak for name, peak in PEAKS.items() if name in gpu), None)


def engine_environment(subject: Subject) -> dict[str, str]:
    """Return what makes vLLM's engine fast on CPUs, and quiet anywhere."""
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if subject.gpus:
        return environment
    return environment | {
        "OMP_NUM_THREADS": str(cores_here()),
        # Measured against `nobind`, with and without the worker in the engine's process: 1.4 times the single
        # texts per second of the next best.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, own_cores())),
        **openmp_environment(cores_here()),
    }
