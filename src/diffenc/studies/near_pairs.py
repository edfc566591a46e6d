"""Pictures of near-same pairs: which there are, and how alike two features of a pair are."""

import os
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffenc._typing import Resize
from diffenc.clip.captioner import ClipEmbedder
from diffenc.clip.tokens import ClipTokens, to_maps
from diffenc.errors import ConfigError
from diffenc.evals.inspection import summary
from diffenc.evals.matching.base import Item
from diffenc.evals.matching.miniature import SHAPES_SEED, shapes_benchmark
from diffenc.evals.matching.mmvp_vlm import load_mmvp_vlm
from diffenc.inputs.images import to_pixel_values

Pool = Literal["flat", "mean"]
"""How a map becomes a vector: all cells in a row, or their mean."""


def open_pairs(data: "str | os.PathLike[str]", *, per_pattern: int, seed: int) -> Sequence[Item]:
    """Pairs of MMVP-VLM, or of its miniature twin.

    Args:
        data: "shapes", or a folder or .zip file of MMVP-VLM.
        per_pattern: Number of pairs of each pattern in miniature; of MMVP-VLM, the first so many.
        seed: Seed of the miniature's scenes; unused for MMVP-VLM.

    Raises:
        ConfigError: There is no such dataset, or something is wrong with it.
    """
    if os.fspath(data) == "shapes":
        made = shapes_benchmark("mmvp-vlm", per_label=per_pattern, seed=SHAPES_SEED + seed)
        return made.items
    benchmark = load_mmvp_vlm(data)
    if benchmark.problems or not benchmark.items:
        raise ConfigError(f"{benchmark.source}: {summary(benchmark.problems) or 'no pairs'}")
    counts: dict[str, int] = {}
    kept = []
    for item in benchmark.items:
        pattern = item.labels["pattern"][0]
        counts[pattern] = counts.get(pattern, 0) + 1
        if counts[pattern] <= per_pattern:
            kept.append(item)
    return kept


def as_vectors(maps: Float[Tensor, "*b c h w"], pool: Pool) -> Float[Tensor, "*b d"]:
    """Maps as vectors, on the CPU in float32."""
    rows = maps.detach().float().cpu().flatten(-2)
    return rows.flatten(-2) if pool == "flat" else rows.mean(dim=-1)


def cosines(first: Float[Tensor, "*b d"], second: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
    """Cosine of the angle between vectors in the same place, without taking off a mean."""
    return F.cosine_similarity(first.double(), second.double(), dim=-1)


class ClipVectors:
    """What CLIP makes of pictures: its image embedding, and the tokens of its patches.

    Args:
        name: Name or folder of a CLIP, such as "shapes-clip".
        device: Device that it runs on.
        pool: How tokens become a vector.

    Raises:
        BackboneError: There is no such model.
    """

    def __init__(self, name: str, device: str | torch.device, pool: Pool) -> None:
        self._embedder = ClipEmbedder.from_name(name).to(device)
        self._tokens = ClipTokens.from_pretrained(name, device=device, use_cache=False)
        self._pool = pool

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> dict[str, Float[Tensor, "b _d"]]:
        """Vectors of pictures by name: "clip-embedding" and "clip-tokens"."""
        resize: Resize = "crop" if self._embedder.crops else "squash"
        pixel_values = to_pixel_values(
            list(images), size=self._embedder.size, resize=resize, multiple=1
        )
        maps = to_maps(self._tokens(list(images)), self._tokens.grid)
        return {
            "clip-embedding": self._embedder(pixel_values).float().cpu(),
            "clip-tokens": as_vectors(maps, self._pool),
        }
