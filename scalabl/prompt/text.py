"""Checks of a text before it becomes a part of a prompt."""

from __future__ import annotations

from scalabl.errors import PromptError


def check_text(field: str, text: str) -> None:
    """Check that a text has a visible character and no lone surrogates, which no tokenizer can encode.

    Raises:
        PromptError: the text is refused; `field` is the error's field.
    """
    if not text.strip():
        raise PromptError("the text is empty; send at least one visible character", field)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(f"the text is not valid Unicode (a lone surrogate at character {error.start})", field) from None
