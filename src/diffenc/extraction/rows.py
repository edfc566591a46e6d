"""What is kept of the features of a batch: maps, tokens, tokens of words; pooled or not."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from diffenc.checks.arguments import flag, whole
from diffenc.config import check_choice
from diffenc.denoiser.grids import middle_grid
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError, NonFiniteError
from diffenc.features import Features
from diffenc.inputs.images import Images
from diffenc.models.device import as_dtype
from diffenc.passes.question_tokens import is_there, token_count
from diffenc.passes.word_tokens import WordTokens

Pool = Literal["mean", "max"]

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape of a picture's row and dtype, by name of the tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What is kept of features.

    Attributes:
        maps: Whether to keep one feature map per tap.
        tokens: Whether to keep "tokens", by the encoder's `tokens`: all taps on one grid, as rows,
            tokens of words, or both.
        word_tokens: Number of words of each picture's text that gather tokens, kept as
            "word_tokens", "word_places" and "word_mask"; None keeps none.
        pool: Way in which the cells of maps and tokens become one vector: "mean" or "max"; None
            keeps the cells.
        registers: Whether register cells (lone cells of huge norm) stay as they are; otherwise the
            mean of the cells around stands in their place.
        output_dtype: Floating point type of what is kept, or its name; None is the model's.
    """

    maps: bool = True
    tokens: bool = False
    word_tokens: int | None = None
    pool: Pool | None = None
    registers: bool = True
    output_dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("maps", "tokens", "registers"):
            flag(name, getattr(self, name))
        if self.word_tokens is not None:
            whole("word_tokens", self.word_tokens, least=1)
            if not self.registers:
                raise ConfigError("word tokens gather features as they are; leave registers on")
        if self.pool is not None:
            check_choice("pool", self.pool, get_args(Pool))
        if self.output_dtype is not None:
            as_dtype(self.output_dtype)
        if not (self.maps or self.tokens or self.word_tokens):
            raise ConfigError("nothing is kept: choose maps, tokens or word_tokens")


@dataclass(frozen=True, slots=True)
class Rows:
    """What is kept of some pictures, a row for each.

    Attributes:
        tensors: Tensors by name, one row per picture.
        truncated: Number of prompt tokens that were cut, per picture; empty without prompts.
        words: Word of each word token, per picture; empty where no words gather.
        conditioning: Conditioning of the features.
        grid: Token grid, as (height, width).
    """

    tensors: dict[str, Tensor]
    truncated: tuple[int, ...] = ()
    words: tuple[tuple[str, ...], ...] = ()
    conditioning: str = ""
    grid: tuple[int, int] = (0, 0)


@torch.no_grad()
def read_rows(
    encoder: DiffusionEncoder,
    pictures: Images,
    prompts: str | Sequence[str] | None,
    kept: Kept,
) -> Rows:
    """Run the encoder on one batch and keep what is wanted of the features.

    Args:
        encoder: Encoder that reads the pictures.
        pictures: Pictures of one batch.
        prompts: One text for all pictures or one for each; None is no text.
        kept: What is kept.

    Raises:
        NonFiniteError: A feature lies beyond what `output_dtype` holds.
        DiffencError: See `DiffusionEncoder.extract` and `word_tokens`.
    """
    gathered: WordTokens | None = None
    tokens: Tensor | None = None
    if _reads_words(encoder, kept):
        tokens, features = encoder.tokens_and_features(pictures, prompts)
    elif kept.word_tokens is None:
        features = encoder.extract(pictures, prompts)
    else:
        texts = "" if prompts is None else prompts
        gathered = encoder.word_tokens(pictures, texts, count=kept.word_tokens)
        features = gathered.features
    if not kept.registers:
        features = features.without_registers()
    tensors = _maps_and_tokens(features, kept, tokens)
    if gathered is not None:
        tensors["word_tokens"] = gathered.tokens
    if kept.output_dtype is not None:
        tensors = _cast(tensors, as_dtype(kept.output_dtype))
    words: tuple[tuple[str, ...], ...] = ()
    if gathered is not None:
        tensors |= {"word_places": gathered.places, "word_mask": gathered.mask}
        words = gathered.words
    return Rows(tensors, features.truncated, words, features.conditioning, features.grid)


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors in another dtype.

    Raises:
        NonFiniteError: A value lies beyond what the dtype holds.
    """
    cast = {name: rows.to(dtype) for name, rows in tensors.items()}
    for name, rows in cast.items():
        if not bool(rows.isfinite().all()):
            raise NonFiniteError(
                f"features {name!r}, of up to {float(tensors[name].abs().amax()):.3g}, are beyond "
                f"{dtype}; take output_dtype='bfloat16' or 'float32' (--output-dtype)"
            )
    return cast


def _reads_words(encoder: DiffusionEncoder, kept: Kept) -> bool:
    """Whether the kept tokens are of words, which contradicts two other things to keep."""
    kind = encoder.config.tokens
    if not kept.tokens or kind == "grid":
        return False
    if kept.word_tokens is not None or not kept.registers:
        other = "word_tokens" if kept.word_tokens is not None else "registers=False"
        raise ConfigError(
            f"tokens={kind!r} of the encoder gathers tokens of words by itself, from features as "
            f"they are; leave {other} out, or take tokens='grid'"
        )
    return True


def _maps_and_tokens(features: Features, kept: Kept, tokens: Tensor | None) -> dict[str, Tensor]:
    tensors = {}
    if kept.maps:
        tensors = {tap: _pooled(maps, (-2, -1), kept.pool) for tap, maps in features.items()}
    if kept.tokens:
        rows = features.tokens() if tokens is None else tokens
        there = None if tokens is None else is_there(tokens)
        tensors["tokens"] = _pooled(rows, (-2,), kept.pool, there)
    return tensors


def _pooled(
    cells: Tensor, axes: tuple[int, ...], pool: Pool | None, there: Tensor | None = None
) -> Tensor:
    """Cells along some axes as one vector, without absent ones; sums are taken in float32."""
    if pool is None:
        return cells
    if pool == "max":
        if there is not None:
            cells = cells.masked_fill(~there[..., None], -math.inf)
        return cells.amax(dim=axes)
    if there is None:
        return cells.mean(dim=axes, dtype=torch.float32).to(cells.dtype)
    counts = there.sum(dim=axes[-1] + 1, keepdim=True)
    return (cells.sum(dim=axes, dtype=torch.float32) / counts).to(cells.dtype)


def row_shapes(encoder: DiffusionEncoder, kept: Kept) -> Shapes | None:
    """Shapes and dtypes of a picture's row, known before anything is computed.

    Args:
        encoder: Encoder that will read the pictures.
        kept: What is kept.

    Returns:
        None where the pictures keep their own sizes, on which shapes depend.
    """
    config, backbone = encoder.config, encoder.backbone
    if config.resize == "none":
        return None
    size = config.size or backbone.default_size
    height, width = size if isinstance(size, tuple) else (size, size)
    grids = [
        (math.ceil(height / tap.reduction), math.ceil(width / tap.reduction))
        for tap in encoder.feature_info
    ]
    halves = 2 if config.conditioning == "concat" else 1
    times = () if isinstance(config.timestep, int) else (len(config.timesteps),)
    dtype = encoder.dtype if kept.output_dtype is None else as_dtype(kept.output_dtype)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if kept.maps:
        for tap, grid in zip(encoder.feature_info, grids, strict=True):
            cells = grid if kept.pool is None else ()
            shapes[tap.name] = ((*times, tap.channels * halves, *cells), dtype)
    if kept.tokens:
        own = config.grid or middle_grid(grids)
        rows, columns = (own, own) if isinstance(own, int) else own
        _reads_words(encoder, kept)  # or raises before anything is read
        count = (token_count(config, rows * columns),) if kept.pool is None else ()
        shapes["tokens"] = ((*times, *count, encoder.hidden_size), dtype)
    if kept.word_tokens is not None:
        words = kept.word_tokens
        channels = halves * sum(tap.channels for tap in encoder.feature_info)
        shapes["word_tokens"] = ((*times, words, channels), dtype)
        shapes["word_places"] = ((*times, words, 4), torch.float32)
        shapes["word_mask"] = ((words,), torch.bool)
    return shapes


def row_bytes(shapes: Shapes) -> int:
    """Bytes of a picture's row."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
