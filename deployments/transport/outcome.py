"""What the failure of a call to a replica means: the one table from an error to what is done about it."""

import enum

from ray.exceptions import ActorDiedError, ObjectLostError, RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from deployments.errors import EmbeddingError, EngineCrashError, EngineDeadError, EngineError


class Outcome(enum.Enum):
    """What becomes of a call's inputs."""

    # The call may be why the replica ended. One death may be chance; two in a row with the same call are its
    # doing, and a third replica would die of it as well.
    CRASHED = enum.auto()
    # Another replica will do.
    RETRY = enum.auto()
    # One of the inputs spoils the call for the others.
    HALVE = enum.auto()
    # It would fail again.
    FAIL = enum.auto()


# The first row that fits counts. A large answer lies on the node that made it, and is lost with it before it
# is fetched.
TABLE: tuple[tuple[tuple[type[BaseException], ...], Outcome], ...] = (
    ((EngineCrashError, ActorDiedError), Outcome.CRASHED),
    ((EngineDeadError, RayActorError, ObjectLostError, DeploymentUnavailableError), Outcome.RETRY),
    ((EngineError,), Outcome.HALVE),
    ((EmbeddingError,), Outcome.FAIL),
)
MAX_CRASHES = 2
FATAL = "two replicas ended while they embedded this request; it isn't tried again"


def outcome_of(error: BaseException) -> Outcome:
    """Return what an error means; for a bug of ours, that the call fails."""
    return next((outcome for kinds, outcome in TABLE if isinstance(error, kinds)), Outcome.FAIL)
