"""What each part between U-Net and language model adds to the answers that can be read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any

import torch

from diffenc.checks.arguments import whole
from diffenc.clip.tokens import ClipTokens
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import BackboneError
from diffenc.models.base import Backbone
from diffenc.storage.pretrained import BUNDLED_CLIPS
from diffenc.studies.parts_run import PARTS, Part, PartRun
from diffenc.studies.probes import (
    Done,
    Progress,
    held_in,
    numerics,
)
from diffenc.studies.spreads import Spread, mean_of, over_seeds
from diffenc.studies.token_readers import ASKED, READERS, Reader
from diffenc.studies.trials import (
    Property,
    chance_of,
    sample_trials,
)

COMPARISONS: tuple[tuple[Part, Part], ...] = (
    ("cond", "uncond"),
    ("concat", "uncond"),
    ("concat", "cond"),
    ("clip+cond", "clip"),
    ("clip+cond", "cond"),
    ("clip+cond", "clip+uncond"),
    ("lora", "cond"),
    ("lora-empty", "uncond"),
    ("lora", "lora-empty"),
    ("captioner", "uncond"),
)
"""Pairs of a part and the part that it is compared with."""

_CLIP_PARTS: tuple[Part, ...] = ("clip", "clip+uncond", "clip+cond", "captioner")


@dataclass(frozen=True, slots=True)
class PartRow:
    """Accuracy of reading answers from the tokens of one part.

    Attributes:
        part: Name of the part whose tokens are read.
        reader: Kind of reader: "told" knows the question, as a language model does; "blind" knows
            only which property is asked for, so the tokens must say which object is meant.
        accuracy: Accuracy for each property, 0 to 1, on scenes that the reader was not fitted to.
    """

    part: Part
    reader: Reader
    accuracy: dict[Property, Spread]

    @property
    def mean(self) -> Spread:
        """Mean over properties, per seed."""
        return mean_of(list(self.accuracy.values()))


@dataclass(frozen=True, slots=True)
class NormRow:
    """Accuracy of a probe of cells behind a projector with or without a layer norm per tap.

    Attributes:
        scales: Factor that each tap's features are multiplied by before the projector.
        norm: Whether the projector has a layer norm per tap.
        accuracy: Share of held-out cells whose object is named rightly, 0 to 1.
    """

    scales: tuple[float, ...]
    norm: bool
    accuracy: Spread


@dataclass(frozen=True, slots=True)
class PartStudy:
    """Results of the study.

    Attributes:
        model: Name of the backbone.
        clip: Name of the CLIP model; None if none was used.
        taps: Places in the U-Net that the encoder reads.
        rows: Accuracy of each part and reader.
        norms: Accuracy with and without layer norms in the projector.
        rms: Root mean square of each tap's features, mean over seeds.
        chance: Share of the most frequent answer among the test questions, for each property, 0 to
            1.
        missing: Reason why a part was not studied, by name of the part.
        settings: Settings of the run, such as numbers of scenes, seeds and epochs.
    """

    model: str
    clip: str | None
    taps: tuple[str, ...]
    rows: tuple[PartRow, ...]
    norms: tuple[NormRow, ...]
    rms: tuple[float, ...]
    chance: dict[Property, float]
    missing: dict[Part, str]
    settings: dict[str, Any]

    def find(self, part: Part, reader: Reader) -> PartRow | None:
        """Row of a part and reader; None if the part was not studied."""
        for row in self.rows:
            if (row.part, row.reader) == (part, reader):
                return row
        return None

    def gain(self, part: Part, base: Part, reader: Reader) -> Spread | None:
        """Mean accuracy of a part minus that of another, per seed."""
        over, under = self.find(part, reader), self.find(base, reader)
        return None if over is None or under is None else over.mean - under.mean

    def lora_by_text(self, reader: Reader) -> Spread | None:
        """Gain of LoRA with the question minus its gain with the empty prompt, per seed."""
        with_text, without = (
            self.gain("lora", "cond", reader),
            self.gain("lora-empty", "uncond", reader),
        )
        return None if with_text is None or without is None else with_text - without

    @property
    def parts(self) -> Sequence[Part]:
        """Parts that were studied."""
        studied = {row.part for row in self.rows}
        return [part for part in PARTS if part in studied]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them, with the gains."""
        gains = [
            {"part": part, "base": base, "reader": reader, "values": spread.values}
            for part, base in COMPARISONS
            for reader in READERS
            if (spread := self.gain(part, base, reader)) is not None
        ]
        return {**asdict(self), "gains": gains}


def study_parts(
    model: "str | Backbone" = "shapes",
    *,
    clip: str | None = "shapes-clip",
    scenes: int = 360,
    seeds: int = 3,
    rank: int = 8,
    epochs: int = 1,
    reader_epochs: int = 30,
    grid: int = 8,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> PartStudy:
    """Read answers from the tokens of each part, on scenes that nothing was fitted to.

    Held-out scenes of the miniature world have two or three objects. To each there are three
    questions, after colour, shape and position of one object. Answers are read by `AnswerReader`,
    which is fitted anew to every part's tokens, once told the question and once not. LoRA and the
    captioner are trained on the scenes that the readers are fitted to, together with readers of
    their own, and then read by fresh ones like everything else. LoRA is trained a second time on
    the same questions in the same order, of which the U-Net is not told: what it gains there is no
    work of the text.

    Args:
        model: Alias, Hub id or folder of a diffusion model, or a loaded `Backbone`.
        clip: Name or folder of a CLIP model; None leaves out the parts that need one, as does
            a bundled one in a version that does not bundle it.
        scenes: Number of scenes per seed, 30 or more; two thirds to fit, the rest to test.
        seeds: Number of repetitions, each with other scenes, noise and order.
        rank: Rank of LoRA, 1 or more.
        epochs: Number of epochs of LoRA over the questions; the captioner has three times as many
            over the scenes, which are as many passes of the U-Net.
        reader_epochs: Number of epochs of the readers, and of the projectors.
        grid: Side of the token grid, in tokens.
        batch_size: Number of rows per call of the U-Net.
        device: Device that the model runs on; unused for a `Backbone`.
        dtype: Floating point type of the U-Net; unused for a `Backbone`.
        progress: Function that is called after each call of the U-Net with the number of rows that
            are done and the number of all rows; None reports nothing.

    Raises:
        ConfigError: A number is too small.
        BackboneError: A model is unknown, missing or broken.

    Examples:
        >>> study = study_parts(scenes=60, seeds=1, clip=None)
        >>> gain = study.gain("cond", "uncond", "told")
    """
    whole("scenes", scenes, least=30)
    whole("seeds", seeds, least=1)
    whole("rank", rank, least=1)
    whole("epochs", epochs, least=1)
    whole("reader_epochs", reader_epochs, least=1)
    whole("grid", grid, least=1)
    whole("batch_size", batch_size, least=1)
    encoder = (
        DiffusionEncoder(model)
        if isinstance(model, Backbone)
        else DiffusionEncoder.from_pretrained(model, device=device, dtype=dtype)
    )
    encoder.config = replace(encoder.config, grid=grid)
    missing = _missing(clip)
    if missing:
        clip = None
    training = held_in(scenes) * len(ASKED) * epochs
    passes = scenes * 4  # two halves
    passes += training + scenes * 3  # LoRA and its features
    passes += training + scenes  # the same with an empty prompt
    passes += 0 if clip is None else training + scenes
    done = Done(progress, seeds * passes)
    accuracies: list[dict[tuple[Part, Reader], dict[Property, float]]] = []
    norms: list[dict[tuple[tuple[float, ...], bool], float]] = []
    chances, rms = [], []
    for seed in range(seeds):
        run = PartRun(
            encoder,
            sample_trials(scenes, seed=seed, least=2),
            seed=seed,
            reader_epochs=reader_epochs,
            batch_size=batch_size,
            done=done.add,
        )
        run.read_frozen(clip)
        run.train_lora(rank, epochs, asks=True)
        run.train_lora(rank, epochs, asks=False)
        if clip is not None:
            run.train_captioner(clip, 3 * epochs)
        accuracies.append(run.accuracies)
        norms.append(run.probe_norms())
        rms.append(run.rms())
        tested = run.trials[run.scenes_to_fit :]
        chances.append({name: chance_of([each.label(name) for each in tested]) for name in ASKED})
        encoder.clear_cache()
    return PartStudy(
        model=encoder.backbone.name,
        clip=clip,
        taps=tuple(tap.name for tap in encoder.feature_info),
        rows=tuple(
            PartRow(*names, over_seeds([each[names] for each in accuracies]))
            for names in accuracies[0]
        ),
        norms=tuple(NormRow(*case, each) for case, each in over_seeds(norms).items()),
        rms=tuple(mean(each) for each in zip(*rms, strict=True)),
        chance={name: each.mean for name, each in over_seeds(chances).items()},
        missing=missing,
        settings={
            "scenes": scenes,
            "seeds": seeds,
            "rank": rank,
            "epochs": epochs,
            "reader_epochs": reader_epochs,
            "grid": grid,
            "timestep": encoder.config.timestep,
            "dtype": numerics(encoder)["dtype"],
        },
    )


def _missing(clip: str | None) -> dict[Part, str]:
    if clip is None:
        return dict.fromkeys(_CLIP_PARTS, "no CLIP was asked for")
    try:
        ClipTokens.from_pretrained(clip)
    except BackboneError as error:
        if clip not in BUNDLED_CLIPS:
            raise
        return dict.fromkeys(_CLIP_PARTS, str(error))
    return {}
