"""What a process of a run needs in memory, whole and split over processes, and what that fits.

Weights, gradients and moments of the optimizer are exact by count. What else a step holds is
estimated, from the longest sample that was looked at: see `process_memory`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from diffenc.mllm.training.config import Sharding, TrainConfig
from diffenc.mllm.training.meta import MetaEncoder, MetaLanguageModel

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a number, by precision."""
CARDS = (24, 40, 80, 141)
"""Memory of the cards that a plan speaks of, in gigabytes (10^9 bytes)."""
SHARE = 0.9
"""Share of a card that a run may take; the rest is the driver's, the communication's, and lost."""
ASSUMPTIONS = (
    "weights, gradients and AdamW are exact by count; activations are estimated, as 34 bytes a "
    "token, channel and layer in two-byte precision, without attention matrices, or one state a "
    "layer and one layer with gradient checkpointing; those of a denoiser that trains are not "
    "counted"
)
_LAYER_ACTIVATIONS = 34
"""Values that a layer of a transformer keeps per token and channel for the way back (Korthikanti
et al. 2022, arXiv:2205.05198, equation 2, without its attention matrix, in two-byte units / 2)."""
_MOST_PROCESSES = 64


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """A model of which the memory of a run follows.

    Attributes:
        config: Config of the run.
        encoder: Encoder of the pictures.
        language: Language model.
        trained: Numbers of parameters that train, by part.
        longest: Number of tokens of the longest sample.
    """

    config: TrainConfig
    encoder: MetaEncoder
    language: MetaLanguageModel
    trained: Mapping[str, int]
    longest: int

    @property
    def width(self) -> int:
        """Bytes of a number of the computation, and of a frozen weight."""
        return BYTES[self.config.optimizing.precision]

    @property
    def full(self) -> bool:
        """Whether the whole language model trains."""
        return self.config.adapting.language_model == "full"


def process_memory(
    model: ModelSizes, *, shard: Sharding, processes: int, batch: int | None = None
) -> dict[str, float]:
    """Bytes of a process, by use.

    Args:
        model: Model and config of the run.
        shard: What is split, see `OptimConfig`.
        processes: Number of processes that share what is split.
        batch: Number of samples that a process takes at a time; None is the config's.
    """
    batch = model.config.optimizing.device_batch_size if batch is None else batch
    parts = 1 if shard == "none" else processes
    learnt = sum(model.trained.values())
    memory = {
        "frozen weights": _frozen_encoder(model) + _frozen_language(model) / parts,
        "trained weights": 4.0 * learnt / parts,
        "gradients": 4.0 * learnt / parts,
        "AdamW": 8.0 * learnt / parts,
        **_of_batch(model, batch),
    }
    if parts > 1:
        memory["put together"] = _put_together(model, shard)
    elif model.full and model.width == 2:
        memory["autocast copies"] = 2.0 * model.language.parameters
    return memory


def host_memory(model: ModelSizes, *, shard: Sharding) -> dict[str, float]:
    """Bytes of main memory, by what needs them: of each process, and of the first one alone."""
    learnt = sum(model.trained.values())
    language = model.language.parameters * (4 if model.full else model.width)
    whole = language + _frozen_encoder(model) + 4.0 * (learnt - model.full * language / 4)
    loading = whole if shard != "none" else 0.0
    # A checkpoint has the moments at once; at the end stand the weights, and a model to save.
    saving = max(8.0 * learnt, 4.0 * learnt + loading)
    return {"each while it loads": loading, "the first while it saves": saving}


def largest_batch(model: ModelSizes, card: int, *, shard: Sharding, processes: int) -> int:
    """Largest of the config's samples at a time, halved as often as needed, that a card holds.

    Args:
        model: Model and config of the run.
        card: Memory of the card, in gigabytes.
        shard: What is split.
        processes: Number of processes that share what is split.

    Returns:
        Number of samples, or 0 where not even one fits.
    """
    batch = model.config.optimizing.device_batch_size
    while batch:
        memory = process_memory(model, shard=shard, processes=processes, batch=batch)
        if sum(memory.values()) <= SHARE * card * 1e9:
            return batch
        batch //= 2
    return 0


def least_processes(model: ModelSizes, card: int, *, shard: Sharding) -> int | None:
    """Least power of two of processes, up to 64, whose cards hold a sample; None is no number."""
    count = 1
    while count <= _MOST_PROCESSES:
        if largest_batch(model, card, shard=shard if count > 1 else "none", processes=count):
            return count
        count *= 2
    return None


def what_fits(model: ModelSizes, processes: int) -> dict[int, dict[str, int | None]]:
    """For each card: samples at a time by what is split, and the least number of processes.

    Args:
        model: Model and config of the run.
        processes: Number of processes that share what is split.

    Returns:
        By the card's gigabytes: `largest_batch` under "none", "zero2" and "zero3", and
        `least_processes` with ZeRO-3 under "processes".
    """
    kinds: tuple[Sharding, ...] = get_args(Sharding)
    return {
        card: {
            **{k: largest_batch(model, card, shard=k, processes=processes) for k in kinds},
            "processes": least_processes(model, card, shard="zero3"),
        }
        for card in CARDS
    }


def _frozen_encoder(model: ModelSizes) -> float:
    """Bytes of the encoder's frozen parts; a CLIP of which a part trains is in float32."""
    trained = model.encoder.trained
    return float(
        sum(
            (size - trained.get(name, 0)) * (4 if name in trained else model.width)
            for name, size in model.encoder.parameters.items()
        )
    )


def _frozen_language(model: ModelSizes) -> float:
    return 0.0 if model.full else float(model.language.parameters * model.width)


def _put_together(model: ModelSizes, shard: Sharding) -> float:
    """Bytes of what a step holds whole, for a while: weights, and gradients before they are shared.

    Layers are whole in the precision of the computation: two of them, one that computes and one
    that is fetched meanwhile, or all. What lies outside the layers is whole during the step, in the
    precision that it is kept in.
    """
    language, width = model.language, model.width
    lora = model.trained.get("language model LoRA", 0)
    outside = sum(size for name, size in model.trained.items() if "language model" not in name)
    of_layers = float(language.in_layers + lora)
    largest = float(language.largest_layer + (lora / language.layers if lora else 0))
    weights = width * (2 * largest if shard == "zero3" else of_layers)
    rest = language.parameters - language.in_layers
    weights += rest * (4 if model.full else width) + 4 * outside
    learnt = largest if model.full else largest - language.largest_layer
    return weights + 4 * (2 * learnt + (rest if model.full else 0) + outside)


def _of_batch(model: ModelSizes, batch: int) -> dict[str, float]:
    """Bytes that grow with the samples that a process takes at a time."""
    language, width = model.language, model.width
    tokens = batch * model.longest
    layer = tokens * language.width * _LAYER_ACTIVATIONS * width / 2
    kept = tokens * language.width * width * language.layers
    again = model.config.optimizing.gradient_checkpointing
    at_once = min(batch, model.config.model.image_batch_size or batch)
    return {
        "activations": float(kept + layer if again else layer * language.layers),
        "logits": float(tokens * language.vocabulary * (2 * width + 4)),
        # The VAE's first level: 128 channels at full size, of which it holds about four tensors.
        "encoding": float(at_once * model.encoder.pixels * 128 * 4 * width),
    }
