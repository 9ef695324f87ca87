"""What a request leaves in the logs: with `LOG_FORMAT=json` a line each, and what is slow with its stages.

Ray Serve writes the lines, as text or JSON, and puts the request's id into each. None holds a text, a key or
a vector: a key's name, a model's, a code of `errors`, numbers.
"""

import logging
import math
import os
from collections.abc import Mapping
from contextvars import ContextVar

from deployments.errors import ConfigError
from deployments.metrics import NO_MODEL
from deployments.tracing import Trace

logger = logging.getLogger("ray.serve")

FORMATS = {"text": "TEXT", "json": "JSON"}  # as Ray Serve calls them
FORMAT_VARIABLE, SLOW_VARIABLE = "LOG_FORMAT", "LOG_SLOW_SECONDS"
# Longer than any request takes that meets no queue, on the slowest machine that is of use.
DEFAULT_SLOW_SECONDS = "10"

# Seconds in each stage of the request that this task is for; the dispatch writes those of its last call.
spent: ContextVar[dict[str, float] | None] = ContextVar("spent", default=None)


class Record:
    """What is known of a request so far."""

    def __init__(self, key: str | None, trace: Trace | None = None) -> None:
        """Know nothing but the name of its key, and its trace where it has one."""
        self.key = key
        self.trace = trace
        self.model = NO_MODEL
        self.service_name = self.service_role = ""
        self.tokens = 0
        self.stages: dict[str, float] = {}

    def serve(self, model: str, service_name: str, service_role: str) -> None:
        """Note the model that the request is for, and what its worker is called."""
        self.model, self.service_name, self.service_role = model, service_name, service_role


class RequestLog:
    """Writes the lines of requests."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        """Read the variables. Raises ConfigError where one of them is wrong."""
        self.encoding = FORMATS.get(environ.get(FORMAT_VARIABLE, "text").lower(), "")
        if not self.encoding:
            raise ConfigError(f"{FORMAT_VARIABLE}: must be {' or '.join(FORMATS)}")
        try:
            self.slow_seconds = float(environ.get(SLOW_VARIABLE, DEFAULT_SLOW_SECONDS))
        except ValueError:
            self.slow_seconds = math.nan
        if not self.slow_seconds > 0:
            raise ConfigError(f"{SLOW_VARIABLE}: must be a number of seconds above 0; inf: nothing is slow")

    def write(self, record: Record, outcome: str, seconds: float) -> None:
        """Write a line of a request that has ended, where there is to be one."""
        slow = seconds >= self.slow_seconds
        if not slow and self.encoding != "JSON":
            return
        fields: dict[str, str | float | None] = {
            "model": record.model,
            "service_name": record.service_name,
            "service_role": record.service_role,
            "key": record.key,
            "outcome": outcome,
            "milliseconds": round(1000 * seconds, 1),
            "tokens": record.tokens,
        }
        if record.trace is not None:
            fields |= record.trace.ids
        if slow:
            fields |= {f"{stage}_ms": round(1000 * each, 1) for stage, each in record.stages.items()}
        level, what = (logging.WARNING, "slow request") if slow else (logging.INFO, "request")
        if self.encoding == "JSON":
            logger.log(level, what, extra=fields)
        else:
            logger.log(level, "%s: %s", what, ", ".join(f"{name} {value}" for name, value in fields.items()))
