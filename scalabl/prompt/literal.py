"""Control tokens (such as `<|im_start|>`) that a user writes into a text, encoded as the text that they are.

The template's own stay control tokens. How the rest of a prompt is encoded is in `encoding`.
"""

from __future__ import annotations

import copy
import json
import re
import secrets
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Tokenizer
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
    other. Everything else it encodes as the original does, up to `original_ids`.

    Raises:
        PromptError: the tokenizer is not a fast one, or has so many control tokens, or such ones, that this cannot be done.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: tuple[str, ...]) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast) or len(names) > PRIVATE_CHARACTERS:
            raise PromptError(
                f"the tokenizer {type(tokenizer).__name__} is not a fast one, so it cannot encode special tokens in a text "
                f"as text; {REMEDY}"
            )
        self._names, self._index_of = names, {name: index for index, name in enumerate(names)}
        self._mark, self._stand_in = _nonce(), _nonce()
        pattern = _any_of(names)
        self._name = re.compile(pattern)
        self._mark_or_name = re.compile(f"{self._mark}(?P<marked>.)|{pattern}", re.DOTALL)
        # Such a control token may also stand in a text in other characters, which `mark` does not find.
        self._always = any(token.normalized and token.content in self._index_of for token in _added(tokenizer))
        stand_in_of = {name: self._stand_in + _character(index) for name, index in self._index_of.items()}
        backend, self._original = _with_stand_ins(tokenizer.backend_tokenizer, stand_in_of)
        self.tokenizer = copy.copy(tokenizer)
        self.tokenizer._tokenizer = backend

    def mark(self, text: str) -> str:
        """The text with a mark in place of each control token."""
        return self._name.sub(lambda match: self._mark + _character(self._index_of[match[0]]), text)

    def concerns(self, rendered: str) -> bool:
        """Whether a rendered prompt must be resolved and encoded by `tokenizer`."""
        return self._always or self._mark in rendered

    def resolve(self, rendered: str) -> str:
        """A rendered prompt for `tokenizer`: the marked control tokens as text, the others as stand-ins."""

        def resolved(match: re.Match[str]) -> str:
            if match["marked"]:
                return self._names[ord(match["marked"]) - PRIVATE]
            return self._stand_in + _character(self._index_of[match[0]])

        return self._mark_or_name.sub(resolved, rendered)

    def original_ids(self, ids: list[int]) -> list[int]:
        """The original tokenizer's ids for those of `tokenizer`."""
        return [self._original.get(token, token) for token in ids] if self._original else ids


def literal_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> LiteralText | None:
    """The `LiteralText` of a tokenizer; None if it has no control tokens.

    Args:
        prompt: a rendered prompt. Added tokens in it are control tokens too, even if the tokenizer does not call them so.

    Raises:
        PromptError: as for `LiteralText`.
    """
    special = set(tokenizer.all_special_tokens)
    names = {
        token.content
        for token in _added(tokenizer)
        # One character, or white space, is text to the model as well.
        if (token.special or token.content in special or token.content in prompt) and len(token.content.strip()) > 1
    }
    return _cached(tokenizer, tuple(sorted(names))) if names else None


@lru_cache(maxsize=1)  # adapters of a process share their base model's tokenizer
def _cached(tokenizer: PreTrainedTokenizerBase, names: tuple[str, ...]) -> LiteralText:
    return LiteralText(tokenizer, names)


def _added(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    return list(tokenizer.added_tokens_decoder.values())


def _character(index: int) -> str:
    return chr(PRIVATE + index)


def _nonce() -> str:
    return "".join(_character(secrets.randbelow(PRIVATE_CHARACTERS)) for _ in range(8))  # 128 bits


def _any_of(texts: Iterable[str]) -> str:
    """A pattern for the longest of these texts, as tokenizers match them. Its time does not grow with their number."""
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}

    def pattern(node: dict[str, Any]) -> str:
        branches = [re.escape(character) + pattern(child) for character, child in node.items() if character]
        joined = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
        return "" if not branches else f"(?:{joined})?" if "" in node else joined

    return pattern(tree)


def _with_stand_ins(original: Tokenizer, stand_in_of: Mapping[str, str]) -> tuple[Tokenizer, dict[int, int]]:
    """(a tokenizer with other names for the control tokens, its ids -> the original ones where they differ).

    It shares the model (vocabulary and merges) of the original, unless that makes control tokens of their names itself.
    """
    backend = Tokenizer(original.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(original, part) is not None:
            setattr(backend, part, getattr(original, part))
    added = sorted(original.get_added_tokens_decoder().items())
    backend.add_tokens([_renamed(token, stand_in_of) for _, token in added])
    original_of: dict[int, int] = {}
    for index, token in added:
        own = backend.token_to_id(stand_in_of.get(token.content, token.content))
        assert own is not None  # it was added
        original_of[own] = index
    control = {index for index, token in added if token.content in stand_in_of}
    clear = all(backend.model.id_to_token(index) is None for index in original_of.keys() - dict(added).keys())
    if clear and not any(control & set(backend.encode(name, add_special_tokens=False).ids) for name in stand_in_of):
        return backend, {index: same for index, same in original_of.items() if index != same}
    return _copy_with_stand_ins(original, stand_in_of), {}


def _renamed(token: AddedToken, stand_in_of: Mapping[str, str]) -> AddedToken:
    return AddedToken(
        stand_in_of.get(token.content, token.content),
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def _copy_with_stand_ins(original: Tokenizer, stand_in_of: Mapping[str, str]) -> Tokenizer:
    """A copy of a tokenizer whose model does not know the names of the control tokens either. Its ids are the same."""
    state = json.loads(original.to_str())
    state["truncation"] = state["padding"] = None
    for token in state["added_tokens"]:
        token["content"] = stand_in_of.get(token["content"], token["content"])
    model = state["model"]
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
    return backend
