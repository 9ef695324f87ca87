"""`embedding-cluster dashboard`: a Grafana dashboard, alert rules, and the configuration that brings them in.

panels, alerts → files
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from deployments.command.alerts import ALERTS, JOB, Alert
from deployments.command.panels import ROWS, Panel
from deployments.errors import ConfigError

UID = "embedding-cluster"
# Grafana's grid is so wide.
WIDTH, HEIGHT, NOW_HEIGHT = 24, 8, 4
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
SCRAPE_SECONDS = 15


@dataclass(frozen=True)
class Places:
    """The cluster's and Prometheus's addresses, the folder that is written, a file with an operator's key."""

    cluster: str
    prometheus: str
    folder: Path
    key_file: Path | None = None


def add_dashboard_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `dashboard` to the command line."""
    command = commands.add_parser("dashboard", help="write a Grafana dashboard and Prometheus alert rules")
    command.add_argument("folder", type=Path, help="where to write them; what has their names is replaced")
    what = "the cluster's address (default: %(default)s)"
    command.add_argument("--url", type=address, default="http://127.0.0.1:8000", help=what)
    what = "Prometheus's address, for Grafana (default: %(default)s)"
    command.add_argument("--prometheus", type=address, default="http://127.0.0.1:9090", help=what)
    what = "a file that holds an operator's key, which Prometheus reads"
    command.add_argument("--key-file", type=Path, metavar="FILE", help=what)
    command.set_defaults(command=_dashboard)


def _dashboard(parsed: argparse.Namespace) -> int:
    key_file = parsed.key_file.resolve() if parsed.key_file else None
    places = Places(parsed.url, parsed.prometheus, parsed.folder.resolve(), key_file)
    try:
        for name, text in files(places).items():
            file = places.folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            print(file)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from None
    return 0


def files(places: Places) -> dict[str, str]:
    """Return what is written, by its path in the folder."""
    dashboards = places.folder / "grafana" / "dashboards"
    provider = {"name": UID, "type": "file", "options": {"path": str(dashboards)}}
    source = {
        "name": "Prometheus",
        "type": "prometheus",
        "uid": "prometheus",
        "access": "proxy",
        "url": places.prometheus,
        "isDefault": True,
    }
    return {
        f"grafana/dashboards/{UID}.json": json.dumps(dashboard(), indent=2) + "\n",
        f"grafana/provisioning/dashboards/{UID}.yaml": yaml_text({"apiVersion": 1, "providers": [provider]}),
        f"grafana/provisioning/datasources/{UID}.yaml": yaml_text({"apiVersion": 1, "datasources": [source]}),
        "prometheus/prometheus.yml": yaml_text(prometheus(places)),
        "prometheus/alerts.yml": yaml_text(rules()),
    }


# --- Prometheus --------------------------------------------------------------------------------------


def prometheus(places: Places) -> dict[str, Any]:
    """Return Prometheus's configuration: the rules, and one target, which answers for the whole cluster."""
    address = urlsplit(places.cluster)
    job: dict[str, Any] = {
        "job_name": JOB,
        "scheme": address.scheme,
        "metrics_path": f"{address.path.rstrip('/')}/metrics",
        "static_configs": [{"targets": [address.netloc]}],
    }
    if places.key_file is not None:
        job["authorization"] = {"credentials_file": str(places.key_file)}
    return {
        "global": {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": f"{SCRAPE_SECONDS}s"},
        "rule_files": ["alerts.yml"],
        "scrape_configs": [job],
    }


def rules() -> dict[str, Any]:
    """Return the alerts as Prometheus reads them."""
    return {"groups": [{"name": UID, "rules": [_rule(alert) for alert in ALERTS]}]}


def _rule(alert: Alert) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expression,
        "for": alert.lasting,
        "labels": {"severity": alert.severity},
        "annotations": {"summary": alert.summary, "action": alert.action},
    }


# --- Grafana -----------------------------------------------------------------------------------------


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana imports and provisions it."""
    return {
        "uid": UID,
        "title": "Embedding cluster",
        "tags": ["embeddings"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,  # one time under the pointer in all panels
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
                _variable("model", "embedding_request_seconds_count"),
                _variable("worker", "embedding_replica_states"),
            ]
        },
        "panels": [{**panel, "id": number} for number, panel in enumerate(_panels(), 1)],
    }


def _variable(label: str, metric: str) -> dict[str, Any]:
    query = f"label_values({metric}, {label})"
    everything = {"text": "All", "value": "$__all"}
    return {
        "name": label,
        "label": label.capitalize(),
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": label},
        "refresh": 2,  # as the time changes
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": everything,
    }


def _panels() -> Iterator[dict[str, Any]]:
    """Yield the rows' headings and panels, placed on the grid."""
    top = 0
    for title, row in ROWS.items():
        yield {"type": "row", "title": title, "collapsed": False, "gridPos": _place(0, top, WIDTH, 1)}
        top += 1
        height = NOW_HEIGHT if row[0].now else HEIGHT
        width = WIDTH // len(row) if len(row) <= 4 or row[0].now else WIDTH // 3
        for number, panel in enumerate(row):
            line, column = divmod(number, WIDTH // width)
            yield _panel(panel, _place(column * width, top + line * height, width, height))
        top += height * -(-len(row) * width // WIDTH)


def _place(left: int, top: int, width: int, height: int) -> dict[str, int]:
    return {"x": left, "y": top, "w": width, "h": height}


def _panel(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    return {
        "type": "stat" if panel.now else "timeseries",
        "title": panel.title,
        "description": panel.what,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + number), "expr": query, "legendFormat": legend, "datasource": SOURCE}
            for number, (query, legend) in enumerate(panel.queries)
        ],
    }


def yaml_text(*documents: Any) -> str:
    """Return one or several documents as YAML, their keys in order."""
    import yaml

    return yaml.safe_dump_all(documents, sort_keys=False, width=110)


def address(text: str) -> str:
    """Return an address as it was written. Raises ArgumentTypeError where it isn't one of HTTP."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise argparse.ArgumentTypeError(f"{text} isn't an address like http://127.0.0.1:8000")
    return text
