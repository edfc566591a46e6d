"""Estimate of the time that a study will take."""

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from diffenc.mllm.training.build import build_vlm
from diffenc.mllm.training.config import TrainConfig
from diffenc.mllm.training.data import check_data
from diffenc.mllm.training.dataset import collate, make_dataset
from diffenc.studies.vlm.measure import CAPTION_TOKENS
from diffenc.studies.vlm.measurements import Measurement
from diffenc.studies.vlm.plan import StudyPlan
from diffenc.studies.vlm.trainings import Training
from diffenc.studies.vlm.workshop import Workshop

_BACKWARD = 3.0
"""Cost of a pass through a trained encoder, relative to its forward pass alone."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Durations of single steps in seconds, measured or assumed.

    Attributes:
        encode: Seconds to encode a picture, once through the U-Net.
        learn: Seconds to train on a sample, forward and backward through the language model.
        answer: Seconds to generate an answer, without encoding the picture.
    """

    encode: float = 0.03
    learn: float = 0.02
    answer: float = 0.04


@dataclass(frozen=True, slots=True)
class Piece:
    """A training or a measurement with one seed.

    Attributes:
        what: Kind of the piece: "train" or "measure".
        name: Name of the training and, for "measure", name of the measurement.
        count: Number of steps of a training, or of answers of a measurement.
        seconds: Estimated duration in seconds.
    """

    what: str
    name: tuple[str, ...]
    count: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Work:
    """All pieces of a study, and how long they take.

    Attributes:
        pieces: Trainings and measurements of one seed.
        seeds: Number of seeds.
    """

    pieces: tuple[Piece, ...]
    seeds: int

    @property
    def seconds(self) -> dict[tuple[str, ...], float]:
        """Estimated seconds of each piece with one seed, by its name."""
        return {piece.name: piece.seconds for piece in self.pieces}

    @property
    def total(self) -> float:
        """Seconds of everything."""
        return self.seeds * sum(piece.seconds for piece in self.pieces)


def work_of(plan: StudyPlan, missing: Collection[str] = (), costs: Costs | None = None) -> Work:
    """List all work of a study, as if none of it had been done.

    Args:
        plan: Plan of the study.
        missing: Names of trainings that cannot be done.
        costs: Measured durations; None assumes some that are good enough for a progress bar.
    """
    costs = costs or Costs()
    trainings = [each for each in plan.trainings.values() if each.name not in missing]
    pieces = [_training(plan, each, costs) for each in trainings]
    pieces += [
        _measurement(plan, training.name, measurement, costs)
        for training, measurement in plan.pairs(missing)
    ]
    return Work(tuple(pieces), plan.seeds)


def measure_costs(workshop: Workshop) -> Costs:
    """Time a few pictures and a batch with the dearest of the encoders; takes some seconds.

    Raises:
        BackboneError: A model is missing.
    """
    plan = workshop.plan
    missing = workshop.missing()
    possible = [name for name in plan.trainings if name not in missing]
    dearest = max(possible, key=lambda name: _halves(plan.config(name)))
    # The first training of the chain: a model that does not exist yet cannot be timed.
    config = workshop.config(plan.ancestors(dearest)[0], 0)
    device = workshop.device or ("cuda" if torch.cuda.is_available() else "cpu")
    vlm = build_vlm(config, device=device)
    samples, _ = check_data(config.data, vlm.prompt_policy)
    batch = min(config.optimizing.device_batch_size, 16, len(samples))
    some = samples[: 2 * batch]
    dataset = make_dataset(config.data, vlm, some, seed=config.seed, as_files=False)
    rows = [dataset[index] for index in range(len(dataset))]
    vlm.train()

    def encode(part: list[Any]) -> list[Any]:
        pictures = [picture for row in part for picture in row["images"]]
        prompts = [row["prompt"] for row in part for _ in row["images"]]
        return list(vlm.encode_images(pictures, prompts))

    def learn(part: list[Any], tokens: list[Any]) -> None:
        batched = {**collate(part), "images": None, "prompts": None}
        vlm(**{k: _on(v, device) for k, v in batched.items()}, image_tokens=tokens).loss.backward()

    with torch.no_grad():
        encode(rows[:2])  # what is loaded or compiled once
        used = rows[batch:] if len(rows) > batch else rows
        start = time.perf_counter()
        tokens = encode(used)
        encoding = (time.perf_counter() - start) / len(tokens)
    learn(used, tokens)
    start = time.perf_counter()
    learn(used, tokens)
    learning = (time.perf_counter() - start) / len(used)
    start = time.perf_counter()
    shown = [row["images"] for row in used]
    vlm.generate(
        shown,
        ["what is this?"] * len(used),
        [row["prompt"] for row in used],
        max_new_tokens=CAPTION_TOKENS,
    )
    answering = (time.perf_counter() - start) / len(used)
    halves = max(1, _halves(config))  # a plan may have no diffusion model at all
    return Costs(encoding / halves, learning, max(answering - encoding, 1e-3))


def _training(plan: StudyPlan, training: Training, costs: Costs) -> Piece:
    config = plan.config(training.name)
    optim, scenes = config.optimizing, plan.data.scenes
    samples = scenes * optim.epochs
    steps = optim.steps(scenes)
    halves = _halves(config)
    if config.data.cache == "off":  # a mixer trains behind the encoder, the others within it
        within = config.model.captioner or config.adapting.unet_rank
        encoded = samples * (_BACKWARD if within else 1.0)
    else:
        encoded = scenes * min(_prompts_of(training.prompts, plan.data.turns), optim.epochs)
    seconds = encoded * halves * costs.encode + samples * costs.learn
    return Piece("train", (training.name,), steps, seconds)


def _measurement(plan: StudyPlan, training: str, measurement: Measurement, costs: Costs) -> Piece:
    config = plan.config(training, options=measurement.options)
    answers = measurement.items * measurement.passes
    answers *= {"leakage": 2, "mmvp": 12, "pairs": 12}.get(measurement.kind, 1)
    texts = answers * (1 + (measurement.writer is not None))
    seconds = texts * (_halves(config) * costs.encode + costs.answer)
    return Piece("measure", (training, measurement.name), answers, seconds)


def _halves(config: TrainConfig) -> int:
    """Passes of the U-Net a picture."""
    if config.model.kind == "vision":
        return 0
    return 2 if config.model.options.get("conditioning") in ("cfg", "concat") else 1


def _prompts_of(policy: str, turns: int) -> int:
    """Different prompts of a picture."""
    source, *changes = policy.replace(" ", "").split("|")
    drawn = 1
    if "question" in source.split("+"):
        drawn *= turns
    if "caption" in source.split("+"):
        drawn *= 5
    if any(change.startswith("dropout") for change in changes):
        drawn += 1
    if any(change.startswith("noisy") for change in changes):
        drawn = 1000  # hardly two alike
    return drawn


def _on(value: Any, device: Any) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
