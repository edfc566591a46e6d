"""Grounded pictures as rows and batches: pixel values, texts, and masks of the words' tokens."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ImageError
from diffenc.grounding.areas import Area, covered
from diffenc.grounding.phrase_tokens import check_phrases_have_tokens, phrase_positions
from diffenc.grounding.picture_bounds import find_misfit
from diffenc.grounding.samples import GroundedImage, GroundedText
from diffenc.inputs.images import load_image, to_pixel_values


class PhraseDataset(Dataset[dict[str, Any]]):
    """Samples as an encoder reads them, indexed by (epoch, index).

    Text and noise of a row depend on the seed, the sample and the epoch alone: they are the same
    whatever the worker, the order or the batch, and new in every epoch.

    Args:
        samples: Samples, as `read_phrases` gives them.
        encoder: Encoder whose size, resizing and tokenizers are used.
        masks: Whether outlines are taken where the data have some; otherwise boxes.
        seed: Seed of texts and noise.
        skip_broken: Whether a sample whose picture cannot be read gets a blank one that teaches
            nothing, so that batches keep their shape, and phrases without tokens are a warning in
            the log; otherwise an error is raised.

    Raises:
        ConfigError: A phrase has no word that the text encoder reads as whole tokens and
            `skip_broken` is not set, or no phrase at all can be taught.
    """

    def __init__(
        self,
        samples: Sequence[GroundedImage],
        encoder: DiffusionEncoder,
        *,
        masks: bool = True,
        seed: int = 0,
        skip_broken: bool = False,
    ) -> None:
        self.samples, self.masks = samples, masks
        self.seed, self.skip_broken = seed, skip_broken
        self._transform = encoder.transform
        self._tokenizers = encoder.backbone.tokenizers
        self._windows = encoder.config.long_prompts == "chunk"
        self._cell = encoder.backbone.reduction
        check_phrases_have_tokens(
            samples, self._tokenizers, windows=self._windows, skip_broken=skip_broken
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: "int | tuple[int, int]") -> dict[str, Any]:
        epoch, index = (0, place) if isinstance(place, int) else place
        sample = self.samples[index]
        mark = f"{self.seed}/{epoch}/{sample.key}"
        text = random.Random(mark).choice(sample.texts)
        digest = hashlib.blake2b(mark.encode(errors="replace"), digest_size=8).digest()
        row = {"text": text.text, "noise_seed": int.from_bytes(digest, "big") >> 1}
        try:
            image = _checked(load_image(sample.image), sample)
        except ImageError as error:
            if not self.skip_broken:
                raise
            width, height = self._blank_size()
            image = Image.new("RGB", (width, height), (128, 128, 128))
            row["broken"] = f"{sample.key}: {error}"
        size = (image.height, image.width)
        pixel_values = self._transform(image)
        named = {} if "broken" in row else self._named(text)
        shares = {
            areas: covered(
                areas,
                size,
                (pixel_values.shape[1], pixel_values.shape[2]),
                resize=self._transform.resize,
                cell=self._cell,
                masks=self.masks,
            )
            for areas in set(named.values())
        }
        masks = {position: shares[areas] for position, areas in named.items()}
        return {**row, "pixel_values": pixel_values, "size": size, "masks": masks}

    def _named(self, text: GroundedText) -> dict[int, tuple[Area, ...]]:
        """What each token names, by its position; tokens beyond the encoder's limit name nothing.

        A token of several phrases names what each of them does.
        """
        named: dict[int, dict[Area, None]] = {}
        for phrase in text.phrases:
            for position in phrase_positions(
                self._tokenizers, text.text, phrase.spans, windows=self._windows
            ):
                named.setdefault(position, {}).update(dict.fromkeys(phrase.areas))
        return {position: tuple(areas) for position, areas in named.items()}

    def _blank_size(self) -> tuple[int, int]:
        """(width, height) of a picture that is shown in place of a broken one."""
        sides = self._transform.size
        height, width = (sides, sides) if isinstance(sides, int) else sides
        return width, height


def collate_phrases(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch for `Grounding`.

    In `masks` (b tokens h w) stand the tokens at `positions`; `weights` (b tokens) make every
    picture count alike, whatever the number of its words. `whole` is 0 for a broken picture.
    """
    pixel_values = to_pixel_values(
        [row["pixel_values"] for row in rows], size=None, resize="none", multiple=1
    )
    # Areas may lie in what a crop leaves out; their words then name nothing.
    masks = [{p: mask for p, mask in row["masks"].items() if mask.any()} for row in rows]
    positions = sorted({position for own in masks for position in own}) or [0]
    grid = next((mask.shape for row in rows for mask in row["masks"].values()), (1, 1))
    shape = (len(rows), len(positions))
    joined = torch.zeros((*shape, *grid), dtype=torch.float32, device="cpu")
    weights = torch.zeros(shape, dtype=torch.float32, device="cpu")
    for row, own in enumerate(masks):
        for position, mask in own.items():
            joined[row, positions.index(position)] = mask
            weights[row, positions.index(position)] = 1 / len(own)
    whole = ["broken" not in row for row in rows]
    broken = [row["broken"] for row in rows if "broken" in row]
    return {
        **({"broken": broken} if broken else {}),
        "pixel_values": pixel_values,
        "texts": [row["text"] for row in rows],
        "sizes": [row["size"] for row in rows],
        "noise_seeds": [row["noise_seed"] for row in rows],
        "positions": positions,
        "masks": joined,
        "weights": weights,
        "whole": torch.tensor(whole, dtype=torch.float32, device="cpu"),
    }


def _checked(image: Image.Image, sample: GroundedImage) -> Image.Image:
    misfit = find_misfit(sample, (image.height, image.width))
    if misfit is not None:
        raise ImageError(f"{sample.image}: {misfit.detail}")
    return image
