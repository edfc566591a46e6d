"""Which words of a phrase name what it is about: a rule of thumb for English, without a parser."""

import re

from diffenc.grounding.samples import Span

_ARTICLES = (
    *("a", "an", "the", "this", "that", "these", "those", "his", "her", "its", "their", "my"),
    *("your", "our", "some", "there", "it", "he", "she", "they", "i", "you", "we"),
)
_OPENERS = (
    *("of", "in", "on", "at", "by", "to", "from", "with", "without", "near", "behind", "under"),
    *("above", "below", "beside", "next", "between", "over", "inside", "outside", "against"),
    *("along", "across", "around", "through", "into", "onto", "off", "towards", "toward", "for"),
    *("and", "or", "is", "are", "was", "were", "has", "have", "had", "that", "who", "which"),
    *("whose", "where", "while", "as", "like", "than", "not", "closest", "nearest"),
    *("wearing", "holding", "standing", "sitting", "riding", "looking", "facing", "walking"),
    *("eating", "playing", "hitting", "carrying", "lying", "laying", "leaning", "parked"),
    *("hanging", "covered", "made", "attached", "talking", "running", "flying", "skiing"),
)
"""Words with which a phrase goes on to say more of a thing that it has named."""


def naming_spans(text: str, start: int = 0, stop: int | None = None) -> tuple[Span, ...]:
    """Places of the words in a part of a text that carry meaning: without articles and the like.

    All of its words where no other is left.
    """
    words = _words(text, start, len(text) if stop is None else stop)
    kept = [span for span in words if not _is_one_of(text, span, (*_ARTICLES, *_OPENERS))]
    return tuple(kept or words)


def head_spans(text: str) -> tuple[Span, ...]:
    """Places of the words that name what a referring expression is about, such as "left girl".

    They end where it begins to say more of the thing: "woman left of the dog" is about a woman, and
    its box is hers, so that "dog" must not be taught to be seen there. Where nothing stands before,
    as in "on the left", all words count that carry meaning.
    """
    words = _words(text, 0, len(text))
    head: list[Span] = []
    for span in words:
        if _is_one_of(text, span, _OPENERS):
            break
        if not _is_one_of(text, span, _ARTICLES):
            head.append(span)
    return tuple(head) or naming_spans(text)


def _words(text: str, start: int, stop: int) -> list[Span]:
    pattern = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
    return [match.span() for match in pattern.finditer(text, start, stop)]


def _is_one_of(text: str, span: Span, words: tuple[str, ...]) -> bool:
    return text[slice(*span)].lower() in words
