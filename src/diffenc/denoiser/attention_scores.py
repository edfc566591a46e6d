"""One number per layer from cross-attention, read while a U-Net runs; no map is kept."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diffenc.denoiser.attention import PairedOutputs, check_read, keep_present, last_projections
from diffenc.denoiser.hooks import AllTapsRead
from diffenc.errors import ConfigError
from diffenc.runtime.threads import for_this_thread

_CHUNK = {"cpu": 2**18, "other": 2**26}
"""Largest number of products q·k held at a time, on a CPU (1 MB, which fits in a core's cache) and
on other devices (256 MB)."""


@dataclass(frozen=True, slots=True)
class Pooling:
    """How the products q·k of a layer become one number per row; see `ScorerConfig`.

    Attributes:
        space: Values that are pooled: "logits" or "probs".
        axis: Axis that the log-sum-exp runs over: "tokens", "pixels" or "both".
        lse_lambda: Factor λ in (1/λ) log Σ exp(λ a).
        head_reduce: Reduction over heads: "mean" or "max".
    """

    space: str = "logits"
    axis: str = "tokens"
    lse_lambda: float = 1.0
    head_reduce: str = "mean"

    def __call__(
        self,
        logits: Float[Tensor, "*rows heads n l"],
        mask: Bool[Tensor, "*rows l"] | None = None,
        present: Bool[Tensor, "*rows l"] | None = None,
    ) -> Float[Tensor, "*rows"]:
        """Pool.

        Args:
            logits: Scaled products of `n` cells with `l` tokens, in float32.
            mask: Mask of the tokens that count; None counts all.
            present: Mask of the tokens that the U-Net sees; None is all.

        Source:
            He et al. 2023 (Discffusion), arXiv:2305.10722, released code: log-sum-exp over tokens
            of logits, then the mean over heads and cells.
        """
        if present is not None:
            logits = logits.masked_fill(~present[..., None, None, :], -torch.inf)
            mask = present if mask is None else mask & present
        values = logits.softmax(dim=-1) if self.space == "probs" else logits
        if self.lse_lambda != 1:
            values = values * self.lse_lambda
        if mask is not None:
            values = values.masked_fill(~mask[..., None, None, :], -torch.inf)
        if self.axis == "tokens":
            per_head = values.logsumexp(dim=-1).mean(dim=-1)
        elif self.axis == "both":
            per_head = values.logsumexp(dim=(-2, -1))
        else:
            per_head = _masked_mean(values.logsumexp(dim=-2), mask)
        per_row = per_head.mean(dim=-1) if self.head_reduce == "mean" else per_head.amax(dim=-1)
        return per_row / self.lse_lambda


def _masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean(dim=-1)
    kept = mask[..., None, :]
    return values.masked_fill(~kept, 0).sum(dim=-1) / kept.sum(dim=-1)


def pooled_scores(
    query: Float[Tensor, "b n qc"],
    key: Float[Tensor, "b l kc"],
    pooling: Pooling,
    *,
    heads: int,
    scale: float,
    mask: Bool[Tensor, "b l"] | None = None,
    present: Bool[Tensor, "b l"] | None = None,
) -> Float[Tensor, " b"]:
    """Score row i of the queries with row i of the keys, in float32.

    Args:
        query: Queries: projected image cells, heads side by side.
        key: Keys: projected tokens, heads side by side.
        pooling: Way in which the products of queries and keys are pooled.
        heads: Number of heads.
        scale: Factor by which the products of queries and keys are multiplied.
        mask: Mask of the tokens that count; None counts all.
        present: Mask of the tokens that the U-Net sees; None is all.
    """
    rows = _rows_at_once(heads * query.shape[1] * key.shape[1], query.device)
    scores = []
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, len(query), rows):
            part = slice(start, start + rows)
            queries = rearrange(
                query[part].float() * scale, "b n (heads d) -> b heads n d", heads=heads
            )
            keys = rearrange(key[part].float(), "b l (heads d) -> b heads d l", heads=heads)
            scores.append(pooling(queries @ keys, _part(mask, part), _part(present, part)))
    return torch.cat(scores)


def crossed_scores(
    query: Float[Tensor, "images n qc"],
    key: Float[Tensor, "texts l kc"],
    pooling: Pooling,
    *,
    heads: int,
    scale: float,
    mask: Bool[Tensor, "texts l"] | None = None,
    present: Bool[Tensor, "texts l"] | None = None,
) -> Float[Tensor, "images texts"]:
    """Score every row of the queries with every row of the keys; else as `pooled_scores`."""
    texts, tokens = key.shape[:2]
    at_once = _rows_at_once(heads * query.shape[1] * tokens, query.device)
    scores = torch.empty(len(query), texts, dtype=torch.float32, device=query.device)
    with torch.autocast(query.device.type, enabled=False):
        for image, cells in enumerate(query):
            queries = rearrange(cells.float() * scale, "n (heads d) -> heads n d", heads=heads)
            queries = queries.contiguous()
            for start in range(0, texts, at_once):
                part = slice(start, start + at_once)
                keys = rearrange(key[part].float(), "m l (heads d) -> heads d (m l)", heads=heads)
                logits = rearrange(queries @ keys, "heads n (m l) -> m heads n l", l=tokens)
                scores[image, part] = pooling(logits, _part(mask, part), _part(present, part))
    return scores


def _part(mask: Tensor | None, part: slice) -> Tensor | None:
    return None if mask is None else mask[part]


def _rows_at_once(products_per_row: int, device: torch.device) -> int:
    limit = _CHUNK.get(device.type, _CHUNK["other"])
    return max(1, limit // products_per_row)


def read_scores(
    attentions: Mapping[str, Any],
    pooling: Pooling,
    call: Callable[[], Any],
    *,
    mask: Bool[Tensor, "b l"] | None = None,
    early_exit: bool,
) -> Float[Tensor, "b layers"]:
    """Score each row of a U-Net call by its own attention.

    Queries and keys are read in hooks on `attn2.to_q` and `attn2.to_k`: the forward pass keeps its
    own attention, its output stays bit-identical. A layer's products live no longer than the layer.
    Tokens that the U-Net is told to ignore do not count.

    Args:
        attentions: Cross-attentions to read, some of `cross_attentions`.
        pooling: Way in which the products of queries and keys are pooled.
        call: Function that runs the U-Net.
        mask: Mask of the tokens that count, per row; None counts all.
        early_exit: Whether the pass ends when every layer has been read.

    Raises:
        TapError: A layer did not run.
    """
    projected = PairedOutputs()
    present: dict[str, Tensor | None] = {}
    scores: dict[str, Tensor] = {}

    def reader(name: str, attn: Any) -> Callable[[Tensor, Tensor], None]:
        def read(query: Tensor, key: Tensor) -> None:
            scores[name] = pooled_scores(
                query,
                key,
                pooling,
                heads=attn.heads,
                scale=attn.scale,
                mask=mask,
                present=present[name],
            )
            if early_exit and len(scores) == len(attentions):
                raise AllTapsRead

        return read

    with ExitStack() as stack:
        for name, attn in attentions.items():
            stack.callback(keep_present(attn, present, name).remove)
            for part, module in last_projections(attn).items():
                hook = projected.hook(name, part, reader(name, attn))
                stack.callback(module.register_forward_hook(hook).remove)
        with suppress(AllTapsRead):
            call()
    check_read(attentions, scores)
    return torch.stack([scores[name] for name in attentions], dim=1)


def read_queries(
    attentions: Mapping[str, Any], call: Callable[[], Any]
) -> dict[str, Float[Tensor, "b _n _c"]]:
    """Projected image cells of some layers; the pass ends when every layer has been read.

    Args:
        attentions: Cross-attentions to read, some of `cross_attentions`.
        call: Function that runs the U-Net.

    Raises:
        TapError: A layer did not run.
    """
    queries: dict[str, Tensor] = {}

    def stop(*_: Any) -> None:
        if len(queries) == len(attentions):
            raise AllTapsRead

    with ExitStack() as stack:
        for name, attn in attentions.items():
            last = last_projections(attn)["query"]
            stack.callback(last.register_forward_hook(_keeper(queries, name)).remove)
            stack.callback(last.register_forward_hook(for_this_thread(stop)).remove)
        with suppress(AllTapsRead):
            call()
    check_read(attentions, queries)
    return {name: queries[name] for name in attentions}


def _keeper(kept: dict[str, Tensor], name: str) -> Callable[..., None]:
    def keep(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        kept[name] = output

    return for_this_thread(keep)


def layer_mix(weights: Sequence[float] | None, layers: int) -> Float[Tensor, "layers 1"]:
    """What layers are multiplied by and added up with: shares of 1, equal ones without weights.

    Raises:
        ConfigError: Another number of weights than layers.
    """
    if weights is not None and len(weights) != layers:
        raise ConfigError(
            f"layer_weights must hold one weight per layer: got {len(weights)} for {layers} layers"
        )
    shares = torch.tensor(weights or [1.0] * layers, dtype=torch.float64, device="cpu")
    return (shares / shares.sum()).float()[:, None]
