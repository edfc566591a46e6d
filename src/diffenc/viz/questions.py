"""One picture under several questions: what each does to the features, in rows of panels."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float64
from PIL import Image

from diffenc.errors import ConfigError, ShapeError
from diffenc.viz.arrays import as_picture, to_array
from diffenc.viz.figure import Panel, figure, fitted
from diffenc.viz.heatmap import HeatMap
from diffenc.viz.pca import pca_maps

_ALPHA = 0.8
_WORDS_A_ROW = 5


@dataclass(frozen=True, slots=True)
class TapMaps:
    """Features of a picture at one tap, without a text and under each question.

    Attributes:
        tap: Name of the place in the U-Net.
        uncond: Unconditional maps f_u (t c h w), one per timestep, as a tensor or an array.
        cond: Conditional maps f_c (q t c h w), one per question and timestep.
        timesteps: Scheduler steps of the noise levels, as they stand in the titles.
        registers: Cells (t h w) that have no part in the colours and are drawn white; None has all
            cells take part.
        words: Heat map of each word, by index of the question and by timestep.
    """

    tap: str
    uncond: Any
    cond: Any
    timesteps: Sequence[int]
    registers: Any = None
    words: Mapping[tuple[int, int], Mapping[str, HeatMap]] = field(default_factory=dict)


def question_figure(
    picture: Image.Image,
    taps: Sequence[TapMaps],
    questions: Sequence[str],
    *,
    guidance_scale: float | None = None,
    title: str = "",
    note: str = "",
    side: int = 256,
) -> Image.Image:
    """Draw what each question does to the features of a picture, side by side.

    Every tap has a block, in which every timestep has rows: features without a text and under each
    question, f_c; their difference f_c - f_u; its length over the picture; and where each word is
    seen, for taps with `words`. All maps of a kind at a tap, whatever question and timestep they
    are of, are drawn in one scheme, so that equal colours are equal features.

    Args:
        picture: Picture that the features are of.
        taps: Features at each tap.
        questions: Texts of the questions, in the order of `TapMaps.cond`.
        guidance_scale: Guidance scale s of one more row, f_u + s (f_c - f_u); None leaves it out.
        title: Text over all panels; "" leaves it out.
        note: Text under all panels; "" leaves it out.
        side: Side of a panel in pixels, 64 or more.

    Raises:
        ConfigError: No tap, no question, or a side below 64.
        ShapeError: Maps that fit neither each other nor the questions.
        NonFiniteError: A map holds NaN or infinity.

    Source:
        "Towards Multimodal Understanding via Stable Diffusion as a Task-Aware Feature Extractor",
        arXiv:2507.07106, figures 5a and 7.
    """
    if not taps or not questions:
        raise ConfigError(f"got {len(taps)} taps and {len(questions)} questions; pass one or more")
    picture = as_picture(picture)
    rows: list[list[Panel | None]] = [[Panel(picture, "picture", _size_of(picture)), *_legend()]]
    for maps in taps:
        rows += question_rows(picture, maps, questions, guidance_scale=guidance_scale, side=side)
    return figure(rows, title=title, note=note, side=side)


def question_rows(
    picture: Image.Image,
    maps: TapMaps,
    questions: Sequence[str],
    *,
    guidance_scale: float | None = None,
    side: int = 256,
) -> list[list[Panel | None]]:
    """The rows of one tap in `question_figure`, for a figure of your own.

    Args:
        picture: Picture that the features are of.
        maps: Features at the tap.
        questions: Texts of the questions, in the order of `TapMaps.cond`.
        guidance_scale: Guidance scale s of one more row, f_u + s (f_c - f_u); None leaves it out.
        side: Side of a panel in pixels.

    Raises:
        ShapeError: Maps that fit neither each other nor the questions.
        NonFiniteError: A map holds NaN or infinity.
    """
    # Drawn over many times, and large ones take a second each.
    picture = _shrunk(as_picture(picture), side)
    uncond, cond = to_array(maps.uncond, "t c h w"), to_array(maps.cond, "q t c h w")
    if cond.shape != (len(questions), *uncond.shape) or len(uncond) != len(maps.timesteps):
        raise ShapeError(
            f"maps at {maps.tap} do not fit: f_u of {uncond.shape} and f_c of {cond.shape} for "
            f"{len(questions)} questions and {len(maps.timesteps)} timesteps; f_c must be "
            "(questions, timesteps, channels, height, width), f_u the same without questions"
        )
    change = cond - uncond
    guided = [] if guidance_scale is None else list(uncond + guidance_scale * change)
    plain, *others = _colored([uncond, *cond, *guided], maps, picture, side)
    differences = _colored(list(change), maps, picture, side)
    channels, height, width = uncond.shape[1:]
    place = f"{maps.tap}: {height} x {width} cells, {channels} channels"
    rows: list[list[Panel | None]] = []
    for index, timestep in enumerate(maps.timesteps):
        at = f", t = {timestep}" if len(maps.timesteps) > 1 else ""
        columns = [each[index] for each in others]
        conditional, beyond = columns[: len(questions)], columns[len(questions) :]
        no_text = Panel(plain[index], f"unconditional{at}", f"no text; at {place}")
        rows.append([no_text, *_captioned(f"conditional{at}", conditional, questions)])
        if beyond:
            title = f"guided, s = {guidance_scale:g}{at}"
            rows.append([_note(_GUIDED, index), *_captioned(title, beyond, questions)])
        shown = [each[index] for each in differences]
        rows.append([_note(_DIFFERENCE, index), *_captioned(f"difference{at}", shown, questions)])
        heats = _lengths(uncond[index], change[:, index])
        titled = f"what the text changed{at}"
        rows.append(
            [
                _note(_CHANGED, index),
                *(
                    _over(heat, picture, titled, text, side)
                    for heat, text in zip(heats, questions, strict=True)
                ),
            ]
        )
        words = [
            panel
            for number, text in enumerate(questions)
            for panel in word_panels(
                maps.words.get((number, timestep), {}), picture, text, timestep=at, side=side
            )
        ]
        across = max(_WORDS_A_ROW, len(questions))
        for start in range(0, len(words), across):
            rows.append([_note(_WORDS, index + start), *words[start : start + across]])
    return rows


def word_panels(
    words: Mapping[str, HeatMap],
    picture: Image.Image,
    text: str,
    *,
    timestep: str = "",
    side: int = 256,
) -> list[Panel]:
    """Panels that show where each word of a text is seen, over the picture.

    Args:
        words: Heat map of each word.
        picture: Picture that the maps are of.
        text: The text, which stands below each panel.
        timestep: End of each title, such as ", t = 50".
        side: Side of a panel in pixels.
    """
    picture = as_picture(picture)
    titles = [f'where "{word}" is seen{timestep}' for word in words]
    return [
        _over(heat, picture, title, text, side)
        for title, heat in zip(titles, words.values(), strict=True)
    ]


COLORS = """\
Colours are the first three principal components of the features, as red, green and blue. Maps \
without a text and under each text share one scheme at a tap: equal colours are equal features."""
_HEAT = """\
Heat maps go from dark (low) to light (high), in the range that stands under them."""
_GUIDED = "Guided features are f_u + s (f_c - f_u), in the scheme of the row above."
_DIFFERENCE = """\
What the text adds: f_c - f_u, the conditional features less the unconditional ones, in a scheme \
of their own that all texts share."""
_CHANGED = """\
How far the text moves the features: the length of f_c - f_u in each cell, as a share of the mean \
length of f_u. One range for all texts."""
_WORDS = """\
Where each word is seen: the share of a cell's cross-attention that it gets, mean over layers and \
heads. Each word has its own range: compare places, not words."""


def _legend() -> list[Panel]:
    return [Panel(caption=COLORS), Panel(caption=_HEAT)]


def _shrunk(picture: Image.Image, side: int) -> Image.Image:
    height, width = fitted(picture, side)
    return picture if max(picture.size) <= side else picture.resize((width, height))


def _size_of(picture: Image.Image) -> str:
    return f"{picture.height} x {picture.width} pixels"


def _colored(
    stacks: Sequence[Float64[np.ndarray, "t c h w"]],
    maps: TapMaps,
    picture: Image.Image,
    side: int,
) -> list[list[Image.Image]]:
    """Each stack in the colours that all of them share, one picture per timestep."""
    leave_out = None if maps.registers is None else [maps.registers] * len(stacks)
    size = fitted(picture, side)
    return pca_maps(stacks, size=size, resample="bicubic", leave_out=leave_out)


def _captioned(
    title: str, pictures: Sequence[Image.Image], questions: Sequence[str]
) -> Iterator[Panel]:
    for shown, text in zip(pictures, questions, strict=True):
        yield Panel(shown, title, text)


def _lengths(
    uncond: Float64[np.ndarray, "c h w"], change: Float64[np.ndarray, "q c h w"]
) -> list[HeatMap]:
    """|f_c - f_u| per cell over the mean |f_u|, for each question, in one range."""
    usual = np.linalg.norm(uncond, axis=0).mean()
    lengths = np.linalg.norm(change, axis=1) / (usual if usual > 0 else 1)
    return [HeatMap(values, low=lengths.min(), high=lengths.max()) for values in lengths]


def _over(heat: HeatMap, picture: Image.Image, title: str, text: str, side: int) -> Panel:
    shown = heat.to_pil(fitted(picture, side), overlay=picture, alpha=_ALPHA)
    return Panel(shown, title, text, heat)


def _note(text: str, before: int) -> Panel | None:
    """An explanation at the left of a row, unless rows before have told it."""
    return None if before else Panel(caption=text)
