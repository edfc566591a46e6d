"""Queries of many images on disk, to be searched by any text without the images."""

import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from diffenc.checks.arguments import whole
from diffenc.denoiser.attention_scores import layer_mix
from diffenc.errors import BackboneError, ConfigError, DiffencError, NonFiniteError, PromptError
from diffenc.inputs.prompts import match_batch
from diffenc.memory.cache import state_key
from diffenc.models import load_backbone
from diffenc.models.base import Backbone
from diffenc.models.device import Device, Dtype
from diffenc.models.encoder_folder import read_source
from diffenc.passes.encoded import prompts_of
from diffenc.runtime.inference import lasting
from diffenc.scoring.bank_build import layer_shapes
from diffenc.scoring.bank_contents import check_unchanged, read_contents
from diffenc.scoring.bank_files import (
    BankContents,
    LayerDigest,
    Shard,
    check_shard,
    check_shards,
    shard_path,
    unreadable,
)
from diffenc.scoring.bank_weights import same_weights, weights_mark
from diffenc.scoring.batches import check_scores
from diffenc.scoring.config import ScorerConfig
from diffenc.scoring.encoded_call import pooling_of
from diffenc.scoring.shared_query import chosen_attentions, score_queries
from diffenc.scoring.token_masks import token_mask
from diffenc.storage.names import checked_path

_ROWS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class SearchResult:
    """An image that was found.

    Attributes:
        name: Name of the image, as given when the bank was built.
        index: Index of the image in the bank.
        score: Score of the image under the text; higher is better.
    """

    name: str
    index: int
    score: float


class QueryBank:
    """Cross-attention queries of images, one set per timestep and draw, on disk.

    A bank belongs to one model and one config: it is searched with the layers, timesteps and
    reference images that it was built with. `CrossAttnScorer.build_index` writes one.

    Attributes:
        folder: Folder that the bank lies in.
        backbone: The text-to-image model whose queries the bank holds.
        config: Config of the scorer that built the bank.
        names: Names of the bank's images, no two alike.
        skipped: Name of and reason for each broken image that was left out.

    Examples:
        >>> from diffenc import CrossAttnScorer
        >>> scorer = CrossAttnScorer.from_pretrained("shapes")
        >>> bank = scorer.build_index([circle, square], folder / "bank", names=["one", "two"])
        >>> bank = QueryBank.load(folder / "bank")
        >>> (results,) = bank.search("a red circle", top=2)
        >>> sorted(result.name for result in results)
        ['one', 'two']
    """

    def __init__(self, folder: Path, contents: BankContents, backbone: Backbone) -> None:
        self.folder, self.backbone = folder, backbone
        self._contents = contents
        self._checked: Hashable | None = None

    @classmethod
    @lasting
    def load(
        cls,
        folder: "str | os.PathLike[str]",
        *,
        backbone: "str | os.PathLike[str] | Backbone | None" = None,
        device: Device = None,
        dtype: Dtype = None,
    ) -> "QueryBank":
        """Open a bank.

        The table of contents and the headers of all files are compared with each other and with the
        model; queries are read, and compared with their digests, by each search.

        Args:
            folder: Folder that `build_index` wrote.
            backbone: The model; None loads the one that the bank names.
            device: Device that the model runs on; None is the CPU, and where a `Backbone` is.
            dtype: Floating point type of the model; None is float32, and what a `Backbone` has.

        Raises:
            BackboneError: The bank is missing, incomplete or broken, or belongs to other weights.
        """
        root = checked_path("a bank", folder, error=BackboneError)
        contents = read_contents(root)
        check_shards(root, contents)
        named = backbone or read_source(contents.backbone, root)
        model = load_backbone(named, device=device, dtype=dtype)
        bank = cls(root, contents, model)
        bank._check_weights()
        check_unchanged(root, contents)
        return bank

    @property
    def config(self) -> ScorerConfig:
        """See the class."""
        return self._contents.config

    @property
    def names(self) -> tuple[str, ...]:
        """See the class."""
        return self._contents.names

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """See the class."""
        return self._contents.skipped

    def _check_weights(self) -> None:
        """Raise a `BackboneError` unless the model is, still, the one that built the bank."""
        unet, texts = state_key(self.backbone.denoiser), self.backbone.states().prompts
        state = None if unet is None or texts is None else (unet, texts)
        if state is None or state != self._checked:
            _check_model(self.folder, self._contents, self.backbone)
            self._checked = state

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"QueryBank({len(self)} images, {len(self._contents.layers)} layers)"

    def scores(self, texts: str | Sequence[str]) -> Float[Tensor, "images texts"]:
        """Score every image of the bank under every text, as the scorer that built it would.

        Raises:
            PromptError: No text, or something that is none.
            BackboneError: A file of the bank is broken, or was exchanged.
            NonFiniteError: Scores are no numbers, or the model's type does not hold the queries.
        """
        unordered = isinstance(texts, (Mapping, Set))  # refused with the rest
        several = isinstance(texts, Iterable) and not unordered and not isinstance(texts, str)
        together = list(texts) if several else texts
        listed = match_batch(together, len(together) if several else 1)
        if not listed:
            raise PromptError("got no texts; pass at least one")
        config = self.config
        with self.backbone.lock:
            self._check_weights()
            means = self._means([*listed, *config.reference_texts])
        images, references = means[: len(self)], means[len(self) :]
        result = images[:, : len(listed)]
        if len(references):
            result = result - references[:, : len(listed)].mean(dim=0)
        if config.reference_texts:
            others = images[:, len(listed) : len(listed) + len(config.reference_texts)]
            result = result - others.mean(dim=1, keepdim=True)
        return result

    def _means(self, texts: Sequence[str]) -> Float[Tensor, "rows texts"]:
        """Scores of images and references, mean over timesteps and draws."""
        config, backbone = self.config, self.backbone
        none = [None] if config.include_uncond else []
        every: list[str | None] = [*texts, *none]
        embeds = prompts_of(
            backbone,
            every,
            size=self._contents.size,
            uncond=config.uncond,
            long_prompts=config.long_prompts,
        )
        mask = token_mask(backbone, every, embeds, config.token_mask)
        attentions = chosen_attentions(backbone, self._contents.layers)
        mix = layer_mix(config.layer_weights, len(attentions))
        rows = []
        for queries in self._rows():
            chosen = torch.ones(len(queries), len(every), dtype=torch.bool, device="cpu")
            pooling = pooling_of(config)
            part = score_queries(
                backbone, queries, attentions, embeds, pooling, mix, mask=mask, chosen=chosen
            )
            rows.append(part[..., 0])
        steps = len(config.steps)
        means: Tensor = torch.cat(rows).unflatten(0, (-1, steps)).mean(dim=1)
        check_scores(means, backbone)
        if config.include_uncond:
            means = (means + means[:, -1:]) / 2
        return means

    def search(self, texts: str | Sequence[str], *, top: int = 5) -> list[list[SearchResult]]:
        """The best images for each text.

        Args:
            texts: One text or several.
            top: Largest number of images per text; of equal scores, the image that comes first in
                the bank wins.

        Raises:
            ConfigError: `top` is no int of 1 or more.
            PromptError: No text, or something that is none.
            BackboneError: A file of the bank is broken, or was exchanged.
            NonFiniteError: Scores are no numbers.
        """
        top = whole("top", top)
        if top < 1:
            raise ConfigError(f"top must be 1 or more, got {top}")
        scores = self.scores(texts)
        hits = []
        for column in scores.T:
            best = column.argsort(descending=True, stable=True)[:top].tolist()
            hits.append([SearchResult(self.names[i], i, float(column[i])) for i in best])
        return hits

    def _rows(self) -> Iterator[list[tuple[Tensor, ...]]]:
        """Queries per image and step, references last, a few images at a time."""
        for shard in self._contents.shards:
            path = shard_path(self.folder, shard)
            try:
                yield from self._rows_of(path, shard)
            except DiffencError as error:
                if isinstance(error, BackboneError):
                    raise unreadable(path, error) from error
                raise
            except Exception as error:  # safetensors raises errors of its own
                raise unreadable(path, error) from error

    def _rows_of(self, path: Path, shard: Shard) -> Iterator[list[tuple[Tensor, ...]]]:
        from safetensors import safe_open

        contents = self._contents
        layers = range(len(contents.layers))
        digest = LayerDigest(len(layers))
        with safe_open(path, "pt") as opened:
            check_shard(
                opened, shard, bank=contents.bank, shapes=contents.shapes, dtype=contents.dtype
            )
            slices = [opened.get_slice(f"layer.{layer}") for layer in layers]
            for start in range(0, shard.rows, _ROWS_AT_ONCE):
                stop = min(start + _ROWS_AT_ONCE, shard.rows)
                with torch.device("cpu"):  # safetensors puts parts on the default device
                    stored = [entry[start:stop] for entry in slices]
                digest.update(stored)
                parts = [_fitting(part, self.backbone.dtype) for part in stored]
                yield [tuple(part[row] for part in parts) for row in range(stop - start)]
        if digest.hexdigest() != shard.digest:
            raise BackboneError("its values are not those that were written")


def _fitting(queries: Tensor, dtype: torch.dtype) -> Tensor:
    fitting = queries.to(dtype)
    # A sum is ten times as fast, and no number where an entry is none.
    if torch.isfinite(fitting.sum(dtype=torch.float32)) or torch.isfinite(fitting).all():
        return fitting
    if not torch.isfinite(queries).all():
        raise BackboneError("it holds NaN or infinity")
    raise NonFiniteError(
        f"queries of the bank do not fit into {dtype}; load it with dtype=torch.bfloat16 or "
        "torch.float32"
    )


def _check_model(folder: Path, contents: BankContents, model: Backbone) -> None:
    """Refuse a model that the bank was not built with."""
    config = contents.config
    try:
        attentions = chosen_attentions(model, config.layers)
        shapes = layer_shapes(model, list(attentions), contents.size)
    except DiffencError as error:
        raise BackboneError(f"the bank {folder} was built with another model: {error}") from error
    if tuple(attentions) != contents.layers or shapes != contents.shapes:
        raise BackboneError(
            f"the bank {folder} was built with another model than {model.name!r}, whose layers "
            f"are others: load the one it was built with, {contents.backbone!r}, or build it again"
        )
    side = config.size or model.default_size
    size = (side, side) if isinstance(side, int) else side
    if config.resize != "none" and size != contents.size:
        raise BackboneError(
            f"the bank {folder} says that its pictures have {contents.size} pixels, and its config "
            f"brings them to {size} in {model.name!r}; build it again"
        )
    if not same_weights(contents.weights, weights_mark(model, attentions)):
        raise BackboneError(
            f"the bank {folder} was built with other weights than {model.name!r} has: load the "
            f"model it was built with, {contents.backbone!r}, or build the bank again"
        )
