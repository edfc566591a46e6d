"""What each part between U-Net and language model adds to the answers that can be read."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean
from typing import TypeAlias

import torch
from torch import Tensor

from diffenc.backbones.base import Backbone
from diffenc.clip_tokens import ClipTokens
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import BackboneError, ConfigError
from diffenc.fusion import FusedEncoder
from diffenc.shapes.render import render
from diffenc.studies.parts_norm import cell_kinds, norm_accuracy, scale_cases
from diffenc.studies.parts_reader import (
    AnswerReader,
    Questions,
    TokenRows,
    accuracy_of,
    fit_reader,
)
from diffenc.studies.parts_results import (
    ASKED,
    READERS,
    NormRow,
    Part,
    PartRow,
    PartStudy,
    Reader,
)
from diffenc.studies.parts_training import train_part
from diffenc.studies.results import Spread
from diffenc.studies.trials import Property, Trial, sample_trials

Progress: TypeAlias = Callable[[int, int], object]
"""Called with the number of U-Net rows that are done and that of all."""

_CLIP_PARTS: tuple[Part, ...] = ("clip", "clip+uncond", "clip+cond", "captioner")
_LORA_RATE, _CAPTIONER_RATE = 2e-3, 1e-2


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
    their own, and then read by fresh ones like everything else.

    Args:
        model: An alias, a Hub id, a folder or a `Backbone`.
        clip: Name or folder of a CLIP; None leaves out what needs one, as does "shapes-clip" in a
            version that does not bundle it.
        scenes: Per seed; two thirds to fit, the rest to test. At least 30.
        seeds: How often everything is repeated, with other scenes, noise and order.
        rank: Of LoRA.
        epochs: Of LoRA over the questions; the captioner has three times as many over the scenes,
            which are as many passes of the U-Net.
        reader_epochs: Of the readers, and of the projectors.
        grid: Side of the token grid.
        batch_size: Rows of the U-Net per call.
        device: Where the model runs; unused for a `Backbone`.
        dtype: Of the U-Net; unused for a `Backbone`.
        progress: Called after each call of the U-Net.

    Raises:
        ConfigError: A number is too small.
        BackboneError: A model is unknown, missing or broken.

    Example:
        >>> study = study_parts(scenes=60, seeds=1, clip=None)
        >>> study.gain("cond", "uncond", "told")
        Spread(values=(...,))
    """
    _check(scenes, seeds, rank, epochs, reader_epochs, grid, batch_size)
    encoder = (
        DiffusionEncoder(model)
        if isinstance(model, Backbone)
        else DiffusionEncoder.from_pretrained(model, device=device, dtype=dtype)
    )
    encoder.config = replace(encoder.config, grid=grid)
    missing = _missing(clip)
    if missing:
        clip = None
    split = 2 * scenes // 3
    passes = scenes * 4 + split * 3 * epochs + scenes * 3  # two halves, LoRA, its features
    passes += 0 if clip is None else split * 3 * epochs + scenes
    counter = _Counter(progress, seeds * passes)
    found: dict[tuple[Part, Reader], list[dict[Property, float]]] = {}
    norms: dict[tuple[tuple[float, ...], bool], list[float]] = {}
    chances, rms = [], []
    for seed in range(seeds):
        run = _Run(
            encoder,
            sample_trials(scenes, seed=seed, least=2),
            seed=seed,
            reader_epochs=reader_epochs,
            batch_size=batch_size,
            done=counter.add,
        )
        for part, tokens in run.frozen(clip):
            run.read(part, tokens, found)
        run.lora(rank, epochs, found)
        if clip is not None:
            run.captioner(clip, 3 * epochs, found)
        run.norms(norms)
        rms.append(run.rms())
        chances.append(_chances(run.questions, 3 * split))
        encoder.clear_cache()
    return PartStudy(
        model=encoder.backbone.name,
        clip=clip,
        taps=tuple(tap.name for tap in encoder.feature_info),
        rows=tuple(
            PartRow(
                part, reader, {name: Spread(tuple(each[name] for each in values)) for name in ASKED}
            )
            for (part, reader), values in found.items()
        ),
        norms=tuple(NormRow(*case, Spread(tuple(values))) for case, values in norms.items()),
        rms=tuple(mean(each) for each in zip(*rms, strict=True)),
        chance={name: mean(chance[name] for chance in chances) for name in ASKED},
        missing=missing,
        settings={
            "scenes": scenes,
            "seeds": seeds,
            "rank": rank,
            "epochs": epochs,
            "reader_epochs": reader_epochs,
            "grid": grid,
            "timestep": encoder.config.timestep,
            "dtype": str(encoder.dtype).removeprefix("torch."),
        },
    )


class _Run:
    """One seed: its scenes, and the features of each part."""

    def __init__(
        self,
        encoder: DiffusionEncoder,
        trials: Sequence[Trial],
        *,
        seed: int,
        reader_epochs: int,
        batch_size: int,
        done: Callable[[int], object],
    ) -> None:
        self.encoder = DiffusionEncoder(encoder.backbone, replace(encoder.config, seed=seed))
        side = encoder.config.size or encoder.backbone.default_size
        assert isinstance(side, int)
        self.side, self.trials, self.seed = side, trials, seed
        self.pictures = [render(trial.scene, side) for trial in trials]
        self.questions = Questions.of(trials)
        self.split = 2 * len(trials) // 3
        self.reader_epochs, self.batch_size, self.done = reader_epochs, batch_size, done
        grid = encoder.config.grid
        assert isinstance(grid, int)
        self.grid = grid
        self.uncond = self.cond = torch.empty(0)
        self.readers: dict[Part, dict[Reader, AnswerReader]] = {}

    def frozen(self, clip: str | None) -> "list[tuple[Part, tuple[Tensor, ...]]]":
        """Tokens of the parts in which nothing is trained."""
        self.uncond = self._tokens(self.encoder, asks=False)
        self.cond = self._tokens(self.encoder, asks=True)
        parts: list[tuple[Part, tuple[Tensor, ...]]] = [
            ("uncond", (self.uncond,)),
            ("cond", (self.cond,)),
            ("concat", (self.uncond, self.cond)),
        ]
        if clip is None:
            return parts
        fused = FusedEncoder(clip, self.encoder, grid=self.grid)
        seen = self._clip_tokens(fused)
        return [
            *parts,
            ("clip", (seen,)),
            ("clip+uncond", (seen, self.uncond)),
            ("clip+cond", (seen, self.cond)),
        ]

    def read(
        self,
        part: Part,
        tokens: tuple[Tensor, ...],
        found: dict[tuple[Part, Reader], list[dict[Property, float]]],
    ) -> None:
        """Fit the readers to a part, and note how well they do."""
        rows, split = TokenRows(tokens, len(self.questions.texts)), len(ASKED) * self.split
        for reader in READERS:
            model = fit_reader(
                rows,
                self.questions,
                reader,
                split=split,
                epochs=self.reader_epochs,
                seed=self.seed,
            )
            self.readers.setdefault(part, {})[reader] = model
            accuracy = accuracy_of(model, rows, self.questions, reader, split=split)
            found.setdefault((part, reader), []).append(accuracy)

    def lora(
        self, rank: int, epochs: int, found: dict[tuple[Part, Reader], list[dict[Property, float]]]
    ) -> None:
        """Train LoRA with the question as prompt."""
        encoder = copy.deepcopy(self.encoder)  # the adapter would stay in the shared U-Net
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            encoder.add_lora(rank=rank)
        self._train(encoder, "cond", epochs, asks=True, rate=_LORA_RATE)
        self.read("lora", (self._tokens(encoder, asks=True),), found)

    def captioner(
        self, clip: str, epochs: int, found: dict[tuple[Part, Reader], list[dict[Property, float]]]
    ) -> None:
        """Train the captioner with an empty prompt."""
        encoder = DiffusionEncoder(self.encoder.backbone, self.encoder.config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            encoder.add_captioner(clip)
        self._train(encoder, "uncond", epochs, asks=False, rate=_CAPTIONER_RATE)
        self.read("captioner", (self._tokens(encoder, asks=False, captions=True),), found)

    def norms(self, found: dict[tuple[tuple[float, ...], bool], list[float]]) -> None:
        """Probe cells through projectors with and without norms."""
        kinds = cell_kinds(self.trials, self.side, self.grid)
        for scales in scale_cases(len(self.encoder.token_channels)):
            for norm in (False, True):
                accuracy = norm_accuracy(
                    self.uncond,
                    kinds,
                    self.encoder.token_channels,
                    scales,
                    norm=norm,
                    split=self.split,
                    epochs=self.reader_epochs,
                    seed=self.seed,
                )
                found.setdefault((scales, norm), []).append(accuracy)

    def rms(self) -> list[float]:
        """Root mean square of each tap's features."""
        taps = self.uncond.float().split(self.encoder.token_channels, dim=-1)
        return [float(tap.square().mean().sqrt()) for tap in taps]

    def _train(
        self, encoder: DiffusionEncoder, start: Part, epochs: int, *, asks: bool, rate: float
    ) -> None:
        train_part(
            encoder,
            copy.deepcopy(self.readers[start]),
            self.questions,
            self.pictures,
            asks=asks,
            split=len(ASKED) * self.split,
            epochs=epochs,
            batch_size=self.batch_size,
            grid=self.grid,
            rate=rate,
            seed=self.seed,
            done=self.done,
        )

    @torch.no_grad()
    def _tokens(self, encoder: DiffusionEncoder, *, asks: bool, captions: bool = False) -> Tensor:
        """Tokens per row where the prompt is the question, else per scene."""
        each = len(ASKED) if asks else 1
        parts = []
        for units in torch.arange(each * len(self.pictures)).split(self.batch_size):
            rows = units.tolist()
            images = [self.pictures[row // each] for row in rows]
            features = encoder.extract(
                images,
                [self.questions.texts[row] for row in rows] if asks else "",
                conditioning="cond" if asks or captions else "uncond",
            )
            parts.append(features.tokens(self.grid).float().cpu())
            self.done(len(rows))
        return torch.cat(parts)

    @torch.no_grad()
    def _clip_tokens(self, fused: FusedEncoder) -> Tensor:
        """CLIP's half of the fused tokens; the other half is at hand already."""
        parts = [
            fused(self.pictures[start : start + self.batch_size])[..., : fused.clip.hidden_size]
            for start in range(0, len(self.pictures), self.batch_size)
        ]
        return torch.cat(parts).float().cpu()


class _Counter:
    """Rows of the U-Net that are done, told to whoever wants to know."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


def _missing(clip: str | None) -> dict[Part, str]:
    if clip is None:
        return dict.fromkeys(_CLIP_PARTS, "no CLIP was asked for")
    try:
        ClipTokens.from_pretrained(clip)
    except BackboneError as error:
        if clip != "shapes-clip":
            raise
        return dict.fromkeys(_CLIP_PARTS, str(error))
    return {}


def _chances(questions: Questions, split: int) -> dict[Property, float]:
    chances: dict[Property, float] = {}
    for index, name in enumerate(ASKED):
        counts = Counter(questions.labels[split:][index :: len(ASKED)].tolist())
        chances[name] = max(counts.values()) / sum(counts.values())
    return chances


def _check(
    scenes: int, seeds: int, rank: int, epochs: int, reader_epochs: int, grid: int, batch_size: int
) -> None:
    least = {
        "scenes": (scenes, 30),
        "seeds": (seeds, 1),
        "rank": (rank, 1),
        "epochs": (epochs, 1),
        "reader_epochs": (reader_epochs, 1),
        "grid": (grid, 1),
        "batch_size": (batch_size, 1),
    }
    for name, (value, low) in least.items():
        if value < low:
            raise ConfigError(f"{name} must be {low} or more, got {value}")
