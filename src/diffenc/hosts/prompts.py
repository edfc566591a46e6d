"""Prompts as tensors, and how they reach a tower through code that knows nothing of them.

Hosts repeat, scatter and move tensors, and lose or misalign texts. A tower therefore takes
`PromptTokens`, and finds those of the call around it in a scope. What was passed wins over the
scope, and that over the null prompt.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from diffenc._typing import Uncond
from diffenc.errors import PromptError
from diffenc.inputs.prompts import PromptEmbeds, match_batch
from diffenc.inputs.tokenizing import fit_rows, limit_of, marks_of, prompt_ids
from diffenc.memory.cache import Entry, content_key, recall
from diffenc.models import resolve_folder
from diffenc.models.base import Backbone
from diffenc.models.folder import read_tokenizer
from diffenc.passes.question_tokens import spans_of_ids
from diffenc.passes.word_tokens import Spans

_LIKE_A_PROMPT = re.compile("prompt|question|caption|^texts?$")


def like_a_prompt(name: str) -> bool:
    """Whether an argument is named like a prompt; what no host knows is dropped without a word."""
    return _LIKE_A_PROMPT.search(name) is not None


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Tokenized prompts, one row each.

    Attributes:
        ids: Token ids of the model's (first) tokenizer, padded to its limit; int64.
        mask: Mask that is 1 for a prompt's own tokens, its start and end included, and 0 for
            padding; int64. A row of zeros is no prompt at all.

    Raises:
        PromptError: They are no two whole-number tensors (n l) of one shape.
    """

    ids: Int[Tensor, "n l"]
    mask: Int[Tensor, "n l"]

    def __post_init__(self) -> None:
        tensors = isinstance(self.ids, Tensor) and isinstance(self.mask, Tensor)
        if not tensors or self.ids.ndim != 2 or self.ids.shape != self.mask.shape:
            shapes = [tuple(getattr(part, "shape", ())) for part in (self.ids, self.mask)]
            raise PromptError(f"ids and mask must be tensors (prompts, length), got {shapes}")
        for name in ("ids", "mask"):
            value = getattr(self, name)
            if value.is_floating_point() or value.is_complex():
                raise PromptError(f"{name} must hold whole numbers, got {value.dtype}")
            object.__setattr__(self, name, value.long())

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: "torch.device | str") -> "PromptTokens":
        """On another device."""
        return PromptTokens(self.ids.to(device), self.mask.to(device))

    def take(self, rows: Sequence[int]) -> "PromptTokens":
        """Some rows, in the order given."""
        return PromptTokens(self.ids[list(rows)], self.mask[list(rows)])

    def take_or_none(self, rows: "Sequence[int | None]") -> "PromptTokens":
        """Some rows, in the order given; None is a row that stands for no prompt."""
        taken = self.take([0 if row is None else row for row in rows])
        absent = [row is None for row in rows]
        present = ~torch.tensor(absent, dtype=torch.bool, device=self.mask.device)
        return PromptTokens(taken.ids, taken.mask * present[:, None])

    def all_equal(self) -> bool:
        """Whether every row is the same prompt."""
        same = (self.ids == self.ids[:1]) & (self.mask == self.mask[:1])
        return bool(same.all())

    def split(self, counts: Sequence[int]) -> list["PromptTokens"]:
        """Neighbouring rows in groups."""
        starts = [sum(counts[:group]) for group in range(len(counts))]
        return [
            self.take(range(start, start + count))
            for start, count in zip(starts, counts, strict=True)
        ]

    def rows(self, images: int) -> "PromptTokens":
        """The same prompts for so many images: one row is repeated, as many rows are kept.

        Raises:
            PromptError: Any other number of rows.
        """
        if len(self) == images:
            return self
        if len(self) != 1:
            raise PromptError(
                f"pass one prompt for all images or one for each: {len(self)} prompts, {images} "
                "images. Where a host shows several images or tiles per sample, each needs a row."
            )
        return self.take([0] * images)

    def is_null(self, marks: int = 2) -> list[bool]:
        """Whether each row has no words, but marks alone.

        Args:
            marks: Number of special tokens around every text, see `Backbone.marks_of_texts`.
        """
        empty: list[bool] = (self.mask.sum(dim=1) <= marks).tolist()
        return empty

    def is_absent(self) -> list[bool]:
        """Whether each row stands for no prompt, which is not the empty text."""
        nothing: list[bool] = (self.mask.sum(dim=1) == 0).tolist()
        return nothing

    def is_unconditional(self, backbone: Backbone, rule: Uncond | None) -> list[bool]:
        """Whether each row reads the unconditional embedding; with "empty", "" does too.

        Args:
            backbone: Model that the tokens are of.
            rule: Rule of the unconditional embedding; None is the model's own.
        """
        if (rule or backbone.uncond_rule) == "empty":
            return self.is_null(backbone.marks_of_texts)
        return self.is_absent()

    @staticmethod
    def concat(parts: "Sequence[PromptTokens]") -> "PromptTokens":
        """Rows of several, in order."""
        device = parts[0].ids.device
        return PromptTokens(
            torch.cat([part.ids.to(device) for part in parts]),
            torch.cat([part.mask.to(device) for part in parts]),
        )


Prompts: TypeAlias = PromptTokens | str | Sequence[str]


class PromptTokenizer:
    """Texts to `PromptTokens`, without the model's weights; it may go to other processes.

    Args:
        model: Name of the model whose tokenizer is used: an alias, a Hub id or a folder.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self._tokenizer: Any = None

    def __call__(self, prompts: Prompts) -> PromptTokens:
        """Tokenize; what a prompt has beyond the model's limit is cut.

        Raises:
            PromptError: Something is no text.
            BackboneError: The model's tokenizer cannot be had.
        """
        if isinstance(prompts, PromptTokens):
            return prompts
        rows, limit = prompt_ids(self.tokenizer, _texts(prompts)), limit_of(self.tokenizer)
        if any(len(row) > limit for row in rows):
            warnings.warn(
                f"prompts are longer than the {limit} tokens that the text encoder reads, and are "
                "cut: words behind that have no effect. Shorten them.",
                stacklevel=2,
            )
        return PromptTokens(*fit_rows(self.tokenizer, rows))

    @property
    def tokenizer(self) -> Any:
        """The model's own."""
        if self._tokenizer is None:
            self._tokenizer = read_tokenizer(resolve_folder(self.model, weights=False))
        return self._tokenizer

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "_tokenizer": None}


def tokenize_prompts(tokenizer: Any, prompts: str | Sequence[str]) -> PromptTokens:
    """Tokenize texts with a model's tokenizer, cut and padded to its limit."""
    return PromptTokens(*fit_rows(tokenizer, prompt_ids(tokenizer, _texts(prompts))))


def _texts(prompts: str | Sequence[str]) -> list[str]:
    return match_batch(prompts, 1 if isinstance(prompts, str) else len(prompts))


def embed_tokens(
    backbone: Backbone,
    tokens: PromptTokens,
    *,
    size: tuple[int, int],
    uncond: Uncond | None = None,
    use_cache: bool = True,
) -> PromptEmbeds:
    """Encode tokenized prompts, equal rows once.

    The empty text is encoded as any other. A row that is absent gets the unconditional embedding,
    which is another on SDXL.

    Args:
        backbone: Model whose text encoders are called.
        tokens: Tokenized prompts, one row or more.
        size: Size of the pictures in pixels, (height, width).
        uncond: Rule of the unconditional embedding; None is the model's own.
        use_cache: Whether encoded prompts are looked up in the cache and kept there.
    """
    state = backbone.states().prompts if use_cache else None
    on_cpu = tokens.to("cpu")
    absent = on_cpu.is_unconditional(backbone, uncond)
    keys: list[tuple[object, ...]] = [
        (state, "", size, uncond) if null else (state, content_key(ids), content_key(mask), size)
        for ids, mask, null in zip(on_cpu.ids, on_cpu.mask, absent, strict=True)
    ]
    distinct = {key: row for row, key in reversed(list(enumerate(keys)))}
    rows = list(distinct.values())

    def embed(missing: list[int]) -> list[Entry]:
        known = {}
        if worded := [rows[index] for index in missing if not absent[rows[index]]]:
            part = on_cpu.take(worded)
            fresh = backbone.embed_ids(part.ids, part.mask, size=size)
            known = {row: fresh.select(at, at + 1) for at, row in enumerate(worded)}
        if len(worded) < len(missing):
            null = backbone.embed_uncond(uncond, size=size)
            known |= {rows[index]: null for index in missing if absent[rows[index]]}
        return [known[rows[index]].pack() for index in missing]

    entries = recall(None if state is None else backbone.caches.prompts, list(distinct), embed)
    known = dict(zip(distinct, map(PromptEmbeds.unpack, entries), strict=True))
    return PromptEmbeds.concat([known[key] for key in keys])


def words_of_tokens(tokenizer: Any, tokens: PromptTokens) -> tuple[Spans, ...]:
    """Words of each row and their positions; none for a row that stands for no prompt."""
    on_cpu = tokens.to("cpu")
    before, behind = marks_of(tokenizer)
    own = [ids[mask].tolist() for ids, mask in zip(on_cpu.ids, on_cpu.mask.bool(), strict=True)]
    return tuple(spans_of_ids(tokenizer, row[before : len(row) - behind]) for row in own)


@dataclass(slots=True)
class Scope:
    """Prompts of the calls inside a `prompt_scope`.

    Attributes:
        prompts: Prompts, as tokens or as texts.
        per: Unit that each prompt belongs to, "sample" or "image"; see `prompt_scope`.
        calls: Number of calls of a tower that the prompts are still for; None is any number.
    """

    prompts: Prompts
    per: Literal["sample", "image"]
    calls: int | None = None

    def for_one_call(self) -> Prompts:
        """The prompts, for one more call of a tower.

        Raises:
            PromptError: They were for fewer calls.
        """
        if self.calls is not None:
            if self.calls == 0:
                raise PromptError(
                    "the host calls its tower once more than it did when it was asked which "
                    "pictures it shows, so it is not known which prompt belongs to which picture; "
                    "show samples with different prompts one by one, or open a prompt_scope(..., "
                    "per='image') around each call of the tower"
                )
            self.calls -= 1
        return self.prompts


_SCOPE: ContextVar[Scope | None] = ContextVar("diffenc_prompts", default=None)


@contextmanager
def prompt_scope(
    prompts: Prompts | None,
    *,
    per: Literal["sample", "image"] = "sample",
    calls: int | None = None,
) -> Iterator[None]:
    """Give prompts to the towers that run inside the block, through code that passes none.

    Other threads do not see it, nor does what is computed again in the backward pass. Open it
    around the call of the model in the same thread, or let the model's class open it
    (`diffenc.hosts.llava.take_prompts`).

    Args:
        prompts: Prompts, one for all or one each; None hides an outer scope.
        per: Unit that each prompt belongs to. "sample" has one prompt for each sample of the batch,
            which hosts that know their samples expand to images and tiles; "image" has one for each
            image that the tower is shown.
        calls: Number of calls of a tower that the prompts are for; a further call is refused. None
            is any number.
    """
    token = _SCOPE.set(None if prompts is None else Scope(prompts, per, calls))
    try:
        yield
    finally:
        _SCOPE.reset(token)


def current_scope() -> Scope | None:
    """Scope of the block that this call runs in, or None."""
    return _SCOPE.get()


def resolve_prompts(
    explicit: Prompts | None, images: int, tokenizer: PromptTokenizer
) -> PromptTokens | None:
    """Prompts of a call of a tower: those passed, else the scope's, else None (the null prompt).

    Args:
        explicit: Prompts that were passed; None takes those of the scope.
        images: Number of images that the tower is shown, tiles counted one by one.
        tokenizer: Tokenizer of the prompts that are texts.

    Returns:
        A row per image.

    Raises:
        PromptError: They are neither one nor as many as the images.
    """
    scope = current_scope()
    if explicit is not None:
        prompts = explicit
    elif scope is not None:
        prompts = scope.for_one_call()
    else:
        return None
    return tokenizer(prompts).rows(images)
