"""The tokenizer's chat template around a prompt, with a date that stays. Task templates are in `prompter`."""

from __future__ import annotations

import datetime
import re
import secrets

from transformers import PreTrainedTokenizerBase

from scalabl.errors import PromptError

# In front of a template, this takes the place of transformers' function of the same name, which writes the current time.
# transformers lets no other function into a template. The line's end is not written (`trim_blocks`).
FIXED_TIME = (
    "{% macro strftime_now(format) %}"
    "{% if format in fixed_times %}{{ fixed_times[format] }}{% else %}{{ time_mark }}{{ format }}{{ time_mark }}{% endif %}"
    "{% endmacro %}\n"
)
MOST_RENDERINGS = 8  # for templates that choose a form of the date by another one


class ChatTemplate:
    """Writes a user's message as the tokenizer's chat template has it, up to where the answer begins.

    Args:
        date: what a template that asks for the current time is told, at midnight.

    Attributes:
        shows_date: whether a message so far had a date in it.

    Raises:
        PromptError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: datetime.date) -> None:
        if not tokenizer.chat_template:
            raise PromptError("task.chat is true but the tokenizer has no chat template; set chat to false")
        self._tokenizer = tokenizer
        self._midnight = datetime.datetime.combine(date, datetime.time())
        self._times: dict[str, str] = {}  # form -> the time in it
        self._mark = secrets.token_hex(16)
        self._asked = re.compile(f"{self._mark}(.*?){self._mark}", re.DOTALL)
        template = str(tokenizer.get_chat_template())
        self._source = FIXED_TIME + template if "strftime_now" in template else None

    @property
    def shows_date(self) -> bool:
        return bool(self._times)

    def render(self, content: str) -> str:
        """The prompt of one user message.

        Raises:
            PromptError: the template raises an error.
        """
        for _ in range(MOST_RENDERINGS):
            rendered = self._render(content)
            unknown = set(self._asked.findall(rendered))
            if not unknown:
                return rendered
            self._times |= {form: self._midnight.strftime(form) for form in unknown}
        raise PromptError("the tokenizer's chat template writes the date in too many forms; set chat to false")

    def _render(self, content: str) -> str:
        dated = {"chat_template": self._source, "fixed_times": self._times, "time_mark": self._mark}
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [{"role": "user", "content": content}],
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=False,
                    **(dated if self._source else {}),
                )
            )
        except Exception as error:  # a template is a program of the base model's authors
            raise PromptError(
                f"the tokenizer's chat template raises an error for one user message ({type(error).__name__}: {error}); "
                "correct the template, or set chat to false"
            ) from error
