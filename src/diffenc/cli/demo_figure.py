"""The figure of `diffenc demo`."""

from collections.abc import Sequence

from PIL import Image

from diffenc.cli.demo_answers import Query, token_of
from diffenc.models.shapes import BUNDLED_MODELS
from diffenc.passes.word_tokens import WordTokens
from diffenc.viz import HeatMap, Panel, figure

_SIDE = 256
_ALPHA = 0.75
_LIMITS = dict.fromkeys(BUNDLED_MODELS, ", a miniature that knows coloured shapes only")

_SEEN = """\
The question is text that the diffusion model reads. Where its word is seen: the word's \
cross-attention in one pass over the picture."""
_CHANGED = """\
How far the question moves the features: |f_c - f_u| at the finest tap. A CLIP encoder \
would give the same features three times."""


def draw_demo(
    picture: Image.Image,
    gathered: WordTokens,
    queries: Sequence[Query],
    answers: Sequence[str] | None,
    *,
    model: str,
) -> Image.Image:
    """Draw what the demo computed: a column a question.

    Args:
        picture: Picture that the model was given.
        gathered: Tokens and maps of the words of each question, with features of both halves.
        queries: The questions, one per row of the batch.
        answers: What the token of each question's word says; None leaves it out.
        model: Name of the model, as it appears in the figure.
    """
    places, changed = [], []
    finest = max(gathered.features, key=lambda tap: gathered.features[tap].shape[-2:].numel())
    changes = gathered.question_maps("change", taps=finest)
    for row, each in enumerate(queries):
        word_map = gathered.maps[row, token_of(gathered, row, each.word)]
        says = "" if answers is None else f" Its token says: {answers[row]}."
        places.append(
            Panel(_over(word_map, picture), each.text, f'Where "{each.word}" is seen.{says}')
        )
        changed.append(Panel(_over(changes[row], picture), caption="What the question changed"))
    return figure(
        [[Panel(picture, "one picture", _SEEN), *places], [Panel(caption=_CHANGED), *changed]],
        title="One picture, three questions",
        note=f"Model: {model}{_LIMITS.get(model, '')}. Made by: diffenc demo",
        side=_SIDE,
    )


def _over(values: object, picture: Image.Image) -> Image.Image:
    return HeatMap(values).to_pil(_SIDE, overlay=picture, alpha=_ALPHA)
