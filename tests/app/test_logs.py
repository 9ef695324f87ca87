"""What requests leave in the logs: a line of JSON each, if wanted, and what is slow with its stages."""

import asyncio
import json
import logging
import re
from typing import Any

import httpx
import pytest
from ray._common.formatters import JSONFormatter

from deployments.app import logging_config
from deployments.errors import ConfigError
from deployments.http.app import make_app
from deployments.http.auth import Access
from deployments.keys.rates import LocalRates
from deployments.keys.ring import KeyRing
from deployments.logs import RequestLog
from deployments.metrics import NO_MODEL, STAGES
from tests.app.conftest import LocalHandle, make_serving
from tests.app.test_auth import KEYS, bearer


def application(
    handles: dict[str, LocalHandle],
    base: str = "http://cluster/v1",
    key: str | None = "all",
) -> httpx.AsyncClient:
    """Return a client of an application with keys on, as the environment has it, and what key is sent."""
    access = Access(KeyRing(KEYS), LocalRates())
    serving = make_serving(handles, access.rates)

    async def gather() -> list[bytes]:
        return [serving.metrics.text()]

    transport = httpx.ASGITransport(make_app(serving, gather, access=access), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url=base, headers=bearer(key) if key else {})


@pytest.fixture
def json_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log in JSON."""
    monkeypatch.setenv("LOG_FORMAT", "json")
    caplog.set_level(logging.INFO, "ray.serve")
    return caplog


def told(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return the lines, each as Ray Serve prints it, without where and when it was."""
    lines = [JSONFormatter().format(record) for record in caplog.records]
    assert not any("\n" in line for line in lines)
    elsewhere = {"asctime", "filename", "lineno", "process", "timestamp_ns", "levelname"}
    return [{k: v for k, v in json.loads(line).items() if k not in elsewhere} for line in lines]


async def test_each_request_is_a_line(
    handles: dict[str, LocalHandle], json_log: pytest.LogCaptureFixture
) -> None:
    """With model, key's name, outcome, milliseconds and tokens; and nothing of what was sent."""
    async with application(handles) as client:
        for body in ({"model": "a", "input": ["private", "x"]}, {"model": "private", "input": "x"}):
            await client.post("/embeddings", json=body)
        await client.post(
            "/tokenize", json={"model": "a", "prompt": "private", "tokens": True, "token_ids": True}
        )
    lines = told(json_log)
    assert all(line.pop("milliseconds") > 0 for line in lines)
    line = {"message": "request", "key": "all"}
    a = line | {"model": "a", "service_name": "search", "service_role": "Index"}
    none = line | {"model": NO_MODEL, "service_name": "", "service_role": ""}
    assert lines == [
        a | {"outcome": "ok", "tokens": 8},
        none | {"outcome": "model_not_found", "tokens": 0},
        a | {"outcome": "ok", "tokens": 0},
    ]
    assert "private" not in json.dumps(lines)
    assert "secret" not in json_log.text


async def test_what_is_slow_is_told_with_its_stages(
    handles: dict[str, LocalHandle], json_log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the request's last call; they hardly leave any of its time out."""
    monkeypatch.setenv("LOG_SLOW_SECONDS", "0.15")
    async with application(handles) as client:
        bodies = [{"model": "patient", "input": f"text {number}"} for number in range(2)]
        await client.post("/embeddings", json=bodies[0])  # brings the engine up
        json_log.clear()
        await asyncio.gather(*(client.post("/embeddings", json=body) for body in bodies))
    for line, record in zip(told(json_log), json_log.records, strict=True):
        assert (line["message"], record.levelname) == ("slow request", "WARNING")
        stages = {stage: line[f"{stage}_ms"] for stage in STAGES}
        assert stages["call"] >= stages["engine"] >= 200
        assert 0.8 < sum(stages.values()) - stages["engine"] <= line["milliseconds"] + 0.5
        assert sum(stages.values()) - stages["engine"] > 0.8 * line["milliseconds"]


async def test_as_text_only_what_is_slow_is_told(
    handles: dict[str, LocalHandle], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line that says all of it."""
    caplog.set_level(logging.INFO, "ray.serve")
    monkeypatch.setenv("LOG_SLOW_SECONDS", "0.15")
    async with application(handles) as client:
        await client.post("/embeddings", json={"model": "a", "input": "x"})
        caplog.clear()
        await client.post("/embeddings", json={"model": "a", "input": "x"})
        assert not caplog.records
        await client.post("/embeddings", json={"model": "patient", "input": "x"})
    (record,) = caplog.records
    number = r"\d+\.\d"
    stages = ", ".join(
        f"{stage}_ms {number}" for stage in ("parse", "tokenise", "wait", "call", "engine", "encode")
    )
    service = "service_name worker, service_role Worker"
    ended = rf"outcome ok, milliseconds {number}, tokens 1, {stages}"
    wanted = rf"slow request: model patient, {service}, key all, {ended}"
    assert re.fullmatch(wanted, record.getMessage())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("LOG_FORMAT", "xml", "LOG_FORMAT: must be text or json"),
        (
            "LOG_SLOW_SECONDS",
            "soon",
            "LOG_SLOW_SECONDS: must be a number of seconds above 0; inf: nothing is slow",
        ),
        (
            "LOG_SLOW_SECONDS",
            "0",
            "LOG_SLOW_SECONDS: must be a number of seconds above 0; inf: nothing is slow",
        ),
    ],
)
def test_a_wrong_variable_is_told_before_anything_starts(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name, with what it may be."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as raised:
        logging_config()
    assert raised.value.message == message


def test_ray_serve_writes_in_the_same_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own lines and ours alike."""
    assert str(logging_config().encoding).endswith("TEXT")
    monkeypatch.setenv("LOG_FORMAT", "JSON")
    assert str(logging_config().encoding).endswith("JSON")
    assert RequestLog({}).encoding == "TEXT"
