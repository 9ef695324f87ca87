"""The token ids of a BERT's texts in a tenth of the time that Hugging Face's tokenizers take."""

import itertools
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
import tokie
from tokenizers import Tokenizer

# What tokie and Hugging Face's tokenizers read alike, alone and in any order: what scripts in use have. They
# differ at controls and at what Unicode came to have of late.
ALIKE = re.compile(
    "[\t\n\r -~\xa0-\u0377\u0384-\u038a\u038c\u038e-\u03a1\u03a3-\u052f\u05d0-\u05ea\u0621-\u064a"
    "\u0660-\u0669\u0905-\u0939\u1e00-\u1f15\u200d\u2010-\u2027\u2030-\u205e\u20a0-\u20bf\u2100-\u218b"
    "\u2190-\u2426\u2440-\u244a\u2460-\u27ff\u3001-\u303f\u3041-\u3096\u3099-\u30ff\u3105-\u312f\u4e00-\u9fef"
    "\uac00-\ud7a3\ufe0f\uff01-\uffbe\U0001f300-\U0001f64f\U0001f680-\U0001f6d7\U0001f900-\U0001f9ff]*"
)
# The settings that it heeds, and for those that it doesn't the values that it goes by.
NORMALIZER = {
    "type": "BertNormalizer",
    "clean_text": True,
    "handle_chinese_chars": True,
    "strip_accents": None,
}
WORD_PIECE = {
    "type": "WordPiece",
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
}
NAMES = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
ADDED = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
PROBE = "Unbelievably, naïve 東京 weren't [MASK]ed!"
# Returns the token ids of each text, with special tokens or without.
Encode = Callable[[Sequence[str], bool], list[list[int]]]
# Fewer texts are quicker one after the other than on threads.
TOGETHER = 16
# tokie cuts a text of 64 KiB in UTF-8 into parts, not always between words or even characters.
LONGEST = 2**14


class WordPiece:
    """Tokenises by tokie, which is right where `benchmarks.tokenisation` has held it against Hugging Face's.

    That is for tokenizers that are declared as BERT's are, and for texts that are `ALIKE` and not too long.
    """

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self | None:
        """Return the same in quick, where it is such a one."""
        serialized = str(tokenizer.to_str())
        declared = json.loads(serialized)
        model, normalizer = declared["model"], declared["normalizer"] or {}
        if (
            model | WORD_PIECE != model
            or normalizer | NORMALIZER != normalizer
            or declared["pre_tokenizer"] != {"type": "BertPreTokenizer"}
            or len(model["vocab"]) != max(model["vocab"].values(), default=0) + 1  # tokie leaves no gaps
            or any(each | ADDED != each or each["content"] not in NAMES for each in declared["added_tokens"])
        ):
            return None
        with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
            file.write(serialized)
            file.flush()
            try:
                quick = cls(tokie.Tokenizer.from_json(file.name))
            except tokie.TokieError:  # it reads some things more strictly
                return None
        for special in (True, False):  # which may be written in another way than BERT's
            if quick._encode([PROBE], special) != [tokenizer.encode(PROBE, add_special_tokens=special).ids]:
                return None
        return quick

    def __init__(self, tokenizer: tokie.Tokenizer) -> None:
        """Take what `of` has found to be right."""
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str], special: bool, otherwise: Encode) -> list[list[int]]:
        """Return the token ids of each text; of those that aren't `ALIKE`, as they are `otherwise`."""
        alike = [len(text) < LONGEST and ALIKE.fullmatch(text) is not None for text in texts]
        if all(alike):
            return self._encode(texts, special)
        quick = iter(self._encode(list(itertools.compress(texts, alike)), special))
        others = iter(otherwise([text for text, each in zip(texts, alike, strict=True) if not each], special))
        return [next(quick if each else others) for each in alike]

    def _encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        if len(texts) < TOGETHER:
            return [self._tokenizer.encode(text, special).ids for text in texts]
        # Its stub has forgotten this one.
        ids, lengths = self._tokenizer.encode_batch_flat(list(texts), special)  # type: ignore[attr-defined]
        ends = np.cumsum(lengths)
        found = ids.tolist()
        return [found[begin:end] for begin, end in zip((ends - lengths).tolist(), ends.tolist(), strict=True)]
