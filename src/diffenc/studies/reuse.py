"""What is lost where a part of the U-Net runs without the text: features, word maps, answers."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffenc._typing import Reused
from diffenc.checks.arguments import whole
from diffenc.encoder import DiffusionEncoder
from diffenc.features import Features
from diffenc.models.base import Backbone
from diffenc.shapes.render import masks
from diffenc.studies.probes import (
    Done,
    Progress,
    batches,
    held_in,
    numerics,
    open_encoder,
    pool,
    with_seed,
)
from diffenc.studies.readouts import fit_readout
from diffenc.studies.spreads import Spread, over_seeds
from diffenc.studies.trials import CLASSES, PROPERTIES, Property, Trial, sample_trials

Text = Literal["question", "caption"]
TEXTS: tuple[Text, ...] = get_args(Text)
PARTS: tuple[Reused, ...] = get_args(Reused)

_Place = tuple[Reused, str, int]
_Vectors = dict[tuple[Reused | None, Property, str, int], list[Tensor]]


@dataclass(frozen=True, slots=True)
class ReuseFigure:
    """Loss at one tap and timestep.

    Attributes:
        part: Part of the U-Net that runs without the text, see `EncoderConfig.reuse`.
        tap: Place in the U-Net, as a module path.
        timestep: Scheduler step of the noise level.
        drift: Length of the difference to exact features over the length of those, by kind of text.
        direction: Cosine between the text's change f_c - f_u with reuse and the exact one, by kind
            of text.
        exact: Share of right answers to questions after four properties, read out of exact features
            by a linear layer that was fitted to exact features.
        reused: The same layer's share on features with reuse.
    """

    part: Reused
    tap: str
    timestep: int
    drift: dict[Text, Spread]
    direction: dict[Text, Spread]
    exact: Spread
    reused: Spread


@dataclass(frozen=True, slots=True)
class ReuseStudy:
    """Results of the study.

    Attributes:
        model: Name of the backbone.
        taps: Places in the decoder, in the order in which they run.
        timesteps: Scheduler steps of the noise levels, in rising order.
        rows: Figures of each part, tap and timestep.
        words: Cosine between maps of a caption's words with reuse and exact ones, by part.
        settings: Numbers of scenes and seeds, size and dtype.
    """

    model: str
    taps: tuple[str, ...]
    timesteps: tuple[int, ...]
    rows: tuple[ReuseFigure, ...]
    words: dict[Reused, Spread]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)


def study_reuse(
    model: "str | Backbone" = "shapes",
    *,
    taps: Sequence[str] | None = None,
    timesteps: Sequence[int] = (50, 261, 500),
    scenes: int = 120,
    seeds: int = 2,
    size: int | None = None,
    batch_size: int = 24,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> ReuseStudy:
    """Compare features under a text with those whose first half ran without it.

    Args:
        model: Alias, Hub id or folder of a diffusion model, or a loaded `Backbone`.
        taps: Module paths or globs of taps in the decoder; None takes its transformers.
        timesteps: Scheduler steps of the noise levels, each 0 to 999.
        scenes: Number of held-out scenes per seed, 6 or more; readouts are fitted to two thirds.
        seeds: Number of repetitions with other scenes and other noise.
        size: Side of the pictures in pixels; None is the backbone's own.
        batch_size: Number of rows (pictures x timesteps) per call of the U-Net.
        device: Device that the model runs on; unused for a `Backbone`.
        dtype: Floating point type of the U-Net; unused for a `Backbone`.
        progress: Function that is called after each batch with the number of scenes that are done
            and the number of all; None reports nothing.

    Raises:
        ConfigError: A number is too small, a timestep stands twice, or no text reaches a tap.
        BackboneError: The model is unknown, missing or broken.
        TapError: A tap does not exist in this model.
    """
    whole("scenes", scenes, least=6)
    whole("seeds", seeds, least=1)
    encoder = open_encoder(
        model,
        taps=["up_blocks.*.attentions.*"] if taps is None else taps,
        timesteps=timesteps,
        size=size,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )
    done = Done(progress, scenes * seeds)
    figures = []
    for seed in range(seeds):
        figures.append(_figures(with_seed(encoder, seed), sample_trials(scenes, seed=seed), done))
        encoder.clear_cache()
    spreads = over_seeds(figures)
    steps = encoder.config.timesteps

    def row(part: Reused, tap: str, step: int) -> ReuseFigure:
        by_text = {
            name: {text: spreads[part, tap, step, name, text] for text in TEXTS}
            for name in ("drift", "direction")
        }
        accuracies = {name: spreads[part, tap, step, name, ""] for name in ("exact", "reused")}
        return ReuseFigure(part, tap, step, **by_text, **accuracies)  # type: ignore[arg-type]

    return ReuseStudy(
        model=encoder.backbone.name,
        taps=encoder.config.taps or (),
        timesteps=steps,
        rows=tuple(
            row(part, tap, step)
            for part in PARTS
            for tap in encoder.config.taps or ()
            for step in steps
        ),
        words={part: spreads[part, "", 0, "words", ""] for part in PARTS},
        settings={"scenes": scenes, "seeds": seeds, **numerics(encoder)},
    )


def _figures(
    encoder: DiffusionEncoder, trials: Sequence[Trial], done: Done
) -> dict[tuple[Reused, str, int, str, str], float]:
    """Every number of one seed: by part, tap, timestep, name and kind of text."""
    values: dict[tuple[Reused, str, int, str, str], list[float]] = defaultdict(list)
    vectors: _Vectors = defaultdict(list)
    for seeded, rows, images in batches(encoder, trials):
        reusing = {
            part: DiffusionEncoder(seeded.backbone, replace(seeded.config, reuse=part))
            for part in PARTS
        }
        batch = trials[rows]
        for text, name, prompts in _texts(batch):
            exact = seeded.extract(images, prompts, conditioning="concat")
            for part, other in reusing.items():
                under = other.extract(images, prompts, conditioning="cond")
                for (tap, step), numbers in _distances(encoder, exact, under).items():
                    for key, each in numbers.items():
                        values[part, tap, step, key, text] += each
                if name is not None:
                    _keep(vectors, encoder, part, name, under, batch)
            if name is not None:
                _keep(vectors, encoder, None, name, exact.select("cond"), batch)
        captions = [trial.caption() for trial in batch]
        for part, cosines in _word_cosines(seeded, reusing, images, captions):
            values[part, "", 0, "words", ""] += cosines
        done.add(len(batch))
    averages = {key: mean(each) for key, each in values.items()}
    labels = {name: [trial.label(name) for trial in trials] for name in PROPERTIES}
    for (part, tap, step), pair in _accuracies(vectors, labels).items():
        for key, accuracy in pair.items():
            averages[part, tap, step, key, ""] = accuracy
    return averages


def _texts(batch: Sequence[Trial]) -> Iterator[tuple[Text, Property | None, list[str]]]:
    """Kind of text, the property that it asks for, and the texts."""
    for name in PROPERTIES:
        yield "question", name, [trial.question(name) for trial in batch]
    yield "caption", None, [trial.caption() for trial in batch]


def _distances(
    encoder: DiffusionEncoder, exact: Features, under: Features
) -> dict[tuple[str, int], dict[str, list[float]]]:
    """Drift of the features and direction of the change, of each picture, by tap and timestep."""
    changes = {}
    without, with_text = exact.select("uncond"), exact.select("cond")
    for tap in under:
        for index, step in enumerate(encoder.config.timesteps):
            plain, true, other = (
                maps[tap][:, index].flatten(1).double().cpu()
                for maps in (without, with_text, under)
            )
            drift = (other - true).norm(dim=1) / true.norm(dim=1)
            direction = F.cosine_similarity(other - plain, true - plain, dim=1)
            changes[tap, step] = {"drift": drift.tolist(), "direction": direction.tolist()}
    return changes


def _keep(
    vectors: _Vectors,
    encoder: DiffusionEncoder,
    part: Reused | None,
    name: Property,
    features: Mapping[str, Tensor],
    batch: Sequence[Trial],
) -> None:
    """Features of the cells that answer a question: those of the object, or all for a number."""
    config = encoder.config
    side = config.size or encoder.backbone.default_size
    assert isinstance(side, int)
    inside = np.stack([masks(trial.scene, side)[trial.target] for trial in batch])
    weights = torch.from_numpy(inside).float()
    for tap, maps in features.items():
        pooled = pool(maps, torch.ones_like(weights) if name == "count" else weights)
        for index, step in enumerate(config.timesteps):
            vectors[part, name, tap, step].append(pooled[:, index])


def _accuracies(
    vectors: _Vectors, labels: Mapping[Property, Sequence[int]]
) -> dict[_Place, dict[str, float]]:
    """Mean accuracy over properties, of readouts fitted to exact features, by place."""
    shares: dict[_Place, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (part, name, tap, step), rows in vectors.items():
        if part is not None:
            continue
        answers = torch.tensor(labels[name], dtype=torch.long, device="cpu")
        split = held_in(len(answers))
        exact = torch.cat(rows)
        readout = fit_readout(exact[:split], answers[:split], CLASSES[name])
        for reused in PARTS:
            others = torch.cat(vectors[reused, name, tap, step])
            for key, features in (("exact", exact), ("reused", others)):
                accuracy = readout.accuracy(features[split:], answers[split:])
                shares[reused, tap, step][key].append(accuracy)
    return {
        place: {key: mean(each) for key, each in by_key.items()} for place, by_key in shares.items()
    }


def _word_cosines(
    exact: DiffusionEncoder,
    reusing: Mapping[Reused, DiffusionEncoder],
    images: Sequence[Image.Image],
    captions: list[str],
) -> Iterator[tuple[Reused, list[float]]]:
    """Cosines between maps of the captions' words, of all timesteps."""

    def maps(encoder: DiffusionEncoder) -> Float[Tensor, "words cells"]:
        words = encoder.word_tokens(list(images), captions, conditioning="cond")
        there = words.mask[:, None].expand(words.maps.shape[:3])
        return words.maps[there].flatten(1)

    true = maps(exact)
    for part, encoder in reusing.items():
        yield part, F.cosine_similarity(maps(encoder), true, dim=1).tolist()
