"""What scores and answers lose where a part of the U-Net runs without the text."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffenc._typing import Reused
from diffenc.checks.arguments import whole
from diffenc.models import load_backbone
from diffenc.models.base import Backbone
from diffenc.scorer import CrossAttnScorer
from diffenc.scoring.config import ScorerConfig, scorer_preset
from diffenc.shapes.pairs import mmvp_pairs
from diffenc.shapes.render import render
from diffenc.studies.probes import Done, Progress
from diffenc.studies.reuse_answers import (
    PARTS,
    AnswerFigure,
    AnswerLoss,
    answer_figure,
    loss_over,
    questions_each,
)
from diffenc.studies.spreads import Spread, over_seeds
from diffenc.studies.vlm.measure import HELD_OUT
from diffenc.studies.vlm.workshop import trained_models

PRESETS = ("calibrated", "denoising-gap")
"""Scores by attention in the decoder, and by the predicted noise."""

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
class ReuseOutcomes:
    """Results of the study.

    Attributes:
        model: Name of the backbone that scores.
        scores: Figures of each kind of score, part and timestep.
        answers: Figures of each language model.
        losses: What these models lose together, by part; empty without models.
        settings: Numbers of pictures, questions and seeds, and dtype.
    """

    model: str
    scores: tuple[ScoreFigure, ...]
    answers: tuple[AnswerFigure, ...]
    losses: tuple[AnswerLoss, ...]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)


def study_reuse_outcomes(
    model: "str | Backbone" = "shapes",
    *,
    vlms: "Sequence[str | PathLike[str]]" = (),
    work: "str | PathLike[str] | None" = None,
    training: str | None = None,
    timesteps: Sequence[int] = (50, 389),
    per_pattern: int = 2,
    questions: int | None = None,
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
        work: Work folder of `diffenc study`, whose trained models of second stages are asked too.
        training: Name of the training in `work`, such as "cfg"; None takes all.
        timesteps: Scheduler steps of the scores' noise levels.
        per_pattern: Number of pairs of nearly same pictures for each of the six patterns of MMVP.
        questions: Number of questions that each language model is asked, on held-out scenes of its
            own; None asks as many as decide whether one answer in a hundred is lost, see
            `questions_needed`, divided among the models.
        seeds: Number of repetitions of the scores with other pictures and other noise.
        batch_size: Largest number of rows per call of the U-Net.
        device: Device that the models run on; unused for a `Backbone`.
        dtype: Floating point type of the U-Net; unused for a `Backbone`.
        progress: Function that is called with the number of settings that are done and the number
            of all; None reports nothing.

    Raises:
        ConfigError: A number is too small, a timestep does not exist, or the work folder holds no
            such model.
        BackboneError: A model is unknown, missing or broken.
    """
    whole("per_pattern", per_pattern, least=1)
    folders = {Path(folder).name: Path(folder) for folder in vlms}
    if len(folders) < len(vlms):
        folders = {str(folder): Path(folder) for folder in vlms}
    if work is not None:
        folders |= trained_models(work, training)
    if questions is None:
        questions = questions_each(max(1, len(folders)))
    whole("questions", questions, least=1)
    whole("seeds", seeds, least=1)
    backbone = model
    if not isinstance(backbone, Backbone):
        backbone = load_backbone(backbone, device=device, dtype=dtype)
    settings = 1 + len(PARTS)
    done = Done(progress, settings * (seeds * len(PRESETS) + len(folders)))
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
    answers = [
        answer_figure(folder, name, number, questions, device, done)
        for number, (name, folder) in enumerate(folders.items())
    ]
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
        losses=tuple(loss_over(answers, part) for part in PARTS) if answers else (),
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
