"""Phrases for which a text encoder has no tokens are counted and told."""

import copy
import json

import pytest

import dit_builders
from diffenc import DiffusionEncoder
from diffenc.errors import ConfigError
from diffenc.grounding import PhraseDataset, phrase_tokens, read_phrases
from diffenc.grounding.phrase_tokens import check_phrases_have_tokens
from diffenc.grounding.samples import GroundedImage, GroundedText, Phrase
from phrases_data import pictures, write

FAR = "a red circle " + "and a blue square " * 12 + "and a triangle"
"""Its triangle stands behind the 32 tokens that the bundled model reads."""
SOUND = ("a red circle", "circle")


@pytest.fixture(scope="module")
def encoder():
    return DiffusionEncoder.from_pretrained("shapes")


@pytest.fixture
def said(monkeypatch):
    """Warnings, whatever a library has made of the loggers of this process meanwhile."""
    lines = []
    monkeypatch.setattr(
        phrase_tokens.logger, "warning", lambda line, *values: lines.append(line % values)
    )
    return lines


def samples(folder, *phrases):
    """Samples of texts and words, or spans, of them."""
    images = pictures(folder / "images", "a.png", size=(64, 64))
    lines = []
    for text, words in phrases:
        named = {"words": words} if isinstance(words, str) else {"span": list(words)}
        record = {"image": "a.png", "text": text, "phrases": [{**named, "boxes": [[4, 4, 40, 40]]}]}
        lines.append(json.dumps(record))
    return read_phrases(write(folder / "p.jsonl", "\n".join(lines)), images)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("two triangles", "triangle"),
        ("two triangles", "tri"),
        ("two triangles", (4, 8)),
        ("two triangles", (6, 13)),
        ("a red circle!!", "!!"),
    ],
)
def test_a_phrase_without_a_whole_token_is_refused(encoder, tmp_path, said, text, words):
    some = samples(tmp_path, SOUND, (text, words))
    with pytest.raises(
        ConfigError, match=rf"1 of 2 phrases name no word .*whole tokens .* in '{text}'\)"
    ):
        PhraseDataset(some, encoder)
    dataset = PhraseDataset(some, encoder, skip_broken=True)
    assert "1 of 2 phrases name no word" in "\n".join(said)
    assert dataset[0]["masks"].keys() == {3}
    with pytest.raises(ConfigError, match="no phrase can be taught: 1 of 1 phrases name no word"):
        PhraseDataset(some[1:], encoder, skip_broken=True)


def test_a_phrase_behind_the_limit_is_told_with_what_reads_it(encoder, tmp_path, said):
    some = samples(tmp_path, SOUND, (FAR, "triangle"), (FAR, "red circle"))
    PhraseDataset(some, encoder)
    assert "1 of 3 phrases stand behind the 32 tokens" in "\n".join(said)
    assert "'triangle' in 'a red circle and" in "\n".join(said)
    with pytest.raises(ConfigError, match=r"no phrase can be taught: 1 of 1 .* long_prompts"):
        PhraseDataset(some[1:2], encoder)
    said.clear()
    chunked = DiffusionEncoder.from_pretrained("shapes", long_prompts="chunk")
    assert PhraseDataset(some[1:2], chunked)[0]["masks"]
    assert not said


def test_nothing_is_said_of_sound_phrases(encoder, tmp_path, said):
    some = samples(tmp_path, SOUND, ("two triangles", "triangles"), ("a red circle.", "circle"))
    PhraseDataset(some, encoder)
    assert not said


def test_phrases_that_name_nothing_at_all_are_refused(encoder, tmp_path):
    images = pictures(tmp_path / "images", "a.png")
    record = {"image": "a.png", "text": "a photo", "phrases": []}
    some = read_phrases(write(tmp_path / "p.jsonl", json.dumps(record)), images)
    with pytest.raises(ConfigError, match="no phrase can be taught: there is none"):
        PhraseDataset(some, encoder)


def many(count, tmp_path, *last):
    """Sound phrases by the hundred, and others behind them."""
    image = tmp_path / "a.png"
    texts = [(f"a red circle {'x' * (place % 9)} {place}", (6, 12)) for place in range(count)]
    return [
        GroundedImage(text, image, (GroundedText(text, (Phrase((span,), ()),)),))
        for text, span in [*texts, *last]
    ]


def test_behind_a_thousand_phrases_those_in_doubt_are_still_found(tiny_tokenizer, tmp_path, said):
    limit = tiny_tokenizer.model_max_length
    far, accents = "circle " * limit, "\u00e1" * (limit - 10)  # two tokens a letter
    last = [
        ("two circles", (4, 10)),
        ("circle, \u00e1circle", (9, 15)),
        (far, (len(far) - 7, len(far) - 1)),
        ("a (circle)", (3, 9)),
        (f"{accents} circle", (len(accents) + 1, len(accents) + 7)),
    ]
    some = many(1100, tmp_path, *last)
    options = {"windows": False, "skip_broken": True}
    check_phrases_have_tokens(some, [tiny_tokenizer], **options)
    assert "2 of 1105 phrases name no word" in "\n".join(said)
    assert "'circle' in 'two circles'" in "\n".join(said)
    assert "2 of 1105 phrases stand behind" in "\n".join(said)
    with pytest.raises(ConfigError, match="2 of 1105 phrases name no word"):
        check_phrases_have_tokens(some, [tiny_tokenizer], **{**options, "skip_broken": False})


def test_of_many_sound_phrases_a_thousand_are_looked_up(tiny_tokenizer, tmp_path, monkeypatch):
    asked = []

    def positions(tokenizers, text, start, stop, *, windows):
        asked.append(text)
        return (1,)

    monkeypatch.setattr(phrase_tokens, "span_positions", positions)
    some = many(1100, tmp_path)
    check_phrases_have_tokens(some + some, [tiny_tokenizer], windows=True, skip_broken=False)
    assert len(asked) == 1000


def test_what_does_not_hold_for_a_tokenizer_is_not_relied_on(tiny_tokenizer, tmp_path, monkeypatch):
    asked = []

    def positions(tokenizers, text, start, stop, *, windows):
        asked.append(text)
        return () if text.endswith((" 3", " 1050")) else (1,)

    monkeypatch.setattr(phrase_tokens, "span_positions", positions)
    some = many(1100, tmp_path)
    with pytest.raises(ConfigError, match="2 of 1100 phrases name no word"):
        check_phrases_have_tokens(some, [tiny_tokenizer], windows=True, skip_broken=False)
    assert len(set(asked)) == 1100


def test_words_within_a_token_that_was_added_are_found(tiny_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["blue square"])
    some = many(1100, tmp_path, ("a blue square", (7, 13)), ("a blue square", (2, 13)))
    with pytest.raises(ConfigError, match=r"1 of 1102 phrases .* \('square' in 'a blue square'\)"):
        check_phrases_have_tokens(some, [tokenizer], windows=False, skip_broken=False)


def test_text_encoders_that_split_texts_differently_are_found_at_once(tiny_tokenizer, tmp_path):
    pair = [tiny_tokenizer, dit_builders.tiny_t5_tokenizer()]
    with pytest.raises(ConfigError, match="no phrase can be taught: 20 of 20"):
        check_phrases_have_tokens(many(20, tmp_path), pair, windows=False, skip_broken=True)
