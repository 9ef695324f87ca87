"""Which pages of other origins may ask from a browser."""

import os
import re

from deployments.errors import ConfigError

ORIGINS_VARIABLE = "EMBEDDING_CLUSTER_ALLOW_ORIGINS"
ANY = "*"
# As a browser sends it: no path, no slash at the end.
ORIGIN = re.compile(r"https?://[^\s/?#@,*]+")


def allowed_origins(text: str) -> tuple[str, ...]:
    """Return the origins that a text names, or else the environment, with commas between; `*` is any.

    Raises ConfigError for what is no origin.
    """
    named = (each.strip() for each in (text or os.environ.get(ORIGINS_VARIABLE, "")).split(","))
    origins = tuple(dict.fromkeys(each for each in named if each))
    for origin in origins:
        if origin != ANY and not ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"allow_origins: `{origin}` is no origin, such as https://app.example.com, and not `*`"
            )
    return origins
