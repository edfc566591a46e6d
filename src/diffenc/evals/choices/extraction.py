"""Which option an answer means. The rules are these and no others; no model is asked."""

import re
from collections.abc import Sequence
from typing import Literal

from diffenc.errors import ConfigError

Rule = Literal["letter", "brackets", "phrase", "words"]

_LETTERS = "ABCDEFGHIJ"
_WHOLE = re.compile(r"[\s\"'*]*(?:option\s+)?\(?([a-z])\)?[\s\"'*.:,]*", re.IGNORECASE)
_LEADING = re.compile(r"[\s\"'*]*(?:option\s+)?(?:\(([A-Za-z])\)|([A-Z])[).:](?=\s)|([A-Z])\n)")
_BRACKETS = re.compile(r"\(([A-Za-z])\)")
_PHRASE = re.compile(
    r"\b(?i:answer|option|choice)(?:\s+is|\s*:)?\s*[\"'*]*([A-Z])(?![\w'-])(?!\s+[a-z])"
)


def extract_choice(answer: str, options: Sequence[str]) -> tuple[int, Rule] | None:
    """The index of the option that an answer means, and the rule that found it.

    The rules are tried in this order, and the first that finds one option decides:

    1. "letter": the answer is a letter, as in "b", "(B)", "B." or "option B".
    2. "brackets": the only letter in brackets, "(B)", in the answer, or else in its last paragraph.
    3. "letter" again: it begins with a letter and a mark, as in "B. because ...".
    4. "phrase": "answer is B", "answer: B", "option B", with one letter in all such phrases.
    5. "words": the words of one option alone stand in the answer; of options of which one holds the
       other, the longer one counts.

    Args:
        answer: What a model said.
        options: Their words, in the order of the letters.

    Returns:
        None where no rule finds exactly one option: the answer is wrong, and counted as unread.

    Raises:
        ConfigError: Fewer than two options, or more than ten.

    Source:
        Rules 1 and 2 are those of BLINK's released evaluation, which goes on with a language model
        where these end at rules 3 to 5.
    """
    if not 2 <= len(options) <= len(_LETTERS):
        raise ConfigError(f"a question has 2 to {len(_LETTERS)} options, got {len(options)}")
    if (whole := _WHOLE.fullmatch(answer)) and (found := _index(whole[1], options)) is not None:
        return found, "letter"
    paragraphs = [part for part in re.split(r"\n\s*\n", answer) if part.strip()]
    for part in (answer, paragraphs[-1] if paragraphs else ""):
        if (found := _only(_BRACKETS.findall(part), options)) is not None:
            return found, "brackets"
    if leading := _LEADING.match(answer):
        found = _index(next(filter(None, leading.groups())), options)
        if found is not None and not _BRACKETS.search(answer):
            return found, "letter"
    if (found := _only(_PHRASE.findall(answer), options)) is not None:
        return found, "phrase"
    if (found := _by_words(answer, options)) is not None:
        return found, "words"
    return None


def _index(letter: str, options: Sequence[str]) -> int | None:
    index = _LETTERS.find(letter.upper())
    return index if 0 <= index < len(options) else None


def _only(letters: Sequence[str], options: Sequence[str]) -> int | None:
    """The option that all these letters name, if it is one."""
    found = {_index(letter, options) for letter in letters}
    return found.pop() if len(found) == 1 else None


def _by_words(answer: str, options: Sequence[str]) -> int | None:
    said = f" {_words(answer)} "
    wanted = [_words(option) for option in options]
    if len(set(wanted)) < len(wanted):
        return None
    for index in sorted(range(len(options)), key=lambda k: -len(wanted[k])):
        # What a longer option took is gone: "not red" leaves no "red".
        if wanted[index] and f" {wanted[index]} " in said:
            rest = said.replace(f" {wanted[index]} ", "  ")
            others = (wanted[k] for k in range(len(options)) if k != index)
            return None if any(other and f" {other} " in rest for other in others) else index
    return None


def _words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.lower()))
