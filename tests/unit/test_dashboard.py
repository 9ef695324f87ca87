"""The dashboard and the alerts: each name is one of `metrics.py`, each rule is right and fires once."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.__main__ import main
from deployments.command.alerts import ALERTS, Alert
from tests.harness.prometheus import (
    CONDITIONS,
    LABELS,
    PANELS,
    QUERIES,
    asked,
    concrete,
    metric_of,
    needs_prometheus,
)


@pytest.mark.parametrize("query", [*QUERIES.values(), *CONDITIONS.values()])
def test_every_query_names_metrics_and_labels_that_there_are(query: str) -> None:
    """Those of `metrics.py`, and of what a counter or a histogram is made up of; what vLLM counts aside."""
    named = [(name, labels) for name, labels in asked(query) if not name.startswith("vllm:")]
    assert named or "vllm:" in query or query.startswith("up{")
    for name, labels in named:
        metric = metric_of(name)
        assert metric in LABELS, name
        assert labels <= LABELS[metric], name


def test_every_metric_is_on_the_dashboard() -> None:
    """What nobody would look at needn't be counted."""
    shown = {
        metric_of(name)
        for query in QUERIES.values()
        for name, _ in asked(query)
        if name.startswith("embedding_")
    }
    assert shown == set(LABELS)


def test_panels_lie_side_by_side() -> None:
    """None on another one, none beyond the edge, each with its queries."""
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        assert panel["targets"]
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)


def test_every_alert_says_what_to_do() -> None:
    """Under a name of its own."""
    assert len(CONDITIONS) == len(ALERTS)
    for alert in ALERTS:
        assert len(alert.action) > 40, alert.name
        assert alert.severity in ("critical", "warning")


def written(folder: Path, *arguments: str) -> Path:
    """Run the command; return the folder."""
    assert main(["dashboard", str(folder), *arguments]) == 0
    return folder


def test_the_command_writes_what_grafana_and_prometheus_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dashboard lies where its provider looks; the target, the key and the source are those named."""
    key = tmp_path / "key"
    folder = written(
        tmp_path / "out",
        *("--url", "https://cluster.example/base/"),
        *("--prometheus", "http://prometheus:9090", "--key-file", str(key)),
    )
    files = sorted(str(file) for file in folder.rglob("*") if file.is_file())
    assert sorted(capsys.readouterr().out.split()) == files
    provider = yaml.safe_load((folder / "grafana/provisioning/dashboards/embedding-cluster.yaml").read_text())
    (dashboard,) = Path(provider["providers"][0]["options"]["path"]).iterdir()
    assert json.loads(dashboard.read_text())["title"] == "Embedding cluster"
    source = yaml.safe_load((folder / "grafana/provisioning/datasources/embedding-cluster.yaml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    (job,) = yaml.safe_load((folder / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert (job["scheme"], job["metrics_path"]) == ("https", "/base/metrics")
    assert job["static_configs"] == [{"targets": ["cluster.example"]}]
    assert job["authorization"] == {"credentials_file": str(key)}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["x", "--url", "127.0.0.1:8000"], "127.0.0.1:8000 isn't an address like http://127.0.0.1:8000"),
        (["x", "--prometheus", "ftp://x"], "ftp://x isn't an address like http://127.0.0.1:8000"),
    ],
)
def test_what_is_no_address_is_refused(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By argument, before anything is written."""
    with pytest.raises(SystemExit) as ended:
        main(["dashboard", *arguments])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"argument {arguments[1]}: {told}")


def test_a_place_that_cant_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line."""
    file = tmp_path / "file"
    file.touch()
    assert main(["dashboard", str(file)]) == 2
    assert capsys.readouterr().err == f"{file}/grafana/dashboards: Not a directory\n"


# --- Prometheus's own tool ------------------------------------------------------------------------


def promtool(*arguments: str | Path) -> str:
    """Run promtool; return what it says, having checked that it is content."""
    result = subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=100
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@needs_prometheus
def test_promtool_reads_all_of_it(tmp_path: Path) -> None:
    """The configuration with the rules; each query of the dashboard, as if it were a rule."""
    key = tmp_path / "key"
    key.touch()
    folder = written(tmp_path, "--key-file", str(key))
    assert f"{len(ALERTS)} rules found" in promtool("check", "config", folder / "prometheus/prometheus.yml")
    recorded = [
        {"record": f"panel:{number}", "expr": concrete(query, "1m")}
        for number, query in enumerate(QUERIES.values())
    ]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}))
    assert f"{len(QUERIES)} rules found" in promtool("check", "rules", file)


def states(running: str, starting: str) -> dict[str, str]:
    """Return the series of how many replicas there are."""
    name = 'embedding_replica_states{worker="a",state="%s"}'
    return {name % "running": running, name % "starting": starting}


def requests(**outcomes: str) -> dict[str, str]:
    """Return the series of requests by outcome."""
    return {f'embedding_requests_total{{model="a",outcome="{name}"}}': v for name, v in outcomes.items()}


def buckets(metric: str, label: str, *grows: tuple[str, str]) -> dict[str, str]:
    """Return the series of a histogram."""
    return {f'embedding_{metric}_bucket{{{label}="a",le="{le}"}}': values for le, values in grows}


# A minute apart: what the cluster tells while all is well.
WELL = {
    'up{job="embedding-cluster",instance="cluster:80"}': "1x120",
    **states("2x120", "0x120"),
    **requests(ok="0+600x120", context_length_exceeded="0+60x120", cancelled="0+60x120"),
    'embedding_queued_tokens{worker="a"}': "100x120",
    'embedding_capacity_tokens_per_second{worker="a"}': "1000x120",
    **buckets("request_seconds", "model", ("0.1", "0+600x120"), ("30.0", "0+601x120"), ("+Inf", "0+601x120")),
    'embedding_retries_total{worker="a"}': "0+1x120",
    'embedding_call_inputs_count{worker="a"}': "0+600x120",
    'embedding_cuts_total{worker="a"}': "7x120",
    **buckets("cold_start_seconds", "worker", ("10.0", "0+1x120"), ("60.0", "0+1x120"), ("+Inf", "0+1x120")),
    'embedding_denied_total{code="invalid_api_key"}': "0+6x120",
    'embedding_batch_lines_total{model="a",outcome="ok"}': "0+600x120",
    'embedding_batch_lines_total{model="a",outcome="context_length_exceeded"}': "0+6x120",
}
# What makes each alert, beside all that is well.
CAUSES: dict[str, dict[str, str]] = {
    "EmbeddingClusterSilent": {'up{job="embedding-cluster",instance="cluster:80"}': "1x20 0x100"},
    "EmbeddingModelDown": states("2x20 0x100", "0x20 2x100"),
    "EmbeddingReplicaMissing": states("2x20 1x100", "0x20 1x100"),
    "EmbeddingErrors": requests(model_unavailable="0x20 0+60x100"),
    "EmbeddingTooMuchWork": requests(queue_full="0x20 0+60x100"),
    "EmbeddingQueueGrows": {'embedding_queued_tokens{worker="a"}': "100x20 30000x100"},
    "EmbeddingSlow": buckets(
        "request_seconds",
        "model",
        ("0.1", "0x20 0+500x100"),
        ("30.0", "0x20 0+600x100"),
        ("+Inf", "0x20 0+600x100"),
    ),
    "EmbeddingInternalError": requests(internal_error="_x20 1x100"),
    "EmbeddingNotFinite": requests(non_finite_embedding="_x20 1x100"),
    "EmbeddingReplicaHangs": {'embedding_cuts_total{worker="a"}': "7x20 8x100"},
    "EmbeddingReplicasDie": {'embedding_retries_total{worker="a"}': "0x20 0+60x100"},
    "EmbeddingColdStartSlow": buckets(
        "cold_start_seconds", "worker", ("10.0", "0x120"), ("60.0", "0x20 0+1x100"), ("+Inf", "0x20 0+1x100")
    ),
    "EmbeddingKeysRefused": {'embedding_denied_total{code="invalid_api_key"}': "0x20 0+120x100"},
    "EmbeddingClientOverRate": requests(rate_limit_exceeded="0x20 0+600x100"),
    "EmbeddingBatchLinesFail": {
        'embedding_batch_lines_total{model="a",outcome="context_length_exceeded"}': "0x20 0+600x100"
    },
}
LABELS_OF = {"EmbeddingClusterSilent": {"instance": "cluster:80", "job": "embedding-cluster"}}
LABELS_OF |= {"EmbeddingKeysRefused": {"code": "invalid_api_key"}}


def expected(alert: Alert) -> dict[str, Any]:
    """Return an alert as it is sent, about `a`."""
    label = "model" if "{{ $labels.model }}" in alert.summary else "worker"
    labels = LABELS_OF.get(alert.name, {label: "a"})
    summary = alert.summary
    for name, value in labels.items():
        summary = summary.replace(f"{{{{ $labels.{name} }}}}", value)
    return {
        "exp_labels": labels | {"severity": alert.severity},
        "exp_annotations": {"summary": summary, "action": alert.action},
    }


def check(minute: int, alert: Alert, *fires: Alert) -> dict[str, Any]:
    """Return promtool's check that an alert fires at a minute, or doesn't."""
    return {
        "eval_time": f"{minute}m",
        "alertname": alert.name,
        "exp_alerts": [expected(each) for each in fires],
    }


@needs_prometheus
def test_each_alert_fires_once_when_its_cause_is_made(tmp_path: Path) -> None:
    """And no other one does, before or after it; with its labels, and with what to do."""
    assert set(CAUSES) == {alert.name for alert in ALERTS}
    tests = []
    for alert in ALERTS:
        made = WELL | CAUSES[alert.name]
        minute = 29 if alert.lasting == "0m" else 22 + int(alert.lasting.removesuffix("m")) + 10
        others = [each for each in ALERTS if each is not alert]
        tests.append(
            {
                "name": alert.name,
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in made.items()],
                "alert_rule_test": [
                    check(19, alert),
                    check(minute, alert, alert),
                    *(check(minute, each) for each in others),
                ],
            }
        )
    well = {"input_series": [{"series": name, "values": values} for name, values in WELL.items()]}
    quiet = [check(minute, alert) for alert in ALERTS for minute in (1, 30, 110)]
    tests.append({"name": "all is well", "interval": "1m", **well, "alert_rule_test": quiet})
    folder = written(tmp_path)
    file = folder / "test.yml"
    content = {"rule_files": ["prometheus/alerts.yml"], "evaluation_interval": "1m", "tests": tests}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    assert "SUCCESS" in promtool("test", "rules", file)
