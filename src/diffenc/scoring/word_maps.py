"""Where in an image a word of a text is seen."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffenc.checks.fields import require_finite
from diffenc.config import check_choice
from diffenc.denoiser.attention import match_layers
from diffenc.denoiser.grids import to_grid
from diffenc.denoiser.joint_attention import match_joint_layers
from diffenc.errors import ConfigError, PromptError
from diffenc.inputs.noise import add_noise, shared_noise
from diffenc.inputs.words import words_of
from diffenc.models.base import Backbone
from diffenc.passes.forward import read_head_attention
from diffenc.scoring.concept_maps import concept_maps
from diffenc.scoring.config import SCORE_TIMESTEPS
from diffenc.viz.heatmap import HeatMap
from diffenc.viz.word_maps import WordMaps

__all__ = [
    "WORD_LAYERS",
    "WORD_TIMESTEPS",
    "daam_maps",
    "heat_maps",
    "pointing_layers",
    "word_maps",
    "words_of",
]

WORD_TIMESTEPS = (50, 189)
"""Little noise, at which the words of a picture that is there point best."""

WORD_LAYERS = ("up_blocks.1",)
"""The block whose attention points best, in the bundled model; 16 x 16 cells in SD at 512 px."""

JOINT_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # Kim et al. 2025 (Seg4Diff), arXiv:2509.18096: layer 9 of SD 3, 8th step from the end of 28.
    "seg4diff": {"sd3": {"layers": ("transformer_blocks.9",), "timesteps": (515,)}},
    # Helbling et al. 2025 (ConceptAttention), arXiv:2502.04320, released code, where it encodes a
    # picture: the last four dual blocks of FLUX at the third of four steps (schnell's), and all
    # blocks of SD 3 at its third, which the shift of 3 brings to sigma = 0.602.
    "concept-attention": {
        "flux": {
            "layers": tuple(f"transformer_blocks.{block}" for block in range(15, 19)),
            "timesteps": (500,),
        },
        "sd3": {"timesteps": (602,)},
    },
}
"""Presets of joint attention: options by the families that each is defined for."""

_DAAM_CELLS = {512: 64, 768: 96, 1024: 64}
"""Cells on a side of DAAM's grid, by the image size that a model was trained for."""

_DAAM_SCALES = (0, 1, 2, 4, 16, 32, 64)
"""Allowed ratios of DAAM's grid to a layer's map; DAAM has 8 for the middle block."""


def word_maps(
    backbone: Backbone,
    latents: Float[Tensor, "images c h w"],
    text: str,
    words: Sequence[str],
    *,
    timesteps: Sequence[int] = SCORE_TIMESTEPS,
    layers: str | Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
    seed: int = 0,
) -> Float[Tensor, "images words gh gw"]:
    """Where each word of a text is seen: the share of a cell's cross-attention that it gets.

    The pieces of a word are added up. Layers are brought to the finest grid among them; the result
    is the mean over heads, layers and timesteps.

    Args:
        backbone: The text-to-image model.
        latents: Latents of the images, without noise.
        text: Prompt that the pictures are read under.
        words: Words of the prompt.
        timesteps: Noise levels, as scheduler steps.
        layers: Module paths of the layers, see `diffenc.denoiser.attention.match_layers`; None
            takes all.
        heads: Indices of the heads that count; None takes all.
        seed: Seed of the noise.

    Returns:
        Shares in [0, 1], in float32.

    Raises:
        PromptError: The text has no such word, or it was cut off.
        ConfigError: No timestep, or one outside the schedule.
        TapError: No cross-attention by that name, or a layer without such a head.
    """
    spans = [backbone.word_positions(text, word) for word in words]
    sums: list[Tensor] = []
    with backbone.lock:
        for maps in _per_timestep(backbone, latents, text, spans, timesteps, layers, heads, seed):
            merged = [reduce(m, "b tokens heads h w -> b tokens h w", "mean") for m in maps]
            finest = max(((m.shape[2], m.shape[3]) for m in merged), key=math.prod)
            sums.append(torch.stack([to_grid(m, finest) for m in merged]).mean(dim=0))
    return _of_words(torch.stack(sums).mean(dim=0), spans, "sum")


def text_attentions(
    backbone: Backbone, layers: str | Sequence[str] | None = None
) -> tuple[str, ...]:
    """Attentions in which cells see the text: cross-attentions, or those that join both.

    Args:
        backbone: The text-to-image model.
        layers: Module paths, or modules around them; None takes all.

    Raises:
        TapError: No such attention by that name.
    """
    match = match_joint_layers if backbone.joins_text else match_layers
    return match(backbone.denoiser, layers)


def pointing_layers(backbone: Backbone) -> list[str] | None:
    """Cross-attentions that word maps are read from by default; None is all.

    Args:
        backbone: The text-to-image model, which may have none in `WORD_LAYERS`.
    """
    names = [
        name
        for name in text_attentions(backbone)
        if any(name.startswith(f"{block}.") for block in WORD_LAYERS)
    ]
    return names or None


def text_share(
    backbone: Backbone,
    latents: Float[Tensor, "images c h w"],
    text: str,
    *,
    timesteps: Sequence[int] = SCORE_TIMESTEPS,
    layers: str | Sequence[str] | None = None,
    seed: int = 0,
) -> Float[Tensor, "images gh gw"]:
    """Share of a cell's joint attention that a text's own tokens get, without its padding.

    Args:
        backbone: The text-to-image model, in which picture and text are joined.
        latents: Latents of the images, without noise.
        text: Prompt that the pictures are read under.
        timesteps: Noise levels, as scheduler steps.
        layers: Module paths of the layers; None takes all.
        seed: Seed of the noise.

    Returns:
        Shares in [0, 1], in float32: mean over heads, layers and timesteps.

    Raises:
        TapError: The model has cross-attention, in which the text gets everything; or no such
            layer.
    """
    match_joint_layers(backbone.denoiser, layers)
    own = [backbone.own_positions(text)]
    with backbone.lock:
        steps = [
            torch.stack([reduce(m, "b tokens heads h w -> b tokens h w", "mean") for m in maps])
            for maps in _per_timestep(backbone, latents, text, own, timesteps, layers, None, seed)
        ]
    return torch.stack(steps).mean(dim=(0, 1)).sum(dim=1)


def daam_maps(
    backbone: Backbone,
    latents: Float[Tensor, "images c h w"],
    text: str,
    words: Sequence[str],
    *,
    timesteps: Sequence[int] = SCORE_TIMESTEPS,
    layers: str | Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
    seed: int = 0,
    grid: tuple[int, int] | None = None,
) -> Float[Tensor, "images words gh gw"]:
    """Word maps as DAAM's released code makes them.

    The probabilities of each layer and head are summed over timesteps, brought to one grid by
    bicubic interpolation and cut off below 0; then the mean over layers and heads, and the mean
    over the pieces of a word. DAAM follows a picture as it is generated; here the noisy latents are
    those of a picture that is there.

    Args:
        backbone: The text-to-image model.
        latents: Latents of the images, without noise.
        text: Prompt that the pictures are read under.
        words: Words of the prompt.
        timesteps: Noise levels, as scheduler steps.
        layers: Module paths of the layers, see `diffenc.denoiser.attention.match_layers`. None
            takes DAAM's: all but the middle block's; for a square picture in another size than the
            model's own, only those whose maps DAAM's code knows the scale of.
        heads: Indices of the heads that count; None takes all.
        seed: Seed of the noise.
        grid: Grid of the maps, (height, width); None is DAAM's, see `daam_grid`.

    Returns:
        Maps with values of 0 or above, in float32.

    Raises:
        PromptError: The text has no such word, or it was cut off.
        ConfigError: No timestep, or one outside the schedule; a picture of whose layers DAAM reads
            none.
        TapError: No cross-attention by that name, or a layer without such a head.

    Source:
        Tang et al. 2022 (DAAM), arXiv:2210.04885, section 2.2, and its released code.
    """
    size = (latents.shape[2], latents.shape[3])
    names = layers
    if layers is None:
        names = [name for name in text_attentions(backbone) if not name.startswith("mid_block")]
    spans = [backbone.word_positions(text, word) for word in words]
    with backbone.lock:
        steps = _per_timestep(backbone, latents, text, spans, timesteps, names, heads, seed)
        sums = next(steps)
        for maps in steps:
            sums = [total + of_layer for total, of_layer in zip(sums, maps, strict=True)]
    if layers is None and size[0] == size[1] and _daam_cells(backbone) is not None:
        cells = math.prod(daam_grid(backbone, size))
        sums = [s for s in sums if math.isqrt(cells // math.prod(s.shape[3:])) in _DAAM_SCALES]
        if not sums:
            raise ConfigError(
                f"DAAM knows the scale of no layer for latents of {size}; pass layers, or a "
                "picture in the size that the model was made for"
            )
    target = daam_grid(backbone, size) if grid is None else grid
    resized = [_clamped(of_layer, target) for of_layer in sums]
    return _of_words(torch.cat(resized, dim=2).mean(dim=2).cpu(), spans, "mean")


def daam_grid(backbone: Backbone, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of DAAM's maps.

    Its code has 64 x 64 cells for models made for 512 or 1024 pixels, whatever the picture's size,
    and 96 x 96 for those made for 768. Beyond it, a picture that is not square has as many on its
    shorter side, and any other model, such as the bundled one, has the grid of its latents.

    Args:
        backbone: The text-to-image model.
        size: Size of the latents, (height, width).
    """
    cells, shorter = _daam_cells(backbone), min(size)
    return size if cells is None else (cells * size[0] // shorter, cells * size[1] // shorter)


def _daam_cells(backbone: Backbone) -> int | None:
    return _DAAM_CELLS.get(backbone.trained_size or 0)


def _clamped(
    maps: Float[Tensor, "b tokens heads _h _w"], grid: tuple[int, int]
) -> Float[Tensor, "b tokens heads gh gw"]:
    flat = rearrange(maps, "b tokens heads h w -> b (tokens heads) h w")
    grown = F.interpolate(flat, size=grid, mode="bicubic").clamp(min=0)
    return rearrange(grown, "b (tokens heads) h w -> b tokens heads h w", tokens=maps.shape[1])


def heat_maps(
    backbone: Backbone,
    latents: Float[Tensor, "1 c h w"],
    text: str,
    words: Sequence[str],
    *,
    preset: str | None,
    picture: Image.Image,
    **options: Any,  # of word_maps, daam_maps and concept_maps
) -> WordMaps:
    """Maps of words over the picture that they are of.

    Raises:
        PromptError: No word, or one that the text does not have.
    """
    if not words:
        raise PromptError("got no words; pass at least one, or None for all of the text")
    drawn: dict[str, Callable[..., Tensor]] = {
        "daam": daam_maps,
        "concept-attention": concept_maps,
    }
    draw = drawn.get(preset or "", word_maps)
    maps = draw(backbone, latents, text, words, **options)
    return WordMaps(
        (word, HeatMap(values, label=word, picture=picture))
        for word, values in zip(words, maps[0], strict=True)
    )


def preset_places(backbone: Backbone, preset: str | None) -> dict[str, Any]:
    """Layers and timesteps that a preset names for a model; None, and "daam", name none.

    Raises:
        ConfigError: An unknown preset, or one that is defined for another family.
    """
    if preset is None:
        return {}
    check_choice("preset of word maps", preset, ("daam", *JOINT_PRESETS))
    if preset not in JOINT_PRESETS:
        return {}
    families = JOINT_PRESETS[preset]
    if backbone.family not in families:
        raise ConfigError(
            f"preset {preset!r} of word maps is defined for {' and '.join(map(repr, families))}, "
            f"and this model is {backbone.family!r}; leave the preset out, and name layers and "
            "timesteps"
        )
    return families[backbone.family]


def _per_timestep(
    backbone: Backbone,
    latents: Tensor,
    text: str,
    spans: Sequence[tuple[int, ...]],
    timesteps: Sequence[int],
    layers: str | Sequence[str] | None,
    heads: Sequence[int] | None,
    seed: int,
) -> Iterator[list[Float[Tensor, "images tokens _heads _h _w"]]]:
    """Maps of each layer for each timestep, for the tokens of all words in a row."""
    if not timesteps:
        raise ConfigError("timesteps must hold one scheduler step or more, got none")
    c, h, w = latents.shape[1:]
    embeds = backbone.embed([text], size=(h * backbone.reduction, w * backbone.reduction))
    positions = [position for span in spans for position in span]
    names = text_attentions(backbone, layers)
    for timestep in timesteps:
        noise = shared_noise((c, h, w), seed=seed, timestep=timestep)
        noisy = add_noise(backbone.scheduler, latents, noise, timestep)
        maps = read_head_attention(backbone, noisy, timestep, embeds, positions, names, heads)
        for name, values in maps.items():
            require_finite(
                values,
                f"attention maps of {name!r} with a {backbone.denoiser_word} in {backbone.dtype}",
                "load the model with dtype=torch.bfloat16 or torch.float32",
            )
        yield list(maps.values())


def _of_words(
    per_token: Float[Tensor, "images tokens h w"], spans: Sequence[tuple[int, ...]], merge: str
) -> Float[Tensor, "images words h w"]:
    per_word = per_token.split([len(span) for span in spans], dim=1)
    return torch.stack([reduce(pieces, "b t h w -> b h w", merge) for pieces in per_word], dim=1)
