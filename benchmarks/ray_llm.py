"""Serves the model with ray.serve.llm's `build_openai_app`, for `benchmarks.rivals`; ends at SIGTERM."""

import json
import signal
import sys
import threading

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

from benchmarks.workloads import MODEL, model_folder
from deployments.config.plan import cores_here


def main() -> None:
    """Serve on the port that the first argument names, with its engine settings and environment."""
    arguments = json.loads(sys.argv[1])
    stop = threading.Event()
    # Its server takes a CPU besides those of the engine.
    ray.init(
        address="local",
        num_cpus=cores_here() + 1,
        include_dashboard=False,
        log_to_driver=True,
        logging_level="ERROR",
    )
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    config = LLMConfig(
        model_loading_config={"model_id": MODEL, "model_source": model_folder()},
        engine_kwargs=arguments["settings"],
        accelerator_config={"kind": "cpu"},
        placement_group_config={"bundles": [{"CPU": cores_here()}]},
        runtime_env={"env_vars": {**arguments["environment"], "VLLM_CPU_OMP_THREADS_BIND": "nobind"}},
        # Requests wait in the engine's queue, where they are batched; its default lets 64 of them in.
        deployment_config={"num_replicas": 1, "max_ongoing_requests": 1024},
        log_engine_metrics=False,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": arguments["port"]})
    application = build_openai_app(
        {
            "llm_configs": [config],
            # The engine has all the CPUs that Ray counts; the ingress waits for them.
            "ingress_deployment_config": {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0}},
        }
    )
    serve.run(application)
    stop.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
