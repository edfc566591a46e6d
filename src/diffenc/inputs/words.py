"""Words of a text, and where a text encoder sees them."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from diffenc.errors import PromptError, near_matches
from diffenc.inputs.tokenizing import (
    added_tokens,
    limit_of,
    marks_of,
    prompt_places,
    require_right,
    token_ids,
)

_WORD_END = "</w>"
"""Mark of the last piece of a word in the vocabulary of CLIP."""
_WORD_START = "\u2581"
"""Mark of the first piece of a word in the vocabularies of T5 and Gemma."""
_APOSTROPHES = "'\u2019"


def words_of(text: str, tokenizer: Any = None) -> list[str]:
    """Distinct words of a text, in order, without punctuation.

    A word in two spellings ("The" and "the") is one, in the first of them.

    Args:
        text: The text to split into words.
        tokenizer: Tokenizer whose added tokens ("<cat-toy>") count as words too; None knows no
            added tokens.

    Raises:
        PromptError: There is none.
    """
    words: dict[str, str] = {}
    for index, part in enumerate(_split_added(text, tokenizer)):
        if index % 2:
            words.setdefault(folded(part), part)
            continue
        # Combining marks belong to words, and no regular expression of Python's says so.
        shadow = "".join("a" if _in_word(letter) else letter for letter in part)
        for match in re.finditer(r"a+(?:['\u2019]a+)*", shadow):
            word = part[match.start() : match.end()]
            words.setdefault(folded(word), word)
    if not words:
        raise PromptError(f"the text {text!r} has no words to map")
    return list(words.values())


def folded(word: str) -> str:
    """A word in the form in which its spellings are equal: composed, and in lower case."""
    return unicodedata.normalize("NFC", word).lower()


def words_of_ids(tokenizer: Any, ids: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Words of a text that is known by its token ids alone, as a tower in another program has it.

    Words are the tokenizer's: each digit is one. What begins with an apostrophe belongs to the word
    before it.

    Args:
        tokenizer: Tokenizer of CLIP, T5 or Gemma, or one like them.
        ids: Ids of the text, without start, end and padding.

    Returns:
        Distinct words in order, without marks, and the places of each in `ids`.
    """
    special = set(tokenizer.all_special_ids)  # what the vocabulary does not know is one of them
    words: list[tuple[str, list[int]]] = []
    for places in _pieces_by_word(tokenizer, ids):
        own = [ids[place] for place in places]
        if own[0] in special:
            continue
        word = tokenizer.decode(own).replace(_WORD_END, "").strip()
        if words and len(word) > 1 and word[0] in _APOSTROPHES:
            words[-1] = (words[-1][0] + word, words[-1][1] + places)
        else:
            words.append((word, places))
    distinct: dict[str, tuple[int, ...]] = {}
    first: dict[str, str] = {}
    for word, places in words:
        if any(map(_in_word, word)):
            spelt = first.setdefault(folded(word), word)
            distinct[spelt] = (*distinct.get(spelt, ()), *places)
    return distinct


def _pieces_by_word(tokenizer: Any, ids: Sequence[int]) -> list[list[int]]:
    added = added_tokens(tokenizer)
    groups: list[list[int]] = [[]]
    of_pieces, special = False, set(tokenizer.all_special_tokens)
    for place, piece in enumerate(tokenizer.convert_ids_to_tokens(list(ids))):
        begins = piece in added or piece.startswith(_WORD_START)
        # A mark has no start of its own in the vocabulary of T5, and belongs to no word.
        mark = piece in special or not any(map(_in_word, piece.removesuffix(_WORD_END)))
        if groups[-1] and (begins or (mark and of_pieces)):
            groups.append([])
        groups[-1].append(place)
        of_pieces = of_pieces or piece.startswith(_WORD_START)
        if piece in added or piece.endswith(_WORD_END):
            groups.append([])
    return [group for group in groups if group]


def word_token_positions(
    tokenizer: Any,
    text: str,
    word: str,
    *,
    occurrence: int | None = None,
    windows: bool = False,
) -> tuple[int, ...]:
    """Positions of all pieces of a word in the text encoder's input; the start token is 0.

    A word ends where letters and digits end and where the tokenizer begins a new piece: "2" is no
    word of "12". A text of CLIP's without spaces, as in Chinese, is one word.

    Args:
        tokenizer: Tokenizer of CLIP, or one like it, with or without textual inversions.
        text: The prompt that holds the word.
        word: A word of the prompt, or several in a row; upper and lower case are equal.
        occurrence: Index of the occurrence to take if the word occurs several times, from 0; None
            takes all occurrences.
        windows: Whether a long text is read in windows, see
            `diffenc.inputs.prompts.tokenize_windows`; otherwise it is cut.

    Raises:
        PromptError: The text has no such word, or not so many times, or it was cut off.
    """
    require_right(tokenizer)
    spans = _token_spans(tokenizer, text, word)
    if not spans:
        others = [each.lower() for each in _words_or_none(text, tokenizer)]
        near = near_matches(word.lower(), [each for each in others if each != word.lower()])
        raise PromptError(f"{word!r} is no word of {text!r}.{near}")
    if occurrence is not None:
        if not 0 <= occurrence < len(spans):
            raise PromptError(
                f"{word!r} stands {len(spans)} times in {text!r}; occurrence counts from 0, got "
                f"{occurrence}"
            )
        spans = [spans[occurrence]]
    positions = _positions_of(tokenizer, spans, windows=windows)
    if not positions:
        raise PromptError(
            f"{word!r} was cut off: it is token {spans[0][0]} of {text!r}, and the text encoder "
            f"reads {limit_of(tokenizer)}; move it to the front or shorten the text"
        )
    return positions


def shared_positions(
    tokenizers: Sequence[Any], text: str, word: str, *, windows: bool = False
) -> tuple[int, ...]:
    """Do the same as `word_token_positions` for text encoders whose states stand side by side.

    Raises:
        PromptError: As there, or the tokenizers split the text differently.
    """
    first, *others = [
        word_token_positions(each, text, word, windows=windows) for each in tokenizers
    ]
    if any(other != first for other in others):
        raise PromptError(
            f"{word!r} stands at other places for each text encoder of this model ({first} and "
            f"{others[0]}); add textual inversions to all of its tokenizers"
        )
    return first


def span_positions(
    tokenizers: Sequence[Any], text: str, start: int, stop: int, *, windows: bool = False
) -> tuple[int, ...]:
    """Positions of the tokens of a part of a text, for text encoders whose states stand together.

    Args:
        tokenizers: Tokenizers of the model.
        text: The whole text.
        start: Index of the part's first letter.
        stop: Index behind its last letter.
        windows: Whether a long text is read in windows; otherwise it is cut.

    Returns:
        Positions; none where the part is not made of whole tokens, was cut off, or stands at other
        places for each text encoder.
    """
    first, behind = (len(unicodedata.normalize("NFC", text[:edge])) for edge in (start, stop))
    normal = unicodedata.normalize("NFC", text)
    each = [
        _positions_of(
            tokenizer, _tokens_between(tokenizer, normal, [(first, behind)]), windows=windows
        )
        for tokenizer in tokenizers
    ]
    return each[0] if all(positions == each[0] for positions in each) else ()


def _positions_of(
    tokenizer: Any, spans: Sequence[tuple[int, int]], *, windows: bool
) -> tuple[int, ...]:
    """Positions of the tokens of some spans that the text encoder reads as a whole."""
    limit = limit_of(tokenizer)
    if windows:
        room = limit - 2
        places = (position - 1 for start, stop in spans for position in range(start, stop))
        return tuple(place // room * limit + place % room + 1 for place in places)
    kept = [span for span in spans if span[1] <= limit - marks_of(tokenizer)[1]]
    return tuple(position for start, stop in kept for position in range(start, stop))


def _token_spans(tokenizer: Any, text: str, word: str) -> list[tuple[int, int]]:
    """First token of each occurrence, and the one after its last."""
    text, word = (unicodedata.normalize("NFC", each) for each in (text, word))
    return _tokens_between(tokenizer, text, list(word_places(text, word)))


def _tokens_between(
    tokenizer: Any, text: str, places: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """First token and the one after the last of each part of a text that is whole tokens."""
    edges = [text[:edge].rstrip() for place in places for edge in place]
    # What stands before an edge has tokens of its own where a piece ends there.
    whole, *parts = token_ids(tokenizer, [text, *edges])
    places_seen = prompt_places(tokenizer, whole)
    behind = marks_of(tokenizer)[1]
    counts = [len(part) - behind for part in parts]  # without the end token
    whole_pieces = [
        part[:count] == whole[:count] for part, count in zip(parts, counts, strict=True)
    ]
    return [
        (places_seen[counts[index]], places_seen[counts[index + 1]])
        for index in range(0, len(counts), 2)
        if whole_pieces[index] and whole_pieces[index + 1] and counts[index] < counts[index + 1]
    ]


def word_places(text: str, word: str) -> Iterator[tuple[int, int]]:
    """Start and end of each occurrence of a word among the letters of a text, in order."""
    pattern = _pattern(word)
    behind = 0
    for match in re.finditer(f"(?=({pattern}))", text, re.IGNORECASE) if pattern else ():
        start, stop = match.span(1)
        if start >= behind and not _glued(text, start) and not _glued(text, stop):
            behind = stop
            yield start, stop


def _pattern(word: str) -> str:
    """A regular expression for a word, or several, with any space between, or none at marks."""
    shadow = "".join("a" if _in_word(letter) else letter for letter in word)
    pattern, was_word = "", False
    for match in re.finditer(r"a+|[^a\s]+", shadow):
        is_word = shadow[match.start()] == "a"
        if pattern:
            pattern += r"\s+" if was_word and is_word else r"\s*"
        pattern += re.escape(word[match.start() : match.end()])
        was_word = is_word
    return pattern


def _glued(text: str, edge: int) -> bool:
    """Whether a word goes on over an edge, where the tokenizer may see two pieces.

    Between letters the tokenizer decides: some split Chinese ones.
    """
    around = text[max(0, edge - 1) : edge + 1]
    if not 0 < edge < len(text) or not all(map(_in_word, around)):
        return False
    return not around.isalpha()


def _in_word(letter: str) -> bool:
    return letter.isalnum() or unicodedata.category(letter)[0] == "M"


def _split_added(text: str, tokenizer: Any) -> list[str]:
    """Parts of a text between added tokens, at even places, and these, at odd ones."""
    known = [] if tokenizer is None else list(added_tokens(tokenizer))
    special = set(getattr(tokenizer, "all_special_tokens", ()))
    names = sorted((name for name in known if name not in special), key=len, reverse=True)
    if not names:
        return [text]
    return re.split(f"({'|'.join(map(re.escape, names))})", text, flags=re.IGNORECASE)


def _words_or_none(text: str, tokenizer: Any) -> list[str]:
    try:
        return words_of(text, tokenizer)
    except PromptError:
        return []
