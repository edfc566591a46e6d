"""One picture under several questions: what the text does to its features, and where."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from diffenc.checks.arguments import shown
from diffenc.checks.arguments import texts as listed
from diffenc.clip.vision_models import to_image, to_pictures
from diffenc.denoiser.attention import cross_attention_layers, match_layers, nearest_layers
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError, PromptError, ShapeError
from diffenc.inputs.images import ImageSource, decoded, to_pixel_values
from diffenc.inputs.words import word_token_positions, words_of
from diffenc.scorer import CrossAttnScorer, ScorerConfig
from diffenc.viz.heatmap import HeatMap
from diffenc.viz.questions import TapMaps, question_figure


@dataclass(frozen=True)
class Look:
    """What questions do to the features of a picture.

    Attributes:
        picture: The picture, as the maps lie over it.
        questions: Texts of the questions.
        taps: Names of the places in the U-Net.
        timesteps: Scheduler steps of the noise levels.
        uncond: Unconditional features f_u per tap, on the CPU in float32.
        cond: Conditional features f_c per tap, with a row for each question.
        registers: Cells per tap that act as registers under any of the texts.
        words: Heat map of each word by tap, index of the question and timestep; empty if words were
            not asked for.
        model: Name of the model.
    """

    picture: Image.Image
    questions: tuple[str, ...]
    taps: tuple[str, ...]
    timesteps: tuple[int, ...]
    uncond: dict[str, Float[Tensor, "t _c _h _w"]]
    cond: dict[str, Float[Tensor, "q t _c _h _w"]]
    registers: dict[str, Bool[Tensor, "t _h _w"]]
    words: dict[tuple[str, int, int], dict[str, HeatMap]]
    model: str

    def difference(self, tap: str) -> Float[Tensor, "q t c h w"]:
        """What each question adds at a tap, f_c - f_u."""
        difference: Tensor = self.cond[tap] - self.uncond[tap]
        return difference

    def change(self, tap: str) -> Float[Tensor, "q t h w"]:
        """Length of f_c - f_u in each cell, as a share of the mean length of f_u."""
        usual = self.uncond[tap].norm(dim=1).mean(dim=(1, 2))
        lengths: Tensor = self.difference(tap).norm(dim=2)
        shares: Tensor = lengths / usual.clamp_min(1e-12)[:, None, None]
        return shares

    def figure(
        self,
        *,
        guidance_scale: float | None = None,
        leave_out_registers: bool = False,
        title: str | None = None,
        note: str | None = None,
        side: int = 256,
    ) -> Image.Image:
        """Draw everything, see `diffenc.viz.questions.question_figure`.

        Args:
            guidance_scale: Guidance scale s of one more row, f_u + s (f_c - f_u); None leaves it
                out.
            leave_out_registers: Whether register cells have no part in the colours and are white.
            title: Text over all panels; None counts the questions.
            note: Text under all panels; None names the model.
            side: Side of a panel in pixels, 64 or more.

        Raises:
            ConfigError: A side below 64.
        """
        count = len(self.questions)
        heading = f"One picture under {count} question{'s' if count > 1 else ''}"
        return question_figure(
            self.picture,
            self.tap_maps(leave_out_registers=leave_out_registers),
            self.questions,
            guidance_scale=guidance_scale,
            title=heading if title is None else title,
            note=f"Model: {self.model}." if note is None else note,
            side=side,
        )

    def tap_maps(self, *, leave_out_registers: bool = False) -> list[TapMaps]:
        """What is drawn of each tap, for `diffenc.viz.questions`.

        Args:
            leave_out_registers: Whether register cells have no part in the colours and are white.
        """
        return [
            TapMaps(
                tap,
                self.uncond[tap],
                self.cond[tap],
                self.timesteps,
                registers=self.registers[tap] if leave_out_registers else None,
                words={
                    (index, timestep): heats
                    for (place, index, timestep), heats in self.words.items()
                    if place == tap
                },
            )
            for tap in self.taps
        ]


def look(
    encoder: DiffusionEncoder,
    image: ImageSource,
    questions: str | Sequence[str],
    *,
    words: bool | str | Sequence[str] = False,
    layers: str | Sequence[str] | None = None,
) -> Look:
    """Read a picture without a text and under each question, and compare.

    The encoder's config says at which taps and timesteps. The first question costs two passes of
    the U-Net, each further one one, and each map of words one more per question and timestep.

    Args:
        encoder: Encoder that reads the features.
        image: A picture of any kind.
        questions: One text or several, each with a word at least.
        words: Whether to map where each word of each question is seen; names of words map these,
            in the questions that have them.
        layers: Cross-attentions or blocks that the maps of words are read from; None takes, for
            each tap, the cross-attentions that it is or holds, or else those of its block, or else
            all.

    Raises:
        ImageError: The picture cannot be read.
        ShapeError: More than one picture.
        ConfigError: The model has no half without a text; or layers, and no words.
        PromptError: No question, one without a word, or a word that no question has.
        TapError: No cross-attention of such a name.
        NonFiniteError: NaN or infinity in the features.

    Examples:
        >>> encoder = DiffusionEncoder.from_pretrained("shapes", taps="up_blocks.1.attentions.1")
        >>> result = look(encoder, picture, ["where is the circle?", "where is the square?"])
        >>> result.figure().save("look.png")

    Source:
        "Towards Multimodal Understanding via Stable Diffusion as a Task-Aware Feature Extractor",
        arXiv:2507.07106, figures 1, 4, 5a and 7.
    """
    if layers is not None and words is False:
        raise ConfigError(
            f"layers={shown(layers)} are those that words are read from, and no words are mapped; "
            "pass words=True (--words) or words, or leave layers out"
        )
    texts = _questions(questions)
    named = _words(texts, words, encoder.backbone.tokenizer)
    images = decoded(image)
    if len(images) != 1:
        raise ShapeError(f"a look is at one picture, got {len(images)}")
    config, backbone = encoder.config, encoder.backbone
    if backbone.is_guidance_distilled:
        raise ConfigError(
            f"{backbone.name!r} was distilled of guided predictions and has no half without a "
            "text, beside which a question's change would be seen; compare `encoder.extract` under "
            "the question and under '', or take a model that is not distilled"
        )
    pixel_values = to_pixel_values(
        images,
        size=config.size or backbone.default_size,
        resize=config.resize,
        multiple=backbone.multiple,
    )
    uncond: dict[str, Tensor] = {}
    cond: dict[str, list[Tensor]] = {}
    registers: dict[str, Tensor] = {}
    for text in texts:
        features = encoder.extract(images, text, conditioning="cfg")
        cells = features.registers()
        plain, under = features.select("uncond"), features.select("cond")
        for tap in features:
            uncond.setdefault(tap, _per_timestep(plain[tap]))
            cond.setdefault(tap, []).append(_per_timestep(under[tap]))
            known = _per_timestep(cells[tap][..., None, :, :])[:, 0] > 0
            registers[tap] = registers.get(tap, known) | known
    taps = tuple(uncond)
    picture = to_pictures(images)[0] if config.resize == "squash" else to_image(pixel_values[0])
    return Look(
        picture=picture,
        questions=texts,
        taps=taps,
        timesteps=config.timesteps,
        uncond=uncond,
        cond={tap: torch.stack(rows) for tap, rows in cond.items()},
        registers=registers,
        words=_word_maps(encoder, images[0], texts, named, taps, layers),
        model=backbone.name,
    )


def _questions(questions: str | Sequence[str]) -> tuple[str, ...]:
    texts = listed("questions", questions, error=PromptError)
    for text in texts:
        if not text.strip():
            raise PromptError(f"a question needs a word or more, got {text!r}")
    return texts


def _words(
    texts: Sequence[str], words: bool | str | Sequence[str], tokenizer: Any
) -> list[tuple[str, ...]]:
    """Words to map in each question."""
    if isinstance(words, bool):
        return [tuple(words_of(text, tokenizer)) if words else () for text in texts]
    chosen: list[tuple[str, ...]] = [() for _ in texts]
    for word in listed("words", words, error=PromptError):
        faults = []
        for index, text in enumerate(texts):
            try:
                word_token_positions(tokenizer, text, word)
            except PromptError as error:
                faults.append(error)
            else:
                chosen[index] += (word,)
        if len(faults) == len(texts):
            raise faults[0] if len(texts) == 1 else PromptError(f"{word!r} is in no question")
    return chosen


def _word_maps(
    encoder: DiffusionEncoder,
    image: ImageSource,
    texts: Sequence[str],
    words: Sequence[Sequence[str]],
    taps: Sequence[str],
    layers: str | Sequence[str] | None,
) -> dict[tuple[str, int, int], dict[str, HeatMap]]:
    """Heat maps by tap, question and timestep; taps beside equal layers share them."""
    config, backbone = encoder.config, encoder.backbone
    if not any(words):
        return {}
    options = ScorerConfig(size=config.size, resize=config.resize, seed=config.seed)
    scorer = CrossAttnScorer(backbone, options, use_cache=encoder.use_cache)
    known = cross_attention_layers(backbone.denoiser)
    read_from = {
        tap: nearest_layers(tap, known)
        if layers is None
        else match_layers(backbone.denoiser, layers)
        for tap in taps
    }
    maps: dict[tuple[str, int, int], dict[str, HeatMap]] = {}
    drawn: dict[tuple[tuple[str, ...], int, int], dict[str, HeatMap]] = {}
    for tap, names in read_from.items():
        for index, (text, own) in enumerate(zip(texts, words, strict=True)):
            for timestep in config.timesteps if own else ():
                place = (names, index, timestep)
                if place not in drawn:
                    drawn[place] = scorer.word_maps(
                        image, text, own, layers=names, timesteps=(timestep,)
                    )
                maps[tap, index, timestep] = drawn[place]
    return maps


def _per_timestep(maps: Tensor) -> Float[Tensor, "t c h w"]:
    """Maps of one picture, with an axis of timesteps whether there are several or one."""
    return maps.detach().float().cpu().reshape(-1, *maps.shape[-3:])
