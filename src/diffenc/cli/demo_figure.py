"""The figure of `diffenc demo`."""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffenc.features import Features
from diffenc.viz import HeatMap, Panel, dot_chart, figure
from diffenc.viz.questions import COLORS, TapMaps, question_rows, word_panels

_SIDE = 256


def draw_demo(
    picture: Image.Image,
    features: Features,
    word_maps: Mapping[str, Float[Tensor, "h w"]],
    scores: Mapping[str, float],
    *,
    prompts: Sequence[str],
    timesteps: Sequence[int],
    model: str,
) -> Image.Image:
    """Draw what the demo computed.

    Args:
        picture: Picture that the model was given.
        features: Features of the picture under each prompt, guided, in one batch.
        word_maps: Attention map of each word of the first prompt.
        scores: Score of each text, higher is better.
        prompts: Prompts of `features`, one per row of the batch.
        timesteps: Scheduler step of `features`, one.
        model: Name of the model, as it appears in the figure.
    """
    tap = max(features, key=lambda name: features[name].shape[2] * features[name].shape[3])
    uncond, cond = (features.select(half)[tap] for half in ("uncond", "cond"))
    maps = TapMaps(tap, uncond[:1], cond[:, None], timesteps)
    return figure(
        [
            _top(picture, word_maps, scores, prompts[0]),
            *question_rows(
                picture, maps, prompts, guidance_scale=features.guidance_scale, side=_SIDE
            ),
        ],
        title="One picture under three prompts",
        note=f"Model: {model}{_LIMITS.get(model, '')}. {COLORS} Made by: diffenc demo",
        side=_SIDE,
    )


_LIMITS = {"shapes": ", a miniature that knows coloured shapes only"}


def _top(
    picture: Image.Image,
    word_maps: Mapping[str, Tensor],
    scores: Mapping[str, float],
    prompt: str,
) -> list[Panel]:
    explanation = (
        f"{picture.height} x {picture.width} pixels. Where a word is seen: the share of a cell's "
        "cross-attention that it gets in up_blocks.1, mean over layers and heads."
    )
    heats = {word: HeatMap(values) for word, values in word_maps.items()}
    return [
        Panel(picture, "picture", explanation),
        *word_panels(heats, picture, prompt, side=_SIDE),
        Panel(
            dot_chart(list(scores), list(scores.values()), side=_SIDE),
            "how well a text fits",
            "Minus the error of the noise that the model predicts under it; higher is better.",
        ),
    ]
