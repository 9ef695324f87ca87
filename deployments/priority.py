"""Which of our threads the kernel runs first where there are fewer cores than threads that want one.

What a request needs on its way is short and goes first, engines that compute on the CPU come next, and what
prepares bulk work has what they leave. Linux lets any process lower itself; where that isn't so, or a sandbox
refuses it, these do nothing.
"""

import contextlib
import os
import threading

# Half the weight of what runs as Ray starts it, or less.
ENGINE_STEPS = 4
LEAST_NICENESS = 19


def behind_requests() -> None:
    """Put the calling thread, and those that it starts from now on, behind what runs at its niceness now."""
    with contextlib.suppress(AttributeError, OSError):
        thread = threading.get_native_id()
        niceness = min(os.getpriority(os.PRIO_PROCESS, thread) + ENGINE_STEPS, LEAST_NICENESS)
        os.setpriority(os.PRIO_PROCESS, thread, niceness)


def in_background() -> None:
    """Leave the cores to everybody else: the calling thread, and those that it starts from now on."""
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
