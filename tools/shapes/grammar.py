"""Tells whether a text is grammatical in the miniature world's language: its form, not its truth.

Written from the language alone: nothing here comes from `diffenc.shapes`. Where the world has one
form, no other is accepted ("a big red circle", never "a red big circle"). An answer must be of the
kind that its question asks for; whether it is right cannot be told without the scene.

    text         = captions | question | captions? answered+ | turn (<eos> turn)*     (line by line)
    turn         = <|user|> captions? question | <|user|> "describe the picture."
                   and then <|assistant|> answer or caption
    question     = one of `_QUESTIONS`, with 2 to 4 lettered options or none
"""

import re

_COLOR = "(?:red|green|blue|yellow|purple|orange)"
_SHAPE = "(?:circle|square|triangle|star)"
_PLACE = "(?:on the left|on the right|at the top|at the bottom|in the middle)"
_RELATION = "(?:left of|right of|to the left of|to the right of|above|over|below|under)"

_DESCRIBED = f"(?:(?:small|large|big) )?(?:{_COLOR} )?{_SHAPE}"
_ONE = f"(?:a (?![aeiou])|an (?=[aeiou])){_DESCRIBED}"
_MANY = f"(?:two|three) {_DESCRIBED}s"
_THING = f"(?:{_ONE}|{_MANY})"
_LIST = f"{_THING}(?:, {_THING})? and {_THING}"
_CAPTION = re.compile(
    f"(?:a picture of |a photo of |we see )?(?:{_THING}|{_LIST})"
    f"|there is {_ONE}|there are (?:{_MANY}|{_LIST})"
    f"|{_ONE} {_PLACE}|{_ONE} on a (?:white|gray|black) background"
    f"|{_ONE} {_RELATION} {_ONE}"
)

_NAME = f"(?:{_COLOR} )?{_SHAPE}"
_NAMES = f"(?:{_COLOR} )?(?:{_SHAPE}|object)s"
_QUESTIONS = tuple(
    (re.compile(rf"(?:{question})\?"), re.compile(answer))
    for question, answer in {
        f"what color is the {_SHAPE}|which color does the {_SHAPE} have": _COLOR,
        f"what shape is the {_COLOR} object|which shape is {_COLOR}": _SHAPE,
        f"is the {_NAME} small or large|what size is the {_NAME}": "small|large",
        f"how many {_NAMES} (?:are there|do we see)": "one|two|three",
        f"where is the {_NAME}": _PLACE,
        f"is there {_ONE}|do we see {_ONE}": "yes|no",
        f"is the {_NAME} {_RELATION} the {_NAME}": "yes|no",
    }.items()
)
_OPTION = re.compile(r" \(([a-d])\) ([a-z ]+?)(?= \(|$)")
_TURN = re.compile(r"<\|user\|>\n((?:.+\n)+)<\|assistant\|>\n(.+)")


def is_grammatical(text: str) -> bool:
    """Whether the whole text is a caption, a question, lines of these, or a conversation.

    Args:
        text: Without the marks that begin and end a document; a conversation may keep its last one.
    """
    if text.startswith("<|user|>"):
        return is_conversation(text)
    lines = text.split("\n")
    while lines and is_caption(lines[0]):
        lines.pop(0)
    if [text] == lines and answers_to(text) is not None:
        return True
    return all(_is_answered(line) for line in lines)


def is_caption(line: str) -> bool:
    """Whether one line describes a scene."""
    return _CAPTION.fullmatch(line) is not None


def answers_to(asked: str) -> re.Pattern[str] | None:
    """What an answer must look like; None if nothing is asked.

    Args:
        asked: A question, with or without lettered options.
    """
    question, mark, listed = asked.partition("?")
    for form, answer in _QUESTIONS:
        if form.fullmatch(question + mark):
            return _letters(listed, answer) if listed else answer
    return None


def is_conversation(text: str) -> bool:
    """Whether every turn asks something and is answered in kind."""
    turns = [_TURN.fullmatch(turn) for turn in text.removesuffix("<eos>").split("<eos>")]
    for number, turn in enumerate(turns):
        if turn is None:
            return False
        *before, asked = turn[1].splitlines()
        if number == 0 and before[:1] == ["<image>"]:
            before.pop(0)
        if asked == "describe the picture." and not before:
            if not is_caption(turn[2]):
                return False
            continue
        expected = answers_to(asked)
        if expected is None or expected.fullmatch(turn[2]) is None:
            return False
        if before and (number > 0 or not all(map(is_caption, before))):
            return False
    return True


def _letters(listed: str, answer: re.Pattern[str]) -> re.Pattern[str] | None:
    """The letters shown, as a pattern.

    None unless they run from (a) and the options differ and are of the kind asked for.
    """
    options = _OPTION.findall(listed)
    shown = "".join(letter for letter, _ in options)
    words = {word for _, word in options}
    whole = "".join(f" ({letter}) {word}" for letter, word in options) == listed
    if not (whole and shown in ("ab", "abc", "abcd") and len(words) == len(shown)):
        return None
    if not all(map(answer.fullmatch, words)):
        return None
    return re.compile(rf"\([{shown}]\)")


def _is_answered(line: str) -> bool:
    """Whether a line is a question and its answer: the blank between them may be any one in it."""
    for blank in re.finditer(" ", line):
        expected = answers_to(line[: blank.start()])
        if expected is not None and expected.fullmatch(line[blank.end() :]):
            return True
    return False
