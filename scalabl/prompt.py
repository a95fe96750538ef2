"""Task templates and choice tokens: from a text and its choices to token ids. Knows the tokenizer, not the model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from scalabl.config import Task
from scalabl.errors import AdapterError, InputTooLongError, PromptError

PROBE = "x"


class Prompter:
    """Renders a task's prompts and finds the token that stands for each choice.

    A choice is read from the first token in which the choices differ. What they all start with (a space token, a shared
    first word) is appended to every prompt, so that the model is asked at exactly the position where they part.

    Attributes:
        choice_tokens: one token id per choice of the task, in its order.

    Raises:
        PromptError: choices that cannot be told apart by one token, named; a template whose end merges with the choices;
            `chat` without a chat template.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
        self.task = task
        self._tokenizer = tokenizer
        # What transformers adds around it takes as long again.
        self._backend = tokenizer.backend_tokenizer if _adds_nothing(type(tokenizer)) else None
        if task.chat and not tokenizer.chat_template:
            raise PromptError("task.chat is true and the tokenizer has no chat template; set chat to false")
        plain, framed = (tokenizer(PROBE, add_special_tokens=framed)["input_ids"] for framed in (False, True))
        # An end-of-sequence token after the prompt would stand where the answer belongs.
        self._appends_eos = not task.chat and framed[-1] != plain[-1] and framed[-1] == tokenizer.eos_token_id
        natural, self._suffix = self._resolve_choices()
        self.choice_tokens: tuple[int, ...] = task.choice_tokens or natural
        self.mismatched = [c for c, a, b in zip(task.choices, self.choice_tokens, natural, strict=True) if a != b]

    def check_tokenizer(self, base_model: str) -> None:
        """Refuse a tokenizer that gives a choice another token than the one the adapter was trained with.

        Args:
            base_model: the one that it was trained with, for the message.

        Raises:
            AdapterError: naming the choice.
        """
        if self.mismatched:
            raise AdapterError(
                f"the adapter was trained with another token for the choice {self.mismatched[0]!r} than this base "
                f"model's tokenizer gives; serve it with the base model it was trained on ({base_model})"
            )

    @property
    def resolved_task(self) -> Task:
        """The task with its choice tokens filled in."""
        return self.task.model_copy(update={"choice_tokens": self.choice_tokens})

    def render(self, text: str, choices: Sequence[str] | None = None) -> str:
        """The prompt's text. `choices` are the texts to letter, for multiple choice only."""
        listed = ""
        if self.task.kind == "multiple_choice":
            if choices is None:
                raise PromptError("this adapter's task is multiple_choice; send the choices with each input", "choices")
            if not 2 <= len(choices) <= len(self.task.choices):
                raise PromptError(f"{len(choices)} were given; this adapter takes 2 to {len(self.task.choices)}", "choices")
            if len(set(choices)) != len(choices):
                repeated = next(c for i, c in enumerate(choices) if c in choices[:i])
                raise PromptError(f"{repeated!r} appears twice; choices must be distinct", "choices")
            lettered = zip(self.task.choices, choices, strict=False)
            listed = "\n".join(f"{letter}) {choice}" for letter, choice in lettered)
        elif choices is not None:
            raise PromptError("this adapter's task is classification with fixed choices; leave the field out", "choices")
        rendered = self.task.template.format(input=text, choices=listed)
        if not self.task.chat:
            return rendered
        messages = [{"role": "user", "content": rendered}]
        chat = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return str(chat)

    def encode(
        self, text: str, choices: Sequence[str] | None = None, *, max_tokens: int | None = None, truncate: bool = False
    ) -> list[int]:
        """Token ids of one prompt, ending right before the token that tells the choices apart.

        Args:
            max_tokens: refuse, or with `truncate` cut the end of the text (never the template), above this many tokens.

        Raises:
            InputTooLongError: too many tokens and no `truncate`, or the template alone is too long.
            PromptError: an empty text, text that is no valid Unicode, or choices that do not fit the task.
        """
        check_text("inputs", text)
        for choice in choices or ():
            check_text("choices", choice)
        ids = self._ids(self.render(text, choices)) + self._suffix
        if max_tokens is None or len(ids) <= max_tokens:
            return ids
        if not truncate:
            raise InputTooLongError(len(ids), max_tokens)
        pieces = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        keep = len(pieces)
        while len(ids) > max_tokens:
            keep -= len(ids) - max_tokens
            if keep < 1:
                raise InputTooLongError(len(ids), max_tokens)
            shortened = self._tokenizer.decode(pieces[:keep])
            ids = self._ids(self.render(shortened, choices)) + self._suffix
        return ids

    def opening(self) -> list[int]:
        """The tokens with which every prompt begins, as far as a few prompts can tell; empty for none."""
        letters = len(self.task.choices)
        some = []
        for text in (PROBE, "7 or so", "Éire?"):
            choices = [f"{text}{n}" for n in range(letters)] if self.task.kind == "multiple_choice" else None
            some.append(self._ids(self.render(text, choices)))
        alike = (len(set(tokens)) == 1 for tokens in zip(*some, strict=False))
        return some[0][: sum(takewhile(bool, alike))]

    def _ids(self, rendered: str) -> list[int]:
        # A chat template writes its own special tokens; a plain prompt gets the tokenizer's (a BOS, say).
        framed = not self.task.chat
        backend = self._backend
        ids: list[int]
        if backend is not None and backend.truncation is None and backend.padding is None:
            ids = backend.encode(rendered, add_special_tokens=framed).ids
        else:
            ids = self._tokenizer(rendered, add_special_tokens=framed)["input_ids"]
        return ids[:-1] if self._appends_eos else ids

    def _resolve_choices(self) -> tuple[tuple[int, ...], list[int]]:
        """(the token of each choice, the tokens that all choices start with)."""
        choices = self.task.choices
        prompt = self.render(PROBE, choices if self.task.kind == "multiple_choice" else None)
        ids = self._ids(prompt)
        tails = []
        for choice in choices:
            whole = self._ids(prompt + self.task.choice_prefix + choice)
            if whole[: len(ids)] != ids:
                raise PromptError(
                    f"the template's last characters merge with the choice {choice!r} into one token; "
                    "end the template without a space and begin choice_prefix with it"
                )
            tails.append(whole[len(ids) :])
        shared = 0
        while all(len(tail) > shared for tail in tails) and len({tail[shared] for tail in tails}) == 1:
            shared += 1
        tokens: dict[int, str] = {}
        for choice, tail in zip(choices, tails, strict=True):
            if len(tail) <= shared:
                raise PromptError(f"the choice {choice!r} is the beginning of every other choice; rename it")
            token = tail[shared]
            if token in tokens:
                raise PromptError(
                    f"choices {tokens[token]!r} and {choice!r} both start with the token {token} "
                    f"({self._tokenizer.decode([token])!r}); rename one of them"
                )
            tokens[token] = choice
        return tuple(tokens), tails[0][:shared]


def _adds_nothing(kind: type[PreTrainedTokenizerBase]) -> bool:
    """Whether calling such a tokenizer gives the ids that its backend gives, as far as transformers' own class does."""
    if not issubclass(kind, PreTrainedTokenizerFast):
        return False
    names = ("__call__", "_encode_plus", "_switch_to_input_mode")
    return all(getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name, None) for name in names)


def check_text(field: str, text: str) -> None:
    """Refuse text without a visible character, and lone surrogates, which no tokenizer can encode.

    Raises:
        PromptError: naming `field`.
    """
    if not text.strip():
        raise PromptError("the text is empty; send at least one visible character", field)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(f"the text is not valid Unicode (a lone surrogate at character {error.start})", field) from None
