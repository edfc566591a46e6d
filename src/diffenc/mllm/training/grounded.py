"""Grounding in a run: an encoder that learns it alone, and phrases beside conversations."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from diffenc.encoder import DiffusionEncoder
from diffenc.grounding import Grounding, GroundingTerms, PhraseDataset, collate_phrases
from diffenc.grounding.reading import find_phrases
from diffenc.grounding.samples import GroundedImage
from diffenc.mllm.training.config import DataConfig
from diffenc.mllm.training.data import DataReport, check_pictures, require_usable
from diffenc.mllm.training.dataset import ConversationDataset, collate
from diffenc.mllm.training.ground_config import GroundConfig

GROUNDED = "grounded"
"""Key of a batch for the phrases that are learnt beside it."""
_THREADS = 8


def check_phrases(
    ground: GroundConfig,
    data: DataConfig,
    *,
    left_out: Collection[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[GroundedImage], DataReport]:
    """Every usable sample, or an error that tells all that is wrong.

    Args:
        ground: Place of the phrases.
        data: Options of the run's data: what is done about broken samples.
        left_out: Indices of records that are left out; pictures are then not looked at.
        progress: Function that is called with the number of pictures looked at so far, and with the
            number of all.

    Raises:
        ConfigError: The annotations cannot be read, or see `require_usable`.
    """
    samples, faults = find_phrases(
        ground.annotations,
        ground.images,
        split=ground.split,
        limit=ground.limit,
        left_out=left_out,
    )
    report = DataReport(samples=len(samples), images=len(samples))
    for fault in faults:
        report.add(fault.kind, fault.where, fault.place)
    if data.check_images and left_out is None:
        threads = min(_THREADS, os.cpu_count() or 1)
        samples = check_pictures(samples, report, workers=threads, progress=progress)
    require_usable(report, skip_broken=data.skip_broken)
    return samples, report


class GroundingLoss:
    """The losses of a batch of phrases as one, and their means for the log.

    Args:
        encoder: Encoder whose LoRA trains.
        ground: Options of the loss.
        denoise: Whether the denoiser learns to predict the noise too.
    """

    def __init__(self, encoder: DiffusionEncoder, ground: GroundConfig, *, denoise: bool) -> None:
        self.grounding = Grounding(
            encoder, layers=ground.layers, timesteps=ground.timesteps, denoise=denoise
        )
        self.weight = ground.weight
        self._noted: list[dict[str, float]] = []

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """The loss of a batch of `collate_phrases`."""
        terms: GroundingTerms = self.grounding(**batch)
        noted = {"outside": terms.outside.item()}
        if self.grounding.denoise:
            noted["denoising"] = terms.denoising.item()
        self._noted.append(noted)
        return terms.denoising + self.weight * terms.outside

    def means(self) -> dict[str, float]:
        """Means of both losses over the batches since this was called before."""
        noted, self._noted = self._noted, []
        names = noted[0] if noted else {}
        return {name: mean(each[name] for each in noted) for name in names}


class GroundedEncoder(nn.Module):
    """An encoder whose LoRA learns where words are, in the place of a multimodal model.

    Args:
        encoder: Encoder whose LoRA trains.
        ground: Options of the loss.
    """

    def __init__(self, encoder: DiffusionEncoder, ground: GroundConfig) -> None:
        super().__init__()
        self.encoder = encoder
        denoise = ground.denoising is not False
        self.loss = GroundingLoss(encoder, ground, denoise=denoise)

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """The loss of a batch of `collate_phrases`."""
        loss = self.loss(batch)
        # DistributedDataParallel waits for every gradient.
        unused = sum(p.float().sum() * 0 for _, p in self.named_trainable_parameters())
        return {"loss": loss + unused}

    def named_trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that require a gradient, with their names in `state_dict`."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Save memory by computing activations again on the way back."""
        self.encoder.backbone.denoiser.enable_gradient_checkpointing()

    def save_pretrained(self, folder: "str | os.PathLike[str]") -> None:
        """Write the encoder: its config, the LoRA and a reference to the backbone."""
        self.encoder.save_pretrained(folder)


class GroundedConversations(Dataset[dict[str, Any]]):
    """Conversations with a phrase beside each; phrases go on from one epoch to the next.

    Args:
        conversations: Conversations.
        phrases: Phrases.
    """

    def __init__(self, conversations: ConversationDataset, phrases: PhraseDataset) -> None:
        self.conversations, self.phrases = conversations, phrases

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        epoch, index = place
        beside = divmod(epoch * len(self) + index, len(self.phrases))
        return {**self.conversations[place], GROUNDED: self.phrases[beside]}


def collate_grounded(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of conversations, and under `GROUNDED` one of phrases."""
    return {**collate(rows), GROUNDED: collate_phrases([row[GROUNDED] for row in rows])}


def phrase_dataset(
    samples: Sequence[GroundedImage],
    encoder: DiffusionEncoder,
    ground: GroundConfig,
    data: DataConfig,
    *,
    seed: int,
) -> PhraseDataset:
    """Phrases as an encoder reads them, under the options of a run."""
    return PhraseDataset(
        samples, encoder, masks=ground.masks, seed=seed, skip_broken=data.skip_broken
    )
