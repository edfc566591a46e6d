"""Answers as plain text, and the words of options in them."""

import re
import unicodedata
from collections.abc import Sequence

_TAG = re.compile(r"</?[A-Za-z]+>")
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit)\s*\{([^{}]*)\}")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{([^{}]*)\}")
_MARKUP = re.compile(r"[*`$]|__+|~~|\\[()\[\]]|^[ \t]*[#>]+", re.MULTILINE)
_QUOTES = str.maketrans("\u201c\u201d\u2018\u2019\u00ab\u00bb\u300c\u300d", '""\'\'""""')
_UNSEEN = re.compile("[\u200b-\u200f\u2060\ufeff]")

# A number keeps its decimals, and a word its hyphens and apostrophes.
_WORD = re.compile(r"(?:(?<=\d)[.,:/](?=\d)|(?<=[^\W_])['-](?=[^\W_])|[^\W_])+")
_EDGES = r"(?<![\w'-])(?<!\d[.,:/])", r"(?![\w'-]|[.,:/]\d)"
_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)

_CLAUSE = re.compile(
    r"[.,;:!?()\n\u2013\u2014]|\b(?:but|and|so|because|since|although|while|whereas|yet)\b",
    re.IGNORECASE,
)
_DENIAL = re.compile(
    r"\b(?:not(?!\s+only\b)|never|neither|nor|none|cannot|without|lack(?:s|ing)?|hardly|"
    r"unlikely|rather than|(?<!no )(?<!a )(?<!without )doubt|instead of|wrong|incorrect|"
    r"no(?!\s+(?:doubt|question)\b))\b|n't\b",
    re.IGNORECASE,
)

_UNDECIDED = re.compile(
    r"(?:\b(?:cannot|unable|impossible|difficult|hard|not\s+possible|not\s+able)|n't)\s+"
    r"(?:to\s+)?(?:\w+\s+)?(?:determine|tell|say|know|decide|choose|answer|identify|be\s+sure)\b",
    re.IGNORECASE,
)
_LISTED = re.compile(r"(?:\b(?:or|nor)|/)\s*$", re.IGNORECASE)

# Words that are often no answer: "no doubt", "the one on the left", "the right answer".
_LOOKS = {
    "no": (r"", r"(?=\s*(?:[.,;:!?\n\u2013\u2014\"')-]|$))"),
    "one": (
        r"(?<!\bthe )(?<!\bthis )(?<!\bthat )(?<!\bwhich )(?<!\bother )(?<!\bright )(?<!\bleft )"
        r"(?<!\bfirst )(?<!\bsecond )(?<!\bthird )(?<!\bcorrect )(?<!\beach )(?<!\bany )",
        r"(?!\s+(?:of|on|in|at|that|which|with|who|or)\b)",
    ),
    "right": (r"(?<!\ball )", r"(?!\s+(?:answer|option|choice|one|response)\b)"),
}


def plain_text(answer: str) -> str:
    """An answer without markup: emphasis, tags, LaTeX; wide letters and brackets as ASCII."""
    text = _UNSEEN.sub("", unicodedata.normalize("NFKC", answer).translate(_QUOTES))
    text = text.replace("\r\n", "\n")
    text = _TAG.sub("\n", text)
    text = _BOXED.sub(r"\nAnswer: \1\n", _WRAPPED.sub(r"\1", text))
    text = re.sub(r"[^\S\n]+", " ", _MARKUP.sub("", text))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers of a text in order."""
    return _WORD.findall(plain_text(text).lower())


def is_denied(text: str, place: int) -> bool:
    """Whether a "not" or the like stands before a place, in the same clause."""
    start = max((match.end() for match in _CLAUSE.finditer(text, 0, place)), default=0)
    return _DENIAL.search(text, start, place) is not None


def by_words(text: str, options: Sequence[str]) -> int | None:
    """The only option whose words stand in a text, unless they are denied or left open.

    Args:
        text: Answer without markup, as `plain_text` returns it.
        options: Words of the options.
    """
    every = [words_of(option) for option in options]
    if len(set(map(tuple, every))) < len(every):
        return None
    if (said := words_of(text)) in every:
        return every.index(said)
    if _UNDECIDED.search(text):
        return None
    meant = []
    for index in sorted(range(len(options)), key=lambda k: -len(every[k])):
        places = list(option_pattern(options[index]).finditer(text)) if every[index] else []
        if any(_LISTED.search(text, 0, match.start()) for match in places):
            return None
        if any(not is_denied(text, match.start()) for match in places):
            meant.append(index)
        for match in places:  # what a longer option took is gone: "not red" leaves no "red"
            blank = " " * (match.end() - match.start())
            text = text[: match.start()] + blank + text[match.end() :]
    return meant[0] if len(meant) == 1 else None


def begins_with(text: str, options: Sequence[str]) -> int | None:
    """The option whose words a text begins with, the longest where several do."""
    best: tuple[int, int] | None = None
    said = words_of(text)
    for index, option in enumerate(options):
        words = words_of(option)
        if words and said[: len(words)] == words and (best is None or len(words) > best[0]):
            best = len(words), index
    return None if best is None else best[1]


def option_pattern(option: str) -> re.Pattern[str]:
    """Matches the words of an option in a text of `plain_text`, as whole words."""
    plain = plain_text(option).lower()
    words = list(_WORD.finditer(plain))
    parts: list[str] = []
    end = 0
    for match in words:
        if parts:  # a comma between words of the answer parts them, unless the option has it
            parts.append(r"[\s\"']+" if plain[end : match.start()].isspace() else r"[\W_]+")
        parts.append(_either_way(match[0]))
        end = match.end()
    before, after = _LOOKS.get(words[0][0], ("", "")) if len(words) == 1 else ("", "")
    return re.compile(rf"{_EDGES[0]}{before}{''.join(parts)}{_EDGES[1]}{after}", re.IGNORECASE)


def _either_way(word: str) -> str:
    """A word as a pattern; small numbers in digits and in letters."""
    if word.isdecimal() and word.isascii() and int(word) < len(_NUMBERS):
        name = _NUMBERS[int(word)]
        before, after = _LOOKS.get(name, ("", ""))
        return rf"(?:{re.escape(word)}|{before}{name}{after})"
    if word in _NUMBERS:
        return rf"(?:{word}|{_NUMBERS.index(word)})"
    return re.escape(word)
