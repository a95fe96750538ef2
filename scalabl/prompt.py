"""Prompts: fills a task's template with a text and its choices, and tokenises it. Needs the tokenizer, not the model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from scalabl.config import Task
from scalabl.errors import AdapterError, InputTooLongError, PromptError

PROBE = "x"  # an arbitrary input, to see how the tokenizer behaves


class Prompter:
    """Renders a task's prompts and finds the token that stands for each choice.

    The first token in which the choices differ stands for each choice. Tokens that all choices share before it (a space
    token, a common first word) are appended to every prompt, so that the model's next token is the one that differs.

    Attributes:
        choice_tokens: one token id per choice of the task, in the task's order.
        mismatched: choices whose token in the task differs from the token that this tokenizer gives.

    Raises:
        PromptError: two choices have the same token (the message names them), the template's end merges with a choice, or
            `chat` is set and the tokenizer has no chat template.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
        self.task = task
        self._tokenizer = tokenizer
        # Calling the backend directly halves the time: transformers' wrapper takes as long as tokenising itself.
        self._backend = tokenizer.backend_tokenizer if _adds_nothing(type(tokenizer)) else None
        if task.chat and not tokenizer.chat_template:
            raise PromptError("task.chat is true but the tokenizer has no chat template; set chat to false")
        plain, with_special = (tokenizer(PROBE, add_special_tokens=special)["input_ids"] for special in (False, True))
        # An end-of-sequence token after the prompt would stand where the answer belongs, so it is cut off.
        appends_eos = with_special[-1] != plain[-1] and with_special[-1] == tokenizer.eos_token_id
        self._appends_eos = not task.chat and appends_eos
        own_tokens, self._suffix = self._resolve_choices()
        self.choice_tokens: tuple[int, ...] = task.choice_tokens or own_tokens
        pairs = zip(task.choices, self.choice_tokens, own_tokens, strict=True)
        self.mismatched = [choice for choice, token, own in pairs if token != own]

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
    def resolved_task(self) -> Task:
        """The task with its choice tokens filled in."""
        return self.task.model_copy(update={"choice_tokens": self.choice_tokens})

    def render(self, text: str, choices: Sequence[str] | None = None) -> str:
        """The prompt's text. `choices` are the texts to label with letters, for multiple choice only."""
        choice_lines = ""
        if self.task.kind == "multiple_choice":
            if choices is None:
                raise PromptError("this adapter's task is multiple_choice; send the choices with each input", "choices")
            if not 2 <= len(choices) <= len(self.task.choices):
                raise PromptError(f"the number of choices is {len(choices)}; send 2 to {len(self.task.choices)}", "choices")
            if len(set(choices)) != len(choices):
                repeated = next(c for i, c in enumerate(choices) if c in choices[:i])
                raise PromptError(f"{repeated!r} appears twice; choices must be distinct", "choices")
            lettered = zip(self.task.choices, choices, strict=False)
            choice_lines = "\n".join(f"{letter}) {choice}" for letter, choice in lettered)
        elif choices is not None:
            raise PromptError("this adapter's task is classification with fixed choices; leave the field out", "choices")
        rendered = self.task.template.format(input=text, choices=choice_lines)
        if not self.task.chat:
            return rendered
        messages = [{"role": "user", "content": rendered}]
        try:
            chat = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except Exception as error:  # a template is a program of the base model's authors
            raise PromptError(
                f"the tokenizer's chat template raises an error for one user message ({type(error).__name__}: {error}); "
                "correct the template, or set chat to false"
            ) from error
        return str(chat)

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
        ids = self._ids(self.render(text, choices)) + self._suffix
        if max_tokens is None or len(ids) <= max_tokens:
            return ids
        if not truncate:
            raise InputTooLongError(len(ids), max_tokens)
        text_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        keep = len(text_ids)
        while len(ids) > max_tokens:
            keep -= len(ids) - max_tokens
            if keep < 1:
                raise InputTooLongError(len(ids), max_tokens)
            shortened = self._tokenizer.decode(text_ids[:keep])
            ids = self._ids(self.render(shortened, choices)) + self._suffix
        return ids

    def opening(self) -> list[int]:
        """The tokens with which every prompt begins, found by comparing three prompts; empty for none."""
        letters = len(self.task.choices)
        prompts = []
        for text in (PROBE, "7 or so", "Éire?"):
            choices = [f"{text}{n}" for n in range(letters)] if self.task.kind == "multiple_choice" else None
            prompts.append(self._ids(self.render(text, choices)))
        alike = (len(set(tokens)) == 1 for tokens in zip(*prompts, strict=False))
        return prompts[0][: sum(takewhile(bool, alike))]

    def _ids(self, rendered: str) -> list[int]:
        # A chat template writes its own special tokens; a plain prompt gets the tokenizer's, such as BOS.
        special = not self.task.chat
        backend = self._backend
        ids: list[int]
        if backend is not None and backend.truncation is None and backend.padding is None:
            ids = backend.encode(rendered, add_special_tokens=special).ids
        else:
            ids = self._tokenizer(rendered, add_special_tokens=special)["input_ids"]
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
                    "move the space at the template's end to the start of choice_prefix"
                )
            tails.append(whole[len(ids) :])
        shared = 0
        while all(len(tail) > shared for tail in tails) and len({tail[shared] for tail in tails}) == 1:
            shared += 1
        tokens: dict[int, str] = {}
        for choice, tail in zip(choices, tails, strict=True):
            if len(tail) <= shared:
                raise PromptError(f"every other choice begins with the choice {choice!r}; rename it")
            token = tail[shared]
            if token in tokens:
                raise PromptError(
                    f"choices {tokens[token]!r} and {choice!r} both start with the token {token} "
                    f"({self._tokenizer.decode([token])!r}); rename one of them"
                )
            tokens[token] = choice
        return tuple(tokens), tails[0][:shared]


def _adds_nothing(kind: type[PreTrainedTokenizerBase]) -> bool:
    """Whether tokenizers of this class give the same ids as their backend: true if no method of theirs is overridden."""
    if not issubclass(kind, PreTrainedTokenizerFast):
        return False
    names = ("__call__", "_encode_plus", "_switch_to_input_mode")
    return all(getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name, None) for name in names)


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
