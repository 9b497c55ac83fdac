"""Rows through chat templates, by the rules of five families (tests/templates: retyped, without their tool calls)."""

from __future__ import annotations

import logging
from datetime import date
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv_trainer.alignment.tokens import PROMPT
from kv_trainer.arguments import DataConfig
from kv_trainer.chat import render_chat
from kv_trainer.data import encode_rows
from kv_trainer.examples import example_of
from kv_trainer.text import Reader, encode, render

TEMPLATES = {path.stem: path.read_text().rstrip("\n") for path in (Path(__file__).parent / "templates").glob("*.jinja")}
FAMILIES = sorted(TEMPLATES)
THOUGHT = "<think>\ntwo and two\n</think>\n\nIt is 4."
CUTS = "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}{% endfor %}"


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return said if system is None else [{"role": "system", "content": system}, *said]


def reader(tiny_tokenizer, family: str) -> Reader:
    return Reader(tiny_tokenizer(bos=True, chat_template=TEMPLATES.get(family, family)), chat=True)


def parts_of(messages: list[dict[str, str]], tokenizer) -> tuple[str, list[str]]:
    """The text, and each part as it lies there, which must be what the message says at that place."""
    text, places = render_chat(messages, tokenizer)
    found = [text[place.start : place.end] for place in places]
    for place, part, message in zip(places, found, messages, strict=True):
        assert message["content"][place.lead : place.lead + len(part)] == part and place.segment == places.index(place)
    return text, found


def test_five_families_are_there() -> None:
    assert FAMILIES == ["gemma2", "llama31", "mistral", "qwen3", "r1"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "messages",
    [
        turns("2+2?", "It is 4."),
        turns("2+2?", "It is 4.", system="Be brief."),
        turns("2+2?", "4", "3+3?", "It is 6.", system="Be brief."),
        turns("2+2?\n", "It is 4.\n"),
        turns("2+2?", THOUGHT),
        turns("2+2?", "<think>two and two</think>It is 4."),
        turns("2+2?", THOUGHT, "3+3?", THOUGHT, system="Be brief."),
    ],
    ids=["plain", "system", "turns", "blanks", "thought", "thought without lines", "two thoughts"],
)
def test_every_part_is_found_and_the_answer_is_whole(tiny_tokenizer, family: str, messages) -> None:
    text, found = parts_of(messages, reader(tiny_tokenizer, family).tokenizer)
    assert found[-1].strip() == messages[-1]["content"].strip(), "nothing that is to be learned is missing"
    assert all(part.strip() in message["content"] and part for part, message in zip(found, messages, strict=True))
    assert text.count("<think>") == sum("<think>" in part for part in found) + (
        family == "qwen3" and "<think>" not in found[-1]
    ), "Qwen 3 writes an empty one before an answer without; no other is made up"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_row_is_the_template_s_own_text(tiny_tokenizer, family: str) -> None:
    tokenizer = reader(tiny_tokenizer, family).tokenizer
    for messages in (turns("2+2?", "It is 4."), turns("2+2?", "4", "3+3?", "It is 6.")):
        assert render_chat(messages, tokenizer)[0] == tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_without_a_system_turn_its_text_is_at_the_head_of_the_user_s(tiny_tokenizer, family: str) -> None:
    text, found = parts_of(turns("2+2?", "It is 4.", system="Be brief."), reader(tiny_tokenizer, family).tokenizer)
    assert found == ["Be brief.", "2+2?", "It is 4."] and "Be brief.\n\n2+2?" in text


def test_an_answer_follows_the_generation_prompt_where_the_template_would_change_it(tiny_tokenizer) -> None:
    qwen, r1 = (reader(tiny_tokenizer, name).tokenizer for name in ("qwen3", "r1"))
    messages = turns("2+2?", THOUGHT)
    assert render_chat(messages, qwen)[0].endswith(f"<|im_start|>assistant\n{THOUGHT}<|im_end|>\n")
    assert render_chat(messages, r1)[0].endswith(f"<｜Assistant｜>{THOUGHT}<｜end▁of▁sentence｜>")
    cuts = reader(tiny_tokenizer, CUTS).tokenizer
    assert render_chat(messages, cuts)[0] == f"[user]2+2?[assistant]{THOUGHT}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_thought_that_the_prompt_opened_is_opened(tiny_tokenizer, family: str) -> None:
    """What R1, QwQ and Qwen3-thinking write: their generation prompt ends in <think>."""
    completion = "two and two\n</think>\n\nIt is 4."
    text, found = parts_of(turns("2+2?", completion), reader(tiny_tokenizer, family).tokenizer)
    assert found[-1] == completion
    if family in ("qwen3", "r1"):
        assert f"<think>\n{completion}" in text and text.count("think>") == 2
    else:
        assert text == reader(tiny_tokenizer, family).tokenizer.apply_chat_template(
            turns("2+2?", completion), tokenize=False
        ), "which knows nothing of thoughts"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_blank_system_turn_is_as_good_as_none(tiny_tokenizer, family: str, caplog) -> None:
    tokenizer = reader(tiny_tokenizer, family).tokenizer
    text, places = render_chat(turns("2+2?", "It is 4.", system=""), tokenizer)
    assert [text[p.start : p.end] for p in places] == ["", "2+2?", "It is 4."]
    assert [place.segment for place in places] == [0, 1, 2] and not caplog.text
    alone = tokenizer.apply_chat_template(turns("2+2?", "It is 4."), tokenize=False)
    if family in ("gemma2", "mistral", "r1"):
        assert text == alone, "others write the turn without a text"


MODES = (
    "{% set ns = namespace(mode='/think', said='') %}{% if messages[0].role == 'system' %}{% if '/no_think' in "
    "messages[0].content %}{% set ns.mode = '/no_think' %}{% endif %}{% set ns.said = "
    "messages[0].content.replace('/no_think', '') %}{% endif %}[{{ ns.mode }}]{{ ns.said }}"
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)


def test_a_system_turn_that_is_changed_is_not_moved(tiny_tokenizer) -> None:
    """As SmolLM3's, of which a word sets the mode: in the user's turn it would ask for another one."""
    tokenizer = reader(tiny_tokenizer, MODES).tokenizer
    assert parts_of(turns("2+2?", "4", system="Be brief."), tokenizer)[1] == ["Be brief.", "2+2?", "4"]
    with pytest.raises(ValueError, match="refuses a row, or changes its text"):
        render_chat(turns("2+2?", "4", system="Be brief. /no_think"), tokenizer)


def test_an_answer_without_an_end_of_the_template_s_ends_in_eos(tiny_tokenizer) -> None:
    tokenizer = tiny_tokenizer(chat_template=MODES)
    example = example_of({"messages": turns("what is two?", "two")}, DataConfig())
    assert encode(example, Reader(tokenizer, True), 999).labels[-1] == tokenizer.eos_token_id
    marked = tiny_tokenizer(chat_template=MODES.replace("{{ m.content }}", "{{ m.content }} done"))
    assert encode(example, Reader(marked, True), 999).labels[-1] != marked.eos_token_id


def test_blanks_that_a_template_strips_at_line_ends_alone(tiny_tokenizer) -> None:
    """Qwen 3 strips line ends, not blanks: an indented answer is still the template's own text."""
    tokenizer = reader(tiny_tokenizer, "qwen3").tokenizer
    messages = turns("2+2?", "\n It is 4. \n")
    assert render_chat(messages, tokenizer)[0] == tokenizer.apply_chat_template(messages, tokenize=False)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.sampled_from(FAMILIES),
    st.lists(st.text("ab <>/\n|1", min_size=1, max_size=8).filter(str.strip), min_size=2, max_size=4),
    st.booleans(),
)
def test_any_text_is_found_where_it_lies(tiny_tokenizer, family: str, contents: list[str], system: bool) -> None:
    contents = contents[: len(contents) // 2 * 2]
    messages = turns(*contents, system="Be brief." if system else None)
    _, found = parts_of(messages, reader(tiny_tokenizer, family).tokenizer)
    assert [part.strip() for part in found] == [message["content"].strip() for message in messages]


def test_what_no_form_fits_is_refused_with_the_template_s_own_words(tiny_tokenizer) -> None:
    gemma = reader(tiny_tokenizer, "gemma2").tokenizer
    twice = [*turns("2+2?"), *turns("and 3+3?"), {"role": "assistant", "content": "4"}]
    with pytest.raises(ValueError, match=r"Conversation roles must alternate.*2\+2\? \| and 3.*Set chat: false"):
        render_chat(twice, gemma)


def test_the_system_s_tokens_are_the_prompt_s(tiny_tokenizer) -> None:
    found = reader(tiny_tokenizer, "gemma2")
    example = example_of({"messages": turns("what is two?", "two is two", system="be brief")}, DataConfig())
    encoded = encode(example, found, 999)
    first = [span for span, segment in zip(encoded.spans, encoded.segments, strict=True) if segment == PROMPT]
    assert {span[0] for span in first} == {0, 1}
    learned = found.tokenizer.decode([label for label in encoded.labels if label != -100])
    assert "two is two" in learned and "brief" not in learned


# ---- what messages hold beside their text


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_the_answer_is_learned_before_it(name: str) -> None:
    last = {"role": "assistant", "content": "It is 4.", name: "two and two\n"}
    example = example_of({"messages": [*turns("2+2?"), last]}, DataConfig())
    assert example.completion == THOUGHT and example.answer.strip() == "It is 4."
    both = example_of({"messages": [*turns("2+2?"), {**last, "content": THOUGHT}]}, DataConfig())
    assert both.completion == THOUGHT, "it is there already"
    none = example_of({"messages": [*turns("2+2?"), {**last, name: None}]}, DataConfig())
    assert none.completion == "It is 4."
    earlier = example_of({"messages": [*turns("2+2?"), last, *turns("3+3?", "6")]}, DataConfig())
    assert earlier.turns[1] == {"role": "assistant", "content": "It is 4."}


def test_reasoning_that_is_no_text_is_refused() -> None:
    last = {"role": "assistant", "content": "It is 4.", "reasoning": ["two"]}
    with pytest.raises(ValueError, match=r"assistant's reasoning in the column messages is \['two'\], no text"):
        example_of({"messages": [*turns("2+2?"), last]}, DataConfig())


def test_keys_that_hold_nothing_are_none(tiny_tokenizer) -> None:
    """A column has them where any message has them; Llama 3.1 asks whether they are there."""
    empty = {"tool_calls": [], "name": None}
    example = example_of({"messages": [{**turn, **empty} for turn in turns("2+2?", "4", "3+3?", "6")]}, DataConfig())
    assert example.turns == turns("2+2?", "4", "3+3?")


def test_tool_calls_are_refused_and_none_are_not() -> None:
    called = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    with pytest.raises(ValueError, match="assistant's tool_calls in the column messages is .*add.*without tool calls"):
        example_of({"messages": [*turns("2+2?"), called]}, DataConfig())
    assert example_of({"messages": [*turns("2+2?"), {**called, "content": "4", "tool_calls": None}]}, DataConfig())


@pytest.mark.parametrize(("chat", "said"), [(False, True), (True, False)])
def test_conversations_read_without_roles_are_told(tiny_tokenizer, caplog, chat: bool, said: bool) -> None:
    student = Reader(tiny_tokenizer(), False)  # without a template: nothing to say
    teacher = Reader(tiny_tokenizer(10, chat_template=TEMPLATES["llama31"]), chat)
    rows = Dataset.from_list([{"messages": turns("what is two?", "two")}] * 2)
    with caplog.at_level(logging.WARNING):
        encode_rows(rows, student, {"big": teacher}, DataConfig())
    assert ("teachers.big, which has a chat template" in caplog.text) is said
    assert ("set teachers.big.chat: true" in caplog.text) is said
    caplog.clear()
    texts = Dataset.from_list([{"prompt": "what is two?", "completion": "two"}] * 2)
    encode_rows(texts, student, {"big": teacher}, DataConfig())
    assert "chat template" not in caplog.text


DATED = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%Y') %}{% endif %}"
    "[{{ date_string }}]{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)


def test_the_template_is_given_what_it_asks_for_and_dates_are_told(tiny_tokenizer, caplog) -> None:
    tokenizer = tiny_tokenizer(chat_template=DATED)
    example = example_of({"messages": turns("what is two?", "two")}, DataConfig())
    fixed = Reader(tokenizer, {"date_string": "today"})
    assert render(example, fixed)[0] == "[today]<user>what is two?<assistant>two"
    rows = Dataset.from_list([{"prompt": "what is two?", "completion": "two"}])
    encode_rows(rows, fixed, {}, DataConfig())
    assert not caplog.text
    encode_rows(rows, Reader(tiny_tokenizer()), {"big": Reader(tokenizer, True)}, DataConfig())
    assert "The chat template of teachers.big writes today's date" in caplog.text
    wrongs = {
        "chat is an empty dict; give true": {}, "gives the template tokenize": {"tokenize": True},
        "chat.date_string is datetime.date.*put it in quotes": {"date_string": date(2024, 7, 26)},
    }  # fmt: skip
    for said, wrong in wrongs.items():
        with pytest.raises(ValueError, match=said):
            Reader(tokenizer, wrong)


def test_no_roles_no_marks(tiny_tokenizer) -> None:
    example = example_of({"messages": turns("a", "b", "c", "d", system="s")}, DataConfig())
    text, places = render(example, Reader(tiny_tokenizer()))
    assert text == "s\na\nb\ncd" and [text[p.start : p.end] for p in places] == ["s", "a", "b", "c", "d"]
