"""Whether a text changes the features where the object is that it names.

Two objects of a scene take turns: a text names one, a control text the other, and both are measured
inside the mask of the first. What makes an object conspicuous under any text cancels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from einops import reduce
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffenc.denoiser.attention import cross_attention_layers, touching, word_token_positions
from diffenc.encoder import DiffusionEncoder
from diffenc.inputs.images import to_pixel_values
from diffenc.inputs.noise import add_noise, shared_noise
from diffenc.passes.encoded import image_keys, posterior_of, prompts_of
from diffenc.passes.forward import read_attention
from diffenc.shapes.render import masks, render
from diffenc.shapes.scenes import SceneObject
from diffenc.studies.probes import per_pass, side_of
from diffenc.studies.spreads import Spread
from diffenc.studies.trials import Trial, phrase

Measure = Literal["attention", "change"]
MEASURES: tuple[Measure, ...] = get_args(Measure)

_SILENT = 1e-4
"""A mean relative change below it is none: the text has not reached the tap, or only rounding."""

_TIE = 1e-5  # a difference of logarithms that rounding makes, as on a map of one cell

_Place = tuple[Measure, str, int]


@dataclass(frozen=True, slots=True)
class Focus:
    """How much more a text acts inside the object that it names than elsewhere.

    Attributes:
        measure: Quantity that is measured. "attention": density of the words' cross-attention
            inside the object's mask over its mean density in the picture. "change": mean |f_c -
            f_u| inside over that outside.
        tap: Place in the U-Net, as a module path.
        timestep: Scheduler step of the noise level.
        asked: Value for the object that the text names, as a geometric mean over scenes; 1 is no
            preference.
        control: Value inside the same masks under a text that names another object of the scene.
        preferred: Share of scenes in which `asked` is above `control`, 0 to 1; 0.5 is chance.
    """

    measure: Measure
    tap: str
    timestep: int
    asked: Spread
    control: Spread
    preferred: Spread


def read_focus(
    encoder: DiffusionEncoder, trials: Sequence[Trial], *, done: Callable[[int], object]
) -> list[Focus]:
    """Measure at every tap and timestep where a text acts.

    Args:
        encoder: Encoder that reads the features, at its taps, timesteps (a tuple), seed and batch
            size.
        trials: Scenes with two objects or more, of which the target and the next object are named
            in turn.
        done: Function that is called after each batch with its number of trials.

    Returns:
        "change" for taps that a text reaches, "attention" for those around or inside a
        cross-attention.

    Source:
        The claim: "Towards Multimodal Understanding via Stable Diffusion as a Task-Aware Feature
        Extractor", arXiv:2507.07106, abstract.
    """
    side, most = side_of(encoder), per_pass(encoder)
    asked: dict[_Place, list[Tensor]] = {}
    control: dict[_Place, list[Tensor]] = {}
    loudness: dict[_Place, float] = {}
    for start in range(0, len(trials), most):
        batch = trials[start : start + most]
        first = [trial.target for trial in batch]
        second = [(trial.target + 1) % len(trial.scene.objects) for trial in batch]
        inside = [_masks(batch, chosen, side) for chosen in (first, second)]
        for turn, chosen in enumerate((first, second)):
            named = [trial.scene.objects[k] for trial, k in zip(batch, chosen, strict=True)]
            images = [render(trial.scene, side) for trial in batch]
            for place, maps in _actions(encoder, images, named):
                loudness[place] = max(float(maps.mean()), loudness.get(place, 0.0))
                asked.setdefault(place, []).append(contrast(maps, inside[turn], place[0]))
                control.setdefault(place, []).append(contrast(maps, inside[1 - turn], place[0]))
        done(len(batch))
    return [
        _summary(place, _per_mask(asked[place]), _per_mask(control[place], swapped=True))
        for place in asked
        if place[0] == "attention" or loudness[place] > _SILENT
    ]


def contrast(
    maps: Float[Tensor, "b h w"], inside: Float[Tensor, "b height width"], measure: Measure
) -> Float[Tensor, " b"]:
    """Logarithm of the ratio of a map's mean inside a mask to its mean elsewhere.

    Args:
        maps: Values of each cell, 0 or more.
        inside: Mask of each map, 1 inside and 0 outside.
        measure: Choice of the mean to compare with: "attention" takes the mean of all cells,
            "change" the mean outside the mask.
    """
    grid = (maps.shape[-2], maps.shape[-1])
    cells = F.adaptive_avg_pool2d(inside[:, None], grid)[:, 0]
    within = reduce(maps * cells, "b h w -> b", "sum") / reduce(cells, "b h w -> b", "sum")
    rest = torch.ones_like(cells) if measure == "attention" else 1 - cells
    beyond = reduce(maps * rest, "b h w -> b", "sum") / reduce(rest, "b h w -> b", "sum")
    return within.clamp_min(1e-12).log() - beyond.clamp_min(1e-12).log()


def _per_mask(turns: Sequence[Tensor], *, swapped: bool = False) -> Float[Tensor, " n"]:
    """Both turns of each batch; swapped, so that rows of one mask meet in both lists."""
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return torch.cat([part for pair in pairs for part in (reversed(pair) if swapped else pair)])


def _summary(place: _Place, asked: Tensor, control: Tensor) -> Focus:
    difference = asked - control
    above = torch.where(difference.abs() < _TIE, 0.5, (difference > 0).double())

    def single(value: Tensor) -> Spread:
        return Spread((float(value),))

    return Focus(
        *place,
        asked=single(asked.mean().exp()),
        control=single(control.mean().exp()),
        preferred=single(above.mean()),
    )


def _masks(
    batch: Sequence[Trial], chosen: Sequence[int], side: int
) -> Float[Tensor, "b side side"]:
    rows = [masks(trial.scene, side)[k] for trial, k in zip(batch, chosen, strict=True)]
    return torch.from_numpy(np.stack(rows)).float()


def _actions(
    encoder: DiffusionEncoder, images: Sequence[Image.Image], named: Sequence[SceneObject]
) -> Iterator[tuple[_Place, Float[Tensor, "b h w"]]]:
    """Effect of a text in each cell, per measure, tap and timestep."""
    texts = [phrase(thing) for thing in named]
    features = encoder.extract(images, texts, conditioning="cfg")
    uncond, cond = features.select("uncond"), features.select("cond")
    for tap in features:
        lengths = (cond[tap] - uncond[tap]).float().norm(dim=2).cpu()
        relative = lengths / uncond[tap].float().norm(dim=2).cpu().mean()
        for index, timestep in enumerate(encoder.config.timesteps):
            yield ("change", tap, timestep), relative[:, index]
    layers = cross_attention_layers(encoder.backbone.denoiser)
    around = {tap: touching(tap, layers) for tap in features}
    read = [name for name in layers if any(name in inside for inside in around.values())]
    for timestep in encoder.config.timesteps if read else ():
        maps = _attention(encoder, images, texts, named, timestep, read)
        for tap, inside in around.items():
            if inside:
                yield ("attention", tap, timestep), _on_finest([maps[name] for name in inside])


def _attention(
    encoder: DiffusionEncoder,
    images: Sequence[Image.Image],
    texts: Sequence[str],
    named: Sequence[SceneObject],
    timestep: int,
    layers: Sequence[str],
) -> dict[str, Float[Tensor, "b _h _w"]]:
    """Probability that each cell gives to the words of colour and shape, per layer."""
    backbone, config = encoder.backbone, encoder.config
    pixel_values = to_pixel_values(
        list(images),
        size=side_of(encoder),
        multiple=backbone.multiple,
    )
    with torch.no_grad():
        latents, _ = posterior_of(backbone, pixel_values, keys=image_keys(pixel_values))
    _, c, h, w = latents.shape
    noise = shared_noise((c, h, w), seed=config.seed, timestep=timestep)
    noisy_latents = add_noise(backbone.scheduler, latents, noise, timestep)
    size = (pixel_values.shape[2], pixel_values.shape[3])
    embeds = prompts_of(backbone, texts, size=size, uncond=config.uncond)
    groups: dict[tuple[int, ...], list[int]] = {}  # rows whose words stand at the same positions
    for row, (text, thing) in enumerate(zip(texts, named, strict=True)):
        groups.setdefault(_positions(backbone, text, thing), []).append(row)
    maps_of: dict[str, list[Tensor]] = {}
    for positions, rows in groups.items():
        part = embeds.concat([embeds.select(row, row + 1) for row in rows])
        maps = read_attention(backbone, noisy_latents[rows], timestep, part, positions, layers)
        for name, values in maps.items():
            maps_of.setdefault(name, []).append(values.sum(dim=1).cpu())
    places = [row for rows in groups.values() for row in rows]
    order = torch.tensor(places, dtype=torch.long, device="cpu").argsort()
    return {name: torch.cat(parts)[order] for name, parts in maps_of.items()}


def _positions(backbone: object, text: str, thing: SceneObject) -> tuple[int, ...]:
    tokenizer = backbone.tokenizer  # type: ignore[attr-defined]
    words = (thing.color, thing.shape)
    return tuple(p for word in words for p in word_token_positions(tokenizer, text, word))


def _on_finest(maps: Sequence[Float[Tensor, "b _h _w"]]) -> Float[Tensor, "b h w"]:
    """Mean over layers on the finest grid among them; each cell's values are kept, not smoothed."""
    finest = max(((m.shape[-2], m.shape[-1]) for m in maps), key=lambda grid: grid[0] * grid[1])
    grown = [F.interpolate(m[:, None], size=finest, mode="nearest")[:, 0] for m in maps]
    return torch.stack(grown).mean(dim=0)
