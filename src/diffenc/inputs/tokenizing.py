"""Texts to token ids, without the settings that live in a tokenizer.

A fast tokenizer keeps padding and truncation in itself, and each call of transformers changes them
for all threads. Ids are therefore read, whole and without padding, by a private copy of which
nobody changes a setting; padding, cuts and windows are made of them here.
"""

import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor

from diffenc.errors import BackboneError, PromptError
from diffenc.runtime.threads import lock_of

_NO_LIMIT = 10**6


@dataclass(frozen=True, slots=True)
class _Copy:
    """A tokenizer's private copy.

    Attributes:
        source: The tokenizer's own backend, of which the copy was made.
        mark: Settings of the tokenizer when the copy was made; the copy is made anew if they
            change.
        backend: The copied backend, without padding and truncation.
    """

    source: Any
    mark: Hashable
    backend: Any


_COPIES: "WeakKeyDictionary[Any, _Copy]" = WeakKeyDictionary()
_GUARD = threading.Lock()


def token_ids(
    tokenizer: Any, texts: Sequence[str], *, special_tokens: bool = True
) -> list[list[int]]:
    """Ids of texts, neither cut nor padded.

    Args:
        tokenizer: Tokenizer of transformers, fast or slow. Its padding and truncation settings are
            neither used nor changed.
        texts: Texts, any number of them.
        special_tokens: Whether start and end tokens are added around each text.

    Raises:
        PromptError: One text, whose letters would be taken for texts.
    """
    if isinstance(texts, str):
        raise PromptError(f"texts are a list of strings, got one string, {texts!r}; pass [text]")
    if not texts:
        return []
    if backend := _backend(tokenizer):
        encodings = backend.encode_batch(list(texts), add_special_tokens=special_tokens)
        return [encoding.ids for encoding in encodings]
    with lock_of(tokenizer):
        rows: list[list[int]] = tokenizer(
            list(texts), add_special_tokens=special_tokens, truncation=False, verbose=False
        ).input_ids
    return rows


def ids_with_places(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a text without start and end tokens, and where in it each stands.

    Args:
        tokenizer: Fast tokenizer of transformers.
        text: The text to tokenize.
    """
    (encoding,) = _backend(tokenizer).encode_batch([text], add_special_tokens=False)
    return encoding.ids, encoding.offsets


def prompt_ids(
    tokenizer: Any, texts: Sequence[str], *, special_tokens: bool = True
) -> list[list[int]]:
    """Ids of texts as a text encoder reads them, see `token_ids`.

    A textual inversion with several vectors ("<cat-toy>", "<cat-toy>_1", ...) is named in a prompt
    by its first one, which is replaced by all of them, as in the pipelines of diffusers.
    """
    rows = token_ids(tokenizer, texts, special_tokens=special_tokens)
    vectors = _vectors(added_tokens(tokenizer))
    if not vectors:
        return rows
    return [[token for group in _expanded(row, vectors) for token in group] for row in rows]


def prompt_places(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Position in `prompt_ids` of each id of `token_ids`, and of their end."""
    places = [0]
    for group in _expanded(ids, _vectors(added_tokens(tokenizer))):
        places.append(places[-1] + len(group))
    return places


def added_tokens(tokenizer: Any) -> dict[str, int]:
    """Texts that were added to a tokenizer's vocabulary, and their ids."""
    read = getattr(tokenizer, "get_added_vocab", None)
    return {} if read is None else dict(read())


def fit_rows(
    tokenizer: Any, rows: Sequence[Sequence[int]], *, to_longest: bool = False
) -> tuple[Int[Tensor, "b l"], Int[Tensor, "b l"]]:
    """Cut and pad whole rows of ids as the tokenizer itself would do.

    Args:
        tokenizer: Tokenizer that gives the limit, the padding token, and the sides that are cut and
            padded.
        rows: Token ids of each text from `token_ids`, with start and end tokens.
        to_longest: Whether rows are padded to the longest row instead of the tokenizer's limit.

    Returns:
        The ids, and 1 where they are a text's own, 0 where they are padding.

    Raises:
        BackboneError: The tokenizer has no limit, or no padding token and a row needs one.
    """
    limit = limit_of(tokenizer)
    cut = [_cut(tokenizer, list(row), limit) for row in rows]
    length = max(map(len, cut), default=0) if to_longest else limit
    if any(len(row) < length for row in cut) and tokenizer.pad_token_id is None:
        raise BackboneError(
            f"{type(tokenizer).__name__} has no padding token, and a text encoder reads {length} "
            "tokens of each text; set tokenizer.pad_token to the one that the model learnt with"
        )
    left = getattr(tokenizer, "padding_side", "right") == "left"
    ids, mask = [], []
    for row in cut:
        filler = [tokenizer.pad_token_id] * (length - len(row))
        own, none = [1] * len(row), [0] * len(filler)
        ids.append(filler + row if left else row + filler)
        mask.append(none + own if left else own + none)
    shape = (len(cut), length)
    values = (torch.tensor(each, dtype=torch.long, device="cpu") for each in (ids, mask))
    first, second = (each.reshape(shape) for each in values)
    return first, second


def own_places(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Positions of a text's own tokens in a row, start and end included, without padding."""
    _, own = fit_rows(tokenizer, prompt_ids(tokenizer, [text]))
    return tuple(own[0].nonzero()[:, 0].tolist())


def limit_of(tokenizer: Any) -> int:
    """Number of tokens of a text that a tokenizer keeps, including start and end token.

    Raises:
        BackboneError: It says none.
    """
    limit: int = tokenizer.model_max_length
    if limit > _NO_LIMIT:
        raise BackboneError(
            f"{type(tokenizer).__name__} has no limit (model_max_length is {limit:.0e}); set "
            "tokenizer.model_max_length to what the text encoder reads, 77 for CLIP"
        )
    return limit


def limits_of(tokenizers: Sequence[Any]) -> str:
    """How many tokens of a text each of a model's tokenizers keeps, as messages say it."""
    return " or ".join(str(limit) for limit in sorted({limit_of(each) for each in tokenizers}))


def marks_of(tokenizer: Any) -> tuple[int, int]:
    """Number of special tokens before and behind every text: 1 and 1 for CLIP, 0 and 1 for T5."""
    (ids,) = token_ids(tokenizer, [""])
    behind = int(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    return len(ids) - behind, behind


def require_right(tokenizer: Any) -> None:
    """Raise a `PromptError` where a tokenizer cuts or pads on the left, which moves every token."""
    sides = [getattr(tokenizer, f"{name}_side", "right") for name in ("padding", "truncation")]
    if "left" in sides:
        raise PromptError(
            f"this tokenizer pads on the {sides[0]} and cuts on the {sides[1]}: places of tokens "
            "are known where both are 'right'; set its padding_side and truncation_side"
        )


def _cut(tokenizer: Any, row: list[int], limit: int) -> list[int]:
    if len(row) <= limit:
        return row
    if getattr(tokenizer, "truncation_side", "right") == "left":
        return row[:1] + row[len(row) - limit + 1 :]
    ends = row[-1] == getattr(tokenizer, "eos_token_id", row[-1])  # Gemma's rows have no end
    return row[: limit - 1] + row[-1:] if ends else row[:limit]


def _backend(tokenizer: Any) -> Any:
    """The private copy of a fast tokenizer's backend; None for a slow one."""
    source = getattr(tokenizer, "backend_tokenizer", None)
    if source is None:
        return None
    mark = _mark(tokenizer, source)
    with _GUARD:
        known = _COPIES.get(tokenizer)
        if known is None or known.source is not source or known.mark != mark:
            backend = type(source).from_str(source.to_str())
            backend.no_padding()
            backend.no_truncation()
            backend.encode_special_tokens = getattr(tokenizer, "split_special_tokens", False)
            known = _COPIES[tokenizer] = _Copy(source, mark, backend)
        return known.backend


def _mark(tokenizer: Any, backend: Any) -> Hashable:
    """Changes with everything in a backend that transformers lets a user change."""
    added = (
        (index, str(token), token.normalized, token.special, token.lstrip, token.rstrip)
        for index, token in backend.get_added_tokens_decoder().items()
    )
    steps = tuple(map(_shown, (backend.normalizer, backend.pre_tokenizer, backend.post_processor)))
    return tuple(added), steps, getattr(tokenizer, "split_special_tokens", False)


def _shown(step: Any) -> Hashable:
    """What a step of a backend does; before tokenizers 0.20 its text says where it lies alone."""
    text = str(step)
    state: Hashable = step.__getstate__() if " object at 0x" in text else text
    return state


def _vectors(added: Mapping[str, int]) -> dict[int, list[int]]:
    """Ids of the other vectors of each textual inversion, by the id of its first one."""
    vectors = {}
    for name, index in added.items():
        others: list[int] = []
        while (other := added.get(f"{name}_{len(others) + 1}")) is not None:
            others.append(other)
        if others:
            vectors[index] = others
    return vectors


def _expanded(row: Sequence[int], vectors: Mapping[int, list[int]]) -> list[list[int]]:
    """Ids that replace each id: itself, and behind a first vector the others."""
    groups = []
    for index, token in enumerate(row):
        others = vectors.get(token, [])
        written_out = list(row[index + 1 : index + 2]) == others[:1]
        groups.append([token] if written_out else [token, *others])
    return groups
