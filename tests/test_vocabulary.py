"""Tokens that two vocabularies share: by the bytes they stand for, whatever their names are."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kv_trainer.vocabulary import ALPHABET, meanings, shared_tokens


def sentencepiece(words: list[str]) -> PreTrainedTokenizerFast:
    tokens = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def test_the_alphabet_of_bytes_is_that_of_the_tokenizers() -> None:
    assert set(ALPHABET) == set(pre_tokenizers.ByteLevel.alphabet()) and len(set(ALPHABET.values())) == 256
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(" é東\n")[0][0]
    assert bytes(ALPHABET[c] for c in split) == " é東\n".encode()


def test_the_same_text_is_found_under_other_names(tiny_tokenizer) -> None:
    ours = tiny_tokenizer(120)
    text = {token: ours.decode([i]) for token, i in ours.get_vocab().items()}
    word = next(t for token, t in text.items() if token.startswith("\u0120") and len(t) > 2)
    theirs = sentencepiece([f"\u2581{word[1:]}", "a", "é"])
    pairs = dict(zip(*shared_tokens(ours, theirs), strict=True))
    names = theirs.convert_ids_to_tokens
    spaced = ours.convert_tokens_to_ids("\u0120" + word[1:])
    assert names(pairs[spaced]) == f"\u2581{word[1:]}"
    assert names(pairs[ours.convert_tokens_to_ids("a")]) == "a", "a token of its own, before the byte"
    assert names(pairs[ours.convert_tokens_to_ids("b")]) == "<0x62>"
    assert names(pairs[ours.eos_token_id]) == "</s>"
    assert len(set(pairs.values())) == len(pairs)


def test_runs_of_blanks_that_are_listed_as_added_stand_for_blanks(tiny_tokenizer) -> None:
    """As Gemma's; merges make the same tokens of blanks."""
    theirs = sentencepiece(["\u2581\u2581", "\u2581\u2581\u2581"])
    theirs.add_tokens([AddedToken("\u2581" * n, normalized=False) for n in (2, 3)])
    found = meanings(theirs)
    assert [found[b" " * n] for n in (2, 3)] == [theirs.convert_tokens_to_ids("\u2581" * n) for n in (2, 3)]
    ours = tiny_tokenizer(10)
    ours.add_tokens([AddedToken("\u2581\u2581", normalized=False)])
    assert "\u2581\u2581".encode() in meanings(ours), "of a byte-level vocabulary it is that sign"


def test_one_vocabulary_with_heads_of_other_widths_names_its_tokens(tiny_tokenizer) -> None:
    ours = tiny_tokenizer(40)
    assert shared_tokens(ours, tiny_tokenizer(40)) is None
    mine, theirs = shared_tokens(ours, tiny_tokenizer(40), same_width=False)
    assert mine == theirs == sorted(ours.get_vocab().values()) and len(meanings(ours)) == len(mine)


def test_wordpiece_and_added_tokens_are_told_by_their_text(tiny_tokenizer) -> None:
    pieces = ["[UNK]", "the", "##ing", "the##", ",", "two"]
    model = models.WordPiece({token: i for i, token in enumerate(pieces)}, unk_token="[UNK]")
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="[UNK]")
    words.add_tokens(["<think>"])
    words.add_tokens(["<|end|>"], special_tokens=True)
    assert meanings(words) == {
        "[UNK]": 0, b" the": 1, b"ing": 2, b" the##": 3, b",": 4, b" two": 5, b"<think>": 6, "<|end|>": 7,
    }  # fmt: skip
