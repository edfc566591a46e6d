"""The only place that calls the U-Net."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from diffenc.checks.arguments import wholes
from diffenc.denoiser.attention import CrossAttnTaps
from diffenc.denoiser.blank_texts import skipping_blank_texts
from diffenc.denoiser.hooks import ForwardTaps, TapOutputs
from diffenc.denoiser.joint_attention import JointAttnTaps
from diffenc.denoiser.shortening import shortened
from diffenc.denoiser.transformers import layout_of
from diffenc.errors import ConfigError, NonFiniteError, TapError
from diffenc.inputs.noise import to_noise
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.memory.model_state import structure_key
from diffenc.models.base import Backbone, CompiledTaps, States
from diffenc.passes.reuse import Reuse
from diffenc.runtime.inference import make_plain


@dataclass(frozen=True, slots=True)
class AttentionRead:
    """Cross-attention that is read in the pass that gives the features.

    Attributes:
        layers: Module paths of the cross-attentions.
        positions: Positions of the tokens in the text, in ascending order; the start token is 0.
    """

    layers: tuple[str, ...]
    positions: tuple[int, ...]


def read_taps(
    backbone: Backbone,
    noisy_latents: Float[Tensor, "rows c h w"],
    timesteps: Int[Tensor, " rows"],
    prompt_embeds: PromptEmbeds,
    taps: Sequence[str],
    *,
    batch_size: int | None = None,
    compiled: Callable[..., tuple[Tensor, ...]] | None = None,
    attention: AttentionRead | None = None,
    reuse: Reuse | None = None,
    packed: Sequence[str] = (),
) -> dict[str, Float[Tensor, "rows _c _h _w"]]:
    """Read features of rows, each with latents, a noise level and a text of its own.

    One call of the U-Net for all rows, or several of at most `batch_size`, and of texts of one
    length where picture and text are joined; each ends after the last tap. On CUDA a call that runs
    out of memory is repeated in halves, with one warning. A graph is built only where something
    inside, or the latents, or the text, requires a gradient.

    Args:
        backbone: Model whose U-Net is called, in its dtype and on its device.
        noisy_latents: Noisy latents, each at the noise level of its timestep.
        timesteps: Scheduler steps, one per row.
        prompt_embeds: Encoded texts, one row per row of latents.
        taps: Module paths of the U-Net.
        batch_size: Largest number of rows per call; None is all at once.
        compiled: Compiled U-Net that `compiled_taps` returned; None looks whether there is one.
        attention: Cross-attention that is read in the same calls, which are then not compiled and
            end after the last of both; None reads none.
        reuse: Outputs that rows have in common, which are not computed for each; exact ones are
            left out where a graph is built, and by compiled code. None computes everything.
        packed: Taps that are adaptive norms and give their inputs, see
            `diffenc.denoiser.adaptive_norm.pack_input`; compiled code gives none.

    Returns:
        One map per tap, in the order of `taps`; behind them, under `attention_key`, one per
        cross-attention, with tokens in place of channels: mean over heads, in float32, and zeros
        for positions behind the end of a text.

    Raises:
        NonFiniteError: A map holds NaN or infinity.
        ConfigError: A gradient is asked for through outputs of a pass without the text.
    """
    grad = torch.is_grad_enabled() and (
        noisy_latents.requires_grad
        or prompt_embeds.requires_grad
        or any(parameter.requires_grad for parameter in backbone.denoiser.parameters())
    )
    if grad and reuse is not None:
        reuse.check_trainable()
        reuse = None
    if grad:
        make_plain(backbone.denoiser)  # moved in inference mode, weights could not be saved for it
    rows = len(noisy_latents)
    size = min(batch_size or rows, rows)
    if attention is not None or packed:
        compiled = None
    elif compiled is None:
        compiled = compiled_taps(backbone, taps)
    readings: list[dict[str, Tensor]] = []
    lengths = prompt_embeds.row_lengths()
    start = 0
    with torch.set_grad_enabled(grad), backbone.lock:
        while start < rows:
            stop = min(start + size, rows)
            if backbone.joins_text:  # which masks no padding
                stop = start + _alike(lengths[start:stop])
            try:
                part = slice(start, stop)
                readings.append(
                    _read(
                        backbone,
                        noisy_latents[part],
                        timesteps[part],
                        prompt_embeds.select(start, stop),
                        taps,
                        compiled,
                        attention,
                        None if reuse is None else reuse.select(start, stop),
                        packed,
                    )
                )
            except torch.cuda.OutOfMemoryError:
                if size == 1:
                    raise
                size = (size + 1) // 2
                torch.cuda.empty_cache()
                continue
            start = stop
    if size < min(batch_size or rows, rows):
        warnings.warn(
            f"{rows} rows did not fit on {backbone.device}; calls of the {backbone.denoiser_word} "
            f"were cut down to {size}. Pass batch_size={size} to begin there.",
            stacklevel=2,
        )
    maps = (
        readings[0]
        if len(readings) == 1
        else {name: torch.cat([m[name] for m in readings]) for name in readings[0]}
    )
    # A U-Net in channels_last gives such maps, which callers could not reshape as they expect.
    maps = {name: features.contiguous() for name, features in maps.items()}
    for name, features in maps.items():
        if not torch.isfinite(features).all():
            raise NonFiniteError(
                f"features at {name!r} hold NaN or infinity in {features.dtype}; load the model "
                "with dtype=torch.bfloat16 or torch.float32, and check its weights if that is so "
                "already"
            )
    return maps


def _alike(lengths: Sequence[int]) -> int:
    """How many texts there are, from the first on, that are as long as the first."""
    return next((row for row, each in enumerate(lengths) if each != lengths[0]), len(lengths))


def compile_taps(backbone: Backbone, taps: Sequence[str], **options: Any) -> None:
    """Compile the U-Net up to the last of these taps; `read_taps` then uses it for them.

    The first call of each shape compiles, and takes minutes for a real model. Weights may change;
    after modules or settings of the U-Net were exchanged, `read_taps` compiles again.

    Args:
        backbone: Model whose U-Net is compiled; the U-Net itself is left as it is.
        taps: Module paths of the U-Net.
        options: Keyword arguments of `torch.compile`.
    """
    with backbone.lock:
        structure = structure_key(backbone.denoiser)
        outputs = TapOutputs(shortened(backbone.denoiser, taps), taps)
        run = torch.compile(outputs, **options)
        backbone.compiled[tuple(taps)] = CompiledTaps(run, options, structure)


def compiled_taps(
    backbone: Backbone, taps: Sequence[str], states: States | None = None
) -> Callable[..., tuple[Tensor, ...]] | None:
    """The compiled U-Net that returns these taps, of the U-Net as it is now; None: not compiled."""
    known = backbone.compiled.get(tuple(taps))
    if known is None:
        return None
    if known.structure != (states or backbone.states()).structure:
        compile_taps(backbone, taps, **known.options)
    return backbone.compiled[tuple(taps)].run


def _read(
    backbone: Backbone,
    noisy_latents: Tensor,
    timesteps: Tensor,
    prompt_embeds: PromptEmbeds,
    taps: Sequence[str],
    compiled: Callable[..., tuple[Tensor, ...]] | None,
    attention: AttentionRead | None,
    reuse: Reuse | None,
    packed: Sequence[str],
) -> dict[str, Tensor]:
    if compiled is not None:
        layout = layout_of(backbone.denoiser)
        if layout is not None and layout.packing > 1:
            h, w = (side // layout.packing for side in noisy_latents.shape[-2:])
            compiled = partial(compiled, grid=(h, w))
        maps = backbone.denoise(noisy_latents, timesteps, prompt_embeds, run=compiled)
        # A compiled graph may give its outputs' memory to its next call.
        return {name: tap.clone() for name, tap in zip(taps, maps, strict=True)}
    rows = (noisy_latents, timesteps, prompt_embeds)
    denoiser = backbone.denoiser if reuse is None else reuse.denoiser(backbone, *rows)
    if attention is None and not torch.is_grad_enabled():
        denoiser = skipping_blank_texts(denoiser, prompt_embeds.prompt_embeds, read=taps)
    call = partial(backbone.denoise, *rows, run=denoiser)
    if attention is None:
        with ForwardTaps(denoiser, taps, early_exit=True, packed=packed) as reader:
            return reader.run(call)
    length, positions = prompt_embeds.prompt_embeds.shape[1], attention.positions
    there = [position for position in positions if position < length]
    # An attention's output, which is let go, says that it has run.
    with (
        CrossAttnTaps(denoiser, attention.layers, tokens=there or [0]) as weights,
        ForwardTaps(denoiser, [*taps, *attention.layers], early_exit=True) as reader,
    ):
        outputs = reader.run(call)
        read = weights.maps()
    features = {name: outputs[name] for name in taps}
    missing = (0, 0, 0, 0, 0, len(positions) - len(there))
    for layer in attention.layers:
        features[attention_key(layer)] = F.pad(read[layer][:, : len(there)], missing)
    return features


def attention_key(layer: str) -> str:
    """Name of a cross-attention's map among those of taps."""
    return f"attention of {layer}"


def predict_noise(
    backbone: Backbone,
    noisy_latents: Float[Tensor, "b c h w"],
    timestep: int,
    prompt_embeds: PromptEmbeds,
) -> Float[Tensor, "b c h w"]:
    """The noise that the U-Net sees in latents under a text, in float32, without guidance.

    Args:
        backbone: Model whose U-Net is called; the output of one that predicts v or the clean
            latents is converted.
        noisy_latents: Noisy latents at the noise level of `timestep`.
        timestep: Scheduler step, 0 (clean) to 999 (pure noise).
        prompt_embeds: Encoded texts: one row for all latents, or one per latent.

    Raises:
        ConfigError: The model predicts something else, or its U-Net was shortened.
    """
    check_whole(backbone)
    with backbone.lock:
        output = backbone.denoise(noisy_latents, timestep, prompt_embeds)[0].float()
    steps = torch.full((len(output),), timestep, dtype=torch.long, device="cpu")
    return to_noise(backbone.scheduler, backbone.prediction_type, output, noisy_latents, steps)


def check_whole(backbone: Backbone) -> None:
    """Raise a `ConfigError` where the U-Net was shortened and predicts nothing."""
    if backbone.shortened:
        raise ConfigError(
            f"the {backbone.denoiser_word} of {backbone.name!r} was truncated after its last tap "
            "and predicts no noise; load the model without truncate"
        )


def read_attention(
    backbone: Backbone,
    noisy_latents: Float[Tensor, "b c h w"],
    timestep: int,
    prompt_embeds: PromptEmbeds,
    positions: Sequence[int],
    layers: Sequence[str] | None = None,
) -> dict[str, Float[Tensor, "b tokens _h _w"]]:
    """Read how much each cell attends to some tokens of a text, with one call of the U-Net.

    Args:
        backbone: Model whose U-Net is called, in its dtype and on its device.
        noisy_latents: Noisy latents at the noise level of `timestep`.
        timestep: Scheduler step, 0 (clean) to 999 (pure noise).
        prompt_embeds: Encoded texts: one row for all latents, or one per latent.
        positions: Positions of the tokens in the text, see
            `diffenc.denoiser.attention.word_token_positions`.
        layers: Module paths of the layers, see `diffenc.denoiser.attention.CrossAttnTaps`.

    Returns:
        For each layer, one probability per cell and token, mean over heads, in float32.

    Raises:
        TapError: No cross-attention by that name.
        ShapeError: A position that the text does not have.
    """
    with (
        backbone.lock,
        torch.no_grad(),
        CrossAttnTaps(backbone.denoiser, layers, tokens=positions) as reader,
    ):
        backbone.denoise(noisy_latents, timestep, prompt_embeds)
        return reader.maps()


def read_head_attention(
    backbone: Backbone,
    noisy_latents: Float[Tensor, "b c h w"],
    timestep: int,
    prompt_embeds: PromptEmbeds,
    positions: Sequence[int],
    layers: Sequence[str],
    heads: Sequence[int] | None = None,
) -> dict[str, Float[Tensor, "b tokens _heads _h _w"]]:
    """Read attention as `read_attention` does, with the heads kept apart.

    Args:
        backbone: Model whose U-Net is called, in its dtype and on its device.
        noisy_latents: Noisy latents at the noise level of `timestep`.
        timestep: Scheduler step, 0 (clean) to 999 (pure noise).
        prompt_embeds: Encoded texts: one row for all latents, or one per latent.
        positions: Positions of the tokens in the text, see
            `diffenc.denoiser.attention.word_token_positions`.
        layers: Module paths of the layers, see `diffenc.denoiser.attention.CrossAttnTaps`.
        heads: Indices of the heads that are returned; None is all.

    Raises:
        TapError: No cross-attention by that name, or it has no such head.
        ShapeError: A position that the text does not have.
    """
    reader: CrossAttnTaps | JointAttnTaps
    if backbone.joins_text:
        reader = JointAttnTaps(backbone.denoiser, layers, tokens=positions)
    else:
        reader = CrossAttnTaps(backbone.denoiser, layers, tokens=positions, merge_heads=False)
    with backbone.lock, torch.no_grad(), reader:
        backbone.denoise(noisy_latents, timestep, prompt_embeds)
        maps = reader.maps()
    if heads is None:
        return maps
    heads = wholes("heads", heads, error=TapError)
    for name, of_layer in maps.items():
        count = of_layer.shape[2]
        if not heads or not all(0 <= head < count for head in heads):
            raise TapError(
                f"{name} has heads 0 to {count - 1}, and {list(heads)} were asked for; name layers "
                "that have them"
            )
    return {name: of_layer[:, :, list(heads)] for name, of_layer in maps.items()}
