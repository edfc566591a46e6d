"""Where a concept is seen: concepts that ride along with a picture's pass (Helbling et al. 2025).

A concept is a text of one token. It runs through the text's side of every block, attends to the
concepts and to the picture's cells, and no token of the pass attends to it: the pass stays the
model's own, bit for bit. Keys, values and outputs of the picture are read by hooks.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from diffenc.denoiser.attention import check_read
from diffenc.denoiser.hooks import AllTapsRead
from diffenc.denoiser.joint_attention import (
    Rotary,
    by_heads,
    joint_attentions,
    match_joint_layers,
    rotated,
)
from diffenc.denoiser.transformers import carried_grid
from diffenc.errors import TapError
from diffenc.runtime.threads import for_this_thread

_READ = ("to_q", "to_k", "to_v")


@dataclass(frozen=True, slots=True)
class Concepts:
    """Concepts as a family of models reads them.

    Attributes:
        states: Text state of each concept, as the text encoder gives it.
        ahead: Number of states before the first concept, which attend and get no map.
        pooled: Whether the pooled text of the pass modulates the concepts too; otherwise zeros
            stand for it.
        unit: Whether a concept's output is brought to length 1 before it is compared.
        cells_see: Whether the outputs of cells that concepts are compared with come from one more
            attention, to the picture and the concepts; otherwise they are those of the pass.
    """

    states: Float[Tensor, "states c"]
    ahead: int = 0
    pooled: bool = True
    unit: bool = False
    cells_see: bool = False


def concept_layers(denoiser: nn.Module, layers: str | Sequence[str] | None) -> tuple[str, ...]:
    """Module paths of joint attentions whose text has weights of its own, in the order of running.

    Args:
        denoiser: Transformer.
        layers: Some of the paths, or of blocks around them; "all" and None are all.

    Raises:
        TapError: No such attention, or one that text and picture share the weights of.
    """
    known = joint_attentions(denoiser)
    own = [name for name, attn in known.items() if _projection(attn) is not None]
    if layers is None or layers == "all":
        return tuple(own)
    chosen = match_joint_layers(denoiser, layers)
    if shared := [name for name in chosen if name not in own]:
        raise TapError(
            f"concepts run through blocks whose text has weights of its own, and {shared[0]!r} is "
            f"in none; take layers of {own[0]!r} to {own[-1]!r}"
        )
    return chosen


class ConceptTaps:
    """How well the attention outputs of cells and of concepts agree, while the block is open.

    `run` ends the pass with the block of the last layer.

    Args:
        denoiser: Transformer whose layout has a joint attention.
        layers: Module paths, see `concept_layers`.
        concepts: Concepts, as the family of the model reads them.

    Raises:
        TapError: No such attention.
    """

    def __init__(
        self, denoiser: nn.Module, layers: str | Sequence[str] | None, concepts: Concepts
    ) -> None:
        self._chosen = concept_layers(denoiser, layers)
        known = joint_attentions(denoiser)
        last = list(known).index(self._chosen[-1])
        self._layers = dict(list(known.items())[: last + 1])
        self._denoiser, self._concepts = denoiser, concepts
        self._grid = (0, 0)
        self._time: Tensor | None = None
        self._stream: Tensor | None = None
        self._maps: dict[str, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "ConceptTaps":
        self._maps.clear()
        denoiser: Any = self._denoiser
        with ExitStack() as stack:  # a failure half-way removes what is already registered
            begin = for_this_thread(self._begin)
            handle = denoiser.register_forward_pre_hook(begin, with_kwargs=True)
            stack.callback(handle.remove)
            if not self._concepts.pooled:
                time = for_this_thread(self._keep_time)
                stack.callback(denoiser.time_text_embed.register_forward_hook(time).remove)
            for name, attn in self._layers.items():
                parts: dict[str, Tensor] = {}
                for part in _READ:
                    keep = for_this_thread(_keep_output(parts, part))
                    stack.callback(getattr(attn, part).register_forward_hook(keep).remove)
                keep = for_this_thread(_keep_input(parts, "cells"))
                stack.callback(attn.to_out[0].register_forward_pre_hook(keep).remove)
                step = for_this_thread(self._step(name, attn, parts))
                block = denoiser.get_submodule(name.rpartition(".")[0])
                handle = block.register_forward_hook(step, with_kwargs=True)
                stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()
        self._time = self._stream = None

    def run(self, call: Callable[[], Any]) -> dict[str, Float[Tensor, "b concepts _h _w"]]:
        """Products of the outputs of concepts and of cells at each layer, in float32.

        Args:
            call: Call of the denoiser.

        Raises:
            TapError: A layer did not run, or its projections are fused.
        """
        with suppress(AllTapsRead):
            call()
        check_read({name: self._layers[name] for name in self._chosen}, self._maps)
        return {name: self._maps[name] for name in self._chosen}

    def _begin(self, denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._grid = carried_grid(denoiser, args, kwargs)
        latents = args[0] if args else kwargs["hidden_states"]
        states = self._concepts.states.to(latents.device, latents.dtype)
        embedded = denoiser.context_embedder(states)
        self._stream = embedded.expand(len(latents), *embedded.shape)

    def _keep_time(self, module: Any, args: tuple[Any, ...], _output: object) -> None:
        *others, pooled = args
        self._time = module.forward(*others, torch.zeros_like(pooled))  # past the hook itself

    def _step(self, name: str, attn: Any, parts: dict[str, Tensor]) -> Callable[..., None]:
        def step(
            block: Any, _args: tuple[Any, ...], kwargs: dict[str, Any], _output: object
        ) -> None:
            if {*_READ} - parts.keys():
                return  # fused: `run` says so
            assert self._stream is not None
            # FLUX and SD 3 pass everything by name.
            time = kwargs["temb"] if self._time is None else self._time
            normed, *modulation = _modulated(block, self._stream, time)
            concepts, seeing = self._attended(attn, normed, parts, kwargs.get("image_rotary_emb"))
            if name in self._chosen:
                self._maps[name] = self._products(concepts, seeing)
            parts.clear()
            if len(self._maps) == len(self._chosen):
                raise AllTapsRead
            self._stream = _updated(block, self._stream, attn.to_add_out(concepts), *modulation)

        return step

    def _attended(
        self,
        attn: Any,
        normed: Float[Tensor, "b states c"],
        parts: dict[str, Tensor],
        rotary: Rotary | None,
    ) -> tuple[Float[Tensor, "b states c"], Float[Tensor, "b cells c"]]:
        """Attention outputs of the concepts, and those of the cells that they are compared with."""
        cells, count = parts["cells"].shape[1], normed.shape[1]
        query, key, value = (
            by_heads(attn, norm, getattr(attn, projection)(normed))
            for norm, projection in (
                ("norm_added_q", "add_q_proj"),
                ("norm_added_k", "add_k_proj"),
                ("", "add_v_proj"),
            )
        )
        image_query, image_key = (
            by_heads(attn, norm, parts[part])
            for norm, part in (("norm_q", "to_q"), ("norm_k", "to_k"))
        )
        if rotary is not None:  # texts have place 0, where nothing is turned
            waves = [each[-cells:, None] for each in rotary]
            image_query, image_key = (
                rotated(each, waves).to(query.dtype) for each in (image_query, image_key)
            )
        if self._concepts.cells_see:
            query = torch.cat([query, image_query], dim=1)
        joined = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            torch.cat([key, image_key], dim=1).transpose(1, 2),
            torch.cat([value, by_heads(attn, "", parts["to_v"])], dim=1).transpose(1, 2),
        )
        output = rearrange(joined, "b heads l d -> b l (heads d)")
        seeing = output[:, count:] if self._concepts.cells_see else parts["cells"]
        return output[:, :count], seeing

    def _products(
        self, concepts: Float[Tensor, "b states c"], cells: Float[Tensor, "b cells c"]
    ) -> Float[Tensor, "b concepts h w"]:
        mapped = concepts[:, self._concepts.ahead :].float()
        if self._concepts.unit:
            mapped = F.normalize(mapped, dim=-1)
        products = einsum(mapped, cells.float(), "b n c, b cells c -> b n cells")
        h, w = self._grid
        return rearrange(products, "b n (h w) -> b n h w", h=h, w=w)


def _projection(attn: Any) -> nn.Module | None:
    module: nn.Module | None = getattr(attn, "add_q_proj", None)
    return module


def _keep_output(parts: dict[str, Tensor], part: str) -> Callable[..., None]:
    def keep(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        parts[part] = output

    return keep


def _keep_input(parts: dict[str, Tensor], part: str) -> Callable[..., None]:
    def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
        parts[part] = args[0]

    return keep


def _modulated(block: Any, stream: Tensor, time: Tensor) -> tuple[Tensor, ...]:
    """The stream behind the adaptive norm of the text, and what modulates it further on.

    The last block of SD 3 gives its text nothing further.
    """
    if getattr(block, "context_pre_only", False):
        return (block.norm1_context(stream, time),)
    modulated: tuple[Tensor, ...] = block.norm1_context(stream, emb=time)
    return modulated


def _updated(
    block: Any,
    stream: Float[Tensor, "b states c"],
    attended: Float[Tensor, "b states c"],
    gate: Float[Tensor, "b c"],
    shift: Float[Tensor, "b c"],
    scale: Float[Tensor, "b c"],
    last_gate: Float[Tensor, "b c"],
) -> Float[Tensor, "b states c"]:
    """The concepts behind the block's text side."""
    stream = stream + gate[:, None] * attended
    flat = block.norm2_context(stream) * (1 + scale[:, None]) + shift[:, None]
    updated: Tensor = stream + last_gate[:, None] * block.ff_context(flat)
    if updated.dtype == torch.float16:  # as FLUX keeps its own text finite
        largest = torch.finfo(torch.float16).max
        updated = updated.clip(-largest, largest)
    return updated
