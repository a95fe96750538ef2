"""Special tokens in a user's text: as text for adapters that are trained so, as control tokens for older ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from scalabl.config import Task
from scalabl.errors import PromptError
from scalabl.prompt import Prompter
from tests import tiny

COLOURS = tiny.CLASSIFICATION.model_copy(update={"special_tokens_in_text": "text"})
TRICKS = ("<eos>", "a<bos>b", "<<eos>>", "<e<eos>os>", "<pad><pad>", "x <eos> y", "<eos")


def plain_bytes(text: str) -> list[int]:
    """The token ids of a text to the byte tokenizer, from the bytes alone."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [len(("<pad>", "<bos>", "<eos>")) + alphabet.index(character) for piece, _ in pieces for character in piece]


@pytest.mark.parametrize("text", TRICKS)
def test_special_tokens_in_a_text_are_encoded_as_the_text_that_they_are(text: str) -> None:
    assert Prompter(COLOURS, tiny.tokenizer()).encode(text) == plain_bytes(f"{text}\nLabel: ")


def test_without_the_option_they_are_control_tokens_as_before() -> None:
    ids = Prompter(tiny.CLASSIFICATION, tiny.tokenizer()).encode("a<eos>b")
    assert ids == [*plain_bytes("a"), 2, *plain_bytes("b\nLabel: ")]


@pytest.mark.parametrize("text", TRICKS)
def test_the_templates_own_special_tokens_stay_control_tokens(text: str) -> None:
    task = COLOURS.model_copy(update={"template": "<bos>{input}<eos>\nLabel:"})
    assert Prompter(task, tiny.tokenizer()).encode(text) == [1, *plain_bytes(text), 2, *plain_bytes("\nLabel: ")]


def test_in_a_chat_and_in_the_choices() -> None:
    task = tiny.MULTIPLE_CHOICE.model_copy(update={"special_tokens_in_text": "text", "chat": True, "choice_prefix": ""})
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content | trim }}<eos>{% endfor %}"
    ids = Prompter(task, tokenizer).encode("  why<eos>", ["<pad>", "a <bos>"])
    assert ids == [1, *plain_bytes("why<eos>\nChoices:\nA) <pad>\nB) a <bos>\nAnswer:"), 2]


def test_a_message_shows_a_choice_as_it_was_sent() -> None:
    task = tiny.MULTIPLE_CHOICE.model_copy(update={"special_tokens_in_text": "text"})
    with pytest.raises(PromptError, match="choices: 'a <eos>' appears twice"):
        Prompter(task, tiny.tokenizer()).encode("why", ["a <eos>", "a <eos>"])


def test_a_choice_of_the_adapter_that_has_a_special_tokens_name() -> None:
    prompter = Prompter(COLOURS.model_copy(update={"choices": ("<eos>", "<bos>", "none")}), tiny.tokenizer())
    assert prompter.token_texts == ["e", "b", "n"]


@pytest.mark.parametrize("limit", range(9, 20))
def test_truncation_counts_them_as_text(limit: int) -> None:
    text = "0<eos><eos>9"
    ids = Prompter(COLOURS, tiny.tokenizer()).encode(text, max_tokens=limit, truncate=True)
    assert ids == plain_bytes(f"{text[: limit - 8]}\nLabel: ")


@given(st.text(min_size=1, max_size=30))
def test_any_other_text_has_the_same_ids_in_both_ways(text: str) -> None:
    as_text, as_control = (Prompter(task, TOKENIZER) for task in (COLOURS, tiny.CLASSIFICATION))
    try:
        expected = as_control.encode(text)
    except PromptError:
        return
    assert as_text.encode(text) == expected


TOKENIZER = tiny.tokenizer()


def test_another_prompt_does_not_make_text_of_what_is_no_special_token() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<tool>", "\n"])  # added, and not special: as <think> in some models, or a line's end in Gemma
    tool = tokenizer.convert_tokens_to_ids("<tool>")
    plain = Prompter(COLOURS, tokenizer).encode("a<tool><eos>")
    assert plain.count(tool) == 1, "the template does not use it"
    used = Prompter(COLOURS.model_copy(update={"template": "<tool>{input}\nLabel:"}), tokenizer).encode("a<tool>")
    assert used.count(tool) == 1, "the template uses it to control, so a text may not"
    assert used[0] == tool


def unigram() -> PreTrainedTokenizerBase:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)] + [(character, -5.0) for character in "▁ab<>/sxLabel:\n"]
    inner = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def merging() -> PreTrainedTokenizerBase:
    """A BPE whose merges make the name of a special token, as conversions from SentencePiece may."""
    letters = ["<unk>", "<s>", *"▁ab<>/sxLel:", "\n", "<s", "s>"]
    inner = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(letters)}, merges=[("<", "s"), ("<s", ">")], unk_token="<unk>"
        )
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


def words() -> PreTrainedTokenizerBase:
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "a", "b", "x", "Label:"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("tokenizer", [unigram(), merging(), words()], ids=["unigram", "merging", "words"])
def test_no_text_becomes_a_control_token_whatever_the_models_own_vocabulary_has(tokenizer: PreTrainedTokenizerBase) -> None:
    task = Task(kind="classification", template="<s>{input} Label:", choices=("a", "b"), special_tokens_in_text="text")
    framed = Prompter(task, tokenizer).encode("x b").count(1)
    ids = Prompter(task, tokenizer).encode("x <s> b <s>")
    assert ids.count(1) == framed >= 1
    assert ids[0] == 1
    controlled = Prompter(task.model_copy(update={"special_tokens_in_text": "control"}), tokenizer)
    assert controlled.encode("x <s> b <s>").count(1) == framed + 2


def test_a_special_token_that_is_matched_in_other_characters_is_text_too() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<stop>", normalized=True, special=True)]})
    stop = tokenizer.convert_tokens_to_ids("<stop>")
    assert stop in Prompter(tiny.CLASSIFICATION, tokenizer).encode("a<STOP>b")
    assert Prompter(COLOURS, tokenizer).encode("a<STOP>b") == plain_bytes("a<stop>b\nlabel: ")


def test_special_tokens_that_take_the_space_beside_them_do_so_in_the_template_only() -> None:
    tokenizer = tiny.tokenizer()
    end = AddedToken("<end>", rstrip=True, special=True)  # as in Phi-3
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    token = tokenizer.convert_tokens_to_ids("<end>")
    task = COLOURS.model_copy(update={"template": "<end>  {input}<end>\nLabel:"})
    ids = Prompter(task, tokenizer).encode("a<end>  b")
    assert ids == [token, *plain_bytes("a<end>  b"), token, *plain_bytes("Label: ")]


def test_a_tokenizer_without_a_fast_form_is_refused_with_the_remedy() -> None:
    with pytest.raises(PromptError, match=r"ByT5Tokenizer is not a fast one.* set special_tokens_in_text to \"control\""):
        Prompter(COLOURS, ByT5Tokenizer())
    assert Prompter(tiny.CLASSIFICATION, ByT5Tokenizer()).encode("sky")
