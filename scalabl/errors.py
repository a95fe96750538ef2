"""The exceptions that ScalaBL raises for wrong input, files or settings. A message says what is wrong and what to do."""


class ScalaBLError(Exception):
    """The base class of all exceptions below."""


class AdapterError(ScalaBLError):
    """An adapter that cannot be used: malformed, or not made for this base model."""


class PromptError(ScalaBLError, ValueError):
    """A task, its choices or an input that cannot be turned into a prompt.

    `field` names the wrong part of a request or data row (`inputs`, `choices`). It is None when the task itself is wrong.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.message, self.field = message, field


class InputTooLongError(PromptError):
    """An input whose prompt has more tokens than the limit allows."""

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(
            f"the prompt has {tokens} tokens and the limit is {limit}; shorten the input or ask for truncate: true",
            "inputs",
        )
        self.tokens = tokens
        self.limit = limit


class DatasetError(ScalaBLError, ValueError):
    """A data file that cannot be read or has an invalid row; for a row, the message gives file and line."""


class BaseModelError(ScalaBLError):
    """A base model that cannot be loaded: not found, not a causal language model, or in an unsafe format."""


class CalibrationError(ScalaBLError):
    """Held-out data that do not suffice: too few rows for a coverage level, or no threshold that reaches a target risk."""


class FitError(ScalaBLError):
    """A posterior that cannot be fitted with these settings or from these rows."""


class OutputError(ScalaBLError):
    """A folder that cannot be written into: it holds something else, or the file system refuses."""
