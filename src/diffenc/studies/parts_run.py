"""One seed of the study of the parts: features, readers, and what is trained."""

import copy
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from diffenc.encoder import DiffusionEncoder
from diffenc.fusion import FusedEncoder
from diffenc.shapes.render import render
from diffenc.studies.probes import held_in, side_of, with_seed
from diffenc.studies.token_readers import (
    ASKED,
    READERS,
    AnswerReader,
    Questions,
    Reader,
    TokenRows,
    accuracy_of,
    cell_kinds,
    descend,
    fit_reader,
    norm_accuracy,
    scale_cases,
    shuffled,
)
from diffenc.studies.trials import Property, Trial

Part = Literal[
    "uncond",
    "cond",
    "concat",
    "clip",
    "clip+uncond",
    "clip+cond",
    "lora",
    "lora-empty",
    "captioner",
]
PARTS: tuple[Part, ...] = get_args(Part)

_READER_RATE, _LORA_RATE, _CAPTIONER_RATE = 5e-3, 2e-3, 1e-2


class PartRun:
    """Run of one seed: its scenes, and the answers read from the features of each part.

    Args:
        encoder: Encoder whose model, taps, timestep and grid are studied.
        trials: Scenes that are asked about, of which the first two thirds are fitted to.
        seed: Seed of the noise, of what is initialised and of the order of rows.
        reader_epochs: Number of epochs of the readers, and of the projectors.
        batch_size: Number of rows per call of the U-Net.
        done: Function that is called after each call of the U-Net with its number of rows.

    Attributes:
        accuracies: Share of right answers by part, reader and property.
    """

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
        self.encoder = with_seed(encoder, seed)
        self.side, self.trials, self.seed = side_of(encoder), trials, seed
        self.pictures: list[Image.Image] = [render(trial.scene, self.side) for trial in trials]
        self.questions = Questions.of(trials)
        self.scenes_to_fit = held_in(len(trials))
        self.rows_to_fit = len(ASKED) * self.scenes_to_fit
        self.reader_epochs, self.batch_size, self.done = reader_epochs, batch_size, done
        grid = encoder.config.grid
        assert isinstance(grid, int)
        self.grid = grid
        self.uncond = self.cond = torch.empty(0, dtype=torch.float32, device="cpu")
        self.readers: dict[Part, dict[Reader, AnswerReader]] = {}
        self.accuracies: dict[tuple[Part, Reader], dict[Property, float]] = {}

    def read_frozen(self, clip: str | None) -> None:
        """Read the parts in which nothing is trained; those with CLIP if there is one."""
        self.uncond = self._tokens(self.encoder, asks=False)
        self.cond = self._tokens(self.encoder, asks=True)
        self._read("uncond", self.uncond)
        self._read("cond", self.cond)
        self._read("concat", self.uncond, self.cond)
        if clip is not None:
            of_clip = self._clip_tokens(FusedEncoder(clip, self.encoder, grid=self.grid))
            self._read("clip", of_clip)
            self._read("clip+uncond", of_clip, self.uncond)
            self._read("clip+cond", of_clip, self.cond)

    def train_lora(self, rank: int, epochs: int, *, asks: bool) -> None:
        """Train and read LoRA, with the question as prompt or, on the same rows, an empty one."""
        encoder = copy.deepcopy(self.encoder)  # the adapter would stay in the shared U-Net
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            encoder.add_lora(rank=rank)
        texts = self.questions.texts
        self.train(
            encoder,
            self.readers["cond" if asks else "uncond"],
            prompts=texts if asks else ("",) * len(texts),
            epochs=epochs,
            rate=_LORA_RATE,
        )
        part: Part = "lora" if asks else "lora-empty"
        self._read(part, self._tokens(encoder, asks=asks, plain=False))

    def train_captioner(self, clip: str, epochs: int) -> None:
        """Train the captioner with an empty prompt, and read it."""
        encoder = DiffusionEncoder(self.encoder.backbone, self.encoder.config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            encoder.add_captioner(clip)
        readers = self.readers["uncond"]
        self.train(encoder, readers, prompts=None, epochs=epochs, rate=_CAPTIONER_RATE)
        self._read("captioner", self._tokens(encoder, asks=False, plain=False))

    def probe_norms(self) -> dict[tuple[tuple[float, ...], bool], float]:
        """Accuracy of a probe of cells through projectors without norms and with them, by scale."""
        kinds = cell_kinds(self.trials, self.side, self.grid)
        return {
            (scales, norm): norm_accuracy(
                self.uncond,
                kinds,
                self.encoder.token_channels,
                scales,
                norm=norm,
                split=self.scenes_to_fit,
                epochs=self.reader_epochs,
                seed=self.seed,
            )
            for scales in scale_cases(len(self.encoder.token_channels))
            for norm in (False, True)
        }

    def rms(self) -> list[float]:
        """Root mean square of each tap's features."""
        taps = self.uncond.float().split(self.encoder.token_channels, dim=-1)
        return [float(tap.square().mean().sqrt()) for tap in taps]

    def train(
        self,
        encoder: DiffusionEncoder,
        readers: dict[Reader, AnswerReader],
        *,
        prompts: Sequence[str] | None,
        epochs: int,
        rate: float,
    ) -> None:
        """Lower the loss of readers on the rows to fit, by what the encoder trains and by copies.

        Args:
            encoder: Encoder with LoRA or a captioner, which are trained in place.
            readers: Readers that were fitted to the features that the encoder had before.
            prompts: Prompts of the U-Net, one per row. None is the empty prompt for all rows; one
                pass then serves the three questions to a scene.
            epochs: Number of passes over these rows.
            rate: Highest learning rate of the encoder's trainable weights.
        """
        models = {name: copy.deepcopy(each).requires_grad_(True) for name, each in readers.items()}
        weights = [weight for model in models.values() for weight in model.parameters()]
        optimizer = torch.optim.AdamW(
            [
                {"params": list(encoder.trainable_parameters()), "lr": rate},
                {"params": weights, "lr": _READER_RATE},
            ],
            weight_decay=0.0,
        )
        count = self.scenes_to_fit if prompts is None else self.rows_to_fit
        batches = shuffled(count, self.batch_size, epochs=epochs, seed=self.seed)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [rate, _READER_RATE], total_steps=len(batches)
        )

        def loss(units: Tensor) -> Tensor:
            tokens, rows = self._trained_tokens(encoder, units, prompts)
            losses = [
                self.questions.loss(model(tokens, self.questions.queries[reader][rows]), rows)
                for reader, model in models.items()
            ]
            self.done(len(units))
            return torch.stack(losses).sum()

        encoder.train()
        descend(optimizer, schedule, batches, loss)
        encoder.eval().requires_grad_(False)

    def _read(self, part: Part, *tokens: Tensor) -> None:
        """Fit the readers to a part, and note how well they do."""
        rows = TokenRows(tokens, len(self.questions.texts))
        for reader in READERS:
            model = fit_reader(
                rows,
                self.questions,
                reader,
                split=self.rows_to_fit,
                epochs=self.reader_epochs,
                seed=self.seed,
            )
            self.readers.setdefault(part, {})[reader] = model
            self.accuracies[part, reader] = accuracy_of(
                model, rows, self.questions, reader, split=self.rows_to_fit
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

    def _trained_tokens(
        self, encoder: DiffusionEncoder, units: Tensor, prompts: Sequence[str] | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens with a graph, and the rows that they serve."""
        each = len(ASKED)
        scenes = (units if prompts is None else units // each).tolist()
        texts = "" if prompts is None else [prompts[row] for row in units.tolist()]
        images = [self.pictures[scene] for scene in scenes]
        features = encoder.extract(images, texts, conditioning="cond")
        tokens = features.tokens(self.grid).float().cpu()
        if prompts is not None:
            return tokens, units
        kinds = torch.arange(each, dtype=torch.long, device="cpu")
        rows = (units[:, None] * each + kinds).flatten()
        return tokens.repeat_interleave(each, dim=0), rows
