"""The files for other tools: valid by those tools' own schemas, and all about the same cluster."""

import json
from pathlib import Path
from typing import Any

import pytest
import tomli
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from deployments.__main__ import main
from deployments.app import BuildArguments
from deployments.batches.desk import batch_place
from deployments.errors import ConfigError
from deployments.front.switches import FAST_DATA_PLANE
from deployments.keys.file import KEYS_VARIABLE
from deployments.plan.manifest import WORKERS_FOLDER
from tests.harness import checkpoints, workers
from tests.unit.test_worker_files import write, write_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two CPU models, one of them scaled, and one on GPUs with TP 2; one file holds a token."""
    config = tmp_path / "workers"
    config.mkdir()
    more = "[deployment]\nnum_gpus = 0\nnum_cpus = 4\n[deployment.autoscaling]\nmax_replicas = 6"
    write(config, "minilm.toml", workers.vllm("minilm", checkpoints.minilm(), more=more))
    sre = workers.vllm("sre", checkpoints.sre(), more="[deployment]\nnum_gpus = 0\nnum_cpus = 2")
    write(config, "sre.toml", sre.replace("[queue]", '[queue]\ntoken = "worker-token"'))
    model = write_config(tmp_path / "model")
    generator = f'type = "vllm"\nmodel_path = "{model}"\ntensor_parallel_size = 2'
    write(config, "qwen.toml", workers.worker("qwen", generator, "[deployment]\nnum_replicas = 3"))
    return config


def documents(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[Any]:
    """Return what the command prints, as YAML."""
    assert main(["plan", *arguments]) == 0
    return list(yaml.safe_load_all(capsys.readouterr().out))


def test_the_deploy_file_is_valid_for_ray_serve(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By Serve's own schema."""
    (document,) = documents(capsys, str(folder), "--format", "serve")
    schema = ServeDeploySchema.model_validate(document)
    assert schema.applications[0].import_path == "deployments.app:build"
    assert schema.applications[0].args["config"] == str(folder)
    assert "worker-token" not in yaml.safe_dump(document)


def test_batches_are_deployed_where_a_place_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the ingress of one node wouldn't find what another one's has stored."""
    for arguments, place, names in (
        ((), "off", ["ingress"]),
        (("--batches", "s3://bucket/batches"), "s3://bucket/batches", ["ingress", "batches"]),
    ):
        (document,) = documents(capsys, str(folder), "--format", "serve", *arguments)
        (application,) = ServeDeploySchema.model_validate(document).applications
        assert application.args["batches"] == place
        assert [each.name for each in application.deployments][: -len(list(folder.iterdir()))] == names


def test_origins_are_deployed_where_some_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what is none is told before anything is printed."""
    for arguments, named in (((), None), (("--allow-origins", "https://a.example"), "https://a.example")):
        (document,) = documents(capsys, str(folder), "--format", "serve", *arguments)
        assert document["applications"][0]["args"].get("allow_origins") == named
    assert main(["plan", str(folder), "--allow-origins", "a.example"]) == 2
    assert capsys.readouterr().err == (
        "allow_origins: `a.example` is no origin, such as https://app.example.com, and not `*`\n"
    )


def test_the_place_of_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the user's data on one node; on several only what is named; never what can't be written."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))

    def place(nodes: int, **arguments: Any) -> str | None:
        given = BuildArguments(config="", **arguments)
        found = batch_place(given.batches, given.batch_days, nodes)
        return found.url if found else None

    assert place(1) == str(tmp_path / "embedding-cluster" / "batches")
    assert place(2) is None
    assert place(2, batches="memory://batches") == "memory://batches"
    assert place(1, batches="off") is None
    monkeypatch.chdir(tmp_path)
    assert place(1, batches="here") == str(tmp_path / "here")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file: can't be written"):
        place(1, batches="file")


@pytest.mark.parametrize(
    ("old", "new", "rebuilt"),
    [
        ("num_cpus = 2", "num_cpus = 2\nnum_replicas = 5", False),
        ("supported = true", 'supported = true\nprompts = {query = "find: "}', False),
        ("engine_args = {}", "engine_args = {max_num_batched_tokens = 4096}", True),
        ("num_cpus = 2", "num_cpus = 1", True),
    ],
)
def test_the_deploy_file_names_other_engines_only_when_they_have_to_start_anew(
    folder: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, rebuilt: bool
) -> None:
    """Its arguments make Ray Serve build everything anew; what it says of deployments changes in place."""
    (before,) = documents(capsys, str(folder), "--format", "serve")
    file = folder / "sre.toml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    (after,) = documents(capsys, str(folder), "--format", "serve")
    assert before != after
    assert (before["applications"][0]["args"] != after["applications"][0]["args"]) == rebuilt


def test_the_ray_service_carries_the_worker_files_as_a_secret(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte for byte, mounted where its own Serve configuration looks for them, and nowhere else."""
    secret, service = documents(capsys, str(folder), "--format", "rayservice")
    assert secret["kind"] == "Secret"
    assert secret["stringData"] == {
        file.name: file.read_text().replace("worker-token", "") for file in folder.glob("*.toml")
    }
    assert "worker-token" not in yaml.safe_dump(service)
    serve = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    assert serve.applications[0].args["config"] == WORKERS_FOLDER
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["volumeMounts"][0]["mountPath"] == WORKERS_FOLDER
        (volume,) = group["template"]["spec"]["volumes"]
        assert volume["secret"]["secretName"] == secret["metadata"]["name"]
        plain = {each["name"]: each.get("value") for each in container["env"]}
        assert plain.items() >= FAST_DATA_PLANE.items()


def test_only_this_machine_is_let_in_without_keys(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Others, where the file names keys, or says that none are meant."""
    wanted: dict[tuple[str, ...], tuple[str, dict[str, Any]]] = {(): ("127.0.0.1", {})}
    wanted["--insecure",] = ("0.0.0.0", {"insecure": True})
    wanted["--keys", str(folder / "keys.json")] = ("0.0.0.0", {"keys": str(folder / "keys.json")})
    for options, (host, arguments) in wanted.items():
        (document,) = documents(capsys, str(folder), "--format", "serve", *options)
        assert document["http_options"]["host"] == host
        got = document["applications"][0]["args"]
        assert {name: got[name] for name in ("keys", "insecure") if name in got} == arguments


def test_pods_take_the_keys_from_a_secret(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the environment variable that the builder reads."""
    _, service = documents(capsys, str(folder), "--format", "rayservice")
    (container,) = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    (reference,) = (each["valueFrom"] for each in container["env"] if each["name"] == KEYS_VARIABLE)
    assert reference["secretKeyRef"]["name"] == "embedding-cluster-keys"


def test_no_secret_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever it is for; pods get it as a variable. One that can't be taken out is told."""
    file = folder / "sre.toml"
    text = file.read_text().replace(
        "engine_args = {}", "engine_args = {hf_token = 'hub-token', dtype = 'float32'}"
    )
    file.write_text(text)
    for form in ("json", "serve", "rayservice"):
        assert main(["plan", str(folder), "--format", form]) == 0
        printed = capsys.readouterr().out
        assert "worker-token" not in printed
        assert "hub-token" not in printed
    secret, service = yaml.safe_load_all(printed)
    kept = tomli.loads(secret["stringData"]["sre.toml"])
    assert kept["queue"]["token"] == ""
    assert kept["generator"]["engine_args"] == {"hf_token": "", "dtype": "float32"}
    (container,) = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "embedding-cluster-variables", "optional": True}}]
    file.write_text(text.replace('"worker-token"', '"""worker-token"""'))
    assert main(["plan", str(folder), "--format", "rayservice"]) == 2
    told = capsys.readouterr()
    assert "worker `sre`: token: can't be taken out of the file" in told.err
    assert "worker-token" not in told.out + told.err


def test_the_ray_service_has_room_for_every_replica(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At least for the smallest number of them at the start, at most for the largest."""
    _, service = documents(capsys, str(folder), "--format", "rayservice", "--gpus", "6")
    cpu, gpu = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    # minilm takes 4 CPUs, 1 to 6 times, a pod each; sre takes 2 of another pod.
    assert (cpu["groupName"], cpu["minReplicas"], cpu["maxReplicas"]) == ("cpu-workers", 2, 7)
    limits = [g["template"]["spec"]["containers"][0]["resources"]["limits"] for g in (cpu, gpu)]
    assert limits[0]["cpu"] == 4
    assert "nvidia.com/gpu" not in limits[0]
    # qwen takes two GPUs on one node, three times.
    assert (gpu["minReplicas"], gpu["maxReplicas"], limits[1]["nvidia.com/gpu"]) == (3, 3, 2)


def cluster_yaml() -> dict[str, Any]:
    """Return the repository's own cluster.yaml."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return content


def test_cluster_yaml_is_valid_for_ray_up() -> None:
    """By Ray's own schema, once Ray has filled in its defaults."""
    validate_config(prepare_config(cluster_yaml()))
    with pytest.raises(ValidationError, match="worker_files"):  # the schema would tell
        validate_config(prepare_config({**cluster_yaml(), "worker_files": []}))


def test_the_local_variant_of_cluster_yaml_is_valid_too() -> None:
    """As its first comment says."""
    config = cluster_yaml()
    for key in ("available_node_types", "head_node_type"):
        del config[key]
    config["provider"] = {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]}
    config |= {"max_workers": 2, "min_workers": 2}
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["provider"]["worker_ips"] == ["10.0.0.2", "10.0.0.3"]


@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_every_node_starts_on_the_fast_data_plane_with_token_authentication(key: str) -> None:
    """The same switches as the tuned start sets; the dashboard stays on the head's loopback."""
    start = cluster_yaml()[key][-1].split()
    assert {f"{name}={value}" for name, value in FAST_DATA_PLANE.items()} <= set(start)
    assert "RAY_AUTH_MODE=token" in start
    if key.startswith("head"):
        assert "--dashboard-host=127.0.0.1" in start


def test_ranks_that_may_span_nodes_get_pods_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PACK with TP 4, twice: eight pods of one GPU."""
    model = write_config(tmp_path / "model")
    generator = f'type = "vllm"\nmodel_path = "{model}"\ntensor_parallel_size = 4'
    more = '[deployment]\nnum_replicas = 2\nplacement_group_strategy = "PACK"'
    file = write(tmp_path, "qwen.toml", workers.worker("qwen", generator, more))
    _, service = documents(capsys, str(file), "--format", "rayservice", "--gpus", "8")
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (8, 8)


def test_the_plan_is_a_table_for_people_and_json_for_programs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each worker, and below which engine serves it, and why."""
    assert main(["plan", str(folder)]) == 0
    heads, *lines = capsys.readouterr().out.splitlines()
    assert heads.split("  ")[0] == "WORKER"
    assert [line.split()[:7] for line in lines[:3]] == [
        ["minilm", "minilm", "vllm", "cpu", "1", "x", "1"],
        ["qwen", "qwen", "vllm", "gpu", "2", "x", "1"],
        ["sre", "sre", "vllm", "cpu", "1", "x", "1"],
    ]
    assert "1 to 6" in lines[0]
    assert lines[4] == f"minilm: vllm: it gives the model's own vectors; {checkpoints.minilm()}"
    assert main(["plan", str(folder), "--format", "json"]) == 0
    assert [each["engine"] for each in json.loads(capsys.readouterr().out)] == ["vllm"] * 3
