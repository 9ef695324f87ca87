"""What all replicas are asked, when one of them is gone, silent or wrong."""

from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError

from deployments.transport.broadcast import broadcast


class Handle:
    """Answers as Ray Serve's handle does: with what each replica gave, errors among it."""

    def __init__(self, *answers: Any) -> None:
        """Keep what the replicas give."""
        self._answers = answers

    def broadcast(self, method: str, *arguments: Any) -> "Handle":
        assert (method, arguments) == ("count", (7,))
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert return_exceptions
        if self._answers == ("silence",):
            raise TimeoutError(timeout_s)
        return list(self._answers)


async def ask(*answers: Any) -> list[Any]:
    """Broadcast to replicas that give these answers."""
    return await broadcast(Handle(*answers), "count", 7, seconds=1.0)  # type: ignore[arg-type]


async def test_the_dead_are_left_out() -> None:
    """The others' answers are there."""
    assert await ask(1, ActorUnavailableError("gone", None), 3) == [1, 3]


@pytest.mark.parametrize(("answers", "kind"), [(("silence",), TimeoutError), ((1, ValueError()), ValueError)])
async def test_silence_and_mistakes_are_told(answers: tuple[Any, ...], kind: type[Exception]) -> None:
    """A sum over a part of the replicas would be wrong without anybody's knowing."""
    with pytest.raises(kind):
        await ask(*answers)
