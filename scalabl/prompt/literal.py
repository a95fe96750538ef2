"""Control tokens (such as `<|im_start|>`) that a user writes into a text, encoded as the text that they are.

The template's own stay control tokens. How the rest of a prompt is encoded is in `encoding`.
"""

from __future__ import annotations

import copy
import json
import re
import secrets
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from scalabl.errors import PromptError

PRIVATE = 0xF0000  # the first of the characters that Unicode leaves without a meaning (plane 15)
PRIVATE_CHARACTERS = 65_534
REMEDY = 'set special_tokens_in_text to "control" (--special-tokens-in-text control)'


class LiteralText:
    """Tells the control tokens of a template from the same characters in a user's text.

    A user's text is marked before it goes into the template (`mark`). In the rendered prompt the marked control tokens are
    then the user's, and all others the template's. `resolve` writes the template's as stand-ins, which no user can guess,
    and the user's as they were. `tokenizer` knows the stand-ins only: to it a control token's own name is text like any
    other. Everything else it encodes as the original does.

    Raises:
        PromptError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: Iterable[str]) -> None:
        characters = {name: chr(PRIVATE + index) for index, name in enumerate(names)}
        stand_ins, self._nonce = _nonce(), _nonce()
        stand_in_of = {name: stand_ins + character for name, character in characters.items()}
        self._mark_of = {name: self._nonce + character for name, character in characters.items()}
        self._resolved = {mark: name for name, mark in self._mark_of.items()} | stand_in_of
        self._names, self._parts = _any_of(self._mark_of), _any_of(self._resolved)
        # Such a control token may also stand in a text in other characters, which `mark` does not find.
        self._always = any(token.normalized and token.content in characters for token in _added(tokenizer))
        self.tokenizer = _with_stand_ins(tokenizer, stand_in_of)

    def mark(self, text: str) -> str:
        """The text with a mark in place of each control token."""
        return self._names.sub(lambda match: self._mark_of[match[0]], text)

    def concerns(self, rendered: str) -> bool:
        """Whether a rendered prompt must be resolved and encoded by `tokenizer`."""
        return self._always or self._nonce in rendered

    def resolve(self, rendered: str) -> str:
        """A rendered prompt for `tokenizer`: the marked control tokens as text, the others as stand-ins."""
        return self._parts.sub(lambda match: self._resolved[match[0]], rendered)


def literal_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> LiteralText | None:
    """The `LiteralText` of a tokenizer; None if it has no control tokens.

    Args:
        prompt: a rendered prompt. Added tokens in it are control tokens too, even if the tokenizer does not call them so.

    Raises:
        PromptError: the tokenizer is not a fast one.
    """
    special = set(tokenizer.all_special_tokens)
    names = {
        token.content
        for token in _added(tokenizer)
        # One character, or white space, is text to the model as well.
        if (token.special or token.content in special or token.content in prompt) and len(token.content.strip()) > 1
    }
    return _cached(tokenizer, tuple(sorted(names))) if names else None


@lru_cache(maxsize=1)  # adapters of a process share their base model's tokenizer, of which this makes a copy
def _cached(tokenizer: PreTrainedTokenizerBase, names: tuple[str, ...]) -> LiteralText:
    return LiteralText(tokenizer, names)


def _added(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    return list(tokenizer.added_tokens_decoder.values())


def _nonce() -> str:
    return "".join(chr(PRIVATE + secrets.randbelow(PRIVATE_CHARACTERS)) for _ in range(8))  # 128 bits


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    # The longest first, as tokenizers match them.
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def _with_stand_ins(tokenizer: PreTrainedTokenizerBase, stand_in_of: dict[str, str]) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer that has other names for its control tokens, with the same ids."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise PromptError(
            f"the tokenizer {type(tokenizer).__name__} is not a fast one, so it cannot encode special tokens in a text as "
            f"text; {REMEDY}"
        )
    original = tokenizer.backend_tokenizer
    state = json.loads(original.to_str())
    state["truncation"] = state["padding"] = None
    for token in state["added_tokens"]:
        token["content"] = stand_in_of.get(token["content"], token["content"])
    model = state["model"]
    # The model's own vocabulary may have the names too. It must not make control tokens of text either.
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {stand_in_of.get(name, name): index for name, index in model["vocab"].items()}
    elif isinstance(model.get("vocab"), list):  # Unigram: [token, score]
        model["vocab"] = [[stand_in_of.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token") in stand_in_of:
        model["unk_token"] = stand_in_of[model["unk_token"]]
    if model.get("merges"):
        model["merges"] = [pair for pair in model["merges"] if stand_in_of.keys().isdisjoint((*pair, "".join(pair)))]
    backend = Tokenizer.from_str(json.dumps(state))
    if any(backend.token_to_id(other) != original.token_to_id(name) for name, other in stand_in_of.items()):
        raise PromptError(f"the tokenizer's special tokens cannot be told from text; {REMEDY}")
    clone = copy.copy(tokenizer)
    clone._tokenizer = backend
    return clone
