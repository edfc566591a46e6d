"""Exact scores: one row of the U-Net per picture, text and noise, batched over all three."""

from collections.abc import Hashable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffenc.denoiser.attention import cross_attentions, match_layers
from diffenc.inputs.noise import signal_levels
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.memory.cache import Entry, TensorCache, recall
from diffenc.passes.reuse import Reuse, check_reuse, prefix_of, without_text
from diffenc.scoring.batches import check_scores, in_batches
from diffenc.scoring.denoiser_reads import read_statistics
from diffenc.scoring.encoded_call import EncodedCall, pooling_of

Step = tuple[int, int]
_Row = tuple[int, int, int]  # picture, step, text: neighbours share latents


def exact_scores(
    encoded: EncodedCall,
    chosen: Bool[Tensor, "pictures texts"],
    steps: Sequence[Step],
    mix: Float[Tensor, "layers out"],
    *,
    memory: TensorCache,
) -> Float[Tensor, "pictures texts steps out"]:
    """Score distinct pictures under distinct texts, each with a pass of its own.

    Args:
        encoded: Pictures and texts.
        chosen: Mask of the pairs that are scored; nothing else is computed but the unconditional
            rows that they need.
        steps: Steps, each a (timestep, draw).
        mix: Weights with which the attention parts of the layers are multiplied.
        memory: Cache of rows that were computed before.

    Returns:
        Scores in float32 on the CPU; NaN for pairs that are not chosen.

    Raises:
        NonFiniteError: NaN or infinity came out of the U-Net.
        ConfigError: `reuse` with a layer that no text would reach.
    """
    config = encoded.config
    empty = encoded.texts.index(None) if config.needs_uncond else None
    needed = chosen.clone()
    if empty is not None:
        needed[:, empty] |= chosen.any(dim=1)
    table = _statistics(encoded, needed, steps, memory)
    attention, squared = table[..., :-1], table[..., -1:]
    scores = torch.zeros(*table.shape[:3], mix.shape[1], dtype=torch.float32, device="cpu")
    if config.attention:
        mixed = attention @ mix
        if config.include_uncond:
            mixed = (mixed + mixed[:, empty, None]) / 2
        scores = scores + mixed
    if config.error_term is not None:
        scores = scores + _error_part(encoded, squared, empty, steps)
    return scores.masked_fill(~chosen[:, :, None, None], torch.nan)


def _error_part(
    encoded: EncodedCall, squared: Tensor, empty: int | None, steps: Sequence[Step]
) -> Tensor:
    """Error part of the scores, from sums of squared errors of the noise.

    Source:
        Li et al. 2023 (Diffusion Classifier), arXiv:2303.16203, equation 6. For the gap of norms
        the released codes of He et al. 2023 (Discffusion), arXiv:2305.10722, and of Krojer et al.
        2023 (DiffusionITM), arXiv:2305.16397. For flows that of Self-Bench, arXiv:2505.17955.
    """
    size, term = encoded.posterior[0][0].numel(), encoded.config.error_term
    if term == "mse":
        return -squared / size
    if term in ("l2_flow", "l2_flow_gap"):
        # The noise in x_σ is x_σ + (1 - σ) v: its error is that of the flow v, times 1 - σ.
        levels = signal_levels(encoded.backbone.scheduler)[[step for step, _ in steps]].float()
        norms = squared.sqrt() / levels[:, None]
        return -norms if empty is None else norms[:, empty, None] - norms
    without = squared[:, empty, None]
    if term == "mse_gap":
        return (without - squared) / size
    assert term == "l2_gap", term
    return without.sqrt() - squared.sqrt()


def _statistics(
    encoded: EncodedCall, needed: Tensor, steps: Sequence[Step], memory: TensorCache
) -> Float[Tensor, "pictures texts steps statistics"]:
    """Attention scores per layer and sum of squared errors of each row; NaN where not needed."""
    config = encoded.config
    unet = encoded.backbone.denoiser
    names = match_layers(unet, config.layers) if config.attention else ()
    check_reuse(encoded.backbone, config.reuse, (), names)
    table = _unknown(*needed.shape, len(steps), len(names) + 1)
    rows: list[_Row] = [
        (picture, step, text)
        for picture in range(len(needed))
        for step in range(len(steps))
        for text in needed[picture].nonzero().flatten().tolist()
    ]

    def run(missing: list[int]) -> Iterator[Entry]:
        for _, values in _passes(encoded, [rows[index] for index in missing], steps, names):
            yield from ((value,) for value in values)

    keys = _memory_keys(encoded, rows, steps, names)
    entries = recall(None if keys is None else memory, keys or rows, run)
    for (picture, step, text), (value,) in zip(rows, entries, strict=True):
        table[picture, text, step] = value
    return table


def _reuse(encoded: EncodedCall, places: Sequence[tuple[int, Step]]) -> Reuse | None:
    """What rows of the same picture and noise have in common, or share without their texts."""
    remembered, config = encoded.memory_key is not None, encoded.config
    pictures = encoded.picture_keys if remembered else None
    common = (encoded.memory_key, encoded.seed, config.posterior)
    keys = [(*common, place if pictures is None else pictures[place], step)
            for place, step in places]  # fmt: skip
    cache = encoded.backbone.caches.outputs if pictures else None
    if config.reuse is None or encoded.textless is None:
        return prefix_of(encoded.backbone, keys, cache)
    texts = encoded.textless.rows(len(places))
    return without_text(encoded.backbone, config.reuse, keys, cache, texts)


def _unknown(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan, dtype=torch.float32, device="cpu")


def _memory_keys(
    encoded: EncodedCall, rows: Sequence[_Row], steps: Sequence[Step], names: Sequence[str]
) -> list[Hashable] | None:
    if encoded.memory_key is None or encoded.picture_keys is None:
        return None
    config = encoded.config
    predicts = config.error_term is not None
    kind = (pooling_of(config), config.token_mask, config.reuse)
    common = (*encoded.memory_key, names, *kind, predicts)
    return [
        (
            common,
            encoded.seed,
            encoded.picture_keys[picture],
            encoded.texts[text],
            steps[step],
        )
        for picture, step, text in rows
    ]


def _passes(
    encoded: EncodedCall, rows: Sequence[_Row], steps: Sequence[Step], names: Sequence[str]
) -> Iterator[tuple[Sequence[_Row], Float[Tensor, "rows statistics"]]]:
    """Run the U-Net on rows, `batch_size` at a time."""
    config, backbone = encoded.config, encoded.backbone
    known = cross_attentions(backbone.denoiser) if names else {}
    attentions = {name: known[name] for name in names}
    predicts = config.error_term is not None

    def run(part: Sequence[_Row]) -> Tensor:
        texts = [text for _, _, text in part]
        embeds = PromptEmbeds.concat([encoded.embeds.select(text, text + 1) for text in texts])
        length = embeds.prompt_embeds.shape[1]
        attention, predicted = read_statistics(
            backbone,
            encoded.noisy_latents([(picture, steps[step]) for picture, step, _ in part]),
            torch.tensor([steps[step][0] for _, step, _ in part], dtype=torch.long, device="cpu"),
            embeds,
            attentions,
            pooling_of(config),
            mask=None if encoded.mask is None else encoded.mask[texts, :length],
            predict=predicts,
            reuse=_reuse(encoded, [(picture, steps[step]) for picture, step, _ in part]),
        )
        columns = _unknown(len(part), len(names) + 1)
        if attention is not None:
            columns[:, :-1] = attention.cpu()
        if predicted is not None:
            noise = torch.stack([encoded.noise(steps[step]) for _, step, _ in part])
            error = predicted - noise.to(predicted)
            columns[:, -1] = error.square().sum(dim=(1, 2, 3)).cpu()
        check_scores(columns if predicts else columns[:, :-1], backbone)
        return columns

    return in_batches(rows, config.batch_size, run)
