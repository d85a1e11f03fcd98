"""Text to ids and back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.vocabulary import Vocabulary

BYTES = Vocabulary("bytes")
GREEK = Vocabulary("characters", "\n abßλ🙂")


@given(st.binary())
def test_any_bytes_survive_a_vocabulary_of_bytes(data):
    ids = np.frombuffer(data, np.uint8)
    assert BYTES.decode_bytes(ids) == data
    assert BYTES.decode(ids) == data.decode("utf-8", "replace")


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=30))
def test_any_text_survives_a_vocabulary_made_of_it(text):
    vocabulary = Vocabulary.from_counts({ord(c): 1 for c in text + "x"}, 1)
    ids = vocabulary.encode(text)
    assert ids.dtype == vocabulary.dtype and len(ids) == len(text)
    assert vocabulary.decode(ids) == text


def test_ids_of_characters_are_sorted_by_code_point_after_the_unknown():
    assert GREEK.size == 8
    assert GREEK.encode("\n abßλ🙂").tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert GREEK.encode("aд\U0010ffffZ", unknown="map").tolist() == [3, 0, 0, 0]
    assert GREEK.decode(np.array([3, 0, 7])) == "a\N{REPLACEMENT CHARACTER}🙂"


def test_min_count_leaves_out_what_is_rarer():
    assert Vocabulary.from_counts({97: 2, 98: 1, 99: 3}, 2).characters == "ac"
    assert Vocabulary.from_counts({97: 2, 98: 1, 99: 3}, 2, always="bad").characters == "abcd"
    with pytest.raises(ValueError, match="min_count=4 leaves no character: the most frequent one occurs 3 times"):
        Vocabulary.from_counts({97: 2, 99: 3}, 4)


def test_a_symbol_not_in_the_vocabulary_is_named_with_its_position_and_a_remedy():
    with pytest.raises(ValueError, match=r"'é' \(U\+00E9\) at position 2 is not in the vocabulary: .*unknown='map'"):
        GREEK.encode("abéa")
    with pytest.raises(ValueError, match=r"U\+D800\) at position 1 has no UTF-8"):
        BYTES.encode("a\ud800")


def test_bytes_that_the_system_could_not_decode_are_those_bytes_again():
    assert BYTES.encode(b"a\xff".decode("utf-8", "surrogateescape")).tolist() == [97, 255]


@pytest.mark.parametrize("characters, dtype", [(255, "<u1"), (256, "<u2"), (65535, "<u2"), (65536, "<u4")])
def test_the_dtype_is_the_smallest_that_holds_every_id(characters, dtype):
    text = "".join(map(chr, range(0x10000, 0x10000 + characters)))
    vocabulary = Vocabulary("characters", text)
    assert vocabulary.dtype == np.dtype(dtype)
    assert vocabulary.encode(text[-1]).tolist() == [characters]


@pytest.mark.parametrize(
    ("text", "of_bytes", "of_characters"),
    [
        (r"a\n\r\t\f\v\0\\", b"a\n\r\t\f\v\0\\", "a\n\r\t\f\v\0\\"),
        (r"\x00\xe9\xC3", b"\0\xe9\xc3", "\0\xe9\xc3"),
        (r"\xc3\xa9é", "éé".encode(), "\xc3\xa9é"),
        (r"\u00e9\U0001F600", "é😀".encode(), "é😀"),
        (r"\\n\\\n", rb"\n" + b"\\\n", "\\n\\\n"),
        ("\udce9\n", b"\xe9\n", None),
        ("<|endoftext|>", b"<|endoftext|>", "<|endoftext|>"),
        ("", b"", ""),
    ],
    ids=range(8),
)
def test_escapes_stand_for_symbols_and_in_bytes_for_bytes(text, of_bytes, of_characters):
    assert BYTES.encode_escaped(text).tobytes() == of_bytes
    if of_characters is not None:
        vocabulary = Vocabulary("characters", "".join(sorted(set(of_characters)))) if of_characters else GREEK
        assert vocabulary.decode(vocabulary.encode_escaped(text)) == of_characters


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        *(("\\", "\\"), ("a\\", "\\"), ("\\\n", "\\\n"), (r"\q", r"\q"), (r"\N{DASH}", r"\N"), (r"\012", r"\0")),
        *((r"\x", r"\x"), (r"\xg0", r"\x"), (r"\u12", r"\u"), (r"\ud800", r"\ud800"), (r"\U00110000", r"\U00110000")),
    ],
)
@pytest.mark.parametrize("vocabulary", [BYTES, GREEK], ids=["bytes", "characters"])
def test_what_is_no_escape_is_refused_with_those_that_are(vocabulary, text, wrong):
    with pytest.raises(ValueError) as caught:
        vocabulary.encode_escaped(text)
    allowed = r"\n \r \t \f \v \0 \xHH \uHHHH \UHHHHHHHH, or \\ for a backslash"
    assert str(caught.value) == f"{wrong} is not an escape: use {allowed}"


def test_an_escape_for_what_is_not_in_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"^'z' \(U\+007A\) at position 1 is not in the vocabulary$"):
        GREEK.encode_escaped(r"λ\x7a")


@given(st.binary(max_size=40), st.integers(1, 5))
def test_the_decoder_gives_the_same_text_however_the_ids_arrive(data, step):
    decoder, ids = BYTES.decoder(), np.frombuffer(data, np.uint8)
    text = "".join(decoder.feed(ids[i : i + step]) for i in range(0, len(ids), step)) + decoder.flush()
    assert text == data.decode("utf-8", "replace")


def test_the_decoder_holds_an_unfinished_sequence_back():
    decoder, euro = BYTES.decoder(), BYTES.encode("€")
    assert [decoder.feed(euro[i : i + 1]) for i in range(3)] == ["", "", "€"]
    assert decoder.feed(euro[:2]) == "" and decoder.flush() == "\N{REPLACEMENT CHARACTER}"
    characters = GREEK.decoder()
    assert characters.feed(np.array([5, 0])) == "ß\N{REPLACEMENT CHARACTER}" and characters.flush() == ""


def test_json_brings_the_same_vocabulary_back_and_nothing_else_passes():
    for vocabulary in (BYTES, GREEK):
        again = Vocabulary.from_json(vocabulary.to_json())
        assert again == vocabulary and again.digest == vocabulary.digest
    assert BYTES.digest != GREEK.digest != Vocabulary("characters", "ab").digest
    for tree in (
        None,
        {},
        {"kind": "words"},
        {"kind": "bytes", "characters": ""},
        {"kind": "characters"},
        {"kind": "characters", "characters": ""},
        {"kind": "characters", "characters": "ba"},
        {"kind": "characters", "characters": "aa"},
        {"kind": "characters", "characters": ["a"]},
    ):
        with pytest.raises(ValueError):
            Vocabulary.from_json(tree)
