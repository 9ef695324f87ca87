"""Which applications of ours a Ray cluster runs, told from the outside."""

import re

from ray.util import list_named_actors

from deployments.config.worker import INGRESS_NAME


def applications() -> list[str]:
    """Return the names of the applications that have an ingress of ours. Blocks."""
    # Serve's status doesn't show what runs while it builds; replicas are actors that carry their names.
    names = [actor["name"] for actor in list_named_actors(all_namespaces=True)]
    found = (re.fullmatch(rf"SERVE_REPLICA::(.+)#{INGRESS_NAME}#\w+", name) for name in names)
    return sorted({match[1] for match in found if match})
