"""Where in an image a word of a text is seen."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffenc.attention import match_layers, word_token_positions
from diffenc.backbones.base import Backbone
from diffenc.config import check_choice
from diffenc.errors import ConfigError, PromptError
from diffenc.forward import read_head_attention
from diffenc.images import ImageSource, to_pixel_values
from diffenc.maps import to_grid
from diffenc.noise import add_noise, shared_noise
from diffenc.scoring.config import SCORE_TIMESTEPS
from diffenc.viz.heatmap import HeatMap


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
        backbone: The model.
        latents: Of the images, without noise.
        text: The prompt.
        words: Words of it.
        timesteps: Noise levels, scheduler steps.
        layers: See `diffenc.attention.match_layers`; None takes all.
        heads: Indices of the heads that count; None takes all.
        seed: Of the noise.

    Returns:
        float32 shares in [0, 1].

    Raises:
        PromptError: The text has no such word, or it was cut off.
        ConfigError: No timestep, or one outside the schedule.
        TapError: No cross-attention by that name, or a layer without such a head.
    """
    spans = [word_token_positions(backbone.tokenizer, text, word) for word in words]
    sums: list[Tensor] = []
    for maps in _per_timestep(backbone, latents, text, spans, timesteps, layers, heads, seed):
        merged = [reduce(m, "b tokens heads h w -> b tokens h w", "mean") for m in maps]
        finest = max(((m.shape[2], m.shape[3]) for m in merged), key=math.prod)
        sums.append(torch.stack([to_grid(m, finest) for m in merged]).mean(dim=0))
    return _of_words(torch.stack(sums).mean(dim=0), spans, "sum")


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
) -> Float[Tensor, "images words h w"]:
    """Word maps by DAAM's definition, on the grid of the latents.

    The probabilities of each layer and head are brought to the grid by bicubic interpolation and
    cut off below 0; then the mean over layers and heads, the sum over timesteps, and the mean over
    the pieces of a word. The middle block is left out.

    Args:
        backbone: The model.
        latents: Of the images, without noise.
        text: The prompt.
        words: Words of it.
        timesteps: Noise levels, scheduler steps.
        layers: See `diffenc.attention.match_layers`; None takes all but the middle block's.
        heads: Indices of the heads that count; None takes all.
        seed: Of the noise.

    Returns:
        float32, 0 or above.

    Raises:
        PromptError: The text has no such word, or it was cut off.
        ConfigError: No timestep, or one outside the schedule.
        TapError: No cross-attention by that name, or a layer without such a head.

    Source:
        Tang et al. 2022 (DAAM), arXiv:2210.04885, section 2.2, and its released code.
    """
    h, w = latents.shape[2:]
    if layers is None:
        layers = [name for name in match_layers(backbone.unet) if not name.startswith("mid_block")]
    spans = [word_token_positions(backbone.tokenizer, text, word) for word in words]
    total = torch.zeros(len(latents), sum(map(len, spans)), h, w)
    for maps in _per_timestep(backbone, latents, text, spans, timesteps, layers, heads, seed):
        resized = []
        for of_layer in maps:
            flat = rearrange(of_layer, "b tokens heads h w -> b (tokens heads) h w")
            grown = F.interpolate(flat, size=(h, w), mode="bicubic").clamp(min=0)
            resized.append(
                rearrange(
                    grown, "b (tokens heads) h w -> b tokens heads h w", tokens=total.shape[1]
                )
            )
        total += torch.cat(resized, dim=2).mean(dim=2).cpu()
    return _of_words(total, spans, "mean")


def heat_maps(
    backbone: Backbone,
    latents: Float[Tensor, "1 c h w"],
    text: str,
    words: Sequence[str],
    *,
    preset: str | None,
    picture: Image.Image,
    **options: Any,  # of word_maps and daam_maps
) -> dict[str, HeatMap]:
    """Maps of words over the picture that they are of.

    Raises:
        ConfigError: An unknown preset.
        PromptError: No word, or one that the text does not have.
    """
    if preset is not None:
        check_choice("preset of word maps", preset, ("daam",))
    if not words:
        raise PromptError("got no words; pass at least one, or None for all of the text")
    draw = daam_maps if preset == "daam" else word_maps
    maps = draw(backbone, latents, text, words, **options)
    return {
        word: HeatMap(values, label=word, picture=picture)
        for word, values in zip(words, maps[0], strict=True)
    }


def words_of(text: str) -> list[str]:
    """Distinct words of a text, in order, without punctuation.

    Raises:
        PromptError: There is none.
    """
    words = list(dict.fromkeys(re.findall(r"\w+(?:['\u2019]\w+)*", text)))
    if not words:
        raise PromptError(f"the text {text!r} has no words to map")
    return words


def to_picture(image: ImageSource) -> Image.Image:
    """A picture of any kind as PIL has it, in its own size."""
    values = to_pixel_values(image, size=None, resize="none", multiple=1)[0]
    pixels = ((values + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(rearrange(pixels, "c h w -> h w c").cpu().numpy())


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
    """Per timestep the maps of each layer, for the tokens of all words in a row."""
    if not timesteps:
        raise ConfigError("timesteps must hold one scheduler step or more, got none")
    c, h, w = latents.shape[1:]
    embeds = backbone.embed([text], size=(h * backbone.reduction, w * backbone.reduction))
    positions = [position for span in spans for position in span]
    names = match_layers(backbone.unet, layers)
    for timestep in timesteps:
        noise = shared_noise((c, h, w), seed=seed, timestep=timestep)
        noisy = add_noise(backbone.scheduler, latents, noise, timestep)
        maps = read_head_attention(backbone, noisy, timestep, embeds, positions, names, heads)
        yield list(maps.values())


def _of_words(
    per_token: Float[Tensor, "images tokens h w"], spans: Sequence[tuple[int, ...]], merge: str
) -> Float[Tensor, "images words h w"]:
    per_word = per_token.split([len(span) for span in spans], dim=1)
    return torch.stack([reduce(pieces, "b t h w -> b h w", merge) for pieces in per_word], dim=1)
