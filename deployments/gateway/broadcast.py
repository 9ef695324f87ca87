"""Asks every replica of a deployment, those that have just died left out."""

from typing import Any

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle


async def broadcast(handle: DeploymentHandle[Any], method: str, *arguments: Any, seconds: float) -> list[Any]:
    """Return what each live replica's method returns.

    Ray Serve takes some seconds to notice that a replica is gone. Raises TimeoutError where one is there
    and silent, and what the method raises.
    """
    response = handle.broadcast(method, *arguments)
    answers = await response.results_async(timeout_s=seconds, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, RayActorError):
            raise answer
    return [answer for answer in answers if not isinstance(answer, RayActorError)]
