"""What the page shows: computed from a picture, a question and texts, without any page."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from PIL import Image, ImageOps

from diffenc.config import EncoderConfig
from diffenc.denoiser.attention import cross_attention_layers
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError, PromptError
from diffenc.inputs.images import to_pixel_values
from diffenc.inputs.latents import encode_latents
from diffenc.models import describe, load_backbone
from diffenc.models.base import Backbone
from diffenc.scorer import denoising_scores
from diffenc.studies.look import Look, look
from diffenc.viz import Panel, dot_chart
from diffenc.viz.questions import question_rows

_MAIN = re.compile(r"(mid_block|up_blocks\.\d+)(\.attentions\.\d+)?|transformer_blocks\.\d+")


@dataclass(frozen=True, slots=True)
class Answer:
    """What one question does to one picture, as pictures.

    Attributes:
        features: Panels of the features without a text, under the question, of their difference,
            and of how far each cell moves, in this order.
        words: Picture of where each word of the question is seen, by word; none where the model
            has no cross-attention.
        chart: Chart of how well each text fits the picture.
        scores: Score of each text, the best first; higher is better.
    """

    features: tuple[Panel, ...]
    words: dict[str, Image.Image]
    chart: Image.Image
    scores: tuple[tuple[str, float], ...]


class Desk:
    """One model at a time, and what is asked of it.

    Args:
        device: Device that models run on.
        dtype: Floating point type of the denoiser.
        side: Side of the panels in pixels.
    """

    def __init__(
        self,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        side: int = 320,
    ) -> None:
        self.device, self.dtype, self.side = device, dtype, side
        self._loaded: tuple[str, Backbone] | None = None
        self._lock = Lock()

    def backbone(self, model: str) -> Backbone:
        """A loaded model; another one than before takes its place in memory.

        Raises:
            BackboneError: The model is unknown, missing or broken.
        """
        with self._lock:
            if self._loaded is None or self._loaded[0] != model:
                self._loaded = None  # before the next one is loaded: two may not fit
                backbone = load_backbone(model, device=self.device, dtype=self.dtype)
                self._loaded = (model, backbone)
            return self._loaded[1]

    def answer(
        self,
        picture: Image.Image | None,
        question: str,
        texts: Sequence[str] = (),
        *,
        model: str = "shapes",
        tap: str | None = None,
        timestep: int = 50,
    ) -> Answer:
        """Read a picture without a text and under a question, and score texts.

        Args:
            picture: Picture; None raises an error that asks for one.
            question: Text that the features are read under.
            texts: Texts to score beside the question.
            model: Alias, Hub id or folder of the model.
            tap: Place in the denoiser; None takes the first of `main_taps`.
            timestep: Scheduler step of the noise level, 0 to 999.

        Raises:
            ConfigError: No picture.
            PromptError: A question without a word.
            TapError: The model has no such tap.
        """
        if picture is None:
            raise ConfigError("there is no picture: drop one into its place")
        if not question.strip():
            raise PromptError("the question has no word yet: type one")
        backbone = self.backbone(model)
        config = EncoderConfig(taps=(tap or main_taps(model)[0],), timestep=timestep)
        encoder = DiffusionEncoder(backbone, config)
        words = bool(cross_attention_layers(backbone.denoiser))
        result = look(encoder, picture, question.strip(), words=words)
        listed = dict.fromkeys(text.strip() for text in (question, *texts) if text.strip())
        scores = score_texts(backbone, picture, list(listed))
        panels = _panels(result, self.side)
        chart = dot_chart([text for text, _ in scores], [s for _, s in scores], side=self.side)
        return Answer(
            features=tuple(panels[:4]),
            words=_words(result, panels[4:]),
            chart=ImageOps.expand(chart, self.side // 16, "white"),  # a frame cuts into the text
            scores=scores,
        )


def main_taps(model: str) -> list[str]:
    """Taps to choose from, without weights: blocks and their transformers, the best place first.

    Raises:
        BackboneError: The model is unknown, missing or broken.
    """
    architecture = describe(model)
    names = [tap.name for tap in architecture.taps() if _MAIN.fullmatch(tap.name)]
    first = "up_blocks.1" if "up_blocks.1" in names else architecture.default_taps[0]
    return list(dict.fromkeys([first, *names, *architecture.default_taps]))


def score_texts(
    backbone: Backbone, picture: Image.Image, texts: list[str]
) -> tuple[tuple[str, float], ...]:
    """How well each text fits a picture, by the error of the predicted noise; the best first."""
    with torch.no_grad():
        pixel_values = to_pixel_values(
            picture, size=backbone.default_size, multiple=backbone.multiple
        )
        latents = encode_latents(backbone.vae, pixel_values)
    (row,) = denoising_scores(backbone, latents, texts).tolist()
    return tuple(sorted(zip(texts, row, strict=True), key=lambda pair: -pair[1]))


def _words(result: Look, panels: Sequence[Panel]) -> dict[str, Image.Image]:
    heats = next(iter(result.words.values()), {})
    images = (panel.image for panel in panels)
    return {word: image for word, image in zip(heats, images, strict=True) if image is not None}


def _panels(result: Look, side: int) -> list[Panel]:
    """Panels with a picture, row by row."""
    (maps,) = result.tap_maps()
    rows = question_rows(result.picture, maps, result.questions, side=side)
    return [panel for row in rows for panel in row if panel is not None and panel.image is not None]
