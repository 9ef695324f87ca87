"""Where answers of Ray's handles arrive: from one replica, or from all of a deployment that live."""

from collections.abc import Awaitable
from typing import Any, TypeVar

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from deployments.errors import as_raised

T = TypeVar("T")


async def answer_of(response: Awaitable[T]) -> T:
    """Return what a handle's response brings. Raises errors of ours as the replica raised them."""
    try:
        return await response
    except Exception as error:
        raise as_raised(error) from None


async def broadcast(handle: DeploymentHandle[Any], method: str, *arguments: Any, seconds: float) -> list[Any]:
    """Return what each live replica's method returns.

    Ray Serve takes some seconds to notice that a replica is gone. Raises TimeoutError where one is there
    and silent, and what the method raises.
    """
    response = handle.broadcast(method, *arguments)
    answers = await response.results_async(timeout_s=seconds, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, RayActorError):
            raise as_raised(answer)
    return [answer for answer in answers if not isinstance(answer, RayActorError)]
