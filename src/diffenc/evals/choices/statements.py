"""Letters that an answer states: alone, at its beginning, or in words."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from diffenc.evals.choices.wording import is_denied, option_pattern

LETTERS = "ABCDEFGHIJ"

_ALONE = re.compile(
    r"[\s\"'.,:;!-]*(?:option\s+|choice\s+|letter\s+)?"
    r"[(\[{]?\s*([A-Za-z])\s*[)\]}]?[\s\"'.,:;!]*",
    re.IGNORECASE,
)

# Bare letters are capitals, or end a sentence; "A" and "I" are words where others follow that give
# no reason.
_REASON = r"(?:because|since|as|for|due|based|given|or|and)\b"
_LETTER = (
    r"(?:[(\[]\s*([A-Za-z])\s*[)\]]|([B-HJ-Z]|[AI](?!\s+(?!is\b|" + _REASON + r")[a-z])"
    r"|[a-hj](?=[\"']?(?:[.!](?:\s|$)|\s*(?:\n\n|$)))))"
    r"(?!\w|[.'-]\w)"
)
_NOUN = r"(?i:(?:(?:the|my)\s+)?(?:(?:correct|right|best|final)\s+)?"
_NOUN += r"(?:option|choice|letter|answer)(?:\s+is|\s*:)?\s+)?"
_NAMED = rf"{_NOUN}[\"']?{_LETTER}"

_NEXT = re.compile(rf"[\"']?\s*(?:,?\s*(?:or|and|nor)\b|[,/&+])\s*(?:either\s+)?{_NAMED}")
_FURTHER = re.compile(rf"[\s,;/\"']*(?i:(?:or|and)\s+)?{_NAMED}")
_BEFORE = re.compile(
    r"(?i:"
    r"\b(?:answer|choice|option|letter|response|solution|selection|(?:correct|right|best)\s+one)"
    r"\s*(?:'s|is|was|=|(?:would|should|must|will)\s+be)\s*:?\s*"
    r"(?:probably\s+|definitely\s+|clearly\s+|most\s+likely\s+)?"
    r"|\b(?:answer|choice|final|result|selection|response|conclusion)[\"']?\s*[:=\u2013\u2014-]+\s*"
    r"|\banswer\s+(?:with\s+)?"
    r"|\b(?:choose|chose|pick|picked|select|selected|opt\s+for|go(?:ing)?\s+(?:with|for)|"
    r"went\s+with|vote\s+for|say|think|believe|guess|suggest)\s*:?\s*"
    r"(?:that\s+)?(?:it(?:'s|\s+is)\s+)?"
    r"|\bit(?:'s|\s+(?:is|must\s+be|should\s+be|has\s+to\s+be))\s+"
    r"|\b(?:probably|definitely|certainly|clearly|therefore|thus|hence|so)\b,?\s+"
    r"|(?:\bnot|n't)\s+(?:option\s+|choice\s+)?[(\[]?[A-J][)\]]?,?\s+but\s+(?:rather\s+)?(?:it's\s+)?"
    r"|答案\s*(?:是|为|:)?\s*"
    r"|\b(?:Antwort|respuesta|réponse|risposta|resposta)(?:\s*:|\s+(?:ist|es|est|è|é)\b)\s*"
    rf"){_NAMED}"
)
_AFTER = re.compile(
    rf"{_NAMED}\s+(?i:(?:is|would\s+be|must\s+be|seems(?:\s+to\s+be)?)\s+"
    r"(?:clearly\s+|definitely\s+)?(?:the\s+)?(?:most\s+)?"
    r"(?:correct|right|best|better|accurate|answer|likely|appropriate)\b)"
)
_NO_CHOICE = re.compile(
    r"[\s\"')\]]*(?:\?|(?i:is|are|was|isn't|has|can|cannot|can't|may|might|does|doesn't|would|will|"
    r"looks|seems|appears)\b)"
)
_LIST_BEFORE = re.compile(r"(?:\b(?:or|and|nor)|[/&])\s*$", re.IGNORECASE)

_REFUSED = re.compile(
    r"[\s\"')\]]*(?:is|was|seems|looks)(?:n't|\s+(?:not|wrong|incorrect|false))\b", re.IGNORECASE
)

_OPENING = re.compile(rf"[\"']?(?i:(?:option|choice|letter)\s+)?[\"']?{_LETTER}")
_MARK = re.compile(rf"[\"']?(?:\s*[.:,)\u2013\u2014](?=\s|$)|\s+-\s|\n|$|\s+{_REASON}|(?<!A)\s+\()")
_SMALL = re.compile(r"[\"']?([a-z])[).:](?=\s|$)")


@dataclass(frozen=True, slots=True)
class Statement:
    """Letters that are stated together; several leave the choice open.

    Attributes:
        letters: Letters of the options, as capitals.
        end: Position in the text where the letters end.
        rule: Form of the statement: "letter" for one alone or at the beginning, "brackets" for one
            in brackets at the beginning without a mark, "phrase" for one in words.
    """

    letters: frozenset[str]
    end: int
    rule: str


def letter_alone(text: str) -> str | None:
    """The letter that is all of a text, as a capital."""
    match = _ALONE.fullmatch(text)
    return match[1].upper() if match else None


def statements(text: str) -> list[Statement]:
    """Every statement of a text of `plain_text`, but for its beginning."""
    return [*_lines(text), *_phrases(text)]


def opening(text: str) -> Statement | None:
    """The statement that a text of `plain_text` begins with, as in "B. because" or "A or B"."""
    if small := _SMALL.match(text):
        return Statement(frozenset(small[1].upper()), small.end(), "letter")
    match = _OPENING.match(text)
    if match is None:
        return None
    marked = _MARK.match(text, match.end()) is not None
    statement = _with_more(text, match, "letter" if marked else "brackets")
    bare = match[1] is None
    if is_refused(text, statement.end) or (len(statement.letters) == 1 and bare and not marked):
        return None
    return statement


def goes_on(rest: str, option: str) -> bool:
    """Whether other letters follow the words of an option: "red, (B) blue" or "red or (B) blue".

    Args:
        rest: Text that follows the option's letter.
        option: Words of the option.
    """
    said = option_pattern(option).search(rest)
    if said is None or re.search(r"\w", rest[: said.start()]):
        return False
    return _FURTHER.match(rest, said.end()) is not None


def is_refused(text: str, end: int) -> bool:
    """Whether what ends there is called wrong: "(A) is not right"."""
    return _REFUSED.match(text, end) is not None


def _lines(text: str) -> Iterator[Statement]:
    start = 0
    for line in text.split("\n"):
        if (letter := letter_alone(line)) is not None:
            yield Statement(frozenset(letter), start + len(line), "letter")
        start += len(line) + 1


def _phrases(text: str) -> Iterator[Statement]:
    for match in _BEFORE.finditer(text):
        statement = _with_more(text, match, "phrase")
        if not is_denied(text, match.start()) and not _NO_CHOICE.match(text, statement.end):
            yield statement
    for match in _AFTER.finditer(text):
        before = text[: match.start()]
        if not is_denied(text, match.start()) and not _LIST_BEFORE.search(before):
            yield Statement(frozenset(_capital(match)), match.end(), "phrase")


def _with_more(text: str, match: re.Match[str], rule: str) -> Statement:
    """A statement with the letters that follow by "or", "and" or a comma."""
    letters, end = {_capital(match)}, match.end()
    while more := _NEXT.match(text, end):
        letters.add(_capital(more))
        end = more.end()
    return Statement(frozenset(letters), end, rule)


def _capital(match: re.Match[str]) -> str:
    return str(match[1] or match[2]).upper()
