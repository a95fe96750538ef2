"""Prompts and choice tokens."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from scalabl.config import Task
from scalabl.errors import InputTooLongError, PromptError
from scalabl.prompt import Prompter, letters
from scalabl.prompt.prompter import _warn_of_date
from tests import tiny


def _classification(*choices: str, **fields: object) -> Task:
    return tiny.CLASSIFICATION.model_copy(update={"choices": choices, **fields})


def _decode(ids: list[int]) -> str:
    return str(tiny.tokenizer().decode(ids))


def test_the_prompt_ends_right_before_the_token_that_tells_the_choices_apart() -> None:
    prompter = Prompter(tiny.CLASSIFICATION, tiny.tokenizer())
    assert _decode(prompter.encode("grass")) == "grass\nLabel: "
    assert [_decode([token]) for token in prompter.choice_tokens] == ["r", "g", "b"]


def test_what_all_choices_begin_with_is_part_of_the_prompt() -> None:
    prompter = Prompter(_classification("dark red", "dark blue"), tiny.tokenizer())
    assert _decode(prompter.encode("grass")) == "grass\nLabel: dark "
    assert [_decode([token]) for token in prompter.choice_tokens] == ["r", "b"]


def test_choices_that_begin_with_the_same_token_get_the_token_that_tells_them_apart() -> None:
    prompter = Prompter(_classification("red", "blue", "rose"), tiny.tokenizer())
    assert _decode(prompter.encode("grass")) == "grass\nLabel: "
    assert prompter.token_texts == ["e", "b", "o"]


def test_a_choice_with_which_another_begins_gets_its_last_token() -> None:
    prompter = Prompter(_classification("red", "redder", "reddest"), tiny.tokenizer())
    assert _decode(prompter.encode("grass")) == "grass\nLabel: re"
    assert prompter.token_texts == ["d", "r", "s"]


def _word_tokenizer(*words: str, frame: str = "<bos> $A <eos>", **named: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<bos>", "<eos>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    inner.post_processor = processors.TemplateProcessing(single=frame, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    names = named or {"bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **names)


@pytest.mark.parametrize("text", ["the sky", "Éire?", "<bos> as text", "a<eos>b", "a\tb\n"])
def test_the_ids_are_those_that_the_tokenizer_gives(text: str) -> None:
    for tokenizer in (tiny.tokenizer(), _word_tokenizer("the", "sky", "Label:", "red", "blue")):
        task = Task(kind="classification", template="{input} Label:", choices=("red", "blue"), choice_prefix=" ")
        prompter = Prompter(task, tokenizer)
        assert prompter._encoder._direct
        expected = tokenizer(f"{text} Label:")["input_ids"]
        cut = 1 if expected[-1] == tokenizer.eos_token_id else 0
        assert prompter._encoder.prompt_ids(f"{text} Label:") == expected[: len(expected) - cut]


def test_a_tokenizer_that_does_more_than_its_backend_is_asked_itself() -> None:
    class Lowering(PreTrainedTokenizerFast):
        def __call__(self, text: str, **options: object) -> object:  # type: ignore[override]
            return super().__call__(text.lower(), **options)  # type: ignore[arg-type]

    words = _word_tokenizer("x", "sky", "Label:", "label:", "red", "blue")
    lowering = Lowering(tokenizer_object=words.backend_tokenizer, unk_token="<unk>", eos_token="<eos>")
    task = Task(kind="classification", template="{input} Label:", choices=("red", "blue"), choice_prefix=" ")
    assert Prompter(task, lowering).encode("SKY") == [*Prompter(task, words).encode("sky")[:-1], words.vocab["label:"]]


def test_a_tokenizer_that_someone_has_cut_short_meanwhile_is_not_cut_short_here() -> None:
    tokenizer = tiny.tokenizer()
    prompter = Prompter(tiny.CLASSIFICATION, tokenizer)
    whole = prompter.encode("the sky")
    tokenizer("the sky", truncation=True, max_length=2)
    assert prompter.encode("the sky") == whole


def test_a_template_whose_end_merges_with_a_choice_is_refused() -> None:
    words = _word_tokenizer("x", "Label:red", "Label:blue", "Label:")
    task = Task(kind="classification", template="{input} Label:", choices=("red", "blue"), choice_prefix="")
    with pytest.raises(PromptError, match="last characters merge with the choice 'red' into one token"):
        Prompter(task, words)


def test_special_tokens_of_the_tokenizer_frame_the_prompt_and_an_eos_does_not_hide_the_choices() -> None:
    words = _word_tokenizer("x", "red", "blue", "Label:")
    prompter = Prompter(Task(kind="classification", template="{input} Label:", choices=("red", "blue")), words)
    assert prompter.choice_tokens == (4, 5)
    assert prompter.encode("x") == [1, 3, 6], "a BOS in front, and no EOS before the answer"


@pytest.mark.parametrize(
    ("frame", "named"),
    [
        ("$A <eos>", {"pad_token": "<eos>"}),  # as Qwen3-Embedding appends a padding token
        ("<bos> $A <eos>", {"cls_token": "<bos>", "sep_token": "<eos>"}),  # as BERT frames a text
        ("<bos> $A <eos> <eos>", {"eos_token": "<eos>"}),
        ("<bos> <eos> $A", {"bos_token": "<bos>", "sep_token": "<eos>"}),
    ],
)
def test_whatever_a_tokenizer_appends_does_not_hide_the_choices(frame: str, named: dict[str, str]) -> None:
    words = _word_tokenizer("x", "red", "blue", "Label:", frame=frame, **named)
    prompter = Prompter(Task(kind="classification", template="{input} Label:", choices=("red", "blue")), words)
    before = [{"<bos>": 1, "<eos>": 2}[name] for name in frame.split("$A")[0].split()]
    assert prompter.choice_tokens == (4, 5)
    assert prompter.encode("x") == [*before, 3, 6]


DATED = "{% for m in messages %}[{{ strftime_now('%d %b %Y') }}]{{ m.content }}{% endfor %}[assistant]"


def _dated(**fields: object) -> Prompter:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = DATED
    return Prompter(tiny.CLASSIFICATION.model_copy(update={"chat": True, "choice_prefix": "", **fields}), tokenizer)


def test_a_date_in_the_chat_template_is_that_of_the_training_for_ever() -> None:
    new = _dated()
    today = datetime.date.today()
    assert new.resolved_task.chat_date in (today, today - datetime.timedelta(days=1))  # midnight may have passed
    trained = new.resolved_task.model_copy(update={"chat_date": datetime.date(2031, 2, 3)})
    served = _dated(chat_date=trained.chat_date, choice_tokens=trained.choice_tokens)
    assert _decode(served.encode("sky")) == "[03 Feb 2031]sky\nLabel:[assistant]"
    assert served.resolved_task == trained


def test_a_template_without_a_date_records_none() -> None:
    task = tiny.CLASSIFICATION.model_copy(update={"chat": True, "choice_prefix": ""})
    assert Prompter(task, tiny.tokenizer(chat=True)).resolved_task.chat_date is None


def test_an_adapter_that_records_no_date_has_one_that_stays_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    _warn_of_date.cache_clear()
    tokens = _dated().choice_tokens
    for _ in range(2):
        assert _decode(_dated(choice_tokens=tokens).encode("sky")) == "[26 Jul 2024]sky\nLabel:[assistant]"
    (record,) = caplog.records
    assert "Set task.chat_date in adapter_config.json to the date of the training" in record.message


def test_a_chat_template_that_raises_is_reported() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system prompt') }}"
    with pytest.raises(PromptError, match=r"chat template raises an error .* no system prompt\); correct the template"):
        Prompter(tiny.CLASSIFICATION.model_copy(update={"chat": True}), tokenizer)


@pytest.mark.parametrize(("count", "last"), [(2, "B"), (26, "Z"), (27, "AA"), (53, "BA"), (702, "ZZ"), (703, "AAA")])
def test_letters_go_on_after_z(count: int, last: str) -> None:
    names = letters(count)
    assert (len(set(names)), names[-1]) == (count, last)


def test_multiple_choice_with_more_choices_than_letters() -> None:
    task = tiny.MULTIPLE_CHOICE.model_copy(update={"choices": letters(40)})
    prompter = Prompter(task, tiny.tokenizer())
    assert _decode(prompter.encode("why", [f"answer {n}" for n in range(40)])).count(")") == 40
    assert "\nAN) answer 39\n" in _decode(prompter.encode("why", [f"answer {n}" for n in range(40)]))
    assert len(set(prompter.choice_tokens)) == 40
    assert prompter.token_texts[:26] == list(letters(26)), "letters of one token keep it"


def test_choice_tokens_of_the_adapter_win_and_a_difference_is_reported() -> None:
    natural = Prompter(tiny.CLASSIFICATION, tiny.tokenizer())
    assert natural.mismatched == []
    assert natural.resolved_task.choice_tokens == natural.choice_tokens
    other = tiny.CLASSIFICATION.model_copy(update={"choice_tokens": (*natural.choice_tokens[:2], 9)})
    prompter = Prompter(other, tiny.tokenizer())
    assert prompter.choice_tokens[2] == 9
    assert prompter.mismatched == ["blue"]


def test_multiple_choice_letters_the_choices() -> None:
    prompter = Prompter(tiny.MULTIPLE_CHOICE, tiny.tokenizer())
    prompt = _decode(prompter.encode("2 + 2?", ["three", "four"]))
    assert prompt == "2 + 2?\nChoices:\nA) three\nB) four\nAnswer: "
    assert [_decode([token]) for token in prompter.choice_tokens] == ["A", "B", "C", "D"]


def test_the_opening_is_what_the_template_puts_before_every_input() -> None:
    def opening(task: Task, *, chat: bool = False) -> str:
        return _decode(Prompter(task, tiny.tokenizer(chat=chat)).opening())

    assert opening(tiny.CLASSIFICATION) == ""
    named = tiny.CLASSIFICATION.model_copy(update={"template": "Which colour? {input}\nLabel:"})
    assert opening(named) == "Which colour? "
    assert opening(named.model_copy(update={"chat": True}), chat=True) == "[user]Which colour? "
    before = tiny.MULTIPLE_CHOICE.model_copy(update={"template": "Of these:\n{choices}\n{input}"})
    assert opening(before) == "Of these:\nA) "


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (None, "choices: this adapter's task is multiple_choice; send the choices with each input"),
        (["one"], "choices: the number of choices is 1; send 2 to 4"),
        (list("abcde"), "choices: the number of choices is 5; send 2 to 4"),
        (["a", "b", "a"], "choices: 'a' appears twice; choices must be distinct"),
        (["a", " "], "choices: the text is empty"),
        (["a", "\udfff"], "choices: the text is not valid Unicode"),
    ],
)
def test_choices_of_a_request_that_do_not_fit_are_refused(choices: list[str] | None, message: str) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        Prompter(tiny.MULTIPLE_CHOICE, tiny.tokenizer()).encode("why", choices)
    assert caught.value.field == "choices"


def test_choices_for_a_classification_are_refused() -> None:
    with pytest.raises(PromptError, match=r"choices: .* fixed choices; leave the field out"):
        Prompter(tiny.CLASSIFICATION, tiny.tokenizer()).encode("why", ["a", "b"])


def test_a_chat_template_wraps_the_prompt_and_the_answer_follows_without_a_space() -> None:
    task = tiny.CLASSIFICATION.model_copy(update={"chat": True, "choice_prefix": ""})
    prompter = Prompter(task, tiny.tokenizer(chat=True))
    assert _decode(prompter.encode("grass")) == "[user]grass\nLabel:[end][assistant]"


def test_chat_without_a_chat_template_is_refused() -> None:
    with pytest.raises(PromptError, match="the tokenizer has no chat template; set chat to false"):
        Prompter(tiny.CLASSIFICATION.model_copy(update={"chat": True}), tiny.tokenizer())


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_an_empty_text_is_refused(text: str) -> None:
    with pytest.raises(PromptError, match="inputs: the text is empty; send at least one visible character"):
        Prompter(tiny.CLASSIFICATION, tiny.tokenizer()).encode(text)


def test_a_lone_surrogate_is_refused_with_its_place() -> None:
    with pytest.raises(PromptError, match=r"inputs: .* \(a lone surrogate at character 2\)"):
        Prompter(tiny.CLASSIFICATION, tiny.tokenizer()).encode("ab\ud83d")


def test_a_text_with_braces_is_taken_as_it_is() -> None:
    prompter = Prompter(tiny.CLASSIFICATION, tiny.tokenizer())
    assert _decode(prompter.encode("{input} {choices} {0}")) == "{input} {choices} {0}\nLabel: "


def test_too_many_tokens_are_refused_with_the_count_and_the_limit() -> None:
    prompter = Prompter(tiny.CLASSIFICATION, tiny.tokenizer())
    with pytest.raises(InputTooLongError, match=r"the prompt has 18 tokens and the limit is 17; .*truncate: true") as caught:
        prompter.encode("0123456789", max_tokens=17)
    assert (caught.value.tokens, caught.value.limit) == (18, 17)
    assert len(prompter.encode("0123456789", max_tokens=18)) == 18


def test_truncation_cuts_the_text_and_keeps_the_template() -> None:
    prompter = Prompter(tiny.CLASSIFICATION, tiny.tokenizer())
    assert _decode(prompter.encode("0123456789", max_tokens=12, truncate=True)) == "0123\nLabel: "


def test_a_template_that_is_too_long_by_itself_is_refused_even_with_truncate() -> None:
    with pytest.raises(InputTooLongError, match="the limit is 8"):
        Prompter(tiny.CLASSIFICATION, tiny.tokenizer()).encode("0123456789", max_tokens=8, truncate=True)


@given(text=st.text(min_size=1, max_size=40), limit=st.integers(9, 60))
def test_truncation_never_exceeds_the_limit_nor_loses_the_end_of_the_prompt(text: str, limit: int) -> None:
    prompter = Prompter(tiny.CLASSIFICATION, tiny.tokenizer())
    try:
        ids = prompter.encode(text, max_tokens=limit, truncate=True)
    except PromptError:
        return
    assert len(ids) <= limit
    assert _decode(ids).endswith("\nLabel: ")
