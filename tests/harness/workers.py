"""Worker files for tests, as text."""

from pathlib import Path

PUBLISHED = """\
edition = 1

[generator]
type = "vllm"
model_path = "/path/to/weights/Qwen/Qwen3-Embedding-8B"
max_model_len = 2048
max_num_seqs = 16
pipeline_parallel_size = 1
tensor_parallel_size = 1
task = "embed"

[queue]
url = "https://inference-api.pharia.example.com"
token = "worker-token"
checkpoint_name = "qwen3-embedding-8b"
version = 1
tags = []
http_request_retries = 7
service_name = "worker"
service_role = "Worker"

[queue.models."qwen3-embedding-8b"]
maximum_completion_tokens = 2048
description = "Description of the embedding model"

[queue.models."qwen3-embedding-8b".embedding_task]
supported = true

[monitoring]
metrics_port = 4000
tcp_probes = []
"""


def worker(name: str, generator: str, more: str = "", task: str = "") -> str:
    """Return a worker file of one model."""
    return f"""\
edition = 1

[generator]
{generator}

[queue]
checkpoint_name = "{name}"

[queue.models."{name}".embedding_task]
supported = true
{task}

{more}
"""


def fake(name: str = "fake", engine_args: str = "", more: str = "", task: str = "") -> str:
    """Return a worker file of the stand-in engine."""
    generator = f'type = "fake"\nmax_model_len = 512\nengine_args = {{{engine_args}}}'
    return worker(name, generator, more, task)


def vllm(name: str, model: Path, engine_args: str = "", more: str = "[deployment]\nnum_gpus = 0") -> str:
    """Return a worker file of a model folder, on CPUs."""
    return worker(name, f'type = "vllm"\nmodel_path = "{model}"\nengine_args = {{{engine_args}}}', more)
