"""How much each cell of a picture attends to the text where both are joined in one attention.

Queries and keys are read behind their projections and brought through the model's own norms and
rotary positions once more; the forward pass keeps its own attention, and no processor is replaced.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from diffenc.denoiser.attention import (
    check_read,
    cross_attention_layers,
    head_maps,
    match_paths,
)
from diffenc.denoiser.transformers import TransformerLayout, carried_grid, layout_of, word_for
from diffenc.errors import ShapeError, TapError
from diffenc.runtime.threads import for_this_thread

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of each token's place (l d), the text's first."""


def joint_attentions(denoiser: nn.Module) -> dict[str, Any]:
    """Every attention that joins picture and text, by its module path, in the order of running.

    Raises:
        TapError: The denoiser has none.
    """
    layout = layout_of(denoiser)
    if layout is None or layout.joint_attention is None:
        raise TapError(
            f"the {type(denoiser).__name__} has no attention that joins picture and text; its word "
            "maps are those of cross-attention"
        )
    return {
        f"{blocks}.{index}.{layout.joint_attention}": getattr(block, layout.joint_attention)
        for blocks in layout.blocks
        for index, block in enumerate(getattr(denoiser, blocks))
    }


def adapted_attentions(denoiser: nn.Module) -> tuple[str, ...]:
    """Module paths of the attentions in which a text has its say, in the order of running."""
    layout = layout_of(denoiser)
    joint = layout is not None and layout.cross_attention is None
    return tuple(joint_attentions(denoiser)) if joint else cross_attention_layers(denoiser)


def match_joint_layers(
    denoiser: nn.Module, layers: str | Sequence[str] | None = None
) -> tuple[str, ...]:
    """Module paths of joint attentions, in the order in which they run.

    Args:
        denoiser: Transformer.
        layers: Some of the paths, or of blocks around them; "all" and None are all.

    Raises:
        TapError: No joint attention by that name.
    """
    known = tuple(joint_attentions(denoiser))
    named = None if isinstance(layers, str) and layers == "all" else layers
    chosen = set(match_paths(named, known, word_for(denoiser), "joint attention"))
    return tuple(name for name in known if name in chosen)


class JointAttnTaps:
    """Shares of joint attention that cells give to tokens of the text, while the block is open.

    The softmax runs over all keys, those of the picture and those of the text, its padding
    included, as the model's own does.

    Args:
        denoiser: Transformer whose layout has a joint attention.
        layers: Module paths, see `match_joint_layers`.
        tokens: Positions among the states of the text, for every row of the batch.

    Raises:
        TapError: No joint attention by that name.
        ShapeError: No position, or one below 0.
    """

    def __init__(
        self, denoiser: nn.Module, layers: Sequence[str] | None = None, *, tokens: Sequence[int]
    ) -> None:
        known = joint_attentions(denoiser)
        self._layers = {name: known[name] for name in match_joint_layers(denoiser, layers)}
        if not tokens or min(tokens) < 0:
            raise ShapeError(f"tokens must be one position or more, 0 or above, got {list(tokens)}")
        self._denoiser, self._tokens = denoiser, list(tokens)
        layout = layout_of(denoiser)
        assert layout is not None  # joint_attentions has raised
        self._layout: TransformerLayout = layout
        self._grid = (0, 0)
        self._maps: dict[str, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "JointAttnTaps":
        self._maps.clear()
        with ExitStack() as stack:  # a failure half-way removes what is already registered
            note = for_this_thread(self._note_grid)
            handle = self._denoiser.register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(handle.remove)
            for name, attn in self._layers.items():
                projected: dict[str, Tensor] = {}
                for part in ("to_q", "to_k", "add_k_proj"):
                    if (module := getattr(attn, part, None)) is not None:
                        keep = for_this_thread(_keeper(projected, part))
                        stack.callback(module.register_forward_hook(keep).remove)
                read = for_this_thread(self._reader(name, projected))
                handle = attn.register_forward_hook(read, with_kwargs=True)
                stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def maps(self) -> dict[str, Float[Tensor, "b tokens heads _h _w"]]:
        """Maps of each layer and head, in float32.

        Raises:
            TapError: A layer did not run, or its projections are fused.
        """
        check_read(self._layers, self._maps)
        return {name: self._maps[name] for name in self._layers}

    def _note_grid(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._grid = carried_grid(module, args, kwargs)

    def _reader(self, name: str, projected: dict[str, Tensor]) -> Callable[..., None]:
        def read(
            attn: Any, _args: tuple[Any, ...], kwargs: dict[str, Any], _output: object
        ) -> None:
            if {"to_q", "to_k"} - projected.keys():
                return  # fused: `maps` says so
            h, w = self._grid
            query, keys = _joined(attn, projected, h * w, kwargs.get("image_rotary_emb"))
            projected.clear()
            maps = head_maps(
                query,
                keys,
                self._tokens,
                heads=attn.heads,
                scale=(query.shape[2] // attn.heads) ** -0.5,
            )
            self._maps[name] = rearrange(maps, "b heads (h w) t -> b t heads h w", h=h, w=w)

        return read


def _keeper(projected: dict[str, Tensor], part: str) -> Callable[..., None]:
    def keep(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        projected[part] = output

    return keep


def _joined(
    attn: Any, projected: dict[str, Tensor], cells: int, rotary: Rotary | None
) -> tuple[Float[Tensor, "b cells c"], Float[Tensor, "b l c"]]:
    """Queries of the picture's cells, and keys of the text and, behind them, of the picture.

    Args:
        attn: Joint attention.
        projected: Outputs of its projections by name. Without `add_k_proj` the others hold both
            streams, the text first.
        cells: Number of the picture's tokens.
        rotary: Rotary positions, where the model has them.
    """
    query = by_heads(attn, "norm_q", projected["to_q"])[:, -cells:]
    keys = by_heads(attn, "norm_k", projected["to_k"])
    if "add_k_proj" in projected:
        keys = torch.cat([by_heads(attn, "norm_added_k", projected["add_k_proj"]), keys], dim=1)
    if rotary is not None:
        waves = [each[:, None] for each in rotary]
        query, keys = rotated(query, [each[-cells:] for each in waves]), rotated(keys, waves)
    return query.flatten(2), keys.flatten(2)


def by_heads(attn: Any, norm: str, projected: Tensor) -> Float[Tensor, "b l heads d"]:
    """A projection with its heads apart, behind a norm of the attention where it has that.

    Args:
        attn: Joint attention.
        norm: Name of the norm; "" is none.
        projected: Output of a projection.
    """
    apart = rearrange(projected, "b l (heads d) -> b l heads d", heads=attn.heads)
    module = getattr(attn, norm, None)
    normed: Tensor = apart if module is None else module(apart)
    return normed


def rotated(
    values: Float[Tensor, "b l heads d"], waves: Sequence[Float[Tensor, "l 1 d"]]
) -> Float[Tensor, "b l heads d"]:
    """Rotate pairs of neighbouring channels (Su et al. 2021, arXiv:2104.09864, equation 34)."""
    cosines, sines = (each.to(values.device, torch.float32) for each in waves)
    pairs = rearrange(values.float(), "... (pairs two) -> ... pairs two", two=2)
    crossed = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return values.float() * cosines + crossed * sines
