"""What a run will take, before it begins: steps, memory, time, disk."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from diffenc.errors import BackboneError, ConfigError
from diffenc.inputs.policies import parse_policy
from diffenc.mllm.chat import Chat
from diffenc.mllm.language import load_tokenizer
from diffenc.mllm.training.config import TrainConfig
from diffenc.mllm.training.data import DataReport, TrainSample, check_data
from diffenc.mllm.training.meta import (
    MetaEncoder,
    MetaLanguageModel,
    meta_encoder,
    meta_language_model,
)
from diffenc.mllm.training.processes import process_count
from diffenc.projector.plain import Projector

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_SAMPLED = 500
_CHARACTERS_PER_TOKEN = 4
_EFFICIENCY = 0.4
_LAYER_ACTIVATIONS = 34
"""Values that a layer of a transformer keeps per token and channel for the way back (Korthikanti
et al. 2022, arXiv:2205.05198, equation 2, without its attention matrix, in two-byte units / 2)."""


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
        if self.data.samples and self.steps < 10:
            notes.append(f"only {self.steps} steps: a smaller optim.batch_size makes more")
        return notes


def make_plan(
    config: TrainConfig,
    *,
    processes: int | None = None,
    tflops: float | None = None,
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
        looking: Function that is called with the number of pictures looked at so far, and with the
            number of all.

    Raises:
        ConfigError: The data cannot be used, or the batch cannot be shared.
        BackboneError: A model's config cannot be had.
    """
    processes = process_count() if processes is None else processes
    if processes < 1 or (tflops is not None and not tflops > 0):
        raise ConfigError(f"processes must be 1 or more and tflops above 0, got {processes}")
    samples, report = check_data(config.data, parse_policy(config.data.prompts), progress=looking)
    optim, adapt = config.optimizing, config.adapting
    encoder = meta_encoder(config.model, unet_rank=adapt.unet_rank)
    language = meta_language_model(config.model.language_model)
    lengths, estimated = _text_lengths(config, samples)
    pictures = report.images / report.samples
    total = [
        length + shown * encoder.tokens
        for length, shown in lengths  # a place in the text counts as a token of the text
    ]
    parameters, trained = _parameters(config, encoder, language)
    tokens = min(sum(total) / len(total), config.data.max_length)
    flops = _flops(config, encoder, language, tokens, pictures)
    rate, source = _rate(config, tflops)
    steps = optim.steps(report.samples)
    seconds = sum(flops.values()) * report.samples * optim.epochs / (rate * processes)
    longest = max(total)
    memory = _memory(
        config, encoder, language, parameters, trained, min(longest, config.data.max_length)
    )
    return Plan(
        stage=config.stage,
        data=report,
        steps=steps,
        processes=processes,
        accumulation=optim.accumulation(processes),
        tokens_per_image=encoder.tokens,
        text_tokens=sum(length for length, _ in lengths) / len(lengths),
        longest=longest,
        context=language.context,
        estimated_text=estimated,
        parameters=parameters,
        trained=trained,
        memory=memory,
        flops=flops,
        rate=rate,
        rate_source=source,
        seconds=seconds,
        disk=_disk(config, encoder, trained, report),
    )


def _text_lengths(
    config: TrainConfig, samples: list[TrainSample]
) -> tuple[list[tuple[int, int]], bool]:
    """(Tokens of the text, pictures) of samples evenly spread; whether they are a guess."""
    some = samples[:: max(1, len(samples) // _SAMPLED)]
    try:
        chat = Chat(
            load_tokenizer(config.model.language_model),
            config.model.template,  # type: ignore[arg-type]  # checked by the config
        )
    except (OSError, ValueError, BackboneError):
        guessed = [
            sum(len(turn["value"]) for turn in sample.conversation) // _CHARACTERS_PER_TOKEN + 1
            for sample in some
        ]
        return [(n, len(s.images)) for n, s in zip(guessed, some, strict=True)], True
    encoded = [chat.encode(sample.conversation) for sample in some]
    return [(len(each.input_ids) - each.num_images, each.num_images) for each in encoded], False


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
    if encoder.trained.keys() - {"vision model", "mixer"} and "unet" in parts:
        parts["unet"] *= 1 + through
    for part in encoder.trained.keys() & {"vision model", "mixer"}:
        parts[part] *= 3  # the gradients of what came in and of the weights
    forward = 2.0 * language.computing * tokens
    attention = 4.0 * language.layers * language.width * tokens**2
    full = config.adapting.language_model == "full"
    parts["language model"] = (forward + attention) * (1 + through + int(full))
    return parts


def _memory(
    config: TrainConfig,
    encoder: MetaEncoder,
    language: MetaLanguageModel,
    parameters: dict[str, int],
    trained: dict[str, int],
    longest: int,
) -> dict[str, float]:
    """Bytes per process, by use."""
    optim = config.optimizing
    width, batch = _BYTES[optim.precision], optim.device_batch_size
    learnt = sum(trained.values())
    frozen = sum(parameters.values()) - learnt
    tokens = batch * longest
    layer = tokens * language.width * _LAYER_ACTIVATIONS * width / 2
    kept = tokens * language.width * width * language.layers
    activations = kept + layer if optim.gradient_checkpointing else layer * language.layers
    logits = tokens * language.vocabulary * (2 * width + 4)
    at_once = min(batch, config.model.image_batch_size or batch)
    # The VAE's first level: 128 channels at full size, of which it holds about four tensors.
    encoding = at_once * encoder.pixels * 128 * 4 * width
    parts = {
        "frozen weights": float(frozen * width),
        "trained weights": 4.0 * learnt,
        "gradients": 4.0 * learnt,
        "AdamW": 8.0 * learnt,
        "activations": float(activations),
        "logits": float(logits),
        "encoding": float(encoding),
    }
    if config.adapting.language_model == "full" and width == 2:
        parts["autocast copies"] = 2.0 * language.parameters
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
        each = encoder.tokens * encoder.hidden_size * _BYTES[config.optimizing.precision]
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
