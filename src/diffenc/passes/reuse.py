"""Outputs of the denoiser's first modules, computed once for all rows that have them in common."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffenc._typing import Reused
from diffenc.denoiser.blank_texts import skipping_blank_texts
from diffenc.denoiser.replay import (
    Outputs,
    down_path,
    output_counts,
    record,
    replayed,
    text_free_prefix,
)
from diffenc.errors import ConfigError
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.memory.cache import Entry, TensorCache, recall
from diffenc.models.base import Backbone
from diffenc.models.reached_layers import reached_projections
from diffenc.models.taps import LATENTS


@dataclass(frozen=True, slots=True)
class Reuse:
    """What some rows of a call have in common with each other, and with rows of calls before.

    Attributes:
        paths: Modules whose outputs are reused, in the order in which they run.
        keys: Key of each row, made of everything that the outputs depend on: rows with equal keys
            have equal outputs.
        cache: Cache that the outputs are looked up in and kept in; None keeps nothing beyond a
            call of the denoiser.
        texts: Texts under which the modules run, one per row; None takes the rows' own, which do
            not change the outputs.
    """

    paths: tuple[str, ...]
    keys: Sequence[Hashable]
    cache: TensorCache | None
    texts: PromptEmbeds | None = None

    def select(self, start: int, stop: int) -> "Reuse":
        """Rows `start` to `stop`."""
        texts = None if self.texts is None else self.texts.select(start, stop)
        return replace(self, keys=self.keys[start:stop], texts=texts)

    def check_trainable(self) -> None:
        """Raise a `ConfigError` where a gradient would lack a part."""
        if self.texts is not None:
            raise ConfigError(
                "reuse runs a part of the U-Net without the text and without a graph, so that "
                "nothing in it could be trained; train without reuse, or read features under "
                "torch.no_grad()"
            )

    def denoiser(
        self,
        backbone: Backbone,
        noisy_latents: Float[Tensor, "rows c h w"],
        timesteps: Int[Tensor, " rows"],
        prompt_embeds: PromptEmbeds,
    ) -> torch.nn.Module:
        """The denoiser with these outputs in place, for a call with these rows.

        Args:
            backbone: Model whose denoiser is called, for what is not known.
            noisy_latents: Noisy latents, one per row.
            timesteps: Scheduler steps, one per row.
            prompt_embeds: Encoded texts, one per row.
        """
        texts = prompt_embeds if self.texts is None else self.texts
        counts = output_counts(backbone.denoiser, self.paths)

        def compute(rows: list[int]) -> Iterator[Entry]:
            of_rows = texts.take(rows)
            whole = skipping_blank_texts(backbone.denoiser, of_rows.prompt_embeds)
            inputs = (noisy_latents[rows], timesteps[rows], of_rows)
            outputs = record(whole, self.paths, partial(backbone.denoise, *inputs, run=whole))
            yield from zip(*(each for path in self.paths for each in outputs[path]), strict=True)

        # A cache without room still computes rows with equal keys once.
        cache = TensorCache(0) if self.cache is None else self.cache
        entries = recall(cache, [(self.paths, key) for key in self.keys], compute)
        parts = iter([torch.stack(rows) for rows in zip(*entries, strict=True)])
        outputs: Outputs = {
            path: tuple(next(parts) for _ in range(count))
            for path, count in zip(self.paths, counts, strict=True)
        }
        return replayed(backbone.denoiser, outputs)


def check_reuse(
    backbone: Backbone, reuse: Reused | None, taps: Sequence[str], layers: Sequence[str] = ()
) -> None:
    """Raise a `ConfigError` where what is read does not change with the text under `reuse`.

    Args:
        backbone: Model.
        reuse: Part of the U-Net that runs without the text, see `EncoderConfig`.
        taps: Names of the taps: module paths of the U-Net, or "latents".
        layers: Module paths of cross-attentions whose maps are read.
    """
    if reuse is None:
        return
    if backbone.is_transformer:
        raise _no_first_half(backbone, reuse)
    first = ("conv_in", "down_blocks", *(["mid_block"] if reuse == "middle" else []))

    def is_early(path: str) -> bool:
        return path.partition(".")[0] in first

    def hears(tap: str) -> bool:
        """Whether a cross-attention behind the part has a say in a tap."""
        config = dict(backbone.denoiser.config)
        return any(
            path.endswith(".to_v") and not is_early(path)
            for path in reached_projections(config, [tap])
        )

    early = [layer for layer in layers if is_early(layer)]
    early += [tap for tap in taps if tap != LATENTS and (is_early(tap) or not hears(tap))]
    if early:
        raise ConfigError(
            f"no text reaches {early[0]!r} where reuse={reuse!r} runs everything before the "
            f"{'decoder' if reuse == 'middle' else 'middle'} without it; read places behind a "
            "later cross-attention, such as 'up_blocks.1', or leave reuse out"
        )


def without_text(
    backbone: Backbone,
    reuse: Reused,
    keys: Sequence[Hashable],
    cache: TensorCache | None,
    texts: PromptEmbeds,
) -> Reuse:
    """Reuse of the U-Net's first half as it runs without a text: approximate.

    Args:
        backbone: Model.
        reuse: Part of the U-Net that runs without the text, see `EncoderConfig`.
        keys: Key of each row, as for `prefix_of`, with the rule of the unconditional text.
        cache: Cache of outputs; None keeps nothing.
        texts: Unconditional texts, one per row.

    Raises:
        ConfigError: The denoiser has no such part, or it cannot be left out.
    """
    paths = down_path(backbone.denoiser, middle=reuse == "middle")
    if not paths:
        raise _no_first_half(backbone, reuse)
    return Reuse(paths, keys, cache, texts)


def _no_first_half(backbone: Backbone, reuse: Reused) -> ConfigError:
    return ConfigError(
        f"reuse={reuse!r} needs a U-Net of diffusers with its usual blocks, which is neither "
        f"offloaded nor compiled in place; the denoiser of {backbone.name!r} is a "
        f"{type(backbone.denoiser).__name__}: leave reuse out"
    )


def prefix_of(
    backbone: Backbone,
    keys: Sequence[Hashable],
    cache: TensorCache | None,
    *,
    read: Sequence[str] = (),
) -> Reuse | None:
    """Reuse of everything that runs before a text comes in: exact.

    Args:
        backbone: Model.
        keys: Key of each row's noisy latents and timestep, and of the model's state where results
            are kept.
        cache: Cache of outputs; None keeps nothing.
        read: Module paths that are read; None of them may lie in a module that does not run.

    Returns:
        None where there is nothing to reuse: only one use of everything, or no such modules.
    """
    if cache is None and len(set(keys)) == len(keys):
        return None
    paths = text_free_prefix(backbone.denoiser)
    if not paths or any(name.startswith(f"{path}.") for name in read for path in paths):
        return None
    return Reuse(paths, keys, cache)
