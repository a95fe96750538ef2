"""Prompts of one task: renders the template with a text and its choices, and appends what all choices begin with."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Sequence
from functools import cache
from itertools import product, takewhile
from string import ascii_uppercase

from transformers import PreTrainedTokenizerBase

from scalabl.config import Task
from scalabl.errors import AdapterError, InputTooLongError, PromptError
from scalabl.prompt.chat import ChatTemplate
from scalabl.prompt.choice_tokens import OwnTokens, control_ids
from scalabl.prompt.encoding import PROBE, PromptEncoder
from scalabl.prompt.literal import literal_text
from scalabl.prompt.text import check_text

# The date in prompts of adapters that record none. Chat templates of Llama fall back on it where they are given no date.
UNRECORDED_DATE = datetime.date(2024, 7, 26)

logger = logging.getLogger("scalabl")


def today() -> datetime.date:
    """The date in the prompts of a new adapter, if its chat template shows one."""
    return datetime.date.today()


def letters(count: int) -> tuple[str, ...]:
    """The letters that label `count` choices in multiple choice: A to Z, then AA, AB, …"""
    names: list[str] = []
    while len(names) < count:
        width = 1 if not names else len(names[-1]) + 1
        names += map("".join, product(ascii_uppercase, repeat=width))
    return tuple(names[:count])


class Prompter:
    """Renders a task's prompts and finds the token that stands for each choice (`choice_tokens.OwnTokens`).

    Tokens that all choices share before it (a space token, a common first word) are appended to every prompt, so that the
    model's next token is the one that stands for a choice.

    Attributes:
        choice_tokens: one token id per choice of the task, in the task's order; empty if the adapter has a head of its own.
        mismatched: choices whose token in the task cannot stand for them with this tokenizer.

    Raises:
        PromptError: the choices need more tokens than there are, the template's end merges with a choice, or `chat` is set
            and the tokenizer has no chat template.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
        self.task = task
        self._tokenizer = tokenizer
        is_new = task.choice_tokens is None  # not that of an adapter
        self._date = task.chat_date or (today() if is_new else UNRECORDED_DATE)
        self._chat = ChatTemplate(tokenizer, self._date) if task.chat else None
        probe = self._render(PROBE, task.choices if task.kind == "multiple_choice" else None)
        if self._shows_date and task.chat_date is None and not is_new:
            _warn_of_date(str(tokenizer.chat_template))
        literal = literal_text(tokenizer, probe) if task.special_tokens_in_text == "text" else None
        # A chat template writes its own special tokens; a plain prompt gets the tokenizer's, such as BOS.
        reads_end = task.head == "own"
        self._encoder = PromptEncoder(tokenizer, special=not task.chat, literal=literal, reads_end=reads_end)
        self._suffix: list[int] = []
        self.choice_tokens: tuple[int, ...] = ()
        self.mismatched: list[str] = []
        if reads_end:  # the head has a row for each choice, so that no token stands for it
            return
        own = OwnTokens.of(self._choices_as_tokens(probe), control_ids(tokenizer))
        self._suffix = list(own.shared)
        self.choice_tokens = task.choice_tokens or own.assign(tokenizer)
        self.mismatched = [task.choices[index] for index in own.mismatched(self.choice_tokens, tokenizer)]

    def check_tokenizer(self, base_model: str) -> None:
        """Check that the tokenizer gives each choice the token with which the adapter was trained.

        Args:
            base_model: the base model on which the adapter was trained, for the message.

        Raises:
            AdapterError: a choice has another token; the message names the choice.
        """
        if self.mismatched:
            raise AdapterError(
                f"the adapter was trained with another token for the choice {self.mismatched[0]!r} than this base "
                f"model's tokenizer gives; serve it with the base model on which it was trained ({base_model})"
            )

    @property
    def _shows_date(self) -> bool:
        return self._chat is not None and self._chat.shows_date

    @property
    def resolved_task(self) -> Task:
        """The task with its choice tokens filled in, and the date that its prompts show, if they show one."""
        date = self._date if self._shows_date else self.task.chat_date
        return self.task.model_copy(update={"choice_tokens": self.choice_tokens or None, "chat_date": date})

    @property
    def token_texts(self) -> list[str]:
        """The text of each choice's token."""
        return [str(self._tokenizer.decode([token])) for token in self.choice_tokens]

    def render(self, text: str, choices: Sequence[str] | None = None) -> str:
        """The prompt's text. `choices` are the texts to label with letters, for multiple choice only."""
        self._check_choices(choices)
        return self._render(text, choices)

    def encode(
        self, text: str, choices: Sequence[str] | None = None, *, max_tokens: int | None = None, truncate: bool = False
    ) -> list[int]:
        """Token ids of one prompt, ending right before the token that stands for the choice.

        Args:
            max_tokens: the most tokens that the prompt may have.
            truncate: cut the end of a text that is too long (never the template) instead of raising.

        Raises:
            InputTooLongError: the prompt is too long and `truncate` is false, or the template alone is too long.
            PromptError: the text is empty or not valid Unicode, or the choices do not fit the task.
        """
        check_text("inputs", text)
        for choice in choices or ():
            check_text("choices", choice)
        ids = self._encode(text, choices)
        if max_tokens is None or len(ids) <= max_tokens:
            return ids
        if not truncate:
            raise InputTooLongError(len(ids), max_tokens)
        text_ids = self._encoder.text_ids(text)
        keep = len(text_ids)
        while len(ids) > max_tokens:
            keep -= len(ids) - max_tokens
            if keep < 1:
                raise InputTooLongError(len(ids), max_tokens)
            ids = self._encode(self._tokenizer.decode(text_ids[:keep]), choices)
        return ids

    def opening(self) -> list[int]:
        """The tokens with which every prompt begins, found by comparing three prompts; empty for none."""
        prompts = []
        for text in (PROBE, "7 or so", "Éire?"):
            choices = [f"{text}{letter}" for letter in range(len(self.task.choices))]
            rendered = self._render(text, choices if self.task.kind == "multiple_choice" else None)
            prompts.append(self._encoder.prompt_ids(rendered))
        alike = (len(set(tokens)) == 1 for tokens in zip(*prompts, strict=False))
        return prompts[0][: sum(takewhile(bool, alike))]

    def _encode(self, text: str, choices: Sequence[str] | None) -> list[int]:
        self._check_choices(choices)
        mark = self._encoder.mark
        rendered = self._render(mark(text), None if choices is None else [mark(choice) for choice in choices])
        return self._encoder.prompt_ids(rendered) + self._suffix

    def _check_choices(self, choices: Sequence[str] | None) -> None:
        if self.task.kind == "multiple_choice":
            if choices is None:
                raise PromptError("this adapter's task is multiple_choice; send the choices with each input", "choices")
            if not 2 <= len(choices) <= len(self.task.choices):
                raise PromptError(f"the number of choices is {len(choices)}; send 2 to {len(self.task.choices)}", "choices")
            if len(set(choices)) != len(choices):
                repeated = next(c for i, c in enumerate(choices) if c in choices[:i])
                raise PromptError(f"{repeated!r} appears twice; choices must be distinct", "choices")
        elif choices is not None:
            raise PromptError("this adapter's task is classification with fixed choices; leave the field out", "choices")

    def _render(self, text: str, choices: Sequence[str] | None) -> str:
        lettered = zip(self.task.choices, choices or (), strict=False)
        lines = "\n".join(f"{letter}) {choice}" for letter, choice in lettered)
        rendered = self.task.template.format(input=text, choices=lines)
        return rendered if self._chat is None else self._chat.render(rendered)

    def _choices_as_tokens(self, prompt: str) -> list[list[int]]:
        """The tokens of each choice after a rendered prompt."""
        ids = self._encoder.prompt_ids(prompt)
        tails = []
        for choice in self.task.choices:
            whole = self._encoder.prompt_ids(prompt + self.task.choice_prefix + self._encoder.mark(choice))
            if whole[: len(ids)] != ids:
                raise PromptError(
                    f"the template's last characters merge with the choice {choice!r} into one token; "
                    "move the space at the template's end to the start of choice_prefix"
                )
            tails.append(whole[len(ids) :])
        return tails


@cache
def _warn_of_date(_chat_template: str) -> None:
    """Warn once for each chat template."""
    logger.warning(
        "the base model's chat template writes the date into prompts, and the adapter does not say with which date it was "
        "trained; prompts have the date %s. Set task.chat_date in adapter_config.json to the date of the training",
        UNRECORDED_DATE,
    )
