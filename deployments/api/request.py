"""What every dialect's body becomes, and what its answers are made of: the seam between format and work."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import orjson
from tokenizers import Encoding

Truncation = Literal["none", "start", "end"]
# vLLM's way to say in `truncate_prompt_tokens`: as many as the model takes.
LONGEST = -1


@dataclass(frozen=True)
class Prompt:
    """Which of the model's prompts to put before each text: the first of `names` that it has.

    `field` of the request named it. A prompt that isn't `required` is left out where the model hasn't it; a
    `usual` one, which gateways send to every model, where that has no prompts at all.
    """

    names: tuple[str, ...]
    field: str
    required: bool = True
    usual: bool = False


@dataclass(frozen=True)
class Chat:
    """Conversations, each of which the model's chat template makes a text, with its `variables`.

    A message has a `role`, and as `content` a text or parts that have one.
    """

    conversations: Sequence[Sequence[Mapping[str, Any]]]
    variables: Mapping[str, Any]
    field: str

    @property
    def characters(self) -> int:
        """How many the messages' texts have."""
        contents = (message.get("content") or () for messages in self.conversations for message in messages)
        return sum(
            len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)
            for content in contents
        )

    @property
    def size(self) -> int:
        """How much there is to write: each conversation may have all the variables in it."""
        variables = len(orjson.dumps(self.variables))
        return len(orjson.dumps(self.conversations)) + len(self.conversations) * variables


class Raw(bytes):
    """An answer that isn't JSON, and the headers that go with it."""

    headers: Mapping[str, str] = {}


@dataclass(frozen=True)
class EmbeddingResult:
    """Vectors and what is said beside them.

    `vectors` is float32 of shape (inputs, dimension), in order; `model` the name that was asked for,
    `version` that of its package; `truncated` holds the indices of the inputs that were cut. `lengths` are
    the inputs' tokens; vectors are those of tokens, of shape (tokens, hidden size), for requests `by_token`.
    """

    vectors: np.ndarray
    model: str
    prompt_tokens: int
    truncated: Sequence[int] = ()
    version: str = ""
    lengths: Sequence[int] | np.ndarray = ()


@dataclass(frozen=True, kw_only=True)
class EmbeddingRequest(ABC):
    """A parsed request: one of `texts`, `token_ids` and `chat`. A dialect adds how to answer.

    `model` is absent where the dialect lets a client leave it out. `input_field` and `dimensions_field` are
    the dialect's names, for errors. `own_ids` says that ids are the model's own, whatever its `token_input`.
    `truncation` and `truncate_prompt_tokens`, of which `LONGEST` are as many as the model takes, go before
    the model's; `truncation_side` is which side to drop where the model's own truncation cuts.
    `truncate_within` says that more tokens than the model takes are a mistake, and not as many as it takes.
    `normalize` asks for vectors of unit length from a model that gives others, or with False for its numbers
    as they are before that.
    `special_tokens` says whether texts get the model's own around them.
    """

    model: str | None = None
    texts: Sequence[str] = ()
    token_ids: Sequence[Sequence[int]] = ()
    chat: Chat | None = None
    input_field: str = "input"
    own_ids: bool = False
    dimensions: int | None = None
    dimensions_field: str = "dimensions"
    prompt: Prompt | None = None
    instruction: str | None = None
    truncation: Truncation | None = None
    truncation_side: Truncation | None = None
    truncate_prompt_tokens: int | None = None
    truncate_within: bool = False
    normalize: bool | None = None
    normalize_field: str = "normalize"
    special_tokens: bool = True
    tags: frozenset[str] = frozenset()
    by_token: ClassVar[bool] = False

    def __len__(self) -> int:
        """Return the number of inputs."""
        return len(self.texts) or len(self.token_ids) or len(self.chat.conversations if self.chat else ())

    @abstractmethod
    def answer(self, result: EmbeddingResult) -> bytes:
        """Return the answer in the dialect of the request: JSON, unless it is `Raw`."""


class Reader(Protocol):
    """A tokenizer, as far as answers need it."""

    def read(self, text: str, special: bool = True) -> Encoding:
        """Return a text's tokens, with `special` ones or without."""

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Return the text of token ids, with `special` ones or without."""


@dataclass(frozen=True, kw_only=True)
class TokensRequest:
    """A parsed request for tokens: of `texts` or a `chat`, or the text of `ids`.

    `answer` makes the JSON answer in the dialect of the request: of its texts, with the model's prompt before
    each, the model's tokenizer, and the most tokens that the model takes.
    """

    answer: Callable[[Sequence[str], Reader, int], bytes]
    model: str | None = None
    texts: Sequence[str] = ()
    ids: Sequence[Sequence[int]] = ()
    chat: Chat | None = None
    field: str = "prompt"
    prompt: Prompt | None = None
    tags: frozenset[str] = frozenset()
