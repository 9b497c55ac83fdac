"""An example to ids, labels and segments, as text and through templates; alignment through them."""

from __future__ import annotations

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers, processors
from transformers import ByT5Tokenizer

from kv_trainer.alignment.tokens import BOS, EOS, span_index
from kv_trainer.arguments import DataConfig
from kv_trainer.data import IGNORED, Reader, encode_rows
from kv_trainer.examples import Example, example_of
from kv_trainer.text import Encoded, encode, render, turn_end

PLAIN = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
# What Llama-3 and Gemma do: a system prompt of their own, contents stripped, marks that hold the words of an answer.
STRIPS = (
    "{% if messages[0].role != 'system' %}[system] you are the assistant. answer the question [/system]{% endif %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} [/{{ m.role }}]{% endfor %} done"
)
SHOUTS = "{% for m in messages %}[{{ m.role }}]{{ m.content | upper }}{% endfor %}"
QUESTION = [{"role": "user", "content": "what is two times three?"}]
SIX = Example(QUESTION, " two times three is six")


def supervised(tokenizer, encoded: Encoded) -> str:
    assert all(label in (IGNORED, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True))
    assert len(encoded.labels) == len(encoded.input_ids) == len(encoded.spans)
    return tokenizer.decode([label for label in encoded.labels if label != IGNORED])


def test_readers_without_offsets_or_template_are_refused(plain):
    with pytest.raises(ValueError, match="is a slow one"):
        Reader(ByT5Tokenizer())
    with pytest.raises(ValueError, match="has no chat template; set chat: false"):
        Reader(plain, chat=True)


def test_what_a_template_does_not_read_is_refused(tiny_tokenizer):
    template = "{% if enable_thinking %}think{% endif %}" + PLAIN
    Reader(tiny_tokenizer(chat_template=template), chat={"enable_thinking": False})
    with pytest.raises(ValueError, match="chat gives the template enable_thinkin, which the one of .* does not read"):
        Reader(tiny_tokenizer(chat_template=template), chat={"enable_thinkin": False})


# One row


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("merges", [0, 40, 120])
def test_only_the_completion_and_the_end_are_learned(tiny_tokenizer, merges, bos):
    tokenizer = tiny_tokenizer(merges, bos=bos)
    found = encode(SIX, Reader(tokenizer), 999)
    assert supervised(tokenizer, found) == " two times three is six</s>"
    text = "what is two times three? two times three is six</s>"
    assert tokenizer.decode(found.input_ids) == ("<s>" if bos else "") + text
    assert found.spans[-1] == EOS and (found.spans[0] == BOS) == bos
    everything = encode(SIX, Reader(tokenizer), 999, train_on_prompt=True)
    assert supervised(tokenizer, everything) == text and everything.input_ids == found.input_ids


def test_text_alone_is_learned_whole(plain):
    assert supervised(plain, encode(Example([], "the lazy dog"), Reader(plain), 999)) == "the lazy dog</s>"


def test_turns_without_a_template_are_lines(plain):
    turns = [{"role": "system", "content": "be"}, {"role": "user", "content": "what?"}]
    found = encode(Example(turns, " six"), Reader(plain), 999)
    assert plain.decode(found.input_ids) == "be\nwhat? six</s>" and supervised(plain, found) == " six</s>"
    assert {s[0] for s in found.spans if s} == {0, 1, 2, EOS[0]}
    assert sum(s is None for s in found.spans) == 1, "the line end between the turns is nobody's text"


def test_an_end_token_that_the_tokenizer_adds_is_learned_once(tiny_tokenizer):
    tokenizer = tiny_tokenizer(bos=True)
    own = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), own])
    found = encode(SIX, Reader(tokenizer), 999)
    assert found == encode(SIX, Reader(tiny_tokenizer(bos=True)), 999)
    assert supervised(tokenizer, found).endswith("six</s>") and found.spans[-1] == EOS


def test_a_token_across_the_border_is_learned(tiny_tokenizer):
    """Left to the prompt it would never be learned, and the prompt of an evaluation would give the answer away."""
    tokenizer = tiny_tokenizer(120)
    assert len(tokenizer(" six")["input_ids"]) == 1
    row = {"prompt": "what is two times three? ", "completion": "six"}
    found = encode(example_of(row, DataConfig()), Reader(tokenizer), 999)
    assert supervised(tokenizer, found) == " six</s>"
    assert found.spans[-2] == (1, -1, 3), "it has read the completion to its end"
    encoded = encode_rows(Dataset.from_list([row]), Reader(tokenizer), {}, DataConfig(), keep=("prompt_ids",))
    assert tokenizer.decode(encoded[0]["prompt_ids"]) == "what is two times three?"


@pytest.mark.parametrize("length", [1, 5, 12, 999])
def test_truncation_keeps_the_front(plain, length):
    whole, short = encode(SIX, Reader(plain), 999), encode(SIX, Reader(plain), length)
    assert short.input_ids == whole.input_ids[:length] and short.labels == whole.labels[:length]
    assert short.spans == whole.spans[:length]


@pytest.mark.parametrize("length", [2, 5, 12, 999])
@pytest.mark.parametrize("bos", [False, True])
def test_truncation_on_the_left_keeps_the_end_and_the_start_token(tiny_tokenizer, length, bos):
    tokenizer = tiny_tokenizer(bos=bos)
    whole = encode(SIX, Reader(tokenizer), 999)
    short = encode(SIX, Reader(tokenizer), length, truncation_side="left")
    count = min(length, len(whole.input_ids)) - bos
    for name in ("input_ids", "labels", "spans", "segments"):
        values = getattr(whole, name)
        assert getattr(short, name) == values[:bos] + values[-count:], name
    assert short.supervised == whole.supervised
    at = whole.answer_position - (len(whole.input_ids) - count - bos)
    assert short.answer_position == (at if at >= bos else -1)


@given(ours=st.integers(3, 40), theirs=st.integers(3, 40))
def test_indices_of_rows_cut_on_the_left_meet_the_same_text(tiny_tokenizer, ours, theirs):
    student, teacher = tiny_tokenizer(40, bos=True), tiny_tokenizer(0)
    a, b = (
        encode(SIX, Reader(t), length, truncation_side="left") for t, length in ((student, ours), (teacher, theirs))
    )
    index = span_index(a.spans, b.spans)
    assert index[-1] == len(b.input_ids) - 1
    for i, j in enumerate(index):
        if j >= 0:
            left, right = student.decode(a.input_ids[i:]), teacher.decode(b.input_ids[j:])
            assert left.endswith(right[1:]) and a.spans[i][::2] == b.spans[j][::2]


def test_a_character_cut_in_its_bytes_was_not_read(tiny_tokenizer):
    tokenizer = tiny_tokenizer(0)
    example = Example([], "a東b")
    whole = encode(example, Reader(tokenizer), 999)
    for length, aligned in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 5)):
        short = encode(example, Reader(tokenizer), length)
        last = max(j for j in span_index(whole.spans, short.spans))
        assert last == aligned - 1, length


@pytest.mark.parametrize("merges", [0, 40, 120])
@pytest.mark.parametrize("template", [None, PLAIN, STRIPS], ids=["none", "plain", "strips"])
def test_segments_and_the_position_before_the_answer(tiny_tokenizer, template, merges):
    tokenizer = tiny_tokenizer(merges, chat_template=template, bos=template is None)
    example = Example(QUESTION, " two times three</think> is six", len(" two times three</think>"))
    found = encode(example, Reader(tokenizer, chat=template is not None), 999)
    texts = {
        s: tokenizer.decode([t for t, of in zip(found.input_ids, found.segments, strict=True) if of == s])
        for s in (-1, 0, 1, 2)
    }
    assert texts[0].strip() == QUESTION[0]["content"] and texts[2] == " is six"
    assert texts[1].strip() == "two times three</think>"
    assert found.segments[found.answer_position : found.answer_position + 2] == [1, 2]
    if template is None:
        assert texts[-1] == "<s></s>"
    plain = encode(SIX, Reader(tokenizer), 999)
    assert plain.segments[plain.answer_position + 1] == 2 and plain.labels[plain.answer_position] == IGNORED
    assert encode(Example(QUESTION, "hm", 2), Reader(tokenizer), 999).answer_position == -1, "no answer, no position"


# Templates


@pytest.mark.parametrize("template", [PLAIN, STRIPS], ids=["plain", "strips"])
@pytest.mark.parametrize("merges", [0, 60])
@pytest.mark.parametrize("lead", ["", "  \n"])
def test_segments_are_the_right_characters_in_a_template(tiny_tokenizer, template, merges, lead):
    tokenizer = tiny_tokenizer(merges, chat_template=template)
    parts = [f"{lead}über seven plus 東京", f"{lead}twelve is five ", f"{lead}fox over dog"]
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": part} for role, part in zip(roles, parts, strict=True)]
    example, answer = Example(turns, f"{lead}jumps 🦊 lazy "), f"{lead}jumps 🦊 lazy "
    text = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
    found = encode(example, Reader(tokenizer, chat=True), 999)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert len(offsets) == len(found.spans)
    cores = [part.strip() if template is STRIPS else part for part in (*parts, answer)]
    leads = [len(part) - len(part.lstrip()) if template is STRIPS else 0 for part in (*parts, answer)]
    covered = set()
    for (start, end), span in zip(offsets, found.spans, strict=True):
        places = [i for i, core in enumerate(cores) if text.index(core) < end <= text.index(core) + len(core)]
        if not places:
            assert span is None
            continue
        place = text.index(cores[places[0]])
        assert span == (places[0], start - place + leads[places[0]], end - place + leads[places[0]])
        covered.update((places[0], i) for i in range(max(start, place), end))
    assert len(covered) == sum(map(len, cores)), "every character of the row is in some token"


@pytest.mark.parametrize("answer", ["assistant", "user", "s", "what is two times three?"])
@pytest.mark.parametrize("template", [PLAIN, STRIPS], ids=["plain", "strips"])
def test_an_answer_that_the_markup_holds_too_is_found_in_its_place(tiny_tokenizer, template, answer):
    tokenizer = tiny_tokenizer(chat_template=template)
    reader = Reader(tokenizer, chat=True)
    text, places = render(Example(QUESTION, answer), reader)
    assert text == tokenizer.apply_chat_template([*QUESTION, {"role": "assistant", "content": answer}], tokenize=False)
    assert text[places[-1].start : places[-1].end] == answer and text.count(answer) > 1
    assert text[: places[-1].start].endswith("<|assistant|>\n" if template is PLAIN else "[assistant] ")
    assert text[places[0].start : places[0].end] == QUESTION[0]["content"]
    closing = "<|end|>\n" if template is PLAIN else " [/assistant] done"
    learned = supervised(tokenizer, encode(Example(QUESTION, answer), reader, 999))
    assert learned.lstrip() == answer + closing, "the first token may hold the space before it"


def test_chat_adds_no_end_token_or_start_token_of_its_own(tiny_tokenizer):
    tokenizer = tiny_tokenizer(bos=True, chat_template=PLAIN)
    text = "<|user|>\nwhat is two times three?<|end|>\n<|assistant|>\nsix<|end|>\n"
    assert tokenizer.decode(encode(Example(QUESTION, "six"), Reader(tokenizer, chat=True), 999).input_ids) == text


def test_a_start_token_of_the_template_is_kept_too(tiny_tokenizer):
    tokenizer = tiny_tokenizer(bos=True, chat_template="<s>" + PLAIN)
    reader = Reader(tokenizer, chat=True)
    short = encode(SIX, reader, 8, truncation_side="left")
    assert short.input_ids[0] == tokenizer.bos_token_id and len(short.input_ids) == 8
    assert short.input_ids[1:] == encode(SIX, reader, 999).input_ids[-7:]


def test_a_composed_character_is_read_to_its_end(tiny_tokenizer):
    """NFC makes one token of a letter and its mark, with the offsets of the letter alone."""
    composing = tiny_tokenizer(0)
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    example = Example([], "cafe\u0301s")
    ours, theirs = (encode(example, Reader(t), 999) for t in (tiny_tokenizer(0), composing))
    index = span_index(ours.spans, theirs.spans)
    letter = ours.spans.index((0, 3, 4))
    assert index[letter] == -1, "the other has read its mark as well"
    assert theirs.spans[index[letter + 2]] == (0, 3, 5), "the mark is of two bytes"


def test_of_trimmed_blanks_nobody_can_tell(tiny_tokenizer):
    """With trim_offsets a token of blanks ends where the first of them does; a word may stand before a blank."""
    text = "f(x):\n    return x"
    trimmed = tiny_tokenizer(120, corpus=[text] * 9)
    trimmed.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    found = encode(Example([], text), Reader(trimmed), 999)
    names = trimmed.convert_ids_to_tokens(found.input_ids)
    blanks = [i for i, name in enumerate(names) if name.startswith("\u010a\u0120")]
    assert blanks and all(found.spans[i] is None and found.labels[i] != IGNORED for i in blanks)
    assert all(found.spans[i] is not None for i in range(len(names)) if i not in blanks)


WORDS = st.text("ab é\n🦊[]", min_size=1, max_size=12)
TEMPLATES = st.sampled_from([PLAIN, STRIPS])


@given(question=WORDS, answer=WORDS, left=st.none() | TEMPLATES, right=TEMPLATES)
def test_two_templates_align_shared_text_only(tiny_tokenizer, question, answer, left, right):
    example = Example([{"role": "user", "content": question}], answer)
    student = tiny_tokenizer(40, chat_template=left)
    teacher = tiny_tokenizer(10, chat_template=right)
    readers = Reader(student, chat=left is not None), Reader(teacher, chat=True)
    try:
        ours, theirs = (encode(example, reader, 999) for reader in readers)
    except ValueError as error:  # a part of spaces only cannot be told from the template's own
        assert "changes the text" in str(error) and not (question.strip() and answer.strip())
        return
    index = span_index(ours.spans, theirs.spans)
    parts = [question, answer]
    for i, j in enumerate(index):
        if j >= 0:
            (segment, _, end), (other, _, same) = ours.spans[i], theirs.spans[j]
            assert (segment, end) == (other, same) and segment in (0, 1) and 0 < end <= len(parts[segment])
    aligned = {ours.spans[i][:1] + ours.spans[i][2:] for i, j in enumerate(index) if j >= 0}
    shared = {(s[0], s[2]) for s in ours.spans if s} & {(s[0], s[2]) for s in theirs.spans if s}
    assert aligned == shared
    if left is right is PLAIN and question.strip() and answer.strip():
        assert aligned, "the same text was read twice, so something aligns"


def test_alignment_goes_through_different_templates(tiny_tokenizer):
    """By bytes on both sides every character of the row aligns, and nothing of the markup."""
    ours = encode(Example(QUESTION, " six "), Reader(tiny_tokenizer(0, chat_template=PLAIN), chat=True), 999)
    theirs = encode(Example(QUESTION, " six "), Reader(tiny_tokenizer(0, chat_template=STRIPS), chat=True), 999)
    index = span_index(ours.spans, theirs.spans)
    aligned = [ours.spans[i] for i, j in enumerate(index) if j >= 0]
    assert len(aligned) == len(QUESTION[0]["content"]) + len("six")
    assert all(ours.input_ids[i] == theirs.input_ids[j] for i, j in enumerate(index) if j >= 0)
    assert (1, 0, 1) not in aligned, "the space that one template strips is read by one model only"


def test_a_template_that_changes_text_is_refused(tiny_tokenizer):
    reader = Reader(tiny_tokenizer(chat_template=SHOUTS), chat=True)
    with pytest.raises(ValueError, match="refuses a row, or changes its text.*Set chat: false"):
        render(Example(QUESTION, "hm </think> six"), reader)


@pytest.mark.parametrize(("template", "special"), [(PLAIN, True), (PLAIN, False), (STRIPS, True)])
def test_the_end_of_a_turn_is_the_special_token_behind_the_answer(tiny_tokenizer, template, special):
    tokenizer = tiny_tokenizer(bos=True, chat_template=template)
    assert turn_end(Reader(tokenizer)) is None, "no chat"
    tokenizer.add_tokens(["<|end|>"], special_tokens=special)
    expected = tokenizer.convert_tokens_to_ids("<|end|>") if template is PLAIN and special else None
    assert turn_end(Reader(tokenizer, chat=True)) == expected
