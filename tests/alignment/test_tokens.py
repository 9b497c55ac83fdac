"""The token axis against slow references, on random cuts of random text and on real tokenizers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kv_trainer.alignment.tokens import BOS, EOS, Span, span_index, take
from kv_trainer.examples import Example
from kv_trainer.text import Reader, encode
from kv_trainer.types import KVStates

PARTS = {0: 7, 1: 9}  # characters in each segment


@st.composite
def segmentations(draw: st.DrawFn) -> list[Span]:
    """One way to cut the text of PARTS: special tokens, template text, tokens of no width, characters in bytes."""
    spans: list[Span] = [BOS] * draw(st.integers(0, 1))
    for segment, length in PARTS.items():
        spans += [None] * draw(st.integers(0, 2))
        cuts = sorted(draw(st.sets(st.integers(1, length - 1)))) + [length]
        start = 0
        for end in cuts:
            copies = draw(st.integers(1, 3)) if end == start + 1 else 1  # a character as several byte tokens
            spans += [(segment, start, end)] * copies
            start = end
    spans += [EOS] * draw(st.integers(0, 1))
    return spans[: draw(st.integers(1, len(spans)))]  # truncated


def naive_index(student: list[Span], teacher: list[Span]) -> list[int]:
    """By the definition, O(S T): the last positions, on both sides, whose token ends at one character."""

    def ends(spans: list[Span], position: int) -> tuple[int, int] | None:
        here = spans[position]
        later = [s for s in spans[position + 1 :] if s is not None and here is not None]
        return None if here is None or any((s[0], s[2]) == (here[0], here[2]) for s in later) else (here[0], here[2])

    index = []
    for i in range(len(student)):
        end = ends(student, i)
        index.append(next((j for j in range(len(teacher)) if end is not None and ends(teacher, j) == end), -1))
    return index


@given(student=segmentations(), teacher=segmentations())
def test_span_index_is_the_definition(student, teacher):
    index = span_index(student, teacher)
    assert index == naive_index(student, teacher)
    known = [j for j in index if j >= 0]
    assert known == sorted(set(known)), "text is read in order, so the map rises"


@given(spans=segmentations())
def test_one_cut_is_the_identity(spans):
    index = span_index(spans, spans)
    for i, (span, found) in enumerate(zip(spans, index, strict=True)):
        repeated = span is not None and span in spans[i + 1 :]
        assert found == (-1 if span is None or repeated else i)


@given(student=segmentations(), teacher=segmentations(), cut=st.integers(0, 30))
def test_a_truncated_teacher_loses_its_tail_only(student, teacher, cut):
    whole, short = span_index(student, teacher), span_index(student, teacher[:cut])
    for before, after in zip(whole, short, strict=True):
        if after != before:
            assert before >= cut
            assert after == -1 or teacher[after][2] == teacher[before][2], "only a character cut in bytes moves"


def test_byte_tokens_of_one_character_count_at_the_last():
    whole, by_bytes = [(0, 0, 1), (0, 1, 2)], [(0, 0, 1), (0, 1, 2), (0, 1, 2), (0, 1, 2)]
    assert span_index(whole, by_bytes) == [0, 3]
    assert span_index(by_bytes, whole) == [0, -1, -1, 1]


def test_a_token_that_holds_half_a_character_has_not_read_it():
    """Byte merges can cross characters: "a" + half of the next, then its other half + "b"."""
    across, whole = [(0, 0, 2), (0, 1, 3)], [(0, 0, 1), (0, 1, 2), (0, 2, 3)]
    assert span_index(across, whole) == [-1, 2] and span_index(whole, across) == [-1, -1, 1]


def test_special_tokens_meet_their_like_only():
    student, teacher = [BOS, (0, 0, 2), None, EOS], [None, (0, 0, 2), EOS]
    assert span_index(student, teacher) == [-1, 1, -1, 2]
    assert span_index(teacher, [BOS, None, (0, 0, 2)]) == [-1, 2, -1]
    assert span_index([(0, 0, 3)], [(1, 0, 3)]) == [-1], "equal characters of another segment are other text"
    assert span_index([], teacher) == [] and span_index(student, []) == [-1] * 4


@pytest.mark.parametrize(("ours", "theirs"), [(0, 40), (40, 0), (20, 120), (40, 40)])
@pytest.mark.parametrize("text", ["the quick brown fox", "naïve café – 東京 🦊 ok", "a" * 9])
def test_aligned_tokens_have_read_the_same_bytes(tiny_tokenizer, ours, theirs, text):
    """On real tokenizers, by decoding: an aligned pair has the same prefix, and no such pair is missed."""
    student, teacher = (tiny_tokenizer(merges) for merges in (ours, theirs))
    example = Example([{"role": "user", "content": "seven "}], text)
    a, b = (encode(example, Reader(t), 999) for t in (student, teacher))
    index = span_index(a.spans, b.spans)

    def prefixes(tokenizer, ids):
        return [b"".join(raw_bytes(tokenizer, ids[: i + 1])) for i in range(len(ids))]

    left, right = prefixes(student, a.input_ids), prefixes(teacher, b.input_ids)
    for i, j in enumerate(index):
        if j >= 0:
            assert left[i] == right[j]
    whole = {p for p in set(left) & set(right) if valid(p)}
    assert {left[i] for i, j in enumerate(index) if j >= 0} == whole
    if ours == theirs:
        assert [j for j in index if j >= 0] == [i for i, p in enumerate(left) if valid(p)]
    assert index[-1] == len(b.input_ids) - 1, "the end token meets the end token"


def valid(raw: bytes) -> bool:
    """Whether it ends between characters."""
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def raw_bytes(tokenizer, ids: list[int]) -> list[bytes]:
    """The bytes behind every byte-level token; the end token counts as a zero byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    back = {c: bytes([b]) for b, c in bytes_to_unicode().items()}
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return [b"\0" if t == "</s>" else b"".join(back[c] for c in t) for t in tokens]


# Tokenizers of other makes

WORDS = ("the quick brown fox jumps over the lazy dog", "what is seven plus five? twelve", "cafe the the the")
BYTES = [f"<0x{i:02X}>" for i in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]


def fast(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", **special)


def sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    """A BPE as Llama 2 has it: a space before the text, "\u2581" for spaces, bytes for what no token covers."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL + BYTES, show_progress=False)
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return fast(tokenizer, bos_token="<s>")


def unigram() -> PreTrainedTokenizerFast:
    """As T5 and Gemma have it. Unknown neighbours share one run of bytes, whose tokens all have the run's offsets."""
    pieces = [("<unk>", -10.0), ("</s>", 0.0), *((b, -9.0) for b in BYTES), ("\u2581", -3.0), ("\u2581the", -2.0)]
    pieces += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz?"] + [("\u2581fox", -3.0), ("qu", -3.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return fast(tokenizer)


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT has it: lower case, no accents, no spaces, "##" pieces."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    tokenizer.train_from_iterator(WORDS, trainers.WordPieceTrainer(
        vocab_size=60, special_tokens=special, show_progress=False
    ))  # fmt: skip
    marks = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture(scope="module")
def makes(tiny_tokenizer):
    mixed = tiny_tokenizer(90, corpus=["\u6771\u4eac\u00e9 a\u00e9b \U0001f98a\u6771\u00e9\u00e9"] * 3)
    return {
        "bytes": tiny_tokenizer(0), "byte level": tiny_tokenizer(60), "byte level, across": mixed,
        "first": sentencepiece("first"), "always": sentencepiece("always"), "legacy": sentencepiece("legacy"),
        "unigram": unigram(),
    }  # fmt: skip


def prefixes_read(tokenizer, ids: list[int]) -> list[bytes]:
    """The bytes that are read up to each token, by the tokens' own text, without the space that is put in front."""
    if "<0x00>" not in tokenizer.get_vocab():
        parts = raw_bytes(tokenizer, ids)
        return [b"".join(parts[: i + 1]) for i in range(len(parts))]
    marks = {"</s>": b"\0", "<s>": b"", **{token: bytes([i]) for i, token in enumerate(BYTES)}}
    parts = [marks.get(t, t.replace("\u2581", " ").encode()) for t in tokenizer.convert_ids_to_tokens(ids)]
    return [b"".join(parts[: i + 1]).removeprefix(b" ") for i in range(len(parts))]


TEXT = st.text("abcthe qu?\u00e9\u6771\U0001f98aZ", min_size=1, max_size=14).filter(lambda t: t[0] != " ")


@given(ours=st.integers(0, 6), theirs=st.integers(0, 6), prompt=TEXT, completion=TEXT)
def test_every_make_of_tokenizer_is_aligned_by_the_bytes_it_has_read(makes, ours, theirs, prompt, completion):
    names = list(makes)
    student, teacher = makes[names[ours]], makes[names[theirs]]
    example = Example([{"role": "user", "content": prompt}], completion)
    a, b = (encode(example, Reader(t), 999) for t in (student, teacher))
    left, right = prefixes_read(student, a.input_ids), prefixes_read(teacher, b.input_ids)
    whole = (prompt + completion).encode() + b"\0"
    assert left[-1] == right[-1] == whole, "or the reference itself would be wrong"
    index = span_index(a.spans, b.spans)
    for i, j in enumerate(index):
        if j >= 0 and a.spans[i] != BOS:
            assert left[i] == right[j], (a.spans[i], b.spans[j])
    assert index[-1] == len(b.input_ids) - 1
    if "unigram" not in (names[ours], names[theirs]):  # whose runs of bytes cannot be told apart
        shared = {p for p in set(left) & set(right) if p and valid(p)}
        assert {left[i] for i, j in enumerate(index) if j >= 0} - {b""} == shared, "no shared prefix is missed"


@pytest.mark.parametrize("kind", ["first", "always", "legacy"])
def test_a_space_put_before_a_text_has_read_none_of_it(makes, kind):
    """Its offsets say (0, 1): the first character, which is not read yet."""
    tokenizer, letters = makes[kind], makes["bytes"]
    example = Example([], "quick</s>dog")
    theirs, ours = encode(example, Reader(tokenizer), 999), encode(example, Reader(letters), 999)
    tokens = tokenizer.convert_ids_to_tokens(theirs.input_ids)
    index = span_index(ours.spans, theirs.spans)
    met = {tokens[j] for j in index if j >= 0}
    assert "\u2581" not in met and "</s>" in met and index[-1] == len(tokens) - 1
    lonely = encode(Example([], "\u6771"), Reader(tokenizer), 999)
    assert tokenizer.convert_ids_to_tokens(lonely.input_ids)[1] == "\u2581"
    assert span_index(encode(Example([], "\u6771"), Reader(letters), 999).spans, lonely.spans)[:3] == [-1, -1, 4]


def test_wordpiece_ends_where_its_pieces_do(makes):
    """Case, accents and spaces are lost to it, but not where it is in the text."""
    tokenizer, text = wordpiece(), "The caf\u00e9,  QUICK fox \u6771"
    example = Example([{"role": "user", "content": "What?"}], text)
    theirs, ours = (encode(example, Reader(t), 999) for t in (tokenizer, makes["bytes"]))
    tokens = tokenizer.convert_ids_to_tokens(theirs.input_ids)
    assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and any(t.startswith("##") for t in tokens)
    index, read = span_index(ours.spans, theirs.spans), prefixes_read(makes["bytes"], ours.input_ids)
    met = {j: read[i].decode() for i, j in enumerate(index) if j >= 0}
    assert sorted(met) == list(range(1, len(tokens) - 1)), "every piece has its place, the marks have none"
    text_of = tokenizer.backend_tokenizer.normalizer.normalize_str
    for j, prefix in met.items():
        if tokens[j] != "[UNK]":
            assert text_of(prefix).endswith(tokens[j].removeprefix("##"))


def make_states(batch: int = 3, length: int = 6, layers: int = 2) -> KVStates:
    draw = torch.Generator().manual_seed(4)
    every = torch.randn(2, layers, batch, 2, length, 5, generator=draw)
    mask = torch.ones(batch, length).bool()
    mask[-1, 4:] = False
    return KVStates(tuple(every[0]), tuple(every[1]), mask, tuple(range(layers)), layers)


@given(st.lists(st.lists(st.integers(-1, 5), min_size=8, max_size=8), min_size=3, max_size=3))
def test_take_is_the_loop(rows):
    states, index = make_states(), torch.tensor(rows)
    taken = take(states, index)
    assert taken.keys[0].shape == (3, 2, 8, 5) and taken.mask.shape == (3, 8) and taken.layers == states.layers
    for b in range(3):
        for t in range(8):
            j = rows[b][t]
            assert taken.mask[b, t] == (j >= 0 and states.mask[b, j])
            for ours, theirs in zip((*taken.keys, *taken.values), (*states.keys, *states.values), strict=True):
                assert torch.equal(ours[b, :, t], theirs[b, :, j] if j >= 0 else torch.zeros(2, 5))


def test_take_of_every_position_is_the_same_states():
    states = make_states()
    taken = take(states, torch.arange(6).expand(3, 6))
    assert torch.equal(taken.mask, states.mask)
    for ours, theirs in zip((*taken.keys, *taken.values), (*states.keys, *states.values), strict=True):
        assert torch.equal(ours, theirs)


@given(st.lists(st.lists(st.integers(-2, 20), min_size=4, max_size=4), min_size=3, max_size=3))
def test_a_fraction_is_real_where_both_neighbours_are(rows):
    states, index = make_states(), torch.tensor(rows) / 4
    taken = take(states, index)
    for b in range(3):
        for t, u in enumerate(index[b].tolist()):
            low, high = int(max(u, 0)), min(5, -int(-u // 1))
            assert taken.mask[b, t] == (u >= 0 and states.mask[b, low] and states.mask[b, high])
            between = states.keys[1][b, :, low].lerp(states.keys[1][b, :, high], u - low)
            torch.testing.assert_close(taken.keys[1][b, :, t], between if u >= 0 else torch.zeros(2, 5))
    assert torch.equal(take(states, index.floor()).keys[0], take(states, index.floor().long()).keys[0])


def test_a_teacher_that_read_nothing_gives_nothing():
    nothing = make_states().map(lambda x: x[:, :, :0], mask=torch.ones(3, 0).bool())
    taken = take(nothing, torch.zeros(3, 4).long())
    assert taken.keys[0].shape == (3, 2, 4, 5) and not taken.mask.any() and taken.keys[0].eq(0).all()


def test_gradient_returns_to_the_positions_taken():
    states = make_states(layers=1)
    key = states.keys[0].clone().requires_grad_()
    taken = take(KVStates((key,), states.values, states.mask, (0,), 1), torch.tensor([[1, 1, -1]] * 3))
    (taken.keys[0] * taken.mask[:, None, :, None]).sum().backward()
    assert key.grad[:, :, 1].eq(2).all() and key.grad.sum() == key.grad[:, :, 1].sum()


def test_more_padding_changes_nothing():
    states, index = make_states(), torch.tensor([[0, 2, -1, 5], [3, 4, 5, -1], [0, 1, 2, 5]])
    expected = take(states, index)
    wide = states.map(lambda x: torch.nn.functional.pad(x, (0, 0, 0, 3), value=7.0))
    wide = wide.map(lambda x: x, mask=torch.nn.functional.pad(states.mask, (0, 3)))
    found = take(wide, torch.nn.functional.pad(index, (0, 2), value=-1))
    assert torch.equal(found.mask[:, :4], expected.mask) and not found.mask[:, 4:].any()
    for ours, theirs in zip((*found.keys, *found.values), (*expected.keys, *expected.values), strict=True):
        assert torch.equal(ours[:, :, :4], theirs)
