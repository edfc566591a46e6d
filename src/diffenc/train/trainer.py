"""transformers' `Trainer` for a `DiffusionVLM`: what is learnt is all that it saves."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from diffenc.errors import BackboneError, ConfigError
from diffenc.train.data import ConversationDataset, EpochSampler, ImageFile
from diffenc.train.token_cache import TokenCache, encoder_digest, entry_name
from diffenc.vlm.model import DiffusionVLM

WEIGHTS_FILE, RUN_FILE, STATE_FILE = "trained.safetensors", "run.json", "trainer_state.json"


class VLMTrainer(Trainer):  # type: ignore[misc]  # transformers is seen as Any
    """A `Trainer` whose checkpoints hold trained parameters alone.

    Args:
        vlm: The model.
        dataset: Its samples.
        args: transformers' `TrainingArguments`.
        collator: Makes batches.
        told: What a checkpoint must agree with to be gone on from; JSON holds it.
        cache: Of the frozen encoder's tokens, or None.
        callbacks: Further ones.
    """

    def __init__(
        self,
        vlm: DiffusionVLM,
        dataset: ConversationDataset,
        args: Any,
        *,
        collator: Any,
        told: dict[str, Any],
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
        self.vlm, self.told, self.cache = vlm, told, cache
        self._digest = "" if cache is None else encoder_digest(vlm.encoder)

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
        known = {name: self.cache.get(name) for name in dict.fromkeys(names)}
        missing = {
            name: pair for name, pair in zip(names, flat, strict=True) if known[name] is None
        }
        if missing:
            pictures = [file.open() for file, _ in missing.values()]
            texts = [prompt for _, prompt in missing.values()]
            with self.accelerator.autocast():
                fresh = self.vlm.encode_images(pictures, texts)
            for name, tokens in zip(missing, fresh, strict=True):
                self.cache.put(name, tokens)
                known[name] = tokens
        return [
            tokens.to(self.args.device) for name in names if (tokens := known[name]) is not None
        ]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            name: parameter.detach().cpu().contiguous().clone()
            for name, parameter in self.vlm.named_trainable_parameters()
        }
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(self.told, indent=2, sort_keys=True) + "\n"
        (folder / RUN_FILE).write_text(text, encoding="utf-8")
        if self.cache is not None:
            self.cache.flush()
        # A run that goes on from here begins with empty caches; what they hold decides which
        # pictures share a batch, and thereby the last digits.
        clear_caches(self.vlm)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self.vlm, Path(resume_from_checkpoint))


def load_trained(vlm: DiffusionVLM, checkpoint: Path) -> None:
    """Set what trains to what a checkpoint holds.

    Raises:
        BackboneError: It cannot be read, or holds other parameters.
    """
    try:
        state = load_file(checkpoint / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"cannot read {checkpoint / WEIGHTS_FILE}: {error}") from error
    own = dict(vlm.named_trainable_parameters())
    wrong = sorted(own.keys() ^ state.keys()) or [
        name for name, parameter in own.items() if parameter.shape != state[name].shape
    ]
    if wrong:
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
    found = [
        (int(path.name.rpartition("-")[2]), path)
        for path in folder.glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdecimal() and _is_whole(path)
    ]
    return max(found)[1] if found else None


def check_same_run(checkpoint: Path, told: dict[str, Any]) -> None:
    """Raise unless a checkpoint is of this run.

    Raises:
        ConfigError: Something that it was trained with is another now; all of it is named.
    """
    try:
        before = json.loads((checkpoint / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{checkpoint} does not say what it was trained with: {error}") from error
    now = json.loads(json.dumps(told))
    changed = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ConfigError(
            f"{checkpoint} is of another configuration: {'; '.join(changed)}. Go on with the one "
            "it was begun with, or choose another output"
        )


def _is_whole(checkpoint: Path) -> bool:
    """The state is written last."""
    try:
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (checkpoint / WEIGHTS_FILE).is_file() and (checkpoint / RUN_FILE).is_file()
