"""What takes the event loop more than some milliseconds goes to threads of its own.

Everything else of the process waits on the loop: other requests, `/health`. asyncio's default threads are for
Ray Serve and for whoever waits for something.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from deployments.machine import cores_here

T = TypeVar("T")

# Below so many characters, token ids or numbers the work takes less than the hop to another thread and back.
INLINE = 20_000
_threads = ThreadPoolExecutor(max(2, cores_here()), thread_name_prefix="offload")


async def offload(size: int, function: Callable[..., T], *arguments: object) -> T:
    """Return what the function returns, called here where `size` is small, else on another thread.

    Cancelled before a thread has begun with it, it is never called.
    """
    if size < INLINE:
        return function(*arguments)
    return await asyncio.get_running_loop().run_in_executor(_threads, function, *arguments)
