"""What a run will take, before it begins: steps, memory, time, disk."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import torch

from diffenc.errors import ConfigError
from diffenc.mixing.config import MIXED
from diffenc.mllm.training.config import Sharding, TrainConfig
from diffenc.mllm.training.data import DataReport
from diffenc.mllm.training.downloads import Download, downloads
from diffenc.mllm.training.lengths import assumed, measured
from diffenc.mllm.training.memory import (
    BYTES,
    CARDS,
    SHARE,
    ModelSizes,
    host_memory,
    process_memory,
    what_fits,
)
from diffenc.mllm.training.meta import (
    MetaEncoder,
    MetaLanguageModel,
    meta_encoder,
    meta_language_model,
)
from diffenc.mllm.training.processes import process_count
from diffenc.projector.plain import Projector

_EFFICIENCY = 0.4
_SPLIT_OVER = 8
"""Number of processes that a plan for one compares it with."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Estimate of what a run will take; numbers are per process where they say so.

    Attributes:
        stage: Name of the stage, "align" or "instruct".
        data: Report of the samples that were found in the data.
        steps: Number of optimizer steps.
        processes: Number of processes that share a batch.
        accumulation: Number of batches that a process takes per step.
        tokens_per_image: Number of tokens of the context that a picture takes.
        text_tokens: Mean number of text tokens of a sample.
        longest: Number of tokens of the longest of the samples looked at, pictures included.
        context: Number of tokens that the language model's context holds; None where its config
            does not say.
        estimated_text: Whether text tokens were estimated from the number of letters, as the
            tokenizer was not available.
        parameters: Numbers of parameters, by part.
        trained: Numbers of parameters that train, by part.
        memory: Memory in bytes per process, by use.
        flops: Floating-point operations for a sample, by part, the backward pass included.
        rate: Assumed floating-point operations per second of a process.
        rate_source: Description of where that rate comes from.
        seconds: Duration of the whole run, in seconds.
        disk: Disk space in bytes, by use.
        shard: What the config splits.
        assumed: Whether no data was looked at: numbers of samples and tokens are assumed.
        settings: What the run is told, in words, by subject: batch, rates, precision, prompts.
        split_over: Number of processes that the memory of what is split is shared by.
        memories: Memory in bytes per process, by use, for each value of `optim.shard`.
        host: Main memory in bytes, by what needs it.
        fits: What cards hold, by their gigabytes: see `diffenc.mllm.training.memory.what_fits`.
        downloads: Weights that the run reads, and where they come from.
    """

    stage: str
    data: DataReport
    steps: int
    processes: int
    accumulation: int
    tokens_per_image: int
    text_tokens: float
    longest: int
    context: int | None
    estimated_text: bool
    parameters: dict[str, int]
    trained: dict[str, int]
    memory: dict[str, float]
    flops: dict[str, float]
    rate: float
    rate_source: str
    seconds: float
    disk: dict[str, float] = field(default_factory=dict)
    shard: Sharding = "none"
    assumed: bool = False
    settings: dict[str, str] = field(default_factory=dict)
    split_over: int = 1
    memories: dict[str, dict[str, float]] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    fits: dict[int, dict[str, int | None]] = field(default_factory=dict)
    downloads: list[Download] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)

    def warnings(self) -> list[str]:
        """What will not do as it is."""
        notes = []
        if self.context is not None and self.longest > self.context:
            notes.append(
                f"the longest sample has {self.longest} tokens and the language model holds "
                f"{self.context}: what is beyond is cut"
            )
        if self.data.broken:
            notes.append(f"left out: {self.data.describe()}")
        needed = sum(self.memory.values()) / 1e9
        if needed > SHARE * max(CARDS):
            notes.append(
                f"no card of {', '.join(map(str, CARDS))} GB holds a process, which needs "
                f'{needed:.0f} GB: take optim.shard = "zero3" over more processes, a smaller '
                'optim.device_batch_size, or adapt.language_model = "lora"'
            )
        if self.data.samples and self.steps < 10:
            notes.append(f"only {self.steps} steps: a smaller optim.batch_size makes more")
        return notes


def make_plan(
    config: TrainConfig,
    *,
    processes: int | None = None,
    tflops: float | None = None,
    samples: int | None = None,
    looking: Callable[[int, int], None] | None = None,
) -> Plan:
    """Check the data and add up what the run will take. No weight is loaded.

    Models are built at real size on the meta device, from their own configs or, where those are not
    at hand, from bundled ones of the known models.

    Args:
        config: Config of the run.
        processes: Number of processes that will share the run; None takes the environment variable
            ``WORLD_SIZE``, and 1 without it.
        tflops: Speed of a process, in 10^12 operations per second; None measures a matrix
            multiplication here and counts on 40 % of it.
        samples: Number of samples to plan for without looking at data: each is taken to have one
            picture, and a text of 25 tokens to align or 250 to instruct. None reads the data.
        looking: Function that is called with the number of pictures looked at so far, and with the
            number of all.

    Raises:
        ConfigError: The data cannot be used, the batch cannot be shared, or the run has no language
            model.
        BackboneError: A model's config cannot be had.
    """
    if config.stage == "ground":
        raise ConfigError(
            'a plan counts what a language model takes, and stage = "ground" has none; diffenc '
            "info tells the memory of the diffusion model"
        )
    if samples is not None and samples < 1:
        raise ConfigError(f"samples must be 1 or more, got {samples}")
    processes = process_count() if processes is None else processes
    if processes < 1 or (tflops is not None and not tflops > 0):
        raise ConfigError(f"processes must be 1 or more and tflops above 0, got {processes}")
    lengths = measured(config, looking) if samples is None else assumed(config, samples)
    optim, report = config.optimizing, lengths.report
    encoder = meta_encoder(config.model, unet_rank=config.adapting.unet_rank)
    language = meta_language_model(config.model.language_model)
    total = [
        length + shown * encoder.tokens
        for length, shown in lengths.samples  # a place in the text counts as a token of the text
    ]
    parameters, trained = _parameters(config, encoder, language)
    tokens = min(sum(total) / len(total), config.data.max_length)
    flops = _flops(config, encoder, language, tokens, report.images / report.samples)
    rate, source = _rate(config, tflops)
    steps = optim.steps(report.samples)
    longest = lengths.longest(encoder.tokens)
    if longest == math.inf:
        longest = min(config.data.max_length, language.context or math.inf)
    at_most = int(min(longest, config.data.max_length))
    model = ModelSizes(config, encoder, language, trained, at_most)
    over = processes if processes > 1 else _SPLIT_OVER
    memories = {
        kind: process_memory(model, shard=kind, processes=over) for kind in get_args(Sharding)
    }
    return Plan(
        stage=config.stage,
        data=report,
        steps=steps,
        processes=processes,
        accumulation=optim.accumulation(processes),
        tokens_per_image=encoder.tokens,
        text_tokens=sum(length for length, _ in lengths.samples) / len(lengths.samples),
        longest=int(longest),
        context=language.context,
        estimated_text=lengths.estimated,
        parameters=parameters,
        trained=trained,
        memory=process_memory(model, shard=optim.shard, processes=processes),
        flops=flops,
        rate=rate,
        rate_source=source,
        seconds=sum(flops.values()) * report.samples * optim.epochs / (rate * processes),
        disk=_disk(config, encoder, trained, report),
        shard=optim.shard,
        assumed=samples is not None,
        settings=_settings(config, steps, processes, encoder.denoiser.replace("unet", "U-Net")),
        split_over=over,
        memories=memories,
        host=host_memory(model, shard=optim.shard if processes > 1 else "none"),
        fits=what_fits(model, over),
        downloads=downloads(config, encoder, language),
    )


def _settings(config: TrainConfig, steps: int, processes: int, word: str) -> dict[str, str]:
    """What a run is told, in words, by subject."""
    optim, adapt = config.optimizing, config.adapting
    rises = math.ceil(steps * optim.warmup)
    again = ", activations computed again" if optim.gradient_checkpointing else ""
    trains = {
        "projector": True,
        "mixer": config.model.how in MIXED,
        "CLIP": not config.model.freeze_clip,
        "implicit captioner": bool(config.model.captioner),
        f"LoRA of rank {adapt.unet_rank} on the {word}": bool(adapt.unet_rank),
        f"LoRA of rank {adapt.rank} on the language model": adapt.language_model == "lora",
        "language model": adapt.language_model == "full",
    }
    split = optim.shard if optim.shard == "none" or processes > 1 else f"{optim.shard}, of 1: none"
    return {
        "trains": ", ".join(part for part, does in trains.items() if does),
        "batch": f"{optim.batch_size} = {optim.device_batch_size} at a time x "
        f"{optim.accumulation(processes)} accumulated x {processes} processes",
        "learning rate": f"{optim.learning_rate:g}, {optim.schedule} after {rises} steps of "
        f"warm-up; weight decay {optim.weight_decay:g}, gradients clipped to "
        f"{optim.max_grad_norm:g}",
        "precision": f"{optim.precision}, trained weights in fp32{again}",
        "prompts": config.data.prompts,
        "split": split,
        **_grounded(config),
    }


def _grounded(config: TrainConfig) -> dict[str, str]:
    """What is said of phrases that are learnt beside, for which nothing is counted."""
    ground = config.ground
    if ground is None:
        return {}
    return {
        "phrases": f"{ground.annotations}, {ground.weight:g} x their loss; one more pass of the "
        "U-Net a sample, which memory and time below do not count"
    }


def _parameters(
    config: TrainConfig, encoder: MetaEncoder, language: MetaLanguageModel
) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters in all and those that train, by part."""
    adapt, model = config.adapting, config.model
    projector = Projector(
        encoder.hidden_size,
        language.width,
        model.projector,
        norm_channels=encoder.groups if model.projector_norm else (),
        device="meta",
    )
    size = sum(parameter.numel() for parameter in projector.parameters())
    trained = {"projector": size, **encoder.trained}
    added = {name: size for name, size in trained.items() if name not in encoder.parameters}
    parameters = {**encoder.parameters, **added, "language model": language.parameters}
    if adapt.language_model == "full":
        trained["language model"] = language.parameters
    elif adapt.language_model == "lora":
        trained["language model LoRA"] = adapt.rank * language.lora
        parameters["language model LoRA"] = adapt.rank * language.lora
    return parameters, trained


def _flops(
    config: TrainConfig,
    encoder: MetaEncoder,
    language: MetaLanguageModel,
    tokens: float,
    pictures: float,
) -> dict[str, float]:
    """Operations of one sample: forward, back, and what checkpointing computes again."""
    again = int(config.optimizing.gradient_checkpointing)
    through = 1 + again  # the gradient of what came in, and forward once more
    parts = {name: flops * pictures for name, flops in encoder.flops.items()}
    if config.keeps_tokens and not encoder.trained:
        parts = {name: flops / config.optimizing.epochs for name, flops in parts.items()}
    if encoder.trained.keys() - {"vision model", "mixer"} and encoder.denoiser in parts:
        parts[encoder.denoiser] *= 1 + through
    for part in encoder.trained.keys() & {"vision model", "mixer"}:
        parts[part] *= 3  # the gradients of what came in and of the weights
    forward = 2.0 * language.computing * tokens
    attention = 4.0 * language.layers * language.width * tokens**2
    full = config.adapting.language_model == "full"
    parts["language model"] = (forward + attention) * (1 + through + int(full))
    return parts


def _disk(
    config: TrainConfig, encoder: MetaEncoder, trained: dict[str, int], report: DataReport
) -> dict[str, float]:
    """Bytes, by use."""
    learnt = sum(trained.values())
    parts = {"model": 4.0 * learnt}
    if config.save_steps:
        # Weights and AdamW's two moments; the newest is written before the oldest goes.
        parts["checkpoints"] = 12.0 * learnt * (config.keep + 1)
    if config.keeps_tokens and not encoder.trained:
        each = encoder.tokens * encoder.hidden_size * BYTES[config.optimizing.precision]
        parts["cache"] = min(float(report.images * each), config.data.cache_gb * 1e9)
    return parts


def _rate(config: TrainConfig, tflops: float | None) -> tuple[float, str]:
    if tflops is not None:
        return tflops * 1e12, "as given"
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    dtype = torch.float32 if config.optimizing.precision == "fp32" else torch.bfloat16
    peak = measured_rate(torch.device(device), dtype)
    return _EFFICIENCY * peak, f"40 % of what a multiplication of matrices reaches on this {device}"


def measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a multiplication of square matrices, the best of some."""
    side = 8192 if device.type == "cuda" else 1024
    left = torch.ones(side, side, device=device, dtype=dtype)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        product = left @ left
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
