"""The figure of `diffenc demo`."""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffenc.features import Features
from diffenc.viz import HeatMap, Panel, dot_chart, figure, pca_maps

_SIDE, _ALPHA = 256, 0.8


def draw_demo(
    picture: Image.Image,
    features: Features,
    word_maps: Mapping[str, Float[Tensor, "h w"]],
    scores: Mapping[str, float],
    *,
    prompts: Sequence[str],
    model: str,
) -> Image.Image:
    """Draw what the demo computed.

    Args:
        picture: Picture that the model was given.
        features: Features of the picture under each prompt, guided, in one batch.
        word_maps: Attention map of each word of the first prompt.
        scores: Score of each text, higher is better.
        prompts: Prompts of `features`, one per row of the batch.
        model: Name of the model, as it appears in the figure.
    """
    tap = max(features, key=lambda name: features[name].shape[2] * features[name].shape[3])
    uncond, cond, guided = (features.select(half)[tap] for half in ("uncond", "cond", "cfg"))
    (first, *_), under, beyond = pca_maps(
        [uncond[:1], cond, guided], size=_SIDE, resample="bicubic"
    )
    c, h, w = cond.shape[1:]
    colors = Panel(
        caption=f"Colours are the first three principal components of the features at {tap} ({h} x "
        f"{w} cells, {c} channels), in one scheme for all seven maps: equal colours are equal "
        "features.\n\nGuided features are f_u + s (f_c - f_u): they go from the unconditional f_u "
        "through the conditional f_c and beyond."
    )
    changed = Panel(
        caption="How far the text moves the features: the length of f_c - f_u in each cell, as a "
        "share of the mean length of f_u. One range for the three maps."
    )
    guidance = f"guided, s = {features.guidance_scale:g}"
    return figure(
        [
            _top(picture, word_maps, scores, prompts[0]),
            [Panel(first, "unconditional", "no text"), *_panels("conditional", under, prompts)],
            [colors, *_panels(guidance, beyond, prompts)],
            [changed, *_changes(uncond, cond, picture, prompts)],
        ],
        title="One picture under three prompts",
        note=f"Model: {model}{_LIMITS.get(model, '')}. Made by: diffenc demo",
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
        *(
            Panel(
                heat.to_pil(_SIDE, overlay=picture, alpha=_ALPHA),
                f'where "{word}" is seen',
                prompt,
                heat,
            )
            for word, heat in heats.items()
        ),
        Panel(
            dot_chart(list(scores), list(scores.values()), side=_SIDE),
            "how well a text fits",
            "Minus the error of the noise that the model predicts under it; higher is better.",
        ),
    ]


def _panels(title: str, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[Panel]:
    return [Panel(shown, title, text) for shown, text in zip(pictures, prompts, strict=True)]


def _changes(
    uncond: Float[Tensor, "b c h w"],
    cond: Float[Tensor, "b c h w"],
    picture: Image.Image,
    prompts: Sequence[str],
) -> list[Panel]:
    lengths = (cond - uncond).float().norm(dim=1) / uncond.float().norm(dim=1).mean()
    low, high = float(lengths.min()), float(lengths.max())
    heats = [HeatMap(values, low=low, high=high) for values in lengths]
    return [
        Panel(
            heat.to_pil(_SIDE, overlay=picture, alpha=_ALPHA), "what the text changed", text, heat
        )
        for heat, text in zip(heats, prompts, strict=True)
    ]
