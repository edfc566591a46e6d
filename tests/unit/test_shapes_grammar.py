"""The grammar that judges sampled texts has all of the world's texts and none of their ruins."""

import random
import re

import pytest
from transformers import PreTrainedTokenizerFast

from diffenc.shapes.captions import captions
from diffenc.shapes.pairs import mmvp_pairs, winoground_items
from diffenc.shapes.questions import conversation, multiple_choice, questions
from diffenc.shapes.scenes import sample_scene, sample_scenes
from shapes_tools import shapes_tools

NAMES = ("documents", "grammar", "make_lm_tokenizer")
MARKS = re.compile(r"(\n|<[^>]*>)")
NEEDED = re.compile(  # words without which no sentence of the world stands
    "an?|the|and|is|are|of|to|at|on|in|or|there|we|see|do|does|have|how|many|what|which|where|"
    "left|right|above|below|over|under|picture|photo|background|color|size"
)
NOUNS = ("circle", "square", "triangle", "star", "object")
ODD_TEXTS = ("  Odd\t spacing\n\n", "l'œuvre, 日本語 🎨", "an <image> in it", "")


@pytest.fixture(scope="module")
def tools():
    with shapes_tools(*NAMES) as modules:
        yield modules


@pytest.fixture(scope="module")
def is_grammatical(tools):
    return tools["grammar"].is_grammatical


@pytest.fixture(scope="module")
def documents(tools):
    rng = random.Random("documents")
    return [tools["documents"].document(sample_scene(rng), rng) for _ in range(2000)]


def test_every_document_is_grammatical(is_grammatical, documents):
    assert [text for text in documents if not is_grammatical(text)] == []


def test_documents_of_all_kinds_are_there_and_seldom_repeat(documents):
    talks = [text for text in documents if text.startswith("<|user|>")]
    assert 0.3 < len(talks) / len(documents) < 0.6
    assert any("describe the picture." in text for text in talks)
    assert any("<eos>" in text for text in talks)
    assert any("(c)" in text for text in documents)
    assert len(set(documents)) > 0.9 * len(documents)


def test_the_texts_of_the_package_itself_are_grammatical(is_grammatical, tools):
    rng = random.Random(0)
    for number, scene in enumerate(sample_scenes(60, seed=71)):
        texts = captions(scene, 4, seed=number)
        for question in questions(scene, seed=number):
            lettered = multiple_choice(question, rng, options=rng.randint(2, 4))
            texts += [question.text, f"{question.text} {question.answer}"]
            texts += [lettered.text, f"{lettered.text} {lettered.answer}"]
        said = [turn["value"] for turn in conversation(scene, turns=4, seed=number)]
        texts.append(tools["documents"].chat(list(zip(said[::2], said[1::2], strict=True))))
        assert [text for text in texts if not is_grammatical(text)] == []
    for pair in mmvp_pairs(10, seed=72) + winoground_items(10, seed=73):
        assert all(map(is_grammatical, pair.captions))


def without_one(words, rng):
    places = [i for i, word in enumerate(words) if NEEDED.fullmatch(word.strip(".,?"))]
    if not places:
        return None
    place = rng.choice(places)
    return words[:place] + words[place + 1 :]


def exchanged(words, rng):
    """Two neighbours exchanged, but not across the end of a question."""
    places = [
        i for i in range(len(words) - 1) if words[i] != words[i + 1] and not words[i].endswith("?")
    ]
    if not places:
        return None
    i = rng.choice(places)
    return [*words[:i], words[i + 1], words[i], *words[i + 2 :]]


def doubled(words, rng):
    i = rng.randrange(len(words))
    return [*words[: i + 1], *words[i:]]


def replaced(words, rng, change):
    """One of the words that `change` changes."""
    places = [i for i, word in enumerate(words) if change(word) != word]
    if not places:
        return None
    i = rng.choice(places)
    return [*words[:i], change(words[i]), *words[i + 1 :]]


def other_article(words, rng):
    return replaced(words, rng, lambda word: {"a": "an", "an": "a"}.get(word, word))


def other_verb(words, rng):
    return replaced(words, rng, lambda word: {"is": "are", "are": "is"}.get(word, word))


def other_number(words, rng):
    def change(word):
        bare = word.rstrip(",?")
        ending = word[len(bare) :]
        if bare in NOUNS:
            return f"{bare}s{ending}"
        return bare[:-1] + ending if bare[:-1] in NOUNS and bare.endswith("s") else word

    return replaced(words, rng, change)


@pytest.mark.parametrize(
    "corrupt", [without_one, exchanged, doubled, other_article, other_verb, other_number]
)
def test_one_wrong_word_in_a_document_is_noticed(is_grammatical, documents, corrupt):
    rng = random.Random(corrupt.__name__)
    tried, missed = 0, []
    for text in documents:
        pieces = MARKS.split(text)
        place = rng.choice([i for i in range(0, len(pieces), 2) if pieces[i]])
        words = corrupt(pieces[place].split(" "), rng)
        if words is None:
            continue
        tried += 1
        ruin = "".join([*pieces[:place], " ".join(words), *pieces[place + 1 :]])
        if is_grammatical(ruin):
            missed.append(ruin)
    assert tried > 400
    assert missed == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a",
        "a red",
        "red circle",
        "a red big circle",
        "a red circle left of",
        "a circle left of a square above a star",
        "a red circle and",
        "a red circle, a blue star",
        "there are a red circle",
        "there is two red circles",
        "a red circle at the left",
        "a red circle on a red background",
        "four red circles",
        "A red circle",
        "a red circle.",
        "a red circle\n",
        "a red circle\n\na star",
        "a red  circle",
        "a red bicycle",
        "what color is the circle? large",
        "how many circles are there? zero",
        "what color is the circle? (a) red",
        "what color is the circle? (a) red (b) red",
        "what color is the circle? (b) red (a) blue",
        "what color is the circle? (a) red (b) blue (c)",
        "what color is the circle? (a) red (b) blue red",
        "what color is the circle? (a) red (b) large (a)",
        "what color is the circle?\nwhat size is the circle?",
        "what color is the circle? red\na red circle",
        "<|user|>\nwhat color is the circle?",
        "<|user|>\nwhat color is the circle?\n<|assistant|>\n",
        "<|user|>\nwhat color is the circle?\n<|assistant|>\ntwo",
        "<|user|>\nwhat color is the circle?\n<|assistant|>\nred<eos><|user|>",
        "<|user|>\nwhat color is the circle?\n<|assistant|>\nred<|user|>\nwhich shape is red?",
        "<|user|>\ndescribe the picture.\n<|assistant|>\nyes",
        "<|user|>\na red circle\n<|assistant|>\na red circle",
        "<|assistant|>\nred",
    ],
)
def test_other_texts_are_refused(is_grammatical, text):
    assert not is_grammatical(text)


@pytest.mark.parametrize(
    "text",
    [
        "an orange star",
        "we see two small red circles, a big star and an orange square",
        "is the red circle to the left of the star? no",
        "what color is the circle? (a) red (b) blue (c) green (d) orange (d)",
        "what color is the circle?",
        "a red circle\na circle\nwhat color is the circle? red",
        "<|user|>\n<image>\ndescribe the picture.\n<|assistant|>\na star<eos>",
    ],
)
def test_typical_texts_are_accepted(is_grammatical, text):
    assert is_grammatical(text)


def test_the_tokenizer_gives_back_any_text_and_keeps_words_whole(tools, documents):
    tokenizer = tools["make_lm_tokenizer"].build(documents)
    unknown, start = tokenizer.token_to_id("<unk>"), tokenizer.token_to_id("<bos>")
    for text in [*documents[:50], *ODD_TEXTS]:
        first, *ids = tokenizer.encode(text).ids
        assert first == start
        assert unknown not in ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    for text in documents[:50]:
        pieces = tokenizer.encode(text).tokens[1:]
        assert len(pieces) == len(re.findall(r"<[^>]*>| ?[a-z]+|\n| ?\(|[^\s\w]", text))


def test_the_chat_template_makes_the_conversations_of_the_documents(tools):
    made = tools["make_lm_tokenizer"]
    settings = made.configuration()
    assert settings.pop("tokenizer_class") == "PreTrainedTokenizerFast"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made.build(["a star"]), **settings)
    turns = [("what size is the star?", "large"), ("is there a red star?", "no")]
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == f"<bos>{tools['documents'].chat(turns)}<eos>"
    open_ended = tokenizer.apply_chat_template(
        messages[:3], tokenize=False, add_generation_prompt=True
    )
    assert f"{open_ended}no<eos>" == whole
    parts = [{"type": "image"}, {"type": "text", "text": "what size is the star?"}]
    shown = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert shown == "<bos><|user|>\n<image>\nwhat size is the star?\n"
