"""The worker file, edition 1, as frozen pydantic models.

The four tables of the published format (`edition`, `[generator]`, `[queue]`, `[monitoring]`) and our
extensions (`[generator.engine_args]`, `[deployment]`, `[limits]`, `[queue.models.NAME.embedding_task]`).
Types are strict and unknown keys are errors: a typo must not become a default.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\s/#?][^\s#?]*$")]
# TOML writes 5 and 5.0; both are numbers here.
Positive = Annotated[float, Field(gt=0, strict=False)]
Delay = Annotated[float, Field(ge=0, strict=False)]
Probe = Annotated[str, Field(pattern=r"^([^\s:\[\]]+|\[[0-9A-Fa-f:.%\w]+\]):\d{1,5}$")]

# Set from keys of their own, or fixed by what a worker is; [generator.engine_args] may not repeat them.
RESERVED_ENGINE_ARGS = {
    "model": "generator.model_path",
    "runner": "generator.task",
    "task": "generator.task",
    "max_model_len": "generator.max_model_len",
    "max_num_seqs": "generator.max_num_seqs",
    "tensor_parallel_size": "generator.tensor_parallel_size",
    "pipeline_parallel_size": "generator.pipeline_parallel_size",
    "data_parallel_size": "deployment.num_replicas",
    "distributed_executor_backend": "deployment.placement_group_strategy",
    "served_model_name": "queue.models",
}


# The deployment in front of all workers.
INGRESS_NAME = "ingress"
# What works off the batches that it takes.
BATCHES_NAME = "batches"
# In place of a storage for batches.
NO_BATCHES = "off"
# What its replicas share of the clients' rate limits.
RATES_NAME = "rates"
MAX_PORT = 65535


def is_secret(name: str) -> bool:
    """Whether a key of that name holds what nobody may see."""
    return re.search(r"token$|secret|password|api_key", name) is not None


class Table(BaseModel):
    """A TOML table: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class FakeEngineArgs(Table):
    """`[generator.engine_args]` of the stand-in engine; times in seconds. Another seed is another model.

    In `calls_folder` each engine keeps a file, named by its process, with a line for each call: its tokens.
    An input with `nan_token` has no vector, a call with `error_token` fails, `fatal_token` ends the engine.
    """

    dimension: Count = 64
    seed: Annotated[int, Field(ge=0)] = 0
    call_seconds: Annotated[float, Field(ge=0)] = 0.0
    token_seconds: Annotated[float, Field(ge=0)] = 0.0
    start_seconds: Annotated[float, Field(ge=0)] = 0.0
    start_error: str = ""
    calls_folder: str = ""
    chat_template: str = ""
    nan_token: int = -1
    error_token: int = -1
    fatal_token: int = -1


class Generator(Table):
    """`[generator]`: the engine and the model.

    `engine` is what computes a model of type `vllm`: vLLM wherever that gives the model's own vectors, else
    sentence-transformers. `steps` says how vLLM's model is computed: `packed`, a step at once; `scheduled`,
    by vLLM's scheduler, which serves every model; `auto`, the faster one that gives the right vectors.
    """

    type: Literal["vllm", "fake"]
    model_path: Annotated[str, Field(min_length=1)] = ""
    max_model_len: Count | None = None
    max_num_seqs: Count = 256
    pipeline_parallel_size: Count = 1
    tensor_parallel_size: Count = 1
    task: Literal["embed"] = "embed"
    engine: Literal["vllm", "sentence-transformers"] | None = None
    steps: Literal["auto", "packed", "scheduled"] = "auto"
    engine_args: dict[str, Any] = Field(default_factory=dict)

    @field_validator("engine_args")
    @classmethod
    def _not_reserved(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name in RESERVED_ENGINE_ARGS:
                raise ValueError(f"`{name}` can't be set here; use {RESERVED_ENGINE_ARGS[name]}")
        return value

    @model_validator(mode="after")
    def _fake_arguments(self) -> "Generator":
        if self.type == "fake":
            FakeEngineArgs.model_validate(self.engine_args)
        return self

    @model_validator(mode="after")
    def _has_model(self) -> "Generator":
        if self.type == "vllm" and not self.model_path:
            raise ValueError("type `vllm` needs a model_path")
        return self

    @property
    def served_by(self) -> str:
        """The engine: of a plan's worker the one that was chosen."""
        return self.engine or self.type

    @property
    def world_size(self) -> int:
        """Number of ranks of one replica: TP times PP."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


class EmbeddingTask(Table):
    """`[queue.models.NAME.embedding_task]`: what one public name may do.

    `dimensions` are the sizes a request may ask for besides the model's own; `prompts` maps a use
    (`query`, `document`, …) to the text put before each input, over the model's own prompts; in the prompt
    `instruction` the client's instruction takes the place of `{instruction}`. `token_input` says whose token
    ids clients send: the model's own, OpenAI's cl100k, which are turned into text, or none.
    """

    supported: bool = False
    dimensions: tuple[Count, ...] = Field(default=(), strict=False)
    prompts: dict[str, str] = Field(default_factory=dict)
    token_input: Literal["native", "cl100k", "reject"] = "native"
    truncation: Literal["none", "start", "end"] = "none"


class Model(Table):
    """`[queue.models.NAME]`: one public name of the worker."""

    maximum_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    description: str = ""
    embedding_task: EmbeddingTask = EmbeddingTask()


class Queue(Table):
    """`[queue]`: how the worker shows itself to the outside."""

    url: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = None
    token: SecretStr | None = None
    checkpoint_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    version: int | str = 1
    tags: tuple[str, ...] = Field(default=(), strict=False)
    http_request_retries: Annotated[int, Field(ge=0, le=100)] = 7
    service_name: str = "worker"
    service_role: str = "Worker"
    models: dict[Name, Model] = Field(min_length=1)

    @field_validator("checkpoint_name")
    @classmethod
    def _not_the_ingress(cls, value: str) -> str:
        if value in (INGRESS_NAME, RATES_NAME, BATCHES_NAME):
            raise ValueError(f"`{value}` is the name of a deployment in front of all workers")
        return value


class Monitoring(Table):
    """`[monitoring]`: metrics and conditions for readiness."""

    metrics_port: Annotated[int, Field(ge=0, le=MAX_PORT)] = 0
    tcp_probes: tuple[Probe, ...] = Field(default=(), strict=False)

    @field_validator("tcp_probes")
    @classmethod
    def _ports(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            if int(address.rpartition(":")[2]) > MAX_PORT:
                raise ValueError(f"`{address}` has no port of a machine")
        return value


class Autoscaling(Table):
    """`[deployment.autoscaling]`: Ray Serve's own names, and the target in tokens.

    A replica should have no more waiting than it embeds in `target_outstanding_s` seconds, at its measured
    speed. `target_ongoing_requests` counts requests instead.
    """

    min_replicas: Annotated[int, Field(ge=0)] = 1
    max_replicas: Count = 1
    initial_replicas: Annotated[int, Field(ge=0)] | None = None
    target_outstanding_s: Positive = 1.0
    target_ongoing_requests: Positive | None = None
    upscale_delay_s: Delay = 5.0
    downscale_delay_s: Delay = 300.0
    downscale_to_zero_delay_s: Delay | None = None
    upscaling_factor: Positive | None = None
    downscaling_factor: Positive | None = None
    metrics_interval_s: Positive = 1.0
    look_back_period_s: Positive = 5.0

    @model_validator(mode="after")
    def _in_order(self) -> "Autoscaling":
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas ({self.min_replicas}) is above max_replicas ({self.max_replicas})"
            )
        initial = self.initial_replicas
        if initial is not None and not self.min_replicas <= initial <= self.max_replicas:
            raise ValueError(f"initial_replicas ({initial}) must lie between min_replicas and max_replicas")
        return self


class Deployment(Table):
    """`[deployment]`: Ray's own names for resources, placement and count.

    `num_cpus` and `num_gpus` are per rank. Absent `num_gpus` means: a GPU for each rank where the cluster has
    GPUs, else CPUs; below 1, several replicas share one. Absent `num_cpus` means: the cores, shared evenly.
    """

    num_replicas: Count | None = None
    num_cpus: Annotated[int, Field(ge=1)] | None = None
    num_gpus: Annotated[float, Field(ge=0, le=1)] | None = None
    accelerator_type: str | None = None
    resources: dict[str, Positive] = Field(default_factory=dict)
    placement_group_strategy: Literal["STRICT_PACK", "PACK"] = "STRICT_PACK"
    max_replicas_per_node: Annotated[int, Field(ge=1, le=100)] | None = None
    autoscaling: Autoscaling | None = None

    @field_validator("resources")
    @classmethod
    def _custom(cls, value: dict[str, float]) -> dict[str, float]:
        if named := {"CPU", "GPU", "memory"} & set(value):
            raise ValueError(f"{', '.join(sorted(named))} can't be set here; use num_cpus and num_gpus")
        return value

    @model_validator(mode="after")
    def _one_scaling(self) -> "Deployment":
        if self.num_replicas is not None and self.autoscaling is not None:
            raise ValueError("num_replicas and [deployment.autoscaling] exclude each other")
        return self

    @property
    def max_replicas(self) -> int:
        """The most replicas that there may be at a time."""
        return self.autoscaling.max_replicas if self.autoscaling else self.num_replicas or 1


class Limits(Table):
    """`[limits]`: what a request to this worker may hold, how long it may take, how much may wait.

    Absent `max_outstanding_tokens` means: what the worker's measured speed can embed in half the deadline.
    `cache_mib` is the memory of each ingress replica for vectors that may be asked for again; 0 for none.
    """

    max_inputs: Count = 2048
    max_request_tokens: Count = 300_000
    max_outstanding_tokens: Count | None = None
    cache_mib: Annotated[int, Field(ge=0)] = 0
    request_timeout_s: Annotated[float, Field(gt=0, le=3600, strict=False)] = 60.0


class Worker(Table):
    """One worker file."""

    edition: int
    generator: Generator
    queue: Queue
    monitoring: Monitoring = Monitoring()
    deployment: Deployment = Deployment()
    limits: Limits = Limits()

    @field_validator("edition")
    @classmethod
    def _known_edition(cls, value: int) -> int:
        if value != 1:
            raise ValueError(f"must be 1, not {value!r}")
        return value

    @model_validator(mode="after")
    def _spreads_single_ranks(self) -> "Worker":
        if self.deployment.max_replicas_per_node and self.generator.world_size > 1:
            raise ValueError(
                "deployment.max_replicas_per_node can't be combined with tensor or pipeline"
                " parallelism: the placement group of the ranks decides where they go"
            )
        return self

    def cpu_objections(self) -> Iterator[tuple[str, str]]:
        """Yield each key that stands in the way of running on CPUs, and why."""
        generator = self.generator
        if generator.type == "fake":
            return
        if generator.world_size > 1 and self.deployment.placement_group_strategy == "PACK":
            yield (
                "deployment.placement_group_strategy",
                "`PACK` may put ranks on several nodes, which vLLM can't do on CPUs; use `STRICT_PACK`",
            )
        if generator.pipeline_parallel_size > 1 and generator.engine_args.get("enforce_eager"):
            yield (
                "generator.engine_args.enforce_eager",
                "pipeline stages can't run eagerly on CPUs; leave it out",
            )

    @property
    def reads_cl100k(self) -> bool:
        """Whether any of its models is sent OpenAI's token ids."""
        return any(model.embedding_task.token_input == "cl100k" for model in self.queue.models.values())

    @property
    def name(self) -> str:
        """The deployment's name and the metrics label."""
        return self.queue.checkpoint_name
