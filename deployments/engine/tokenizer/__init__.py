"""Text → token ids, outside the engine: once per request, all texts in a call into Rust; messages → text."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers

from deployments.engine import ModelCard
from deployments.engine.tokenizer.chat import ChatTemplate
from deployments.engine.tokenizer.wordpiece import WordPiece
from deployments.errors import ContextLengthError, InvalidRequestError, MissingCapabilityError


class TextTokenizer:
    """A model's tokenizer, with special tokens, without padding or truncation of its own."""

    @classmethod
    def of(cls, card: ModelCard) -> Self:
        """Return the tokenizer of a model, which reads chat messages where that has a template for them."""
        chat = ChatTemplate(card.chat_template, card.special_tokens) if card.chat_template else None
        return cls(card.tokenizer, chat)

    def __init__(self, serialized: str, chat: ChatTemplate | None = None) -> None:
        """Take the tokenizer out of a model card."""
        self._chat = chat
        self._tokenizer = Tokenizer.from_str(serialized)
        # Many tokenizer.json files cut at 128 tokens and pad to it; what is cut is our decision.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._quick = WordPiece.of(self._tokenizer)
        # How many special tokens stand before and after a text.
        mask = self._tokenizer.encode("a").special_tokens_mask
        text = mask.index(0)
        self._frame = text, mask[text:].count(1)

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Return the token ids of each text, with `special` tokens or without. Threads may share this."""
        if self._quick is not None:
            return self._quick.encode(texts, special, self._encode)
        return self._encode(texts, special)

    def _encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)
        return [encoding.ids for encoding in found]

    def read(self, text: str, special: bool = True) -> Encoding:
        """Return a text's tokens, with `special` ones or without."""
        return self._tokenizer.encode(text, add_special_tokens=special)

    def render(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        variables: Mapping[str, Any],
        field: str,
        characters: int,
    ) -> list[str]:
        """Return the text of each conversation, as the model's chat template writes it, so many `characters`.

        Raises MissingCapabilityError and InvalidRequestError that name the `field`.
        """
        if self._chat is None:
            raise MissingCapabilityError("the model has no chat template; send text as `input`", field)
        try:
            texts, left = [], characters
            for messages in conversations:
                texts.append(self._chat.render(messages, variables))
                if (left := left - len(texts[-1])) < 0:
                    raise ContextLengthError(f"the chat template writes more than {characters} characters")
            return texts
        except InvalidRequestError as error:
            raise type(error)(error.message, field) from error

    def count_prompt(self, prompt: str, special: bool = True) -> int:
        """Return how many tokens a prompt puts before a text, as sentence-transformers counts them."""
        found = self.read(prompt, special)
        return len(found.ids) - found.special_tokens_mask[-1] if prompt and found.ids else 0

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Return the text of token ids, with `special` ones or without."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=not special))

    def truncate(self, ids: list[int], longest: int, drop_start: bool, framed: bool) -> list[int]:
        """Return `longest` of the ids, the others dropped at the end, or with `drop_start` there.

        Ids that were made here are `framed`: their special tokens stay. No more than that stay as they are.
        """
        if len(ids) <= longest:
            return ids
        lead, trail = self._frame if framed else (0, 0)
        keep = longest - lead - trail
        if keep < 1:
            raise InvalidRequestError(
                f"no text is left in {longest} tokens, {lead + trail} of them special",
                "truncate_prompt_tokens",
            )
        body = ids[lead : len(ids) - trail]
        body = body[len(body) - keep :] if drop_start else body[:keep]
        return [*ids[:lead], *body, *ids[len(ids) - trail :]]


def byte_tokenizer() -> str:
    """Return a tokenizer that makes a token of each UTF-8 byte, for the engine that has no model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return str(tokenizer.to_str())
