"""What scores and answers lose where a part of the U-Net runs without the text."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from diffenc._typing import Reused
from diffenc.checks.arguments import whole
from diffenc.mllm.model import DiffusionVLM
from diffenc.models import load_backbone
from diffenc.models.base import Backbone
from diffenc.scorer import CrossAttnScorer
from diffenc.scoring.config import ScorerConfig, scorer_preset
from diffenc.shapes.pairs import mmvp_pairs
from diffenc.shapes.render import render
from diffenc.studies.probes import Done, Progress
from diffenc.studies.spreads import Spread, over_seeds
from diffenc.studies.vlm.measure import HELD_OUT, ask_questions, is_right

PARTS: tuple[Reused, ...] = get_args(Reused)
PRESETS = ("calibrated", "denoising-gap")
"""Scores by attention in the decoder, and by the predicted noise."""

_EXAMPLES = 20
_Place = tuple[str, Reused, int]


@dataclass(frozen=True, slots=True)
class ScoreFigure:
    """What one kind of score loses at one timestep.

    Attributes:
        preset: Kind of the score, see `scorer_preset`.
        part: Part of the U-Net that runs without the text, see `ScorerConfig.reuse`.
        timestep: Scheduler step of the noise level.
        agreement: Spearman's rank correlation of a picture's scores over texts, exact and with
            reuse, mean over pictures.
        moved: Length of the difference to exact scores over that of exact scores, both without the
            mean over texts.
        exact: Share of pictures whose own text scores above that of the nearly same picture.
        reused: The same share with reuse.
    """

    preset: str
    part: Reused
    timestep: int
    agreement: Spread
    moved: Spread
    exact: Spread
    reused: Spread


@dataclass(frozen=True, slots=True)
class AnswerFigure:
    """Answers of one trained language model to the same questions.

    Attributes:
        model: Name of its folder.
        exact: Share of right answers without reuse.
        reused: Share of right answers, by part that runs without the text.
        changed: Share of answers that differ from those without reuse, by part.
        examples: Questions, true answers, and what was said.
    """

    model: str
    exact: float
    reused: Mapping[Reused, float]
    changed: Mapping[Reused, float]
    examples: tuple[Mapping[str, str], ...]


@dataclass(frozen=True, slots=True)
class ReuseOutcomes:
    """Results of the study.

    Attributes:
        model: Name of the backbone that scores.
        scores: Figures of each kind of score, part and timestep.
        answers: Figures of each language model.
        settings: Numbers of pictures, questions and seeds, and dtype.
    """

    model: str
    scores: tuple[ScoreFigure, ...]
    answers: tuple[AnswerFigure, ...]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)


def study_reuse_outcomes(
    model: "str | Backbone" = "shapes",
    *,
    vlms: "Sequence[str | PathLike[str]]" = (),
    timesteps: Sequence[int] = (50, 389),
    per_pattern: int = 2,
    questions: int = 140,
    seeds: int = 2,
    batch_size: int = 24,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> ReuseOutcomes:
    """Compare scores, and answers of trained models, with and without reuse.

    Args:
        model: Alias, Hub id or folder of a diffusion model, or a loaded `Backbone`.
        vlms: Folders of trained `DiffusionVLM`s that were trained without reuse.
        timesteps: Scheduler steps of the scores' noise levels.
        per_pattern: Number of pairs of nearly same pictures for each of the six patterns of MMVP.
        questions: Number of questions that each language model is asked, on held-out scenes.
        seeds: Number of repetitions of the scores with other pictures and other noise.
        batch_size: Largest number of rows per call of the U-Net.
        device: Device that the models run on; unused for a `Backbone`.
        dtype: Floating point type of the U-Net; unused for a `Backbone`.
        progress: Function that is called with the number of settings that are done and the number
            of all; None reports nothing.

    Raises:
        ConfigError: A number is too small, or a timestep does not exist.
        BackboneError: A model is unknown, missing or broken.
    """
    whole("per_pattern", per_pattern, least=1)
    whole("questions", questions, least=1)
    whole("seeds", seeds, least=1)
    backbone = model
    if not isinstance(backbone, Backbone):
        backbone = load_backbone(backbone, device=device, dtype=dtype)
    settings = 1 + len(PARTS)
    done = Done(progress, settings * (seeds * len(PRESETS) + len(vlms)))
    options = {"timesteps": tuple(timesteps), "batch_size": batch_size}
    figures = []
    for seed in range(seeds):
        numbers: dict[tuple[_Place, str], float] = {}
        for preset in PRESETS:
            config = ScorerConfig.from_dict({**scorer_preset(preset), **options, "seed": seed})
            numbers |= _score_numbers(CrossAttnScorer(backbone, config), preset, per_pattern, done)
        figures.append(numbers)
    spreads = over_seeds(figures)
    places = [(p, part, step) for p in PRESETS for part in PARTS for step in timesteps]
    answers = [_answers(Path(folder), questions, device, done) for folder in vlms]
    return ReuseOutcomes(
        model=backbone.name,
        scores=tuple(
            ScoreFigure(
                *place,
                agreement=spreads[place, "agreement"],
                moved=spreads[place, "moved"],
                exact=spreads[place, "exact"],
                reused=spreads[place, "reused"],
            )
            for place in places
        ),
        answers=tuple(answers),
        settings={
            "pictures": 12 * per_pattern,
            "questions": questions,
            "seeds": seeds,
            "dtype": str(backbone.dtype).removeprefix("torch."),
        },
    )


def _score_numbers(
    scorer: CrossAttnScorer, preset: str, per_pattern: int, done: Done
) -> dict[tuple[_Place, str], float]:
    """Numbers of one kind of score with one seed, by part and timestep."""
    pairs = mmvp_pairs(per_pattern, seed=HELD_OUT["mmvp"] + scorer.config.seed)
    pictures = [render(scene) for pair in pairs for scene in pair.scenes]
    texts = [caption for pair in pairs for caption in pair.captions]

    def scores(part: Reused | None) -> Float[Tensor, "pictures texts timesteps"]:
        values = scorer.with_options(reuse=part).score(pictures, texts).by_timestep[0].double()
        done.add(1)
        return values

    exact = scores(None)
    numbers: dict[tuple[_Place, str], float] = {}
    for part in PARTS:
        reused = scores(part)
        for index, step in enumerate(scorer.config.timesteps):
            first, second = exact[..., index], reused[..., index]
            place = (preset, part, step)
            numbers[place, "agreement"] = float(rank_agreement(first, second).mean())
            centred = first - first.mean(dim=1, keepdim=True)
            change = (second - first) - (second - first).mean(dim=1, keepdim=True)
            numbers[place, "moved"] = float(change.norm() / centred.norm())
            numbers[place, "exact"] = _matched(first)
            numbers[place, "reused"] = _matched(second)
    return numbers


def rank_agreement(
    first: Float[Tensor, "rows n"], second: Float[Tensor, "rows n"]
) -> Float[Tensor, " rows"]:
    """Spearman's rank correlation of two rows of numbers, for each row."""
    ranks = [each.argsort(dim=1).argsort(dim=1).double() for each in (first, second)]
    one, two = (each - each.mean(dim=1, keepdim=True) for each in ranks)
    return torch.nn.functional.cosine_similarity(one, two, dim=1)


def _matched(scores: Float[Tensor, "pictures texts"]) -> float:
    """Share of pictures whose own text scores above that of the other picture of their pair."""
    own = torch.arange(len(scores), dtype=torch.long, device=scores.device)
    right = scores[own, own] > scores[own, own ^ 1]
    return float(right.double().mean())


def _answers(folder: Path, questions: int, device: str | torch.device, done: Done) -> AnswerFigure:
    """What one language model answers with and without reuse."""
    said: dict[Reused | None, list[str]] = {}
    for part in (None, *PARTS):
        vlm = DiffusionVLM.from_pretrained(folder, device=device, reuse=part)
        posed, said[part] = ask_questions(vlm.generate, questions, seed=HELD_OUT["answers"])
        done.add(1)
    shares = {
        part: mean(is_right(text, question) for text, question in zip(texts, posed, strict=True))
        for part, texts in said.items()
    }
    changed = {
        part: mean(one != two for one, two in zip(said[part], said[None], strict=True))
        for part in PARTS
    }
    examples = tuple(
        {
            "question": question.text,
            "true": question.answer,
            "exact": said[None][row],
            **{part: said[part][row] for part in PARTS},
        }
        for row, question in enumerate(posed[:_EXAMPLES])
    )
    reused = {part: shares[part] for part in PARTS}
    return AnswerFigure(folder.name, shares[None], reused, changed, examples)
