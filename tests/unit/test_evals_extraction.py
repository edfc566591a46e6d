"""Natural replies as a labelled table: what a reader would take each for."""

import random

import pytest

from diffenc.evals.choices import extract_choice

COLORS = ["red", "blue", "green", "not one of these"]
SCENES = ["a red circle", "a blue square", "a green triangle", "a yellow star"]
COUNTS = ["2", "3", "4", "none of these"]
YES_NO = ["yes", "no"]
SIDES = ["left", "right"]

A, B, C, D, UNREAD = 0, 1, 2, 3, None

LETTERS = [
    ("B", B),
    ("b", B),
    ("B.", B),
    ("B)", B),
    ("(B)", B),
    ("( b )", B),
    ("[B]", B),
    ("{B}", B),
    ("'B'", B),
    ("\u201cB\u201d", B),
    ("**B**", B),
    ("`B`", B),
    ("__B__", B),
    ("Option B", B),
    ("option (b).", B),
    ("\uff08B\uff09", B),
    ("\uff22", B),
    ("$B$", B),
    (r"\boxed{B}", B),
    (r"$\boxed{\text{B}}$", B),
    (r"$$\boxed{(B)}$$", B),
    (r"\(B\)", B),
    ("<answer>B</answer>", B),
    ("<s> B</s>", B),
    ("\n\n B \n", B),
    ("Let me think.\n\nB", B),
    ("### Answer\nB", B),
    ("The correct answer is:\n\n(B)", B),
    ("B (blue)", B),
    ("B (red)", UNREAD),
    ("\u200bB\ufeff", B),
    ("\u00abB\u00bb", B),
    ("\u300cB\u300d", B),
    ('{"answer": "B"}', B),
    ("The answer is not A but B.", B),
    ("It's not (A), but rather (B)", B),
    ("The answer is not A but B or C", UNREAD),
    ("It's not that A but B", UNREAD),
    ("I doubt it's B", UNREAD),
    ("It lacks red.", UNREAD),
    ("It lacks red, and is blue.", B),
    ("A is the best but B is better.", UNREAD),
    ("B is better.", B),
    ("There is no doubt that it's B", B),
    ("A is correct.", A),
    ("I think A is wrong.", UNREAD),
    ("B is wrong. A is right.", A),
    ("The answer is b", B),
    ("the answer is a.", A),
    ("The answer is a\nlarge star", UNREAD),
    ("\u7b54\u6848\uff1aB", B),
    ("\u6b63\u786e\u7b54\u6848\u662fB\u3002", B),
    ("\u7b54\u6848\u4e0d\u662fB\u3002", UNREAD),
    ("Die Antwort ist B.", B),
    ("Die Antwort ist nicht B.", UNREAD),
    ("La respuesta es (B).", B),
    ("B\nThe picture shows it.", B),
    ("B. blue", B),
    ("b) blue", B),
    ("(b) blue", B),
    ("B: blue", B),
    ("B - blue", B),
    ("B, because it is", B),
    ("B because it is", B),
    ("a. red", A),
    ("a) red", A),
    ("(A) red", A),
    ("E", UNREAD),
    ("(E)", UNREAD),
    ("e) purple", UNREAD),
    ("Z", UNREAD),
    ("I", UNREAD),
    ("AB", UNREAD),
    ("B B", UNREAD),
    ("B.C.", UNREAD),
    ("A\nB", UNREAD),
    ("A, B", UNREAD),
    ("A/B", UNREAD),
    ("A or B", UNREAD),
    ("A and B", UNREAD),
    ("(A) or (B)", UNREAD),
    ("(A) or (B).", UNREAD),
    ("either (A) or (B), hard to say", UNREAD),
    ("B. red", UNREAD),
    ("", UNREAD),
    ("   \n", UNREAD),
    (None, UNREAD),
]

SENTENCES = [
    ("The answer is B.", B),
    ("The answer is B", B),
    ("the correct answer is: (B).", B),
    ("The correct answer is (b) blue.", B),
    ("The correct option would be B.", B),
    ("Answer: B", B),
    ("**Answer:** B", B),
    ("Answer - B", B),
    ("Final answer: (b)", B),
    ("The object(s) in the picture. The answer is (B)", B),
    ("The object(s) in the picture. The answer is (B).", B),
    ("Look at the circle(s), square(s) and area(r) (r). The answer is (B).", B),
    ("animal(a) seen; (B)", B),
    ("I think B.", B),
    ("I think it's B.", B),
    ("I believe the answer is B", B),
    ("I'd go with option B: blue", B),
    ("I choose (B).", B),
    ("I would answer with B.", B),
    ("My choice is (b) blue.", B),
    ("It is B.", B),
    ("It's not A, it's B", B),
    ("Therefore, B.", B),
    ("So, (B).", B),
    ("B is correct.", B),
    ("Option B is the right one.", B),
    ("(B) is the best answer, I think.", B),
    ("B. Option A is wrong because of its edge.", B),
    ("(B). (A) is wrong.", B),
    ("(A) is tempting, but the answer is (B).", B),
    ("not (A) but (B)", B),
    ("Neither (A) nor (C): the answer is (B).", B),
    ("Options A, C and D have other colours.\n\nThe answer is B", B),
    ("(A) red (B) blue (C) green\nAnswer: B", B),
    ("The answer is A because it has that colour.", A),
    ("We see two shapes. Answer: A", A),
    ("The answer is E.", UNREAD),
    ("The answer is not B.", UNREAD),
    ("It is not (B).", UNREAD),
    ("I don't think it's B.", UNREAD),
    ("I wouldn't choose B", UNREAD),
    ("B is not correct", UNREAD),
    ("(A) is wrong", UNREAD),
    ("Option A is wrong.", UNREAD),
    ("Is the answer B?", UNREAD),
    ("I cannot say whether it is A or B.", UNREAD),
    ("Answer: A, B", UNREAD),
    ("The answer is A or B.", UNREAD),
    ("I think both A and B.", UNREAD),
    ("The answer is A. Or rather, the answer is B.", UNREAD),
    ("The correct answer is:\n(A) red\n(B) blue\n(C) green", UNREAD),
    ("The answer is (A) red or (B) blue", UNREAD),
    ("(A) red (B) blue (C) green", UNREAD),
    ("Neither (A) nor (B).", UNREAD),
    ("a cat sits there", UNREAD),
    ("A cat sits there", UNREAD),
    ("The answer is A cat", UNREAD),
    ("I see a B-side of a record", UNREAD),
    ("Vitamin C, iron and plan B", UNREAD),
    ("I am sorry, I cannot help with that.", UNREAD),
    ("Which one do you mean?", UNREAD),
]

WORDS = [
    ("blue", COLORS, B),
    ("Blue.", COLORS, B),
    ("BLUE!", COLORS, B),
    ("It is blue.", COLORS, B),
    ("It is blue, not red.", COLORS, B),
    ("not one of these", COLORS, D),
    ("It is *blue*", COLORS, B),
    ("a blue square", SCENES, B),
    ("The picture shows a blue square.", SCENES, B),
    ("A blue square", SCENES, B),
    ("A red circle is there", SCENES, A),
    ("yes", YES_NO, A),
    ("Yes, it is.", YES_NO, A),
    ("Yes, there is no other.", YES_NO, A),
    ("No, it is not.", YES_NO, B),
    ("no", YES_NO, B),
    ("No doubt, yes", YES_NO, A),
    ("I would say yes.", YES_NO, A),
    ("The answer is no.", YES_NO, B),
    ("2", COUNTS, A),
    ("two", COUNTS, A),
    ("There are two of them.", COUNTS, A),
    ("There are 3 squares", COUNTS, B),
    ("Three.", COUNTS, B),
    ("There is one square.", ["1", "2"], A),
    ("one", ["one", "two"], A),
    ("to the right", SIDES, B),
    ("It moved left.", SIDES, A),
    ("It is redder than the other", COLORS, UNREAD),
    ("incredible", COLORS, UNREAD),
    ("a red-orange thing", COLORS, UNREAD),
    ("bluetooth", COLORS, UNREAD),
    ("It is not red.", COLORS, UNREAD),
    ("It isn't blue", COLORS, UNREAD),
    ("red or blue", COLORS, UNREAD),
    ("red and blue", COLORS, UNREAD),
    ("I cannot tell whether it is red.", COLORS, UNREAD),
    ("neither", COLORS, UNREAD),
    ("yes and no", YES_NO, UNREAD),
    ("Yes... no.", YES_NO, UNREAD),
    ("There is no doubt", YES_NO, UNREAD),
    ("There is no red circle", YES_NO, UNREAD),
    ("I would not say yes", YES_NO, UNREAD),
    ("eyes", YES_NO, UNREAD),
    ("I don't know", YES_NO, UNREAD),
    ("2.5", COUNTS, UNREAD),
    ("23", COUNTS, UNREAD),
    ("2 or 3", COUNTS, UNREAD),
    ("between 2-3", COUNTS, UNREAD),
    ("3,000", COUNTS, UNREAD),
    ("twofold", COUNTS, UNREAD),
    ("The one on the left", ["one", "two"], UNREAD),
    ("The right answer is unclear", SIDES, UNREAD),
    ("bright", SIDES, UNREAD),
]


@pytest.mark.parametrize(("reply", "index"), LETTERS + SENTENCES, ids=repr)
def test_letters(reply, index):
    found = extract_choice(reply, COLORS)
    assert (None if found is None else found[0]) == index


@pytest.mark.parametrize(("reply", "options", "index"), WORDS, ids=repr)
def test_words(reply, options, index):
    found = extract_choice(reply, options)
    assert (None if found is None else found[0]) == index


def released(answer, count):
    """BLINK's released rule where it asks no language model, and reads no hidden second letter."""
    known = [f"({letter})" for letter in "ABCDE"[:count]]
    if answer in "ABCDE"[:count] and answer:
        return known.index(f"({answer})")
    for part in (answer.rsplit("\n\n", 1)[-1], answer):
        words = {word for word in part.split() if word in known}
        hidden = {mark for mark in known if mark in part or mark.lower() in part}
        if len(words) == 1:
            return known.index(*words) if words == hidden else "hidden"
    return "asks"


def test_the_released_rule_decides_wherever_it_does():
    rng = random.Random(7)
    words = "(A) (B) (C) (D) (E) B the answer is red (A). (B), square(s) because"
    pieces = [*words.split(), "\n\n", "\n"]
    decided = 0
    for _ in range(3000):
        answer = " ".join(rng.choices(pieces, k=rng.randint(1, 7)))
        expected = released(answer, 3)
        if isinstance(expected, int):
            found = extract_choice(answer, COLORS[:3])
            assert found is not None, answer
            assert found[0] == expected, answer
            decided += 1
    assert decided > 500


@pytest.mark.parametrize("letter", "EFGXZ")
def test_a_letter_that_no_option_has_is_never_read(letter):
    for reply in (
        "{}",
        "({})",
        "{}.",
        "Answer: {}",
        "The answer is ({}).",
        "I choose {}",
        "{}) x",
    ):
        assert extract_choice(reply.format(letter), COLORS) is None


def test_any_text_gives_an_option_or_nothing():
    rng = random.Random(3)
    alphabet = "AaBbCc()[]{}.,:;!?'\"-\n\t \\$*_<>0129/\u00a0\u2028\u0301\uff08noredblue"
    for _ in range(2000):
        reply = "".join(rng.choices(alphabet, k=rng.randint(0, 40)))
        found = extract_choice(reply, ["red", "blue"])
        assert found is None or found[0] in (0, 1)


def test_a_long_reply_takes_no_long_time():
    for filler in (" ", "\n", "(", "a ", "B, ", "\\boxed{", "not "):
        extract_choice(filler * 3000 + "x", COLORS)
