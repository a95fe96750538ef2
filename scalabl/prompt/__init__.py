"""Prompts: fills a task's template with a text and its choices, and tokenises it. Needs the tokenizer, not the model.

What the rest of the project uses is exported here.
"""

from scalabl.prompt.prompter import Prompter as Prompter
from scalabl.prompt.prompter import letters as letters
from scalabl.prompt.text import check_text as check_text
