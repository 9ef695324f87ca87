"""Serves the model with ray.serve.llm's `build_openai_app`, for `benchmarks.rivals`; ends at SIGTERM."""

import json
import logging
import signal
import sys
import time
from typing import Any

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app
from ray.serve.schema import LoggingConfig

from deployments.machine import cores_here


def main() -> None:
    """Serve on the port that the first argument names, with its engine settings and environment."""
    arguments = json.loads(sys.argv[1])
    # Its server takes a CPU besides those of the engine.
    ray.init(
        address="local",
        num_cpus=cores_here() + 1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    # While it starts too; Ray has put a handler of its own there.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    hardware: dict[str, Any] = {"placement_group_config": {"bundles": [{"CPU": 1, "GPU": 1}]}}
    if not arguments["gpu"]:
        hardware = {
            "accelerator_config": {"kind": "cpu"},
            "placement_group_config": {"bundles": [{"CPU": cores_here()}]},
        }
    config = LLMConfig(
        model_loading_config={"model_id": arguments["model"], "model_source": arguments["folder"]},
        engine_kwargs=arguments["settings"],
        **hardware,
        runtime_env={"env_vars": arguments["environment"]},
        # Requests wait in the engine's queue, where they are batched; its default lets 64 of them in.
        deployment_config={"num_replicas": 1, "max_ongoing_requests": 1024},
        log_engine_metrics=False,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": arguments["port"]})
        application = build_openai_app(
            {
                "llm_configs": [config],
                # The engine has all the CPUs that Ray counts; the ingress waits for them.
                "ingress_deployment_config": {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0}},
            }
        )
        # Without a line for each request, as ours.
        quiet = LoggingConfig(enable_access_log=not arguments["tuned"])
        serve.run(application, logging_config=quiet)
        while True:
            time.sleep(1)
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
