"""transformers' `Trainer` for a `DiffusionVLM`: what is learnt is all that it saves."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from diffenc.errors import BackboneError, ConfigError
from diffenc.memory.cache import recall
from diffenc.memory.digests import is_marked
from diffenc.mllm.model import DiffusionVLM
from diffenc.mllm.training.data import BROKEN, ConversationDataset, EpochSampler, ImageFile
from diffenc.mllm.training.token_cache import TokenCache, encoder_digest, entry_name
from diffenc.storage.names import is_file, reason
from diffenc.storage.reading import parse_json, read_json
from diffenc.storage.tensors import misfits, read_tensors, write_tensors
from diffenc.storage.writing import make_folder, write_json

logger = logging.getLogger(__name__)

WEIGHTS_FILE, RUN_FILE, STATE_FILE = "trained.safetensors", "run.json", "trainer_state.json"


class VLMTrainer(Trainer):  # type: ignore[misc]  # transformers is seen as Any
    """A `Trainer` whose checkpoints hold trained parameters alone.

    Args:
        vlm: Model that is trained.
        dataset: Samples that the model is trained on.
        args: transformers' `TrainingArguments`.
        collator: Function that makes a batch of samples.
        identity: Description of the run, as JSON holds it; training goes on only from checkpoints
            that agree with it.
        cache: Cache of the frozen encoder's tokens; None keeps nothing.
        callbacks: Further callbacks of the trainer.
    """

    def __init__(
        self,
        vlm: DiffusionVLM,
        dataset: ConversationDataset,
        args: Any,
        *,
        collator: Any,
        identity: dict[str, Any],
        cache: TokenCache | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        super().__init__(
            model=vlm,
            args=args,
            train_dataset=dataset,
            data_collator=collator,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = True
        self.vlm, self.identity, self.cache = vlm, identity, cache
        self.broken: dict[str, None] = {}  # in the order in which they were noticed
        precision = str(self.accelerator.mixed_precision)
        self._digest = "" if cache is None else encoder_digest(vlm.encoder, precision)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return EpochSampler(len(self.train_dataset), seed=self.args.data_seed)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, whose pictures the cache may know."""
        inputs = dict(inputs)
        for each in inputs.pop(BROKEN, ()):
            if each not in self.broken:
                self.broken[each] = None
                logger.warning("trained without the sample %s", each)
        if self.cache is not None:
            tokens = self._image_tokens(inputs["images"], inputs["prompts"])
            inputs = {**inputs, "images": None, "prompts": None, "image_tokens": tokens}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @torch.no_grad()
    def _image_tokens(self, images: list[list[ImageFile]], prompts: list[str]) -> list[Tensor]:
        assert self.cache is not None
        flat = [
            (file, prompt) for files, prompt in zip(images, prompts, strict=True) for file in files
        ]
        names = [entry_name(self._digest, file.digest, prompt) for file, prompt in flat]

        def encode(rows: list[int]) -> list[Tensor]:
            pictures, texts = [flat[row][0].open() for row in rows], [flat[row][1] for row in rows]
            with self.accelerator.autocast():
                return list(self.vlm.encode_images(pictures, texts))

        return [tokens.to(self.args.device) for tokens in recall(self.cache, names, encode)]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = make_folder(output_dir or self.args.output_dir)
        state = {name: value.cpu() for name, value in self.vlm.named_trainable_parameters()}
        write_tensors(folder / WEIGHTS_FILE, state)
        write_json(folder / RUN_FILE, self.identity)
        if self.cache is not None:
            self.cache.flush()
        # A run that goes on from here begins with empty caches; what they hold decides which
        # pictures share a batch, and thereby the last digits.
        clear_caches(self.vlm)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self.vlm, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)


@contextmanager
def _reading(checkpoint: str | None) -> Iterator[None]:
    """Turn what transformers and pickle make of a broken file into a `BackboneError`."""
    try:
        yield
    except Exception as error:
        raise BackboneError(
            f"cannot go on from {checkpoint}: {reason(error)}. Remove that folder to go on from "
            "the checkpoint before it"
        ) from error


def load_trained(vlm: DiffusionVLM, checkpoint: Path) -> None:
    """Set what trains to what a checkpoint holds.

    Raises:
        BackboneError: It cannot be read, or holds other parameters.
    """
    state = read_tensors(checkpoint / WEIGHTS_FILE, error=BackboneError, finite=True)
    own = dict(vlm.named_trainable_parameters())
    if wrong := misfits(state, own):
        raise BackboneError(
            f"{checkpoint} is a checkpoint of another model: {len(wrong)} parameters differ, such "
            f"as {wrong[0]!r}"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def clear_caches(vlm: DiffusionVLM) -> None:
    """Forget what the encoder remembers."""
    parts: tuple[Any, ...] = (vlm.encoder, getattr(vlm.encoder, "model", None))
    for part in parts:
        if hasattr(part, "clear_cache"):
            part.clear_cache()


def find_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run; one whose writing was interrupted does not count."""
    checkpoints = [
        (int(path.name.rpartition("-")[2]), path)
        for path in folder.glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdecimal() and _is_whole(path)
    ]
    return max(checkpoints)[1] if checkpoints else None


def check_same_run(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Raise unless a checkpoint is of this run.

    Raises:
        ConfigError: Something that it was trained with is another now; all of it is named.
            The weights are compared by `check_same_weights`.
    """
    try:
        before = read_json(checkpoint / RUN_FILE)
    except ConfigError as error:
        raise ConfigError(f"{checkpoint} does not say what it was trained with: {error}") from error
    now = parse_json(json.dumps(identity), where="this run")
    if not ("sizes of the pictures" in before and "sizes of the pictures" in now):
        before.pop("sizes of the pictures", None), now.pop("sizes of the pictures", None)
    changed = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted((before.keys() | now.keys()) - {"weights"})
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ConfigError(
            f"{checkpoint} is of another configuration: {'; '.join(changed)}. Go on with the one "
            "it was begun with, or choose another output"
        )


def check_same_weights(checkpoint: Path, vlm: DiffusionVLM) -> None:
    """Raise unless the models of a run are those that its checkpoint was begun with.

    Raises:
        ConfigError: A model of the same name has other weights now.
    """
    before = read_json(checkpoint / RUN_FILE).get("weights", {})
    parts = {"encoder": vlm.encoder, "language model": vlm.language_model}
    for part, mark in before.items():
        if part in parts and not is_marked(parts[part], mark):
            raise ConfigError(
                f"{checkpoint} was trained with another {part}: the one that stands in its place "
                "has other weights. Put that one back, or choose another output"
            )


def _is_whole(checkpoint: Path) -> bool:
    """The state is written last."""
    try:
        state = read_json(checkpoint / STATE_FILE, finite=False)
    except ConfigError:
        return False
    step = int(checkpoint.name.rpartition("-")[2])
    whole = is_file(checkpoint / WEIGHTS_FILE) and is_file(checkpoint / RUN_FILE)
    return whole and state.get("global_step") == step
