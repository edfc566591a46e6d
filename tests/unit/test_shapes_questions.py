"""Every question has the answer that a second reader finds in the scene."""

import random
import re
from collections import Counter, defaultdict

import pytest

from diffenc.errors import ConfigError
from diffenc.shapes.questions import (
    QUESTION_KINDS,
    conversation,
    multiple_choice,
    questions,
    sample_question,
    without_names,
)
from diffenc.shapes.scenes import Scene, SceneObject, sample_scenes
from shapes_oracle import UngrammaticalError, answer, is_true

SCENES = list(sample_scenes(300, seed=41))
ASKED = [
    (scene, question)
    for number, scene in enumerate(SCENES)
    for question in questions(scene, seed=number)
]
THING = SceneObject("circle", "red", "small", 0.2, 0.5, 0.13)
OTHER = SceneObject("star", "blue", "large", 0.7, 0.5, 0.2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("what color is the star?", "blue"),
        ("which shape is red?", "circle"),
        ("what size is the blue star?", "large"),
        ("how many objects are there?", "two"),
        ("where is the circle?", "on the left"),
        ("is there a red star?", "no"),
        ("is the circle left of the star?", "yes"),
        ("is the circle right of the star?", "no"),
    ],
)
def test_the_reader_itself_knows_the_answers(text, expected):
    assert answer(text, Scene((THING, OTHER)))[0] == expected


def test_the_reader_itself_refuses_what_is_no_question():
    with pytest.raises(UngrammaticalError):
        answer("why is the circle?", Scene((THING, OTHER)))


def test_every_answer_is_right_and_the_subjects_are_those_asked_about():
    for scene, question in ASKED:
        expected, subjects = answer(question.text, scene)
        assert (question.answer, set(question.subjects)) == (expected, subjects), question


def test_the_answer_is_one_of_the_choices_and_all_of_them_differ():
    for _, question in ASKED:
        assert question.answer in question.choices
        assert len(set(question.choices)) == len(question.choices) >= 2


def test_every_kind_is_asked_and_every_answer_occurs():
    answers = defaultdict(set)
    choices = defaultdict(set)
    for _, question in ASKED:
        answers[question.kind].add(question.answer)
        choices[question.kind].update(question.choices)
    assert set(answers) == set(QUESTION_KINDS)
    assert answers == choices


@pytest.mark.parametrize("kind", ["presence", "relation"])
def test_yes_and_no_are_about_equally_often_right(kind):
    tally = Counter(question.answer for _, question in ASKED if question.kind == kind)
    assert set(tally) == {"yes", "no"}
    assert 0.4 < tally["yes"] / tally.total() < 0.6


def test_a_sampled_question_is_right_and_of_any_kind_that_the_scene_allows():
    rng = random.Random(0)
    tally = Counter()
    for scene in SCENES * 2:
        question = sample_question(scene, rng)
        assert question.answer == answer(question.text, scene)[0]
        tally[question.kind] += 1
    assert set(tally) == set(QUESTION_KINDS)
    assert max(tally.values()) < 3 * min(tally.values())


def test_equal_seeds_give_equal_questions_and_other_seeds_others():
    scene = SCENES[0]
    assert questions(scene, seed=1) == questions(scene, seed=1)
    assert questions(scene, seed=1) != questions(scene, seed=2)


def test_twins_that_cannot_be_named_are_not_asked_about_one_by_one():
    twins = Scene((THING, SceneObject("circle", "red", "large", 0.7, 0.5, 0.2)))
    kinds = {question.kind for question in questions(twins)}
    assert kinds == {"count", "presence"}


@pytest.mark.parametrize("options", [2, 3, 4])
def test_a_lettered_question_keeps_its_answer_among_different_options(options):
    rng = random.Random(0)
    letters = set()
    for scene, question in ASKED[:400]:
        lettered = multiple_choice(question, rng, options=options)
        shown = dict(re.findall(r"(\([a-d]\)) ([a-z ]+?)(?= \(|$)", lettered.text))
        assert lettered.text.startswith(f"{question.text} (a) ")
        assert shown[lettered.answer] == answer(question.text, scene)[0]
        assert set(shown.values()) <= set(question.choices)
        assert len(set(shown.values())) == min(options, len(question.choices))
        assert lettered.choices == tuple(shown)
        assert (lettered.kind, lettered.subjects) == (question.kind, question.subjects)
        letters.add(lettered.answer)
    assert len(letters) == options


@pytest.mark.parametrize("options", [1, 0, 5])
def test_a_number_of_options_without_sense_is_refused(options):
    with pytest.raises(ConfigError, match=f"2 to 4, got {options}"):
        multiple_choice(ASKED[0][1], random.Random(0), options=options)


def test_a_conversation_takes_turns_begins_with_the_image_and_tells_the_truth():
    described = 0
    for number, scene in enumerate(SCENES):
        messages = conversation(scene, turns=3, seed=number)
        assert [message["from"] for message in messages] == ["human", "gpt"] * 3
        texts = [message["value"] for message in messages]
        assert texts[0].startswith("<image>\n")
        texts[0] = texts[0].removeprefix("<image>\n")
        assert not any("<image>" in text for text in texts)
        assert len(set(texts[::2])) == 3
        for asked, said in zip(texts[::2], texts[1::2], strict=True):
            if asked == "describe the picture.":
                described += 1
                assert is_true(said, scene)
            else:
                assert said == answer(asked, scene)[0]
    assert 0 < described < 3 * len(SCENES)


def test_a_long_conversation_ends_when_everything_is_asked():
    scene = SCENES[0]
    messages = conversation(scene, turns=1000)
    assert len(messages) == 2 * (len(questions(scene)) + 1)
    assert conversation(scene, turns=2, seed=3) == conversation(scene, turns=2, seed=3)


@pytest.mark.parametrize("objects", [(), (THING,) * 10], ids=len)
def test_scenes_without_words_are_refused(objects):
    scene = Scene(objects)
    with pytest.raises(ConfigError, match=f"1 to 9 objects, this one has {len(objects)}"):
        questions(scene)
    with pytest.raises(ConfigError, match="1 to 9 objects"):
        sample_question(scene, random.Random(0))
    with pytest.raises(ConfigError, match="1 to 9 objects"):
        conversation(scene)


@pytest.mark.parametrize("turns", [0, -2])
def test_a_conversation_without_turns_is_refused(turns):
    with pytest.raises(ConfigError, match=f"1 turn or more, got {turns}"):
        conversation(SCENES[0], turns=turns)


def talk(number, scene, **options):
    """Pairs of a question, without its mark, and an answer."""
    texts = [turn["value"] for turn in conversation(scene, seed=number, **options)]
    texts[0] = texts[0].removeprefix("<image>\n")
    return list(zip(texts[::2], texts[1::2], strict=True))


def test_lettered_turns_stand_anywhere_and_their_letter_is_that_of_the_right_option():
    letters, places = defaultdict(Counter), Counter()
    for number, scene in enumerate(SCENES):
        pairs = talk(number, scene, turns=2, lettered=1)
        assert len(pairs) == 3
        (place,) = (k for k, (text, _) in enumerate(pairs) if "(a)" in text)
        text, said = pairs.pop(place)
        question, _, options = text.partition("? ")
        shown = dict(re.findall(r"(\([a-d]\)) ([a-z ]+?)(?= \(|$)", options))
        assert shown[said] == answer(f"{question}?", scene)[0]
        assert pairs == talk(number, scene, turns=2)  # the others are what they were
        letters[len(shown)][said] += 1
        places[place] += 1
    assert set(places) == {0, 1, 2}
    for count, tally in letters.items():  # no letter is a better guess than another
        assert len(tally) == count
        assert max(tally.values()) < tally.total() / count + 3 * tally.total() ** 0.5 / 2


@pytest.mark.parametrize("even", [False, True])
def test_kinds_of_questions_are_even_where_that_is_asked_for(even):
    kinds, allowed = Counter(), Counter()
    for number, scene in enumerate(SCENES):
        known = {question.text: question.kind for question in questions(scene, seed=number)}
        allowed.update(set(known.values()))
        (text, _) = talk(number, scene, turns=1, even=even)[0]
        if text != "describe the picture.":
            kinds[known[text]] += 1
    shares = [kinds[kind] / allowed[kind] for kind in QUESTION_KINDS]
    assert (max(shares) < 2.5 * min(shares)) is even


def test_a_negative_number_of_lettered_turns_is_refused():
    with pytest.raises(ConfigError, match="0 or more, got -1"):
        conversation(SCENES[0], lettered=-1)


def test_without_names_a_question_says_what_is_asked_for_alone():
    requests = {
        "color": {"what color?"},
        "shape": {"what shape?"},
        "size": {"what size?"},
        "count": {"how many?"},
        "position": {"where?"},
        "presence": {"is there?"},
        "relation": {"left of?", "right of?", "above?", "below?"},
    }
    by_kind = defaultdict(set)
    for _scene, question in ASKED:
        by_kind[question.kind].add(without_names(question.text))
        if question.kind == "relation":
            assert without_names(question.text).rstrip("?") in question.text
    assert by_kind == requests
    assert without_names("describe the picture.") == "describe the picture."
