"""Words are found where the text encoder sees them, or refused."""

import pytest
from tests import builders

from diffenc.errors import PromptError
from diffenc.inputs.words import shared_positions, word_token_positions, words_of, words_of_ids


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = builders.tiny_tokenizer()
    tokenizer.add_tokens(["<cat-toy>", "<cat-toy>_1", "<cat-toy>_2", "<one>"])
    return tokenizer


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a red, blue circle", "blue"),
        ("(red)", "red"),
        ("“red”", "red"),
        ("a RED circle", "red"),
        ("a red circle", "ReD CirCLE"),
        ("a red\n  circle", "red circle"),
        ("a red-hot circle", "red-hot"),
        ("a red - hot circle", "red-hot"),
        ("a red-hot circle", "hot"),
        ("don't", "don't"),
        ("a café left", "café"),
        ("a cafe\u0301 left", "café"),
        ("a café left", "cafe\u0301"),
        ("12 red 2 blue", "2"),
        ("in 2024 a circle", "2024"),
        ("a 4k photo", "4k"),
        ("a 🔴 circle", "🔴"),
        ("猫 と 犬", "と"),
        ("ÄPFEL left", "äpfel"),
        ("हिन्दी circle", "हिन्दी"),
        ("snake_case circle", "snake"),
        ("a <one> circle", "circle"),
        ("<one>circle", "circle"),
        ("circle<one>", "circle"),
    ],
)
def test_the_tokens_of_a_word_spell_it(tokenizer, text, word):
    positions = word_token_positions(tokenizer, text, word)
    own = tokenizer(word).input_ids
    ids = tokenizer(text).input_ids
    assert list(positions) == list(range(positions[0], positions[0] + len(own) - 2))
    assert [ids[position] for position in positions] == own[1:-1]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("12 circles", "2"),
        ("12 circles", "1"),
        ("in 2024", "20"),
        ("in 2024", "02"),
        ("abc123", "abc"),
        ("abc123", "123"),
        ("reddish", "red"),
        ("a bored", "red"),
        ("don't", "t"),
        ("🔴🔵", "🔴"),
        ("red!!?", "?"),
        ("cafe\u0301", "cafe"),
        ("हिन्दी", "ह"),
        ("a <cat-toy>", "cat"),
        ("a <cat-toy>_1", "<cat-toy>"),
        ("red", ""),
        ("red", "  "),
        ("", "red"),
    ],
)
def test_what_is_no_word_of_a_text_is_refused(tokenizer, text, word):
    with pytest.raises(PromptError, match="is no word of") as caught:
        word_token_positions(tokenizer, text, word)
    assert f"Did you mean {word!r}" not in str(caught.value)


def test_chinese_letters_are_words_where_the_tokenizer_parts_them(tokenizer):
    together, apart = "猫と犬", "猫 と 犬"
    if tokenizer(together).input_ids == tokenizer(apart).input_ids:  # before transformers 5
        positions = word_token_positions(tokenizer, together, "と")
        assert positions == word_token_positions(tokenizer, apart, "と")
    else:
        with pytest.raises(PromptError, match="is no word of"):
            word_token_positions(tokenizer, together, "と")


def test_a_number_inside_another_does_not_count(tokenizer):
    text = "22 circles, 2 squares, 12 photos and 2"
    positions = word_token_positions(tokenizer, text, "2")
    assert len(positions) == 2
    ids = tokenizer(text).input_ids
    assert positions[1] == len(ids) - 2
    assert word_token_positions(tokenizer, text, "2", occurrence=1) == positions[1:]
    with pytest.raises(PromptError, match="stands 2 times"):
        word_token_positions(tokenizer, text, "2", occurrence=2)


def test_all_vectors_of_an_inversion_are_its_places(tokenizer):
    text = "a <cat-toy> left of a <cat-toy> circle"
    assert word_token_positions(tokenizer, text, "<cat-toy>") == (2, 3, 4, 8, 9, 10)
    assert word_token_positions(tokenizer, text, "circle") == (11,)
    assert word_token_positions(tokenizer, text, "left of") == (5, 6)
    written_out = "a <cat-toy> <cat-toy>_1 <cat-toy>_2 circle"
    assert word_token_positions(tokenizer, written_out, "circle") == (5,)
    assert word_token_positions(tokenizer, written_out, "<cat-toy>_1") == (3,)
    # A slow tokenizer does not know an inversion in capitals: it spells "<", "one" and ">".
    capitals = tokenizer("A <ONE> circle").input_ids
    places = (2,) if tokenizer.is_fast else tuple(range(2, len(capitals) - 2))
    assert word_token_positions(tokenizer, "A <ONE> circle", "<one>") == places


def test_the_end_of_a_cut_prompt(tokenizer):
    text = "red " * 72 + "<cat-toy> circle"  # 1 to 72, 73 to 75, 76 is the end token's
    assert word_token_positions(tokenizer, text, "<cat-toy>") == (73, 74, 75)
    with pytest.raises(PromptError, match="'circle' was cut off: it is token 76"):
        word_token_positions(tokenizer, text, "circle")
    with pytest.raises(PromptError, match="'<cat-toy>' was cut off: it is token 74"):
        word_token_positions(tokenizer, f"red {text}", "<cat-toy>")
    assert len(word_token_positions(tokenizer, f"circle {text}", "circle")) == 1


def test_words_of_a_text_hold_added_tokens_marks_and_numbers(tokenizer):
    text = "A <cat-toy>, हिन्दी and <one>s in 2024, don't <cat-toy>"
    words = ["A", "<cat-toy>", "हिन्दी", "and", "<one>", "s", "in", "2024", "don't"]
    assert words_of(text, tokenizer) == words
    for word in words:
        assert word_token_positions(tokenizer, text, word)
    assert "cat" in words_of(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The circle is left of the triangle", ["The", "circle", "is", "left", "of", "triangle"]),
        ("Circle, circle or CIRCLE?", ["Circle", "or"]),
        ("e\u0301toile \u00e9toile", ["e\u0301toile"]),
        ("a red_circle and_a", ["a", "red", "circle", "and"]),
    ],
)
def test_a_word_in_two_spellings_is_one_by_the_text_and_by_its_ids(tokenizer, text, words):
    assert words_of(text, tokenizer) == words
    ids = tokenizer(text, add_special_tokens=False).input_ids
    by_ids = {
        tuple(each + 1 for each in places) for places in words_of_ids(tokenizer, ids).values()
    }
    by_text = [word_token_positions(tokenizer, text, word) for word in words]
    assert set(by_text) == by_ids
    assert len(set(by_text)) == len(words)


def test_tokenizers_of_one_model_have_to_agree(tokenizer):
    plain = builders.tiny_tokenizer(pad_token="!")
    assert shared_positions([tokenizer, plain], "a red circle", "circle") == (3,)
    with pytest.raises(PromptError, match="add textual inversions to all of its tokenizers"):
        shared_positions([tokenizer, plain], "a <one> circle", "circle")


@pytest.mark.parametrize("side", ["padding_side", "truncation_side"])
def test_a_tokenizer_that_moves_the_tokens_is_refused(side):
    other = builders.tiny_tokenizer()
    setattr(other, side, "left")
    with pytest.raises(PromptError, match="are known where both are 'right'"):
        word_token_positions(other, "a red circle", "red")
