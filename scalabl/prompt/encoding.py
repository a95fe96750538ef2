"""Token ids of a rendered prompt: the special tokens around it, and those in a user's text (`literal`)."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from scalabl.prompt.literal import LiteralText

PROBE = "x"  # an arbitrary input, to see how the tokenizer behaves


class PromptEncoder:
    """Encodes rendered prompts.

    Args:
        special: let the tokenizer add its special tokens, such as a BOS. Those that it adds at the end are cut off: the
            answer belongs there.
        literal: what encodes a user's control tokens as text; None to encode them as control tokens.
        reads_end: keep the special tokens at the end, except padding tokens: the answer is read at the last one, as by
            transformers' models for sequence classification.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        special: bool,
        literal: LiteralText | None = None,
        reads_end: bool = False,
    ) -> None:
        self._tokenizer, self._special, self._literal = tokenizer, special, literal
        # Calling the backend directly halves the time: transformers' wrapper takes as long as tokenising itself.
        self._direct = _adds_nothing(type(tokenizer))
        self._appended = _appended(tokenizer) if special and not reads_end else 0
        self._padding = tokenizer.pad_token_id if reads_end else None

    def mark(self, text: str) -> str:
        """A user's text for the template, in which control tokens are marked as the user's."""
        return text if self._literal is None else self._literal.mark(text)

    def prompt_ids(self, rendered: str) -> list[int]:
        """The token ids of a rendered prompt, into which marked texts went."""
        literal = self._literal
        if literal is not None and literal.concerns(rendered):
            resolved = literal.resolve(rendered)
            ids = literal.original_ids(self._encode(literal.tokenizer, resolved, special=self._special))
        else:
            ids = self._encode(self._tokenizer, rendered, special=self._special)
        while self._padding is not None and len(ids) > 1 and ids[-1] == self._padding:
            ids = ids[:-1]
        return ids[: len(ids) - self._appended]

    def text_ids(self, text: str) -> list[int]:
        """The token ids of a user's text alone."""
        if self._literal is None:
            return self._encode(self._tokenizer, text, special=False)
        return self._literal.original_ids(self._encode(self._literal.tokenizer, text, special=False))

    def _encode(self, tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
        ids: list[int]
        if self._direct:
            backend = tokenizer.backend_tokenizer
            if backend.truncation is None and backend.padding is None:
                ids = backend.encode(text, add_special_tokens=special).ids
                return ids
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids


def _adds_nothing(kind: type[PreTrainedTokenizerBase]) -> bool:
    """Whether tokenizers of this class give the same ids as their backend: true if no method of theirs is overridden."""
    if not issubclass(kind, PreTrainedTokenizerFast):
        return False
    names = ("__call__", "_encode_plus", "_switch_to_input_mode")
    return all(getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name, None) for name in names)


def _appended(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many special tokens (an EOS, a separator, a padding token) the tokenizer adds at the end of a text."""
    plain, framed = (tokenizer(PROBE, add_special_tokens=special)["input_ids"] for special in (False, True))
    ends = range(len(framed), len(plain) - 1, -1)
    return next((len(framed) - end for end in ends if framed[end - len(plain) : end] == plain), 0)
