"""A run: one of the two stages of LLaVA's recipe, or an encoder that is grounded alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from diffenc._optional import require, require_transformers
from diffenc.errors import ImageError
from diffenc.grounding.samples import GroundedImage
from diffenc.inputs.policies import parse_policy
from diffenc.mllm.model import DiffusionVLM
from diffenc.mllm.training.build import build_grounded, build_vlm
from diffenc.mllm.training.checkpoints import (
    CONFIG_FILE,
    LEFT_OUT_FILE,
    MODEL_FOLDER,
    read_left_out,
    starting_point,
    step_of,
)
from diffenc.mllm.training.config import TrainConfig
from diffenc.mllm.training.data import DataReport, check_data
from diffenc.mllm.training.dataset import make_dataset
from diffenc.mllm.training.grounded import (
    GroundedConversations,
    GroundedEncoder,
    GroundingLoss,
    check_phrases,
    phrase_dataset,
)
from diffenc.mllm.training.identity import (
    Samples,
    check_same_run,
    check_same_weights,
    marks_of,
    run_identity,
)
from diffenc.mllm.training.log import Progress
from diffenc.mllm.training.processes import (
    alone,
    is_first_process,
    of_all,
    own_device,
    process_count,
    require_same,
)
from diffenc.mllm.training.sharding import check_launch, held_bytes, is_sharded, set_trained
from diffenc.mllm.training.token_cache import make_cache
from diffenc.storage.names import expanded
from diffenc.storage.writing import make_folder, write_json

OLDEST_TRANSFORMERS = "5.0"
"""Of the extra `train`: with older ones, a resumed run is not the same as one that went through."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run did.

    Attributes:
        model: Folder that `DiffusionVLM.from_pretrained` reads; of the stage "ground",
            `DiffusionEncoder.from_pretrained`.
        steps: Number of optimizer steps in all.
        resumed_at: Step from which the run went on; 0 is the beginning.
        loss: Mean loss over the steps of this call.
        data: Report of the samples that were found in the data.
        cache_hits: Number of pictures whose tokens were in the cache.
        cache_misses: Number of pictures that were encoded, where there was a cache.
        skipped: Samples that taught nothing, and why: their pictures broke while this call trained,
            or their answers lie behind `data.max_length`.
        held: Bytes that this process held at the end, by use: its part of the weights, trained and
            frozen, and of AdamW's moments.
        phrases: Report of the phrases that were learnt beside conversations; None where there were
            none.
    """

    model: Path
    steps: int
    resumed_at: int
    loss: float
    data: DataReport
    cache_hits: int = 0
    cache_misses: int = 0
    skipped: tuple[str, ...] = ()
    held: Mapping[str, int] = field(default_factory=dict)
    phrases: DataReport | None = None


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    stop_after: int | None = None,
    looking: Callable[[int, int], None] | None = None,
) -> TrainResult:
    """Run one stage, or ground an encoder.

    Under `torchrun` or `accelerate launch` every process calls this; the first one writes.

    Args:
        config: Config of the run.
        resume: Whether to go on from the newest whole checkpoint in `config.output`, or begin where
            there is none. The result equals that of a run without interruption.
        device: Device of the model; None is CUDA where there is one, and otherwise the CPU.
        progress: Function that is called after each step with the number of steps done, the number
            of all steps, and the last loss that was logged.
        stop_after: Number of steps after which the run ends as if killed: no model is written,
            checkpoints stay. None runs to the end.
        looking: Function that is called with the number of pictures looked at so far before
            training, and with the number of all.

    Raises:
        ConfigError: The data cannot be used, a checkpoint is of another configuration, a run is in
            `config.output` already and shall not be resumed, the launcher would split the model, or
            transformers is older than `OLDEST_TRANSFORMERS`.
        BackboneError: A model is missing.
        ImageError: A picture broke after it was checked, and `data.skip_broken` is not set.
        OutputError: The folder cannot be written, or another program trains in it.
    """
    require("accelerate", extra="train")
    require_transformers(
        OLDEST_TRANSFORMERS,
        to="training",
        why="with older ones a run that is resumed, or that accumulates batches, does not end "
        "as one that is not. Run: pip install 'diffenc[train]'",
    )
    check_launch(config.optimizing, process_count())
    folder = Path(config.output)
    policy = parse_policy(config.data.prompts)
    checkpoint = starting_point(folder, resume=resume)
    skip = checkpoint is not None and config.data.skip_broken
    begun_without = read_left_out(folder) if skip else None
    samples: Samples
    report: DataReport
    phrases: list[GroundedImage] = []
    about_phrases: DataReport | None = None
    if config.stage == "ground":
        assert config.ground is not None
        samples, report = check_phrases(
            config.ground, config.data, left_out=begun_without, progress=looking
        )
    else:
        samples, report = check_data(config.data, policy, left_out=begun_without, progress=looking)
        if config.ground is not None:
            phrases, about_phrases = check_phrases(config.ground, config.data, progress=looking)
    with alone(folder):
        result = _train(
            config,
            samples,
            phrases,
            report,
            checkpoint,
            own_device(device),
            progress,
            stop_after,
        )
    return replace(result, phrases=about_phrases)


def _train(
    config: TrainConfig,
    samples: Samples,
    phrases: Sequence[GroundedImage],
    report: DataReport,
    checkpoint: Path | None,
    device: torch.device,
    progress: Progress | None,
    stop_after: int | None,
) -> TrainResult:
    from diffenc.mllm.training.trainer import make_trainer, quiet

    folder = Path(config.output)
    lasting = config.lasting()
    images = config.data.images if config.ground is None else config.ground.images
    identity = run_identity(lasting, samples, expanded(config.data.images or images), phrases)
    if checkpoint is not None:
        check_same_run(checkpoint, identity)
    # What is split goes to its device layer by layer: the whole may not fit there.
    split = config.optimizing.shard != "none" and process_count() > 1
    place = torch.device("cpu") if split else device
    vlm: DiffusionVLM | GroundedEncoder
    if config.stage == "ground":
        vlm = build_grounded(config, device=place)
    else:
        vlm = build_vlm(config, device=place)
    identity["weights"] = marks_of(vlm)
    if checkpoint is not None:
        check_same_weights(checkpoint, vlm)
    if config.optimizing.gradient_checkpointing:
        vlm.gradient_checkpointing_enable()
    cache = make_cache(config.data, vlm.encoder, folder) if config.keeps_tokens else None
    dataset, beside = _rows(config, vlm, samples, phrases, as_files=cache is not None)
    if is_first_process():
        lasting.write(make_folder(folder) / CONFIG_FILE)
        if checkpoint is None:
            write_json(folder / LEFT_OUT_FILE, report.left_out, indent=None)
    trainer = make_trainer(
        config,
        vlm,
        dataset,
        identity=identity,
        cache=cache,
        beside=beside,
        device=device,
        progress=progress,
        stop_after=stop_after,
    )
    require_same(samples)
    try:
        with quiet():
            source = None if not checkpoint else str(checkpoint)
            outcome = trainer.train(resume_from_checkpoint=source)
    except ImageError as error:  # from a process that reads, with its traceback in the message
        fault = str(error).strip().split("\n")[-1].removeprefix("diffenc.errors.ImageError: ")
        raise ImageError(
            f"{fault}. Repair it and go on (--resume), or train without it: data.skip_broken = true"
        ) from error
    if cache is not None:
        cache.flush()
    if stop_after is None:
        _save(config, trainer, folder / MODEL_FOLDER)
    trainer.accelerator.wait_for_everyone()
    return TrainResult(
        model=folder / MODEL_FOLDER,
        steps=outcome.global_step,
        resumed_at=step_of(checkpoint),
        loss=outcome.training_loss,
        data=report,
        cache_hits=0 if cache is None else cache.hits,
        cache_misses=0 if cache is None else cache.misses,
        skipped=of_all(list(trainer.broken)),
        held=held_bytes(vlm, trainer.optimizer),
    )


def _rows(
    config: TrainConfig,
    vlm: DiffusionVLM | GroundedEncoder,
    samples: Any,
    phrases: Sequence[GroundedImage],
    *,
    as_files: bool,
) -> "tuple[Any, GroundingLoss | None]":
    """Rows of the run, and the loss on phrases that are learnt beside conversations."""
    seed, data, ground = config.seed, config.data, config.ground
    if isinstance(vlm, GroundedEncoder):
        assert ground is not None
        return phrase_dataset(samples, vlm.encoder, ground, data, seed=seed), None
    conversations = make_dataset(data, vlm, samples, seed=seed, as_files=as_files)
    if ground is None:
        return conversations, None
    encoder: Any = getattr(vlm.encoder, "diffusion", vlm.encoder)
    rows = phrase_dataset(phrases, encoder, ground, data, seed=seed)
    beside = GroundingLoss(encoder, ground, denoise=False)
    return GroundedConversations(conversations, rows), beside


def _save(config: TrainConfig, trainer: Any, folder: Path) -> None:
    """Write the model; one that is split is built again as a whole in the first process."""
    vlm, first = trainer.vlm, trainer.args.should_save
    if is_sharded(vlm):
        state = trainer.trained_state()
        if first:
            vlm = build_vlm(config, device="cpu")
            set_trained(vlm, state)
    if first:
        vlm.eval()
        vlm.save_pretrained(folder)
