"""What is lost when processes die: `make faults`.

Eight clients send all the time, every vector is compared with its known value, and meanwhile something is
killed or stopped. Two replicas of the model, two ingress replicas, the fake engine with a set service time,
on both data planes. Where the front itself dies, clients retry as the OpenAI SDK does by default. A raylet
is killed on a cluster of two, each of which holds a replica of the model and one of the ingress.
"""

import argparse
import sys

from tests.harness.faults import FAULTS, run, served

HEADER = [
    "fault", "sent", "ok", "retried", "lost", "wrong",
    "p99 before, ms", "p99 during, ms", "p99 after, ms", "last slow answer after, s",
]  # fmt: skip


def main() -> int:
    """Print a table for each data plane; the exit status says whether anything was lost or wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--only", choices=names, action="append", help="this fault, and no other")
    wanted = parser.parse_args().only or names
    failures = 0
    for tuned in (True, False):
        print(f"\n{'tuned (HAProxy, gRPC)' if tuned else 'serve run, defaults'}\n")
        print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER), flush=True)
        for fault in FAULTS:  # a server for each: one fault must not show in the next one's numbers
            if fault.name not in wanted:
                continue
            with served(fault, tuned) as server:
                result = run(server, fault)
            if result is None:
                continue  # this data plane has no such process
            load, row = result
            print("| " + " | ".join(row) + " |", flush=True)
            for reason in load.lost[:3]:
                print(f"  lost: {reason}", file=sys.stderr)
            failures += len(load.lost) + load.wrong
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
