"""Tokens that stand for a picture, in every number that the study of the budget compares."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffenc.clip.tokens import ClipTokens
from diffenc.denoiser.gathering import as_shares, gather, most_telling, places
from diffenc.encoder import DiffusionEncoder
from diffenc.features import Features
from diffenc.passes.question_tokens import PLACE_CHANNELS, placed_cells, placed_words
from diffenc.passes.word_tokens import WordTokens
from diffenc.projector.plain import Projector
from diffenc.shapes.render import masks, render
from diffenc.studies.crowd_trials import CROWD_PROPERTIES, CrowdQuestion, CrowdTrial
from diffenc.studies.probes import side_of
from diffenc.studies.token_readers import TokenRows

Family = Literal["uncond", "cond", "words", "grid+words", "mask", "clip"]
FAMILIES: tuple[Family, ...] = get_args(Family)
"""Kinds of tokens: the grid without text and under the question, words of the question, both, the
mean over the true mask of each object, and the grid of CLIP."""

Half = Literal["uncond", "cond"]
HALVES: tuple[Half, ...] = get_args(Half)

WORD_COUNTS = (1, 2, 4, 8, 16)
SIDES = (1, 2, 4, 8)
MOST_SIDE = 16
"""Side of the finest grid that is handed on, 256 tokens."""

_MASKS = 2  # objects that a question names at most

_Key: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Arm:
    """A kind and a number of tokens.

    Attributes:
        family: Kind of the tokens.
        side: Side of the grid, in tokens; 0 for none.
        words: Number of tokens of words, or of masks.
    """

    family: Family
    side: int = 0
    words: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.side**2 + self.words


@dataclass(frozen=True, slots=True)
class Choice:
    """Settings of a family, chosen on validation scenes.

    Attributes:
        taps: Places in the U-Net whose channels stand side by side in each token.
        half: Features that are taken: without text ("uncond") or under the question ("cond").
        rest: Whether the last of several tokens of words is of what the words leave.
    """

    taps: tuple[str, ...]
    half: Half = "cond"
    rest: bool = False


MOONSHOT = Arm("grid+words", side=2, words=8)
MASKS = Arm("mask", words=_MASKS)


class CrowdTokens:
    """Tokens of crowded scenes under their questions, kept in half precision.

    Every token has its place as further channels, cells of a grid too.

    Args:
        encoder: Encoder whose taps, timestep and noise are read.
        trials: Scenes with their questions.
        sides: Sides of the grids that are kept.
        batch_size: Number of scenes per call of the U-Net.
        clip: CLIP whose grid is kept too; None keeps none.
        done: Function that is called after each call of the U-Net with its number of rows.

    Attributes:
        words_kept: Share of questions whose nouns are all among the sharpest words, by their
            number.
    """

    def __init__(
        self,
        encoder: DiffusionEncoder,
        trials: Sequence[CrowdTrial],
        *,
        sides: Sequence[int],
        batch_size: int,
        clip: ClipTokens | None,
        done: Callable[[int], object],
    ) -> None:
        self._encoder, self._sides, self._done = encoder, tuple(sides), done
        self._taps = [(tap.name, tap.channels) for tap in encoder.feature_info]
        self._rows = len(CROWD_PROPERTIES) * len(trials)
        self._parts: dict[_Key, dict[int, list[Tensor]]] = {}
        side = side_of(encoder)
        with torch.no_grad():
            for start in range(0, len(trials), batch_size):
                batch = trials[start : start + batch_size]
                images = [render(trial.scene, side) for trial in batch]
                truth = [masks(trial.scene, side) for trial in batch]
                for index in range(len(CROWD_PROPERTIES)):
                    asked_for = [trial.questions[index] for trial in batch]
                    self._read(images, truth, asked_for, index)
                if clip is not None:
                    self._read_clip(clip, images)
        self._tensors = {key: _joined(self._parts.pop(key)) for key in list(self._parts)}
        self.words_kept = {
            count: float(self._tensors["nouns", count].float().mean()) for count in WORD_COUNTS
        }

    def rows(self, arm: Arm, choice: Choice) -> TokenRows:
        """Tokens of an arm for all questions.

        Args:
            arm: Kind and number of tokens.
            choice: Taps and features; unused for CLIP.
        """
        return TokenRows((self.tokens(arm, choice),), self._rows)

    def tokens(self, arm: Arm, choice: Choice) -> Float[Tensor, "_sets n c"]:
        """Tokens of an arm: a set for every question, or one for every scene."""
        match arm.family:
            case "clip":
                return self._tensors["clip", arm.side]
            case "uncond" | "cond":
                return self._of_taps(self._tensors["cells", arm.family, arm.side], choice.taps)
            case "mask":
                return self._of_taps(self._tensors["mask", choice.half], choice.taps)
            case "words":
                return self._words(arm.words, choice)
            case "grid+words":
                cells = self._tensors["cells", choice.half, arm.side]
                cells = cells.repeat_interleave(self._rows // len(cells), dim=0)
                words = self._words(arm.words, choice)
                return torch.cat([self._of_taps(cells, choice.taps), words], dim=1)

    def _words(self, count: int, choice: Choice) -> Float[Tensor, "rows count c"]:
        """The sharpest words in the order of the text; of several the last may be the rest."""
        every = self._of_taps(self._tensors["words", choice.half], choice.taps)
        with_rest = choice.rest and count > 1
        chosen = count - 1 if with_rest else count
        kept = self._tensors["kept", chosen]
        order = (~kept).long().argsort(dim=1, stable=True)[:, :chosen]
        there = kept.take_along_dim(order, dim=1)[..., None]
        words = every.take_along_dim(order[..., None], dim=1) * there
        return torch.cat([words, every[:, -1:]], dim=1) if with_rest else words

    def _of_taps(self, tokens: Tensor, taps: Sequence[str]) -> Tensor:
        widths = [channels for _, channels in self._taps]
        parts = tokens.split([*widths, PLACE_CHANNELS], dim=-1)
        chosen = [part for (name, _), part in zip(self._taps, parts, strict=False) if name in taps]
        return torch.cat([*chosen, parts[-1]], dim=-1)

    def _read(
        self,
        images: Sequence[Image.Image],
        truth: Sequence[Bool[np.ndarray, "objects size size"]],
        questions: Sequence[CrowdQuestion],
        index: int,
    ) -> None:
        """Read a batch of scenes under one question each."""
        texts = [question.text for question in questions]
        gathered = self._encoder.word_tokens(images, texts, rest=True, conditioning="concat")
        self._done(len(images) * (2 if index == 0 else 1))  # the half without text is remembered
        true = _true_maps(truth, questions)
        for half in HALVES:
            features = gathered.features.select(half)
            words = replace(gathered, tokens=_gathered(features, gathered.maps))
            self._keep(("words", half), index, _padded(placed_words(words), 1))
            self._keep(("mask", half), index, placed_words(_of_masks(features, true)))
            for side in self._sides if half == "cond" or index == 0 else ():
                cells = placed_cells(features.tokens(side), (side, side))
                self._keep(("cells", half, side), index, cells)
        for count in sorted({*WORD_COUNTS, *(count - 1 for count in WORD_COUNTS)} - {0}):
            kept = most_telling(gathered.maps[:, :-1], gathered.mask[:, :-1], count).cpu()
            nouns = [
                all(word in own and bool(row[own.index(word)]) for word in question.nouns)
                for own, row, question in zip(gathered.words, kept, questions, strict=True)
            ]
            flags = torch.tensor(nouns, dtype=torch.bool, device="cpu")
            self._keep(("nouns", count), index, flags)
            self._keep(("kept", count), index, _padded(kept[..., None], 0)[..., 0])

    def _read_clip(self, clip: ClipTokens, images: Sequence[Image.Image]) -> None:
        tokens = clip(images)
        for side in self._sides:
            if side <= clip.side:
                pool = Projector(clip.hidden_size, clip.hidden_size, "identity", grid=side)
                self._keep(("clip", side), 0, placed_cells(pool(tokens), (side, side)))

    def _keep(self, key: _Key, index: int, tensor: Tensor) -> None:
        small = tensor.cpu() if tensor.dtype == torch.bool else tensor.to("cpu", torch.float16)
        self._parts.setdefault(key, {}).setdefault(index, []).append(small)


def groups_of(tokens: TokenRows) -> tuple[int, int]:
    """Number of channels of features, and of places."""
    return tokens.sources[0].shape[2] - PLACE_CHANNELS, PLACE_CHANNELS


def _joined(parts: dict[int, list[Tensor]]) -> Tensor:
    """All batches in order: scene by scene, or row by row where every question has its own."""
    each = [torch.cat(batches) for batches in parts.values()]
    return each[0] if len(each) == 1 else torch.stack(each, dim=1).flatten(0, 1)


def _gathered(features: Features, maps: Float[Tensor, "b words h w"]) -> Float[Tensor, "b words c"]:
    return torch.cat([gather(each, maps) for each in features.values()], dim=-1)


def _true_maps(
    truth: Sequence[Bool[np.ndarray, "objects size size"]], questions: Sequence[CrowdQuestion]
) -> Float[Tensor, "b masks size size"]:
    """Visible pixels of the objects that each question names; zeros behind them."""
    size = truth[0].shape[-1]
    maps = torch.zeros(len(questions), _MASKS, size, size, dtype=torch.float32, device="cpu")
    for row, question in enumerate(questions):
        for place, thing in enumerate(question.things):
            maps[row, place] = torch.from_numpy(truth[row][thing]).float()
    return maps


def _of_masks(features: Features, maps: Float[Tensor, "b masks size size"]) -> WordTokens:
    """Tokens that true masks gather, in the form of those of words."""
    shares = as_shares(maps.to(next(iter(features.values())).device))
    mask = shares.sum(dim=(-2, -1)) > 0
    return WordTokens(
        tokens=_gathered(features, shares),
        places=places(shares),
        maps=shares,
        mask=mask,
        words=tuple(tuple("object" if there else "" for there in row) for row in mask.tolist()),
        features=features,
    )


def _padded(tokens: Float[Tensor, "b n c"], behind: int) -> Float[Tensor, "b slots c"]:
    """Tokens of words brought to the largest number; the last `behind` stay the last."""
    room = max(WORD_COUNTS) + behind - tokens.shape[1]
    front, back = tokens.split([tokens.shape[1] - behind, behind], dim=1)
    return torch.cat([F.pad(front, (0, 0, 0, room)), back], dim=1)
