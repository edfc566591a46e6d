"""Which option an answer means. The rules are these and no others; no model is asked."""

import re
from collections.abc import Sequence
from typing import Literal

from diffenc.errors import ConfigError
from diffenc.evals.choices.statements import (
    LETTERS,
    Statement,
    goes_on,
    is_refused,
    letter_alone,
    opening,
    statements,
)
from diffenc.evals.choices.wording import begins_with, by_words, plain_text, words_of

Rule = Literal["letter", "brackets", "phrase", "words"]

READING = 3
"""Number of these rules; it changes when answers are read otherwise."""

_STATED: tuple[Rule, ...] = ("letter", "brackets", "phrase")

_TOKEN = re.compile(r"\([A-Z]\)")
_MARKED = re.compile(
    r"(?<![\w)\]])[(\[]\s*(?i:(?:option|choice|answer)\s+)?([A-Za-z])\s*[)\]](?!\w)"
)
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|never|neither|nor|cannot|than|of)|n't)\s+"
    r"(?:(?:be|is|either|an?|the|answer|option|choice|image|point|box)\s+)*$",
    re.IGNORECASE,
)


def extract_choice(answer: str | None, options: Sequence[str]) -> tuple[int, Rule] | None:
    """The index of the option that an answer means, and the rule that found it.

    The rules are tried in this order. A letter counts only if an option has it, but one that is
    stated and that no option has leaves the answer unread.

    1. "letter": the answer is a letter, as in "b", "(B)", "B." or "option B".
    2. "brackets": one letter stands in brackets between spaces, "(B)", in the last paragraph, or
       else in the answer, and no other is in brackets there.
    3. "letter" or "phrase": the answer states a letter: on a line of its own, at its beginning with
       a mark ("B. because ..."), or in words ("the answer is B", "Answer: B", "I choose option B",
       "B is correct"). All statements must name the same letter, and the words of another option
       must not follow it.
    4. "brackets": the only letter in brackets that is not denied ("not (b)"), in the answer or else
       in its last paragraph, whatever stands beside the brackets but a word: "object(s)".
    5. "words": the words of one option alone stand in the answer, as whole words that are not
       denied ("it is not red"); of options of which one holds the other, the longer one counts.
       Numbers up to twelve may be in letters or digits.

    Args:
        answer: Text that a model answered; None counts as silence.
        options: Words of the options, in the order of the letters.

    Returns:
        None where no rule finds exactly one option, as for "A or B": the answer is wrong, and
        counted as unread.

    Raises:
        ConfigError: Fewer than two options, or more than ten.

    Source:
        Rules 1 and 2 are those of BLINK's released evaluation, which asks a language model where
        these end at rules 3 to 5. There "(A) or (B)." is A, since a full stop hides the second
        letter; here it is unread.
    """
    if not 2 <= len(options) <= len(LETTERS):
        raise ConfigError(f"a question has 2 to {len(LETTERS)} options, got {len(options)}")
    text = plain_text(answer or "")
    letters = LETTERS[: len(options)]
    alone = letter_alone(text)
    if alone is not None and alone in letters:
        return letters.index(alone), "letter"
    if (letter := _between_spaces(answer or "", letters)) is not None:
        return letters.index(letter), "brackets"
    begins = None if _repeats_options(text, options) else opening(text)
    stated = statements(text) if alone is None else []
    if begins is not None and len(begins.letters) == 1:
        stated += [begins] if begins.rule == "letter" or not stated else []
    if stated:
        return _agreed(stated, text, options)
    if marked := _marked(text, letters):
        letter = _only(marked) or _only(_marked(_last_paragraph(text), letters))
        return None if letter is None else (letters.index(letter), "brackets")
    index = None if begins else by_words(text, options)
    return None if index is None else (index, "words")


def _between_spaces(answer: str, letters: str) -> str | None:
    """The letter that the released rule finds, unless another one hides beside a mark."""
    for part in (answer.split("\n\n")[-1], answer):
        tokens = {word[1] for word in part.split() if _TOKEN.fullmatch(word) and word[1] in letters}
        if len(tokens) == 1:
            marked = _marked(plain_text(part), letters)
            letter = _only(marked)
            return letter if tokens == marked.keys() else None
    return None


def _agreed(
    stated: Sequence[Statement], text: str, options: Sequence[str]
) -> tuple[int, Rule] | None:
    """Option that all statements name, if it is one and no other option's words follow."""
    letters = frozenset[str]().union(*(each.letters for each in stated))
    index = LETTERS.find(next(iter(letters))) if len(letters) == 1 else -1
    if not 0 <= index < len(options):
        return None
    rests = [text[each.end :] for each in stated]
    if any(begins_with(rest, options) not in (None, index) for rest in rests):
        return None
    if any(goes_on(rest, options[index]) for rest in rests):
        return None
    rules = {each.rule for each in stated}
    return index, next(rule for rule in _STATED if rule in rules)


def _repeats_options(text: str, options: Sequence[str]) -> bool:
    """Whether a text begins by repeating the options: "(A) red (B) blue"."""
    said = words_of(text)
    repeated = [w for k in (0, 1) for w in (LETTERS[k].lower(), *words_of(options[k]))]
    return said[: len(repeated)] == repeated


def _marked(text: str, letters: str) -> dict[str, bool]:
    """Letters in brackets, and whether each is somewhere not denied."""
    marks: dict[str, bool] = {}
    for match in _MARKED.finditer(text):
        letter = match[1].upper()
        if letter in letters:
            denied = _DENIED_BEFORE.search(text, 0, match.start()) or is_refused(text, match.end())
            marks[letter] = marks.get(letter, False) or not denied
    return marks


def _only(marked: dict[str, bool]) -> str | None:
    kept = [letter for letter, meant in marked.items() if meant]
    return kept[0] if len(kept) == 1 else None


def _last_paragraph(text: str) -> str:
    return re.split(r"\n\s*\n", text)[-1]
