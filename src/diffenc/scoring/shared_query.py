"""Approximate scores: queries of one pass per picture and noise meet the keys of every text."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffenc.denoiser.attention import cross_attentions, match_layers
from diffenc.denoiser.attention_scores import Pooling, crossed_scores
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.memory.cache import Entry, TensorCache, recall
from diffenc.models.base import Backbone
from diffenc.passes.encoded import prompts_of
from diffenc.scoring.batches import check_scores, in_batches
from diffenc.scoring.denoiser_reads import read_late_queries
from diffenc.scoring.encoded_call import EncodedCall, pooling_of

Step = tuple[int, int]
Place = tuple[int, int]
"""Index of a picture, and index of a step."""

_TEXTS_AT_ONCE = 64


def shared_query_scores(
    encoded: EncodedCall,
    chosen: Bool[Tensor, "pictures texts"],
    steps: Sequence[Step],
    mix: Float[Tensor, "layers out"],
    *,
    memory: TensorCache,
) -> Float[Tensor, "pictures texts steps out"]:
    """Score distinct pictures under distinct texts with one pass per picture and step.

    The queries come from a pass under the generic prompt, so that a text changes the keys alone:
    what it does to the picture's own features in earlier layers is left out. The same holds for
    SDXL's pooled text, which stays the generic prompt's.

    Args:
        encoded: Pictures and texts.
        chosen: Mask of the pairs that are scored.
        steps: Steps, each a (timestep, draw).
        mix: Weights with which the scores of the layers are multiplied.
        memory: Cache of queries that were read before.

    Returns:
        Scores in float32 on the CPU; NaN for pairs that are not wanted.

    Raises:
        NonFiniteError: NaN or infinity came out of the U-Net.
    """
    config, backbone = encoded.config, encoded.backbone
    empty = encoded.texts.index(None) if config.include_uncond else None
    needed = chosen.clone()
    if empty is not None:
        needed[:, empty] |= chosen.any(dim=1)
    scores = torch.full(
        (*chosen.shape, len(steps), mix.shape[1]), torch.nan, dtype=torch.float32, device="cpu"
    )
    places = [(p, s) for p in range(len(chosen)) for s in range(len(steps)) if chosen[p].any()]
    attentions = chosen_attentions(backbone, config.layers)

    def run(part: Sequence[Place]) -> None:
        queries = late_queries(encoded, part, steps, memory)
        rows = score_queries(
            backbone,
            queries,
            attentions,
            encoded.embeds,
            pooling_of(config),
            mix,
            mask=encoded.mask,
            chosen=torch.stack([needed[picture] for picture, _ in part]),
        )
        for (picture, step), row in zip(part, rows, strict=True):
            scores[picture, :, step] = row

    for _ in in_batches(places, config.batch_size, run):
        pass
    if empty is not None:
        scores = (scores + scores[:, empty, None]) / 2
    check_scores(scores[chosen], backbone)
    return scores.masked_fill(~chosen[:, :, None, None], torch.nan)


def chosen_attentions(backbone: Backbone, layers: str | Sequence[str]) -> dict[str, Any]:
    """Cross-attentions of a config's `layers`, by name, in the order in which they run."""
    known = cross_attentions(backbone.denoiser)
    return {name: known[name] for name in match_layers(backbone.denoiser, layers)}


def late_queries(
    encoded: EncodedCall, places: Sequence[Place], steps: Sequence[Step], memory: TensorCache
) -> list[tuple[Float[Tensor, "_n _c"], ...]]:
    """Queries of each layer, for each place, under the generic prompt.

    Args:
        encoded: Pictures.
        places: Places to read: indices of pictures and steps.
        steps: Steps, each a (timestep, draw).
        memory: Cache of queries that were read before.
    """
    config, backbone = encoded.config, encoded.backbone
    attentions = chosen_attentions(backbone, config.layers)
    keys: list[Hashable] | None = None
    if encoded.memory_key is not None and encoded.picture_keys is not None:
        common = (*encoded.memory_key, "queries", tuple(attentions), config.query_prompt)
        keys = [(common, encoded.seed, encoded.picture_keys[p], steps[s]) for p, s in places]

    def read(missing: list[int]) -> list[Entry]:
        rows = [(places[index][0], steps[places[index][1]]) for index in missing]
        queries = read_late_queries(
            backbone,
            encoded.noisy_latents(rows),
            torch.tensor([step for _, (step, _) in rows], dtype=torch.long, device="cpu"),
            _query_prompt(encoded),
            attentions,
        )
        return list(zip(*queries.values(), strict=True))

    return recall(None if keys is None else memory, keys or places, read)


def _query_prompt(encoded: EncodedCall) -> PromptEmbeds:
    # The empty text is encoded here: SDXL's zeros would give queries of no text at all.
    return prompts_of(
        encoded.backbone,
        [encoded.config.query_prompt],
        size=encoded.size,
        uncond="empty",
        use_cache=encoded.memory_key is not None,
        states=encoded.states,
    )


def score_queries(
    backbone: Backbone,
    queries: Sequence[Sequence[Float[Tensor, "_n _c"]]],
    attentions: Mapping[str, Any],
    embeds: PromptEmbeds,
    pooling: Pooling,
    mix: Float[Tensor, "layers out"],
    *,
    mask: Bool[Tensor, "texts l"] | None,
    chosen: Bool[Tensor, "rows texts"],
) -> Float[Tensor, "rows texts out"]:
    """Score queries under texts, whose keys are projected here.

    Args:
        backbone: Model on whose device and in whose dtype the scores are computed.
        queries: Queries of each row, one entry per layer.
        attentions: Cross-attentions, in the order of the queries.
        embeds: Embeddings of the texts.
        pooling: Way in which the products of queries and keys are pooled.
        mix: Weights with which the scores of the layers are multiplied.
        mask: Mask of the tokens that count, per text; None counts all.
        chosen: Mask of the pairs that are scored; the others stay NaN.
    """
    device, dtype = backbone.device, backbone.dtype
    scores = torch.zeros(*chosen.shape, mix.shape[1], dtype=torch.float32, device="cpu")
    for start in range(0, chosen.shape[1], _TEXTS_AT_ONCE):
        stop = min(start + _TEXTS_AT_ONCE, chosen.shape[1])
        texts = torch.arange(start, stop, dtype=torch.long, device="cpu")
        part = embeds.select(start, start + len(texts)).to(device, dtype)
        present = part.own_states()
        with torch.no_grad():
            states = backbone.attended_states(part.prompt_embeds)
        counted = None if mask is None else mask[texts, : states.shape[1]]
        for layer, attn in enumerate(attentions.values()):
            with torch.no_grad():
                keys = attn.to_k(states)
                if (norm := getattr(attn, "norm_k", None)) is not None:
                    keys = norm(keys)
            for row, per_layer in enumerate(queries):
                kept = chosen[row, texts].nonzero().flatten()
                if not len(kept):
                    continue
                values = crossed_scores(
                    per_layer[layer][None].to(device),
                    keys if len(kept) == len(texts) else keys[kept.to(device)],
                    pooling,
                    heads=attn.heads,
                    scale=attn.scale,
                    mask=_rows(counted, kept),
                    present=_rows(present, kept),
                )
                scores[row, texts[kept]] += values[0].cpu()[:, None] * mix[layer]
    return scores.masked_fill(~chosen[..., None], torch.nan)


def _rows(mask: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if mask is None else mask[rows.to(mask.device)]
