"""What training needs of a scene, be it of shapes or of little pictures."""

import random
from collections.abc import Sequence

import numpy as np
import picture_falsehoods
import torch
from crowd_texts import false_caption
from grounding import bit_sets, spoken_of
from jaxtyping import Bool
from PIL import Image
from texts import training_scene, training_text, wrong_captions
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTokenizer

from diffenc.shapes.crowds import COUNTS, sample_crowd
from diffenc.shapes.phrases import scene_text
from diffenc.shapes.picture_texts import named_things, picture_text
from diffenc.shapes.pictures import PictureScene, picture_masks, render_pictures, sample_pictures
from diffenc.shapes.render import masks, render
from diffenc.shapes.scenes import Scene

AnyScene = Scene | PictureScene


def drawn(
    rng: random.Random, *, crowds: float, pictures: float
) -> tuple[AnyScene, tuple[str, ...]]:
    """A scene, and words of which its captions must have one (any caption where there are none)."""
    if pictures and rng.random() < pictures:
        return sample_pictures(rng), ()
    if crowds and rng.random() < crowds:
        return sample_crowd(rng), ()
    return training_scene(rng)


def image(scene: AnyScene, size: int) -> Image.Image:
    """The scene as an RGB picture."""
    return render_pictures(scene, size) if isinstance(scene, PictureScene) else render(scene, size)


def seen(scene: AnyScene, size: int) -> Bool[np.ndarray, "objects size size"]:
    """Visible pixels of each object."""
    return picture_masks(scene, size) if isinstance(scene, PictureScene) else masks(scene, size)


def pixels(scenes: Sequence[AnyScene], size: int) -> Tensor:
    """Rendered scenes (b 3 size size) in [-1, 1]."""
    stacked = np.stack([np.asarray(image(scene, size)) for scene in scenes])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def covered(scene: AnyScene, size: int, side: int, most: int) -> Tensor:
    """Share of each of `side` x `side` latent cells that an object covers, in 255ths."""
    visible = torch.from_numpy(seen(scene, size)).float()
    shares = torch.zeros(most, side, side)
    shares[: len(visible)] = F.avg_pool2d(visible, size // side)
    return (255 * shares).round().byte()


def text(scene: AnyScene, rng: random.Random, saying: tuple[str, ...] = ()) -> str:
    """A caption, a question or a reference; `saying` are words of which it must have one."""
    if isinstance(scene, PictureScene):
        return picture_text(scene, rng)
    if len(scene.objects) >= COUNTS[0]:
        return scene_text(scene, rng)
    return training_text(scene, rng, saying=saying)


def false_texts(scene: AnyScene, lines: list[str], rng: random.Random) -> list[str | None]:
    """For each text a caption that is false in much the same words; None where there is none."""
    if isinstance(scene, PictureScene):
        return [picture_falsehoods.false_caption(scene, line, rng) for line in lines]
    if len(scene.objects) >= COUNTS[0]:
        return [false_caption(scene, line, rng) for line in lines]
    return wrong_captions(scene, lines, rng)


def named(tokenizer: CLIPTokenizer, line: str, scene: AnyScene, *, colors: bool) -> list[int]:
    """Per token of the padded text a bit set of the objects that it names."""
    if isinstance(scene, PictureScene):
        return bit_sets(tokenizer, line, lambda words: named_things(scene, words))
    return spoken_of(tokenizer, line, scene, colors=colors)
