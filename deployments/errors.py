"""The tree of errors. Status, code and type stand on the class; raising one is enough.

Every error survives pickling, since it crosses process borders on its way from a replica to the
ingress: constructor arguments are positional and go to ``super().__init__`` unchanged.
"""

from http import HTTPStatus


class EmbeddingError(Exception):
    """Base of everything that this package raises on purpose.

    ``message`` is for the client: it never holds the input, a secret or a traceback.
    ``param`` names the request field at fault. ``retry_after`` is in seconds.
    """

    status: int = HTTPStatus.INTERNAL_SERVER_ERROR
    code: str = "internal_error"
    type: str = "server_error"

    def __init__(self, message: str, param: str | None = None, retry_after: float | None = None) -> None:
        """Keep the arguments positional, so that the error can be pickled."""
        super().__init__(message, param, retry_after)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def __str__(self) -> str:
        """Return the message alone."""
        return self.message


def as_raised(error: BaseException) -> BaseException:
    """Return an error of ours as it was raised, any other as it is.

    Ray hands out an instance of a class that it derives from ours and its own: with another constructor, and
    the server's traceback as its text.
    """
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, EmbeddingError) else error


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason_of(message: str) -> str:
    """Return the last line of Serve's message on a deployment that says something: our own one-line error."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    ours = [line for line in lines if "Error: " in line]
    return (ours or lines or ["no reason given"])[-1].rpartition("Error: ")[2]


# --- the client can mend these ---------------------------------------------------------------


class InvalidRequestError(EmbeddingError):
    """The request is malformed; ``param`` names the field."""

    status = HTTPStatus.BAD_REQUEST
    code = "invalid_request"
    type = "invalid_request_error"


class ContextLengthError(InvalidRequestError):
    """An input, or all inputs together, hold more tokens than allowed."""

    code = "context_length_exceeded"


class TooManyInputsError(InvalidRequestError):
    """The request holds more inputs than allowed."""

    code = "too_many_inputs"


class MissingCapabilityError(InvalidRequestError):
    """The model exists, and can't do what is asked of it."""

    code = "MISSING_CAPABILITY"


class ModelNotFoundError(InvalidRequestError):
    """No worker serves a model of that name."""

    status = HTTPStatus.NOT_FOUND
    code = "model_not_found"


class FileMissingError(InvalidRequestError):
    """The client has no file of that id."""

    status = HTTPStatus.NOT_FOUND
    code = "file_not_found"


class BatchMissingError(InvalidRequestError):
    """The client has no batch of that id."""

    status = HTTPStatus.NOT_FOUND
    code = "batch_not_found"


class RouteNotFoundError(InvalidRequestError):
    """No route has that path."""

    status = HTTPStatus.NOT_FOUND
    code = "not_found"


class MethodNotAllowedError(InvalidRequestError):
    """The path exists, and doesn't take that method."""

    status = HTTPStatus.METHOD_NOT_ALLOWED
    code = "method_not_allowed"


class InvalidKeyError(InvalidRequestError):
    """There is no key in the request, or none that is valid."""

    status = HTTPStatus.UNAUTHORIZED
    code = "invalid_api_key"
    type = "authentication_error"


class ModelNotAllowedError(InvalidRequestError):
    """The key may not use that model."""

    status = HTTPStatus.FORBIDDEN
    code = "model_not_allowed"
    type = "permission_error"


class QuotaError(InvalidRequestError):
    """The key has as many files, bytes or batches as it may have."""

    status = HTTPStatus.FORBIDDEN
    code = "quota_exceeded"
    type = "permission_error"


class OperatorOnlyError(InvalidRequestError):
    """The key isn't an operator's."""

    status = HTTPStatus.FORBIDDEN
    code = "operator_only"
    type = "permission_error"


class UnsupportedEncodingError(InvalidRequestError):
    """The request body is encoded in a way that isn't read here."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    code = "unsupported_encoding"


class BodyTooLargeError(InvalidRequestError):
    """The request body is over the limit."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "body_too_large"


# --- time and load: the same request may succeed later ------------------------------------------


class RateLimitError(EmbeddingError):
    """The key has used up its requests or tokens of this minute."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    code = "rate_limit_exceeded"
    type = "rate_limit_error"


class DeadlineExceededError(EmbeddingError):
    """The request's time ran out. 408 is what both client families read as a timeout."""

    status = HTTPStatus.REQUEST_TIMEOUT
    code = "deadline_exceeded"
    type = "timeout_error"


class ModelUnavailableError(EmbeddingError):
    """No replica of the model could answer."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "model_unavailable"
    type = "unavailable_error"


class QueueFullError(ModelUnavailableError):
    """The model has as much work waiting as it may have."""

    code = "queue_full"


class IncompleteError(EmbeddingError):
    """A part of the cluster doesn't tell what it has counted."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "incomplete"
    type = "unavailable_error"


class StorageUnavailableError(ModelUnavailableError):
    """The storage of files and batches doesn't answer as it should."""

    code = "storage_unavailable"


# --- ours to mend ------------------------------------------------------------------------------


class HarmfulInputError(EmbeddingError):
    """The input itself is at fault. Not retried: it would do it again."""


class NonFiniteEmbeddingError(HarmfulInputError):
    """The engine gave a vector with NaN or infinity in it."""

    code = "non_finite_embedding"


class FatalInputError(HarmfulInputError):
    """Two engines ended while they had this input."""


class EngineError(EmbeddingError):
    """The engine failed on this call and lives on."""


class ModelChangedError(EmbeddingError):
    """The replica has another version of the model than the call was prepared for: prepare it anew."""


class EngineDeadError(EngineError):
    """The engine is gone; its replica has to be replaced."""


class EngineCrashError(EngineDeadError):
    """The engine ended, or hung, with this call in it: the call may be why."""


class EngineStartError(EngineError):
    """The engine can't start; the message is one line that says why."""


class ConfigError(EmbeddingError):
    """Worker files hold mistakes. ``message`` has one line for each, with file and key."""

    code = "invalid_config"


class JobError(EmbeddingError):
    """A batch job can't be done as it was asked for; the message is one line that says why."""

    code = "invalid_job"

    def __init__(self, message: str, param: str | None = None, retry_after: float | None = None) -> None:
        """Keep it one line: names of columns may hold several."""
        super().__init__(" ".join(message.splitlines()), param, retry_after)
