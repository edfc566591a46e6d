"""One seed of the study of the parts: features, readers, and what is trained."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from diffenc.encoder import DiffusionEncoder
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
from diffenc.studies.parts_results import ASKED, READERS, Part, Reader
from diffenc.studies.parts_training import train_part
from diffenc.studies.trials import Property, Trial

Found: TypeAlias = dict[tuple[Part, Reader], list[dict[Property, float]]]
"""Accuracies per part and reader, one entry per seed."""

_LORA_RATE, _CAPTIONER_RATE = 2e-3, 1e-2


class PartRun:
    """Run of one seed: its scenes, and the answers read from the features of each part."""

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
        self.uncond = self.cond = torch.empty(0, dtype=torch.float32, device="cpu")
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
        found: Found,
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

    def lora(self, rank: int, epochs: int, found: Found, *, asks: bool) -> None:
        """Train LoRA with the question as prompt, or on the same rows with an empty one."""
        encoder = copy.deepcopy(self.encoder)  # the adapter would stay in the shared U-Net
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            encoder.add_lora(rank=rank)
        texts = self.questions.texts
        prompts = texts if asks else ("",) * len(texts)
        self._train(encoder, "cond" if asks else "uncond", epochs, prompts, rate=_LORA_RATE)
        part: Part = "lora" if asks else "lora-empty"
        self.read(part, (self._tokens(encoder, asks=asks, plain=False),), found)

    def captioner(self, clip: str, epochs: int, found: Found) -> None:
        """Train the captioner with an empty prompt."""
        encoder = DiffusionEncoder(self.encoder.backbone, self.encoder.config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            encoder.add_captioner(clip)
        self._train(encoder, "uncond", epochs, None, rate=_CAPTIONER_RATE)
        self.read("captioner", (self._tokens(encoder, asks=False, plain=False),), found)

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
        self,
        encoder: DiffusionEncoder,
        start: Part,
        epochs: int,
        prompts: Sequence[str] | None,
        *,
        rate: float,
    ) -> None:
        train_part(
            encoder,
            copy.deepcopy(self.readers[start]),
            self.questions,
            self.pictures,
            prompts=prompts,
            split=len(ASKED) * self.split,
            epochs=epochs,
            batch_size=self.batch_size,
            grid=self.grid,
            rate=rate,
            seed=self.seed,
            done=self.done,
        )

    @torch.no_grad()
    def _tokens(self, encoder: DiffusionEncoder, *, asks: bool, plain: bool = True) -> Tensor:
        """Tokens per row where the prompt is the question, else per scene.

        Of an empty prompt the plain ones are the unconditional; otherwise what was trained with it
        takes part.
        """
        each = len(ASKED) if asks else 1
        parts = []
        every = torch.arange(each * len(self.pictures), dtype=torch.long, device="cpu")
        for units in every.split(self.batch_size):
            rows = units.tolist()
            images = [self.pictures[row // each] for row in rows]
            features = encoder.extract(
                images,
                [self.questions.texts[row] for row in rows] if asks else "",
                conditioning="uncond" if plain and not asks else "cond",
            )
            parts.append(features.tokens(self.grid).float().cpu())
            self.done(len(rows))
        return torch.cat(parts)

    @torch.no_grad()
    def _clip_tokens(self, fused: FusedEncoder) -> Tensor:
        parts = [
            fused.clip_stream(self.pictures[start : start + self.batch_size])
            for start in range(0, len(self.pictures), self.batch_size)
        ]
        return torch.cat(parts).float().cpu()
