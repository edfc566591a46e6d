"""One picklable object that turns columns of pictures into columns of features."""

import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffenc.checks.arguments import flag, shown, text, whole
from diffenc.config import EncoderConfig, described
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError, ImageError, PromptError, ShapeError, near_matches
from diffenc.extraction.decoding import Decoded, cores, decode_ahead
from diffenc.extraction.rows import Kept, Pool, Rows, Shapes, read_rows, row_shapes
from diffenc.inputs.images import as_list, as_list_entry, describe_broken, load_image
from diffenc.inputs.pictures.files import FILE_TYPES
from diffenc.inputs.pictures.values import range_known
from diffenc.models.device import named_device, named_dtype
from diffenc.models.sources import SOURCES
from diffenc.models.taps import tap_patterns
from diffenc.storage.names import exists, expanded, is_file, is_folder

_LOADING = frozenset(
    (
        *("preset", "truncate", "channels_last", "architecture", "prediction_type", "variant"),
        *("unet", "transformer", "vae", "text_encoder", "text_encoder_2"),
        *("tokenizer", "tokenizer_2"),
    )
)
"""Arguments of `DiffusionEncoder.from_pretrained` that are passed on."""

_WORDS = frozenset({"preset", "architecture", "prediction_type", "variant"})
"""Those of them that name no file."""

_MOST_THREADS = 8
_BUILDING = threading.Lock()
_built: tuple[int, str, DiffusionEncoder] | None = None


class Extractor:
    """Columns with pictures in, columns with features out: the same object for every engine.

    It is a recipe, not a model: it pickles to a few hundred bytes, and each process that calls it
    loads the model once. So it is what plain Python, `datasets.map`, Ray Data, Daft and Spark call
    on a batch of rows.

    Args:
        model: Model to load, see `DiffusionEncoder.from_pretrained`: an alias, a Hub id, a folder
            or a checkpoint. A model in memory is saved first.
        prompt: Text that all pictures are read under; None takes none.
        prompt_column: Name of the column with a text for each picture; None where there is none.
        image_column: Name of the column with the pictures: PIL images, paths, contents of files,
            arrays, or entries of Hugging Face datasets.
        keep_columns: Names of the other columns that the result repeats; None repeats all.
        maps: Whether to give one feature map per tap, under the tap's name.
        tokens: Whether to give "tokens", by the `tokens` of a saved encoder: all taps on one grid,
            as rows, tokens of words, or both.
        word_tokens: Number of words of each text that gather tokens, given as "word_tokens",
            "word_places" and "word_mask"; None gives none.
        pool: Way in which the cells of maps and tokens become one vector: "mean" or "max"; None
            gives the cells.
        registers: Whether register cells stay as they are, see `Features.without_registers`.
        device: Device of the model; "auto" is CUDA where there is one.
        dtype: Floating point type of the weights.
        output_dtype: Floating point type of the features; None is that of the weights, and float32
            for bfloat16, which numpy lacks.
        batch_size: Largest number of pictures per pass.
        threads: Number of threads that decode pictures; None is one for each core that there is,
            and 8 at most.
        skip_broken: Whether rows whose picture cannot be read are left out, with a warning, instead
            of raising an error.
        options: Attributes of `EncoderConfig`, such as `taps`, `timestep` or `size`, and arguments
            of `DiffusionEncoder.from_pretrained`, such as `preset`, `truncate` or `unet`.

    Raises:
        ConfigError: An option is unknown or not allowed, or two contradict each other.

    Examples:
        >>> from diffenc import Extractor
        >>> extractor = Extractor("shapes", prompt_column="question", pool="mean")
        >>> batch = {"image": [circle, square], "question": ["what color is it?"] * 2}
        >>> extractor(batch)["up_blocks.0.attentions.1"].shape
        (2, 128)
    """

    def __init__(
        self,
        model: "str | os.PathLike[str]",
        *,
        prompt: str | None = None,
        prompt_column: str | None = None,
        image_column: str = "image",
        keep_columns: Sequence[str] | None = None,
        maps: bool = True,
        tokens: bool = False,
        word_tokens: int | None = None,
        pool: Pool | None = None,
        registers: bool = True,
        device: str = "auto",
        dtype: str = "float32",
        output_dtype: Literal["float32", "float16", "bfloat16"] | None = None,
        batch_size: int = 8,
        threads: int | None = None,
        skip_broken: bool = False,
        **options: Any,  # attributes of EncoderConfig, and what from_pretrained takes
    ) -> None:
        if not isinstance(model, (str, os.PathLike)):
            raise ConfigError(
                f"an Extractor is made of a model's name or folder, got {shown(model)}: each "
                "process loads it anew. Save an encoder with save_pretrained and pass the folder"
            )
        if prompt is not None and prompt_column is not None:
            raise ConfigError("prompt= is for all pictures and prompt_column= for each: pass one")
        self.model = os.fspath(model)
        self.prompt = None if prompt is None else text("prompt", prompt, error=PromptError)
        self.prompt_column = None if prompt_column is None else text("prompt_column", prompt_column)
        self.image_column = text("image_column", image_column)
        self.keep_columns = _names(keep_columns)
        self.kept = Kept(
            maps=maps,
            tokens=tokens,
            word_tokens=word_tokens,
            pool=pool,
            registers=registers,
            output_dtype=output_dtype,
        )
        if word_tokens is not None and not self.prompted:
            raise ConfigError("word_tokens are gathered by the words of a text: pass a prompt")
        self.device, self.dtype = text("device", device), text("dtype", dtype)
        named_dtype(self.dtype)
        self.batch_size = whole("batch_size", batch_size, least=1)
        self.threads = None if threads is None else whole("threads", threads, least=1)
        self.skip_broken = flag("skip_broken", skip_broken)
        self.options = _checked_options(options, prompted=self.prompted)
        self._encoder: DiffusionEncoder | None = None

    @property
    def prompted(self) -> bool:
        """Whether pictures are read under texts."""
        return self.prompt is not None or self.prompt_column is not None

    def to_dict(self) -> dict[str, Any]:
        """Arguments that make this object again: `Extractor(**extractor.to_dict())`."""
        own = ("model", "prompt", "prompt_column", "image_column", "keep_columns")
        running = ("device", "dtype", "batch_size", "threads", "skip_broken")
        named = {name: getattr(self, name) for name in (*own, *running)}
        return {**named, **asdict(self.kept), **self.options}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Extractor) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self._key(self.to_dict()))

    def __repr__(self) -> str:
        ordinary = {"device": "auto", "dtype": "float32", "batch_size": 8}
        ordinary |= {"maps": True, "registers": True, "image_column": "image"}
        facts = {
            name: value
            for name, value in self.to_dict().items()
            if value != ordinary.get(name) and value not in (None, False)
        }
        return described(type(self).__name__, facts)

    def __getstate__(self) -> dict[str, Any]:
        """The recipe alone: a copy in another process loads the model itself."""
        return {**vars(self), "_encoder": None}

    @property
    def encoder(self) -> DiffusionEncoder:
        """The encoder of this process, loaded when it is first asked for.

        Copies of this object share it, and others of the same model and options, unless the
        model's files were written anew in between.
        """
        global _built  # noqa: PLW0603  # one model in a process, whatever copies of this there are
        if self._encoder is None:
            loading = {"model": self.model, "device": self.device, "dtype": self.dtype}
            key = self._key({**loading, **self.options, "files": self._files()})
            with _BUILDING:
                # A forked process has a copy of the entry, but not the right to its device.
                if _built is None or _built[:2] != (os.getpid(), key):
                    _built = None  # makes room for the next
                    _built = (os.getpid(), key, self._load())
                self._encoder = _built[2]
        return self._encoder

    @staticmethod
    def _key(values: Mapping[str, Any]) -> str:
        return json.dumps(values, sort_keys=True, default=str)

    def _files(self) -> list[list[tuple[str, int, int]]]:
        """Files that the model is loaded from: a folder that was written anew is another model."""
        parts = (self.options.get(name) for name in sorted(_LOADING - _WORDS))
        return [_files_of(name) for name in (self.model, *parts) if isinstance(name, str)]

    def _load(self) -> DiffusionEncoder:
        return DiffusionEncoder.from_pretrained(
            self.model,
            device=named_device(self.device),
            dtype=named_dtype(self.dtype),
            use_cache=False,  # each picture comes once
            **self.options,
        )

    def prepare(self) -> Callable[[Any], Any]:
        """The function that threads call on a picture of any kind ahead of the model.

        It gives pixel values, or a decoded picture where the model reads more than those.
        """
        encoder = self.encoder
        if encoder.captioner is not None or encoder.config.original_size == "image":
            return lambda source: (
                load_image(source) if isinstance(source, FILE_TYPES) else as_list_entry(source)[0]
            )
        return encoder.transform

    @property
    def thread_count(self) -> int:
        """Number of threads that decode pictures here."""
        return self.threads or min(_MOST_THREADS, cores())

    @property
    def picture_size(self) -> tuple[int, int]:
        """Size that pictures are brought to, (height, width); a guess where they keep their own."""
        encoder = self.encoder
        size = encoder.config.size or encoder.backbone.default_size
        return size if isinstance(size, tuple) else (size, size)

    @property
    def row_shapes(self) -> Shapes | None:
        """Shape of a picture's row and its dtype, by name of the tensor; loads the model.

        None where pictures keep their own sizes (`resize="none"`), on which shapes depend.
        """
        return row_shapes(self.encoder, self.kept)

    def read(self, pictures: Sequence[Any], prompts: str | Sequence[str] | None = None) -> Rows:
        """Features of one batch, as tensors.

        Args:
            pictures: What the function of `prepare` gave.
            prompts: One text for all or one for each; None takes `prompt`.

        Raises:
            DiffencError: See `DiffusionEncoder.extract`.
        """
        with range_known():
            texts = self.prompt if prompts is None else prompts
            return read_rows(self.encoder, list(pictures), texts, self.kept)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Features of a batch of rows.

        Args:
            batch: Columns by name, each a list or an array with one entry per row.

        Returns:
            An array for each kind of feature, one row per picture, and the other columns.

        Raises:
            ConfigError: A column is missing, or has the name of a feature.
            ImageError: A picture cannot be read; it says in which row.
            PromptError: An entry of the prompts is no text.
            ShapeError: Columns of different lengths.
        """
        pictures, prompts, others = self._columns(batch)
        whole, faults = self._decoded(pictures)
        if faults:
            summary = describe_broken(faults.values(), len(pictures))
            warnings.warn(f"{summary}; left out", stacklevel=2)
        parts: list[dict[str, Tensor]] = []
        for start in range(0, len(whole), self.batch_size):
            together = whole[start : start + self.batch_size]
            texts = None if prompts is None else [prompts[each.place] for each in together]
            parts.append(self.read([each.picture for each in together], texts).tensors)
        features = self._arrays(parts)
        if doubled := sorted(features.keys() & others.keys()):
            raise ConfigError(
                f"the batch has a column {doubled[0]!r}, which is the name of a feature: rename "
                "it, or leave it out with keep_columns="
            )
        kept_rows = [each.place for each in whole]
        return {**{name: column[kept_rows] for name, column in others.items()}, **features}

    def _columns(
        self, batch: Mapping[str, Any]
    ) -> tuple[list[Any], list[str] | None, dict[str, np.ndarray]]:
        """Pictures, texts and the other columns."""
        if not isinstance(batch, Mapping):
            raise ConfigError(
                f"a batch is a mapping of columns by name, got {shown(batch)}; in datasets.map "
                "pass batched=True, in Spark and Daft see the guide"
            )
        column = _column(batch, self.image_column, "image_column")
        pictures = _entries(column)
        prompts = None
        if self.prompt_column is not None:
            prompts = list(_column(batch, self.prompt_column, "prompt_column"))
            for row, prompt in enumerate(prompts):
                if not isinstance(prompt, str):
                    raise PromptError(
                        f"row {row} has no text in the column {self.prompt_column!r}, but "
                        f'{shown(prompt)}; "" stands for the empty text'
                    )
        if self.keep_columns is None:
            names = [name for name in batch if name != self.image_column]
        else:
            names = list(self.keep_columns)
        others = {name: _as_array(_column(batch, name, "keep_columns")) for name in names}
        for name, values in (*others.items(), (self.prompt_column, prompts)):
            if values is not None and len(values) != len(pictures):
                raise ShapeError(
                    f"the columns have different lengths: {len(pictures)} pictures and "
                    f"{len(values)} of {name!r}"
                )
        return pictures, prompts, others

    def _decoded(self, pictures: Sequence[Any]) -> tuple[list[Decoded], dict[int, str]]:
        """Pictures that can be read, and why the others cannot, by row."""
        prepare = self.prepare()
        decoded: Iterator[Decoded] = decode_ahead(
            range(len(pictures)),
            lambda row: prepare(pictures[row]),
            threads=self.thread_count,
            ahead=len(pictures),
        )
        whole, faults = [], {}
        for each in decoded:
            if each.error is None:
                whole.append(each)
            elif self.skip_broken and isinstance(each.error, ImageError):
                faults[each.place] = f"row {each.place}: {each.error}"
            else:
                raise type(each.error)(f"row {each.place} of the batch: {each.error}") from (
                    each.error
                )
        return whole, faults

    def _arrays(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, np.ndarray]:
        """Tensors of several passes as arrays, of no rows where there was no picture."""
        if not parts:
            shapes = self.row_shapes or {}
            empty = {
                name: torch.empty(0, *shape, dtype=dtype, device="cpu")
                for name, (shape, dtype) in shapes.items()
            }
            return {name: _to_numpy(rows) for name, rows in empty.items()}
        return {name: _to_numpy(torch.cat([part[name] for part in parts])) for name in parts[0]}


def _files_of(name: str) -> list[tuple[str, int, int]]:
    """Path, size and time of the files of a model; none of an alias or a Hub id."""
    place = expanded(name)
    if name in SOURCES or not exists(place):
        return []
    facts = []
    for path in sorted(place.rglob("*")) if is_folder(place) else [place]:
        if is_file(path):
            state = path.stat()
            facts.append((str(path), state.st_size, state.st_mtime_ns))
    return facts


def _checked_options(options: Mapping[str, Any], *, prompted: bool) -> dict[str, Any]:
    """Options of the encoder, checked as far as that goes without a model."""
    known = {field.name for field in fields(EncoderConfig)}
    for name in options:
        if name not in known | _LOADING:
            hint = near_matches(name, known | _LOADING)
            raise ConfigError(f"unknown option {name!r} of an Extractor.{hint}")
    checked = {name: value for name, value in options.items() if value is not None}
    if "taps" in checked:
        checked["taps"] = tap_patterns(checked["taps"])
    for name in _LOADING & checked.keys():
        if isinstance(checked[name], os.PathLike):
            checked[name] = os.fspath(checked[name])
        elif not isinstance(checked[name], (str, bool)):
            raise ConfigError(
                f"{name}= must be a name or a path, which every process can load, got "
                f"{shown(checked[name])}"
            )
    stated = {name: value for name, value in checked.items() if name in known}
    if "word_count" in stated:
        stated["tokens"] = "words"  # a saved encoder may have them, and tells when it is loaded
    config = EncoderConfig.from_dict(stated)
    if config.conditioning not in (None, "uncond") and not prompted:
        raise ConfigError(f"conditioning {config.conditioning!r} needs a prompt or prompt_column")
    return checked


def _names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, str):
        return (names,)
    return tuple(text("an entry of keep_columns", name) for name in names)


def _column(batch: Mapping[str, Any], name: str, option: str) -> Any:
    if name not in batch:
        raise ConfigError(
            f"the batch has no column {name!r}; its columns are {sorted(map(str, batch))}."
            f"{near_matches(name, map(str, batch))} {option}= names another one"
        )
    return batch[name]


def _entries(column: Any) -> list[Any]:
    """Pictures of a column: a list, an array of objects, or an array of a whole batch."""
    if isinstance(column, (np.ndarray, Tensor)) and column.ndim == 3:
        raise ShapeError(
            f"the column of pictures has the shape {tuple(column.shape)}, that of one picture or "
            "of grey ones; pass a list of pictures"
        )
    return as_list(column) if len(column) else []


def _as_array(column: Any) -> np.ndarray:
    """A column as an array: numbers as they are, anything else as objects."""
    if isinstance(column, np.ndarray):
        return column
    if isinstance(column, Tensor):
        return _to_numpy(column)
    entries = list(column)
    if entries and all(isinstance(each, (bool, int, float, np.number)) for each in entries):
        return np.asarray(entries)
    array = np.empty(len(entries), dtype=object)
    for row, entry in enumerate(entries):
        array[row] = entry
    return array


def _to_numpy(rows: Tensor) -> np.ndarray:
    rows = rows.float() if rows.dtype == torch.bfloat16 else rows
    return rows.cpu().numpy()
