"""The errors that the method raises on purpose. Each message names what is wrong and what to do about it."""


class ScalaBLError(Exception):
    """Base of the errors below."""


class AdapterError(ScalaBLError):
    """An adapter that cannot be used: malformed, or not made for this base model."""


class PromptError(ScalaBLError, ValueError):
    """A task, its choices or an input that cannot be turned into a prompt.

    `field` is the part of a request or a row that is wrong (`inputs`, `choices`), None when it is the task itself.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.message, self.field = message, field


class InputTooLongError(PromptError):
    """An input whose prompt has more tokens than are allowed."""

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(
            f"the prompt has {tokens} tokens and the limit is {limit}; shorten the input or ask for truncate: true",
            "inputs",
        )
        self.tokens = tokens
        self.limit = limit


class DatasetError(ScalaBLError, ValueError):
    """A data file with a row that cannot be used; the message gives file and line."""


class BaseModelError(ScalaBLError):
    """A base model that cannot be loaded: not found, not a causal language model, or in an unsafe format."""


class CalibrationError(ScalaBLError):
    """Held-out data that cannot give what was asked of it: too few rows for a level, or no threshold for a risk."""
