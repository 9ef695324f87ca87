"""Text → token ids, outside the engine: once per request, all texts in one call into Rust; messages → text.

And what else transformers alone knows of a model's folder: which weights, of which shapes, there should be.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from safetensors import safe_open
from tokenizers import Encoding, Tokenizer, decoders, models, normalizers, pre_tokenizers

from deployments.config.model_files import ModelFiles
from deployments.engine import ModelCard
from deployments.engine.chat import ChatTemplate
from deployments.errors import (
    ContextLengthError,
    EngineStartError,
    InvalidRequestError,
    MissingCapabilityError,
    first_line,
)

logger = logging.getLogger("ray.serve")

# OpenAI's vocabulary, for clients that send its token ids to a model with another tokenizer.
ENCODING = "cl100k_base"
HUB_OPTIONS = {"revision", "trust_remote_code"}
# Special tokens stand behind these, not each id among them.
TOKENS = 100_256
# tiktoken asks OpenAI's host where it finds no copy, and waits for it without end.
FETCH_SECONDS = 30.0


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
        # How many special tokens stand before and after a text.
        mask = self._tokenizer.encode("a").special_tokens_mask
        text = mask.index(0)
        self._frame = text, mask[text:].count(1)

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Return the token ids of each text, with `special` tokens or without. Threads may share this."""
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


def read_tokenizer(folder: str, files: ModelFiles | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a card holds of the tokenizer of a model folder or hub id. Raises EngineStartError.

    transformers reads it, as for the model's authors: what `tokenizer_config.json` says may change the other.
    """
    from transformers import AutoTokenizer

    try:
        return tokenizer_card(AutoTokenizer.from_pretrained(folder, **hub_options(arguments)), files)
    except (OSError, ValueError, AttributeError) as error:
        raise EngineStartError(f"no fast tokenizer in {folder}: {first_line(error)}") from error


def hub_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of an engine's arguments that say what is taken from a hub."""
    return {name: arguments[name] for name in HUB_OPTIONS & set(arguments)}


def tokenizer_card(loaded: Any, files: ModelFiles | None) -> dict[str, Any]:
    """Return what a card holds of a tokenizer of transformers', as JSON, and of its chat template.

    The tokenizer does before what sentence-transformers does to a text. Raises AttributeError where there is
    no fast one.
    """
    tokenizer, template = loaded.backend_tokenizer, loaded.chat_template
    if isinstance(template, dict):  # by use
        template = template.get("default")
    if files and files.sentence_bert_config.get("do_lower_case"):
        lowercase = [normalizers.Lowercase()]
        if tokenizer.normalizer is not None:
            lowercase.append(tokenizer.normalizer)
        tokenizer.normalizer = normalizers.Sequence(lowercase)
    try:
        ChatTemplate(template or "", loaded.special_tokens_map)
    except Exception as error:  # whatever Python says of what Jinja makes of it
        logger.warning("the chat template isn't one that Jinja reads, so there is none: %s", error)
        template = None
    return {
        "tokenizer": str(tokenizer.to_str()),
        "chat_template": template or "",
        "special_tokens": loaded.special_tokens_map,
    }


def check_vocabulary(serialized: str, vocab_size: int) -> None:
    """Hold a tokenizer against the model's table, which has a row for each of `vocab_size` ids.

    Raises EngineStartError where every text has an id beyond it; warns where some may, which are refused.
    """
    tokenizer = Tokenizer.from_str(serialized)
    last = max(tokenizer.get_vocab().values(), default=0)
    if last < vocab_size:
        return
    what = f"the tokenizer has ids up to {last}, and the model's embedding table {vocab_size} rows"
    if max(tokenizer.encode("a").ids, default=0) >= vocab_size:
        raise EngineStartError(f"{what}: no text can be embedded")
    logger.warning("%s: texts with ids beyond it are refused", what)


def check_weights(folder: Path) -> None:
    """Hold names and shapes of a folder's safetensors against the model that transformers would make of it.

    vLLM starts without a weight that no file gives, and takes the first rows of one that is too large. Nobody
    here reads a pooler's. Raises EngineStartError.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    shapes = _shapes(folder)
    if not shapes:  # PyTorch's own files have to be loaded to be read
        return
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    missing = []
    for name, weight in model.named_parameters():
        wanted = list(weight.shape)
        # A file may have the name of a head's model before it.
        found = shapes.get(name) or next((s for key, s in shapes.items() if key.endswith(f".{name}")), None)
        if found is None and "pooler." not in name:
            missing.append(name)
        elif found is not None and found != wanted:
            raise EngineStartError(
                f"generator.model_path: `{name}` is {found} in the files of weights, by config.json {wanted}"
            )
    if missing:
        raise EngineStartError(lacking(missing))


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shape of each weight, by the name that today's models give it."""
    shapes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no mapping
                known = name.replace("LayerNorm.gamma", "LayerNorm.weight")  # in old files of BERT
                known = known.replace("LayerNorm.beta", "LayerNorm.bias")
                shapes[known] = list(weights.get_slice(name).get_shape())
    return shapes


def lacking(names: Sequence[str]) -> str:
    """Say that no file gives these weights."""
    others = f" and {len(names) - 1} others" if len(names) > 1 else ""
    return f"generator.model_path: the files of weights lack `{names[0]}`{others}"


def byte_tokenizer() -> str:
    """Return a tokenizer that makes a token of each UTF-8 byte, for the engine that has no model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return str(tokenizer.to_str())


def read_cl100k() -> tuple[bytes, ...]:
    """Return the bytes of each token by its id, and none where there is no token. Raises EngineStartError.

    A special token is read as the text that stands for it, which is what a client had in its text.

    tiktoken finds the vocabulary in the folder that `TIKTOKEN_CACHE_DIR` names, or fetches it.
    """
    found: list[tuple[bytes, ...]] = []
    reason = [f"no answer within {FETCH_SECONDS:g} s"]

    def read() -> None:
        try:
            import tiktoken

            encoding = tiktoken.get_encoding(ENCODING)
        except Exception as error:  # whatever kept it from being read, the worker can't start
            reason[0] = type(error).__name__
            return
        special = {encoding.encode_single_token(text): text.encode() for text in encoding.special_tokens_set}
        behind = [special.get(token, b"") for token in range(TOKENS, encoding.n_vocab)]
        found.append((*encoding.decode_tokens_bytes(range(TOKENS)), *behind))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(FETCH_SECONDS)
    if not found:
        raise EngineStartError(
            f"token_input `cl100k` needs tiktoken's vocabulary {ENCODING}, which can't be read ({reason[0]});"
            " put it into the folder that TIKTOKEN_CACHE_DIR names"
        )
    return found[0]
