"""Which of our threads the kernel runs first where there are fewer cores than threads that want one.

What a request needs on its way is short and goes first, engines that compute on the CPU come next, and what
prepares bulk work has what they leave. A process may lower itself without any rights. Linux only: elsewhere
these do nothing.
"""

import os
import threading

# Half the weight of what runs as Ray starts it, or less.
ENGINE_STEPS = 4
LEAST_NICENESS = 19


def behind_requests() -> None:
    """Put the calling thread, and those that it starts from now on, behind what runs at its niceness now."""
    if hasattr(os, "sched_setscheduler"):
        thread = threading.get_native_id()
        niceness = min(os.getpriority(os.PRIO_PROCESS, thread) + ENGINE_STEPS, LEAST_NICENESS)
        os.setpriority(os.PRIO_PROCESS, thread, niceness)


def in_background() -> None:
    """Leave the cores to everybody else: the calling thread, and those that it starts from now on."""
    if hasattr(os, "sched_setscheduler"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
