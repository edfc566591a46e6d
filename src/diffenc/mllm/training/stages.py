"""The two stages of LLaVA's recipe: align the projector, then instruct the language model."""

import hashlib
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffenc._optional import require
from diffenc.errors import ConfigError, ImageError
from diffenc.inputs.policies import parse_policy
from diffenc.memory.digests import weights_mark
from diffenc.mllm.model import DiffusionVLM
from diffenc.mllm.model_folder import is_saved
from diffenc.mllm.training.build import build_vlm
from diffenc.mllm.training.config import TrainConfig
from diffenc.mllm.training.data import (
    ConversationDataset,
    DataReport,
    TrainSample,
    check_pictures,
    collate,
    read_samples,
    require_usable,
)
from diffenc.mllm.training.log import LOG_FILE
from diffenc.mllm.training.token_cache import TokenCache, is_frozen
from diffenc.storage.names import expanded, is_file, is_folder
from diffenc.storage.reading import read_json
from diffenc.storage.writing import locked, make_folder, write_json

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, float | None], None]
"""Function called after each step with the steps done, all steps, and the last logged loss."""

MODEL_FOLDER, CONFIG_FILE = "model", "config.toml"
LEFT_OUT_FILE = "left_out.json"
"""Name of the file that lists the records left out when the run began; resuming leaves out the same
ones."""
# What may change between a run and its continuation.
_FREE = ("output", "save_steps", "keep", "log_steps")
_FREE_DATA = (
    *("workers", "cache", "cache_gb", "cache_dir", "images", "annotations"),
    *("skip_broken", "check_images"),
)
_THREADS = 8


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run did.

    Attributes:
        model: Folder that `DiffusionVLM.from_pretrained` reads.
        steps: Number of optimizer steps in all.
        resumed_at: Step from which the run went on; 0 is the beginning.
        loss: Mean loss over the steps of this call.
        data: Report of the samples that were found in the data.
        cache_hits: Number of pictures whose tokens were in the cache.
        cache_misses: Number of pictures that were encoded, where there was a cache.
        skipped: Samples whose pictures broke while this call trained, and why.
    """

    model: Path
    steps: int
    resumed_at: int
    loss: float
    data: DataReport
    cache_hits: int = 0
    cache_misses: int = 0
    skipped: tuple[str, ...] = ()


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    stop_after: int | None = None,
    looking: Callable[[int, int], None] | None = None,
) -> TrainResult:
    """Run one stage.

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
        ConfigError: The data cannot be used, a checkpoint is of another configuration, or a run is
            in `config.output` already and shall not be resumed.
        BackboneError: A model is missing.
        ImageError: A picture broke after it was checked, and `data.skip_broken` is not set.
        OutputError: The folder cannot be written, or another program trains in it.
    """
    require("accelerate", extra="train")
    folder = Path(config.output)
    checkpoint = _starting_point(folder, resume)
    skip = checkpoint is not None and config.data.skip_broken
    begun_without = _read_left_out(folder) if skip else None
    samples, report = check_data(config, left_out=begun_without, progress=looking)
    with _alone(folder):
        return _train(config, samples, report, checkpoint, device, progress, stop_after)


def _train(
    config: TrainConfig,
    samples: list[TrainSample],
    report: DataReport,
    checkpoint: Path | None,
    device: str | torch.device | None,
    progress: Progress | None,
    stop_after: int | None,
) -> TrainResult:
    from diffenc.mllm.training.trainer import check_same_run, check_same_weights

    folder = Path(config.output)
    identity = run_identity(config, samples)
    if checkpoint is not None:
        check_same_run(checkpoint, identity)
    device = _device(device)
    vlm = build_vlm(config, device=device)
    identity["weights"] = {
        part: weights_mark(module)
        for part, module in (("encoder", vlm.encoder), ("language model", vlm.language_model))
    }
    if checkpoint is not None:
        check_same_weights(checkpoint, vlm)
    if config.optimizing.gradient_checkpointing:
        vlm.gradient_checkpointing_enable()
    cache = make_cache(config, vlm)
    dataset = make_dataset(config, vlm, samples, as_files=cache is not None)
    if is_first_process():
        _begin(folder, config)
        if checkpoint is None:
            write_json(folder / LEFT_OUT_FILE, report.left_out, indent=None)
    trainer = _trainer(config, vlm, dataset, identity, cache, device, progress, stop_after)
    _require_same(samples)
    try:
        with _quiet():
            source = None if not checkpoint else str(checkpoint)
            outcome = trainer.train(resume_from_checkpoint=source)
    except ImageError as error:  # from a process that reads, with its traceback in the message
        fault = str(error).strip().split("\n")[-1].removeprefix("diffenc.errors.ImageError: ")
        raise ImageError(
            f"{fault}. Repair it and go on (--resume), or train without it: data.skip_broken = true"
        ) from error
    if cache is not None:
        cache.flush()
    if stop_after is None and trainer.args.should_save:
        vlm.eval()
        vlm.save_pretrained(folder / MODEL_FOLDER)
    trainer.accelerator.wait_for_everyone()
    return TrainResult(
        model=folder / MODEL_FOLDER,
        steps=outcome.global_step,
        resumed_at=0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2]),
        loss=outcome.training_loss,
        data=report,
        cache_hits=0 if cache is None else cache.hits,
        cache_misses=0 if cache is None else cache.misses,
        skipped=_of_all(list(trainer.broken)),
    )


def check_data(
    config: TrainConfig,
    *,
    left_out: Collection[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[TrainSample], DataReport]:
    """Every usable sample, or an error that tells all that is wrong.

    Args:
        config: Configuration of the run.
        left_out: Indices of records that are left out, see `read_samples`; pictures are then not
            looked at.
        progress: Function that is called with the number of pictures looked at so far, and with the
            number of all.

    Raises:
        ConfigError: See `diffenc.mllm.training.data.require_usable`.
    """
    data = config.data
    samples, report = read_samples(
        data.annotations,
        data.images,
        limit=data.limit,
        policy=parse_policy(data.prompts),
        left_out=left_out,
    )
    if data.check_images and left_out is None:
        threads = min(_THREADS, os.cpu_count() or 1)
        samples = check_pictures(samples, report, workers=threads, progress=progress)
    require_usable(report, skip_broken=data.skip_broken)
    return samples, report


def count_steps(config: TrainConfig, samples: int) -> int:
    """Optimizer steps of a run."""
    optim = config.optimizing
    return math.ceil(samples / optim.batch_size) * optim.epochs


def make_dataset(
    config: TrainConfig, vlm: DiffusionVLM, samples: list[TrainSample], *, as_files: bool
) -> ConversationDataset:
    """The data set of a run.

    Raises:
        ConfigError: A picture takes more tokens than a sample may have.
    """
    each = vlm.tokens_per_image or 1
    limit = min(config.data.max_length, vlm.context or config.data.max_length)
    shown = max((len(sample.images) for sample in samples), default=0)
    if shown * each >= limit:
        raise ConfigError(
            f"the sample with most pictures shows {shown} of {each} tokens each, and a sample may "
            f"have {limit} (data.max_length, the language model's context); use a coarser grid: "
            "grid in [model.options]"
        )
    return ConversationDataset(
        samples,
        vlm.chat,
        parse_policy(config.data.prompts),
        max_length=limit,
        tokens_per_image=each,
        seed=config.seed,
        as_files=as_files,
        skip_broken=config.data.skip_broken,
    )


def uses_cache(config: TrainConfig) -> bool:
    """Whether the encoder's tokens are kept on disk, if it is frozen."""
    mode, policy = config.data.cache, config.data.prompts
    if mode != "auto":
        return mode == "on"
    baseline = config.model.kind == "vision"
    changes = "|" in policy
    drawn = any(
        word in ("question", "caption") for word in policy.split("|")[0].replace(" ", "").split("+")
    )
    return config.optimizing.epochs > 1 and (baseline or not (changes or drawn))


def make_cache(config: TrainConfig, vlm: DiffusionVLM) -> TokenCache | None:
    """The cache of a run, or None.

    Raises:
        ConfigError: A cache is requested and the encoder trains.
    """
    if not uses_cache(config):
        return None
    if not is_frozen(vlm.encoder):
        if config.data.cache == "on":
            raise ConfigError(
                'data.cache = "on" keeps the tokens of a frozen encoder, and this one trains '
                "(captioner, freeze_clip = false, a way of fusing with weights, or "
                'adapt.unet_rank); use "auto" or "off"'
            )
        return None
    folder = config.data.cache_dir or str(Path(config.output) / "cache")
    return TokenCache(folder, int(config.data.cache_gb * 1e9))


def run_identity(config: TrainConfig, samples: Sequence[TrainSample]) -> dict[str, Any]:
    """What a run and its continuation must share, flat; `weights` comes with the model."""
    settings = {key: value for key, value in config.lasting().to_dict().items() if key not in _FREE}
    settings["data"] = {k: v for k, v in settings["data"].items() if k not in _FREE_DATA}
    settings["optim"] = {k: v for k, v in settings["optim"].items() if k != "device_batch_size"}
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": each for inner, each in value.items()})
        else:
            flat[key] = value
    content = samples_digest(samples, expanded(config.data.images))
    identity = {**flat, "samples": len(samples), "content of the samples": content}
    if not config.data.skip_broken:  # a picture that is gone since then is left out
        identity["sizes of the pictures"] = sizes_digest(samples)
    return identity


def samples_digest(samples: Sequence[TrainSample], images: Path) -> str:
    """Digest of texts, and of the names of pictures in their folder."""
    digest = hashlib.blake2b(digest_size=12)
    for sample in samples:
        names = [os.path.relpath(path, images) for path in sample.images]
        parts = [sample.key, names, [dict(t) for t in sample.conversation], sample.captions]
        digest.update(json.dumps(parts).encode())
    return digest.hexdigest()


def sizes_digest(samples: Sequence[TrainSample]) -> str:
    """Digest of how large the pictures' files are."""
    sizes = [path.stat().st_size for sample in samples for path in sample.images]
    return hashlib.blake2b(json.dumps(sizes).encode(), digest_size=12).hexdigest()


def is_first_process() -> bool:
    """Whether this process writes."""
    return int(os.environ.get("RANK", "0")) == 0


def _starting_point(folder: Path, resume: bool) -> Path | None:
    from diffenc.mllm.training.trainer import find_checkpoint

    if resume:
        if is_saved(folder / MODEL_FOLDER):
            raise ConfigError(
                f"{folder / MODEL_FOLDER} is complete: there is nothing to resume. To train again, "
                "choose another output or remove the folder"
            )
        return find_checkpoint(folder)
    if is_folder(folder) and (is_saved(folder / MODEL_FOLDER) or any(folder.glob("checkpoint-*"))):
        raise ConfigError(
            f"{folder} holds a run already; go on with it (--resume), choose another output, or "
            "remove the folder"
        )
    return None


def _read_left_out(folder: Path) -> frozenset[int] | None:
    """Records that the run in a folder began without, None where it does not say."""
    if not is_file(folder / LEFT_OUT_FILE):
        return None
    return frozenset(read_json(folder / LEFT_OUT_FILE, list))


def _require_same(samples: Sequence[TrainSample]) -> None:
    """Raise a `ConfigError` unless all processes train on the same samples."""
    keys = "\0".join(sample.key for sample in samples)
    counts = _of_all([(len(samples), hashlib.sha256(keys.encode(errors="replace")).hexdigest())])
    if len(set(counts)) > 1:
        raise ConfigError(
            f"the processes of this run found {[count for count, _ in counts]} usable samples: "
            "they see different files, or some could not be read for a moment. Start again"
        )


def _of_all(rows: list[Any]) -> tuple[Any, ...]:
    """What all processes of the run have."""
    from accelerate.utils import gather_object

    return tuple(gather_object(rows))


def _begin(folder: Path, config: TrainConfig) -> None:
    config.lasting().write(make_folder(folder) / CONFIG_FILE)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep others from training in a folder; of several processes the first one does."""
    if not is_first_process():
        yield
        return
    with locked(make_folder(folder), purpose="training in it"):
        yield


def _device(device: str | torch.device | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _trainer(
    config: TrainConfig,
    vlm: DiffusionVLM,
    dataset: ConversationDataset,
    identity: dict[str, Any],
    cache: TokenCache | None,
    device: torch.device,
    progress: Progress | None,
    stop_after: int | None,
) -> Any:
    from transformers import TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from diffenc.mllm.training.callbacks import RunCallback
    from diffenc.mllm.training.trainer import VLMTrainer

    optim = config.optimizing
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    total = count_steps(config, len(dataset))
    on_cpu = device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=config.output,
        per_device_train_batch_size=optim.device_batch_size,
        gradient_accumulation_steps=optim.accumulation(processes),
        num_train_epochs=optim.epochs,
        learning_rate=optim.learning_rate,
        lr_scheduler_type=optim.schedule,
        warmup_steps=math.ceil(total * optim.warmup),
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
    trainer = VLMTrainer(
        vlm,
        dataset,
        arguments,
        collator=collate,
        identity=identity,
        cache=cache,
        callbacks=[RunCallback(Path(config.output) / LOG_FILE, progress, stop_after)],
    )
    trainer.remove_callback(PrinterCallback)
    kind = str(trainer.accelerator.distributed_type)
    if any(word in kind for word in ("FSDP", "DEEPSPEED")):
        raise ConfigError(
            f"{kind} splits parameters, which checkpoints here do not gather; use plain data "
            'parallelism, with adapt.language_model = "lora" where memory is short'
        )
    return trainer


@contextmanager
def _quiet() -> Iterator[None]:
    """Without notices of the libraries that every run would repeat."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        yield
