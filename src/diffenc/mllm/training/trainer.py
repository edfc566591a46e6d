"""transformers' `Trainer` for a `DiffusionVLM`: what is learnt is all that it saves."""

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback

from diffenc.errors import BackboneError
from diffenc.grounding import PhraseDataset, collate_phrases
from diffenc.memory.cache import recall
from diffenc.mllm.model import DiffusionVLM
from diffenc.mllm.training.callbacks import RunCallback
from diffenc.mllm.training.checkpoints import RUN_FILE, WEIGHTS_FILE, load_trained
from diffenc.mllm.training.config import TrainConfig
from diffenc.mllm.training.dataset import (
    BROKEN,
    ConversationDataset,
    EpochSampler,
    ImageFile,
    collate,
)
from diffenc.mllm.training.grounded import (
    GROUNDED,
    GroundedConversations,
    GroundedEncoder,
    GroundingLoss,
    collate_grounded,
)
from diffenc.mllm.training.log import LOG_FILE, Progress
from diffenc.mllm.training.processes import process_count
from diffenc.mllm.training.sharding import gathered, is_sharded, load_optimizer, shard
from diffenc.mllm.training.token_cache import TokenCache, encoder_digest, entry_name
from diffenc.storage.names import reason
from diffenc.storage.tensors import read_state, write_state, write_tensors
from diffenc.storage.writing import make_folder, write_json

logger = logging.getLogger(__name__)

Samples = ConversationDataset | PhraseDataset | GroundedConversations
"""Rows of a run."""
_COLLATORS: dict[type, Any] = {
    ConversationDataset: collate,
    PhraseDataset: collate_phrases,
    GroundedConversations: collate_grounded,
}


class VLMTrainer(Trainer):  # type: ignore[misc]  # transformers is seen as Any
    """A `Trainer` whose checkpoints hold trained parameters alone.

    Args:
        vlm: Model that is trained, or an encoder in its place.
        dataset: Samples that the model is trained on.
        args: transformers' `TrainingArguments`.
        collator: Function that makes a batch of samples.
        identity: Description of the run, as JSON holds it; training goes on only from checkpoints
            that agree with it.
        cache: Cache of the frozen encoder's tokens; None keeps nothing.
        beside: Loss on the phrases in a batch, beside that of the answers; None has none.
        callbacks: Further callbacks of the trainer.
    """

    def __init__(
        self,
        vlm: DiffusionVLM | GroundedEncoder,
        dataset: Dataset[dict[str, Any]],
        args: Any,
        *,
        collator: Any,
        identity: dict[str, Any],
        cache: TokenCache | None = None,
        beside: GroundingLoss | None = None,
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
        self.vlm, self.identity, self.cache, self.beside = vlm, identity, cache, beside
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
        grounded = inputs.pop(GROUNDED, None)
        for each in (*inputs.pop(BROKEN, ()), *(grounded or {}).pop(BROKEN, ())):
            if each not in self.broken:
                self.broken[each] = None
                logger.warning("trained without the sample %s", each)
        if self.cache is not None:
            tokens = self._image_tokens(inputs["images"], inputs["prompts"])
            inputs = {**inputs, "images": None, "prompts": None, "image_tokens": tokens}
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.beside is None or return_outputs:
            return loss
        # The loss of the answers is divided by all answers of a step; this one is a batch's mean.
        return loss + self.beside(grounded) / self.current_gradient_accumulation_steps

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log what transformers does, and the losses on phrases one by one."""
        loss = self.vlm.loss if isinstance(self.vlm, GroundedEncoder) else self.beside
        own = loss.means() if loss is not None and "loss" in logs else {}
        super().log({**logs, **own}, *args, **options)

    @torch.no_grad()
    def _image_tokens(self, images: list[list[ImageFile]], prompts: list[str]) -> list[Tensor]:
        assert self.cache is not None
        assert isinstance(self.vlm, DiffusionVLM)
        vlm = self.vlm
        flat = [
            (file, prompt) for files, prompt in zip(images, prompts, strict=True) for file in files
        ]
        names = [entry_name(self._digest, file.digest, prompt) for file, prompt in flat]

        def encode(rows: list[int]) -> list[Tensor]:
            pictures, texts = [flat[row][0].open() for row in rows], [flat[row][1] for row in rows]
            with self.accelerator.autocast():
                return list(vlm.encode_images(pictures, texts))

        return [tokens.to(self.args.device) for tokens in recall(self.cache, names, encode)]

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        """The model is where it shall be: moving one that is split would put it together."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what trains; where it is split, all processes put it together."""
        state = self.trained_state()
        if self.args.should_save:
            self._save(output_dir, state)

    def trained_state(self) -> dict[str, Tensor]:
        """What trains, by name: whole, on the CPU, in the first process; empty in others.

        All processes call this together.
        """
        trained = dict(self.vlm.named_trainable_parameters())
        state: dict[str, Tensor] = gathered(trained, keep=self.args.should_save)
        return state

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = make_folder(output_dir or self.args.output_dir)
        write_tensors(folder / WEIGHTS_FILE, state_dict)
        write_json(folder / RUN_FILE, self.identity)
        if self.cache is not None:
            self.cache.flush()
        # A run that goes on from here begins with empty caches; what they hold decides which
        # pictures share a batch, and thereby the last digits.
        clear_caches(self.vlm)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self.vlm, Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.vlm):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # In the layout of a run that is not split, so that either goes on from either.
        state = gathered(self.optimizer.state_dict(), keep=self.args.should_save)
        if self.args.should_save:
            write_state(Path(output_dir) / OPTIMIZER_NAME, state)
            write_state(Path(output_dir) / SCHEDULER_NAME, self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            if checkpoint is None or not is_sharded(self.vlm):
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            load_optimizer(self.optimizer, read_state(Path(checkpoint) / OPTIMIZER_NAME))
            self.lr_scheduler.load_state_dict(read_state(Path(checkpoint) / SCHEDULER_NAME))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)


def make_trainer(
    config: TrainConfig,
    vlm: DiffusionVLM | GroundedEncoder,
    dataset: Samples,
    *,
    identity: dict[str, Any],
    cache: TokenCache | None,
    beside: GroundingLoss | None,
    device: torch.device,
    progress: Progress | None,
    stop_after: int | None,
) -> VLMTrainer:
    """The trainer of a run, with its log.

    Args:
        config: Config of the run.
        vlm: Model that is trained, on its device.
        dataset: Samples that the model is trained on.
        identity: Description of the run, see `VLMTrainer`.
        cache: Cache of the frozen encoder's tokens; None keeps nothing.
        beside: Loss on phrases, see `VLMTrainer`.
        device: Device of the model.
        progress: Function that is called after each step.
        stop_after: Number of steps after which training stops; None runs to the end.

    Raises:
        ConfigError: A parameter cannot be split where `optim.shard` says so.
    """
    optim = config.optimizing
    processes, folder = process_count(), Path(config.output)
    on_cpu = device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=config.output,
        per_device_train_batch_size=optim.device_batch_size,
        gradient_accumulation_steps=optim.accumulation(processes),
        num_train_epochs=optim.epochs,
        learning_rate=optim.learning_rate,
        lr_scheduler_type=optim.schedule,
        warmup_steps=math.ceil(optim.steps(len(dataset)) * optim.warmup),
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        bf16=optim.precision == "bf16",
        fp16=optim.precision == "fp16",
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and processes > 1 else None,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
        dataloader_num_workers=config.data.workers,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 1,
        save_total_limit=config.keep,
        report_to=[],
        disable_tqdm=True,
        seed=config.seed,
        data_seed=config.seed,
    )
    # The arguments have begun the process group. What is split comes before the optimizer is made.
    split = optim.shard != "none" and processes > 1
    if split:
        assert isinstance(vlm, DiffusionVLM)
        shard(vlm, optim, arguments.device)
    trainer = VLMTrainer(
        vlm,
        dataset,
        arguments,
        collator=_COLLATORS[type(dataset)],
        identity=identity,
        cache=cache,
        beside=beside,
        callbacks=[RunCallback(folder / LOG_FILE, progress, stop_after)],
    )
    trainer.remove_callback(PrinterCallback)
    if split:  # it reduces its gradients itself, and wants no DistributedDataParallel round it
        accelerator: Any = trainer.accelerator
        accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)
    return trainer


@contextmanager
def quiet() -> Iterator[None]:
    """Without notices of the libraries that every run would repeat."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        yield


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


def clear_caches(vlm: DiffusionVLM | GroundedEncoder) -> None:
    """Forget what the encoder remembers."""
    parts: tuple[Any, ...] = (vlm.encoder, getattr(vlm.encoder, "model", None))
    for part in parts:
        if hasattr(part, "clear_cache"):
            part.clear_cache()
