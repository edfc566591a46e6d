"""Which pixels a word attends to: cross-attention, read while a U-Net runs."""

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diffenc.checks.arguments import shown, texts
from diffenc.denoiser.transformers import carried_grid, layout_of, transformer_attentions, word_for
from diffenc.errors import ShapeError, TapError, near_matches
from diffenc.inputs.words import word_token_positions
from diffenc.runtime.threads import for_this_thread

__all__ = [  # words are looked up from here by users
    "CrossAttnTaps",
    "PairedOutputs",
    "check_read",
    "cross_attention_layers",
    "cross_attentions",
    "head_maps",
    "keep_present",
    "match_layers",
    "match_paths",
    "word_token_positions",
]


class CrossAttnTaps:
    """Cross-attention maps of a U-Net while the `with` block is open.

    Queries and keys are read in hooks on `attn2.to_q` and `attn2.to_k` and multiplied once more,
    in float32: the forward pass keeps its own attention, its output stays bit-identical. Only the
    maps of the requested tokens are kept. Tokens that the U-Net is told to ignore get no attention.

    Args:
        unet: A `UNet2DConditionModel`.
        layers: Names of `cross_attention_layers`, or of modules around them ("up_blocks.1"); None
            reads all.
        tokens: Positions in the prompt, the start token being 0, for every row of the batch.
        merge_heads: Whether to take the mean over heads; otherwise maps have an axis of heads after
            the tokens.

    Raises:
        TapError: No cross-attention by that name.
        ShapeError: No position, or one below 0.

    Examples:
        >>> from diffenc import load_backbone
        >>> unet = load_backbone("shapes").unet
        >>> noisy_latents, prompt_embeds = torch.zeros(1, 4, 16, 16), torch.zeros(1, 77, 128)
        >>> with CrossAttnTaps(unet, ["mid_block"], tokens=[2]) as taps:
        ...     _ = unet(noisy_latents, 50, prompt_embeds)
        >>> taps.maps()["mid_block.attentions.0.transformer_blocks.0.attn2"].shape
        torch.Size([1, 1, 4, 4])
    """

    def __init__(
        self,
        unet: nn.Module,
        layers: Sequence[str] | None = None,
        *,
        tokens: Sequence[int],
        merge_heads: bool = True,
    ) -> None:
        known = _attentions(unet)
        self._layers = {
            name: known[name] for name in match_paths(layers, list(known), word_for(unet))
        }
        if not tokens or min(tokens) < 0:
            raise ShapeError(f"tokens must be one position or more, 0 or above, got {list(tokens)}")
        self._tokens, self._merge_heads = list(tokens), merge_heads
        self._grids: dict[nn.Module, tuple[int, int]] = {}
        self._projected = PairedOutputs()
        self._present: dict[str, Tensor | None] = {}
        self._maps: dict[str, Callable[[], Tensor]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "CrossAttnTaps":
        self._maps.clear()
        with ExitStack() as stack:  # a failure half-way removes what is already registered
            note_grid = for_this_thread(self._note_grid)
            for transformer in {transformer for transformer, _ in self._layers.values()}:
                handle = transformer.register_forward_pre_hook(note_grid, with_kwargs=True)
                stack.callback(handle.remove)
            for name, (transformer, attn) in self._layers.items():
                stack.callback(keep_present(attn, self._present, name).remove)
                read = self._reader(name, transformer, attn)
                for part, module in last_projections(attn).items():
                    hook = self._projected.hook(name, part, read)
                    stack.callback(module.register_forward_hook(hook).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()
        self._grids.clear()
        self._projected.clear()
        self._present.clear()

    def maps(self) -> dict[str, Float[Tensor, "b tokens *heads _h _w"]]:
        """Maps of each layer, mean over its heads, in float32: how much each cell looks at a token.

        The values of a cell sum to 1 over all tokens of a prompt.

        Raises:
            TapError: A layer did not run.
        """
        check_read({name: attn for name, (_, attn) in self._layers.items()}, self._maps)
        return {name: self._maps[name]() for name in self._layers}

    def _note_grid(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._grids[module] = carried_grid(module, args, kwargs)

    def _reader(
        self, name: str, transformer: nn.Module, attn: Any
    ) -> Callable[[Tensor, Tensor], None]:
        def read(query: Tensor, key: Tensor) -> None:
            h, w = self._grids[transformer]
            present = self._present[name]

            def computed() -> Tensor:
                maps = head_maps(
                    query, key, self._tokens, heads=attn.heads, scale=attn.scale, present=present
                )
                maps = rearrange(maps, "b heads (h w) tokens -> b tokens heads h w", h=h, w=w)
                return maps.mean(dim=2) if self._merge_heads else maps

            if query.requires_grad or key.requires_grad:
                # Within a pass whose activations are computed again on the way back, nothing may
                # be computed that the second time leaves out.
                self._maps[name] = cache(computed)
                return
            maps = computed()
            self._maps[name] = lambda: maps

        return read


class PairedOutputs:
    """Queries and keys of attentions, handed on together, in whichever order they are computed."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[str, Tensor]] = {}

    def hook(
        self, name: str, part: str, read: Callable[[Tensor, Tensor], None]
    ) -> Callable[..., None]:
        """A forward hook of a projection.

        Args:
            name: Path of the attention.
            part: Part that the projection makes: "query" or "key".
            read: Function that gets the query and the key, once both are there.
        """

        def keep(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            pair = self._waiting.setdefault(name, {})
            pair[part] = output
            if len(pair) == 2:
                del self._waiting[name]
                read(pair["query"], pair["key"])

        return for_this_thread(keep)

    def clear(self) -> None:
        """Forget what waits."""
        self._waiting.clear()


def last_projections(attn: Any) -> dict[str, Any]:
    """The modules that give an attention's queries and keys: projections, or norms behind them."""
    return {
        "query": attn.to_q if getattr(attn, "norm_q", None) is None else attn.norm_q,
        "key": attn.to_k if getattr(attn, "norm_k", None) is None else attn.norm_k,
    }


def check_read(attentions: Mapping[str, Any], read: Container[str]) -> None:
    """Raise a `TapError` that says why attentions were not read.

    Args:
        attentions: Attentions, by module path.
        read: Module paths of the attentions that were read.
    """
    if missing := [name for name in attentions if name not in read]:
        processor = type(getattr(attentions[missing[0]], "processor", None)).__name__
        raise TapError(
            f"no attention was read at {missing}: the denoiser did not run inside the block, it "
            f"ends before them, or their processor ({processor}) does not call to_q and to_k. "
            "Where its projections are fused, its unfuse_qkv_projections() separates them; a "
            "U-Net's set_default_attn_processor() brings the usual processor back."
        )


def head_maps(
    query: Float[Tensor, "b hw qc"],
    key: Float[Tensor, "b l kc"],
    tokens: Sequence[int],
    *,
    heads: int,
    scale: float,
    present: Bool[Tensor, "b l"] | None = None,
) -> Float[Tensor, "b heads hw tokens"]:
    """Attention probabilities of some tokens, per head, computed and returned in float32.

    Args:
        query: Queries: projected image cells, heads side by side.
        key: Keys: projected tokens, heads side by side.
        tokens: Positions on `l`; the softmax runs over all of `l`.
        heads: Number of heads.
        scale: Factor by which the products of queries and keys are multiplied.
        present: Mask of the tokens that the U-Net sees; the others get no attention. None is all.

    Raises:
        ShapeError: A position lies behind the last token.
    """
    if max(tokens) >= key.shape[1]:
        raise ShapeError(f"there is no token {max(tokens)}: the text has {key.shape[1]}")
    with torch.autocast(query.device.type, enabled=False):
        queries = rearrange(query.float(), "b n (heads d) -> b heads n d", heads=heads)
        keys = rearrange(key.float(), "b l (heads d) -> b heads d l", heads=heads)
        scores = (queries * scale) @ keys
        if present is not None:
            scores = scores.masked_fill(~present[:, None, None, :], -torch.inf)
        total = scores.logsumexp(dim=-1, keepdim=True)
        return (scores[..., list(tokens)] - total).exp()


def keep_present(attn: nn.Module, kept: dict[str, Tensor | None], name: str) -> Any:
    """Note which tokens a cross-attention sees, whenever it runs: (b l), or None for all.

    Args:
        attn: Cross-attention module, an `attn2`.
        kept: Mapping that the tokens are put into.
        name: Key of the tokens in `kept`.

    Returns:
        The handle that removes the hook.
    """

    def note(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bias = kwargs.get("attention_mask")  # (b 1 l): 0, or -10000 where a token is ignored
        kept[name] = None if bias is None else bias[:, 0] > -1

    return attn.register_forward_pre_hook(for_this_thread(note), with_kwargs=True)


def cross_attention_layers(unet: nn.Module) -> tuple[str, ...]:
    """Module paths of every cross-attention, in the order in which they run."""
    return tuple(_attentions(unet))


def cross_attentions(unet: nn.Module) -> dict[str, Any]:
    """Every cross-attention by its module path, in the order in which they run."""
    return {name: attn for name, (_, attn) in _attentions(unet).items()}


def match_layers(unet: nn.Module, layers: str | Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of `cross_attention_layers`, in the order in which they run.

    Args:
        unet: A `UNet2DConditionModel`.
        layers: Some of the names, or modules around them ("up_blocks.1"); "discffusion" is that
            code's set; "all" and None are all.

    Raises:
        TapError: No cross-attention by that name.

    Source:
        He et al. 2023 (Discffusion), arXiv:2305.10722, released code: of the last down block with
        cross-attention, the middle and the last such up block, in every transformer the last block.
    """
    known = cross_attention_layers(unet)
    if isinstance(layers, str) and layers == "discffusion":
        if layout_of(unet) is not None:
            raise TapError(
                "layers='discffusion' are the last ones of a U-Net's stages, and this model is a "
                "transformer without stages; name blocks such as 'transformer_blocks.14', or 'all'"
            )
        return _last_of_each_stage(known)
    named = None if isinstance(layers, str) and layers == "all" else layers
    chosen = set(match_paths(named, known, word_for(unet)))
    return tuple(name for name in known if name in chosen)


def touching(module: str, layers: Sequence[str]) -> tuple[str, ...]:
    """Those of some layers that a module is, holds or lies in, by their paths."""
    path = f"{module}."
    return tuple(
        name for name in layers if f"{name}.".startswith(path) or path.startswith(f"{name}.")
    )


def nearest_layers(module: str, layers: Sequence[str]) -> tuple[str, ...]:
    """Layers that touch a module, or the nearest module around it that has some; else all."""
    while module:
        if near := touching(module, layers):
            return near
        module = module.rpartition(".")[0]
    return tuple(layers)


def _last_of_each_stage(known: Sequence[str]) -> tuple[str, ...]:
    last_blocks = {name.partition("_block")[0]: name.partition(".attentions")[0] for name in known}
    last_of: dict[str, str] = {}  # per transformer
    for name in known:
        transformer = name.partition(".transformer_blocks")[0]
        if transformer.partition(".attentions")[0] in last_blocks.values():
            last_of[transformer] = name
    return tuple(last_of.values())


def _attentions(unet: nn.Module) -> dict[str, tuple[nn.Module, Any]]:
    """Attentions by module path, each after the transformer that flattens the map around it."""
    if (layout := layout_of(unet)) is not None:
        return transformer_attentions(unet, layout)
    modules = dict(unet.named_modules())
    attentions = {}
    for stage in ("down_blocks", "mid_block", "up_blocks"):  # registered in another order
        for path, transformer in modules.items():
            if path.startswith(stage) and type(transformer).__name__ == "Transformer2DModel":
                for name, module in transformer.named_modules(prefix=path):
                    if name.endswith(".attn2"):
                        attentions[name] = (transformer, module)
    return attentions


def match_paths(
    layers: Sequence[str] | None, known: Sequence[str], word: str, kind: str = "cross-attention"
) -> list[str]:
    """Those of some attentions that are named, or lie in a module that is named.

    Args:
        layers: Module paths of attentions, or of modules around them; None names all.
        known: Module paths of the attentions.
        word: What the denoiser is called in messages.
        kind: What the attentions are called there.

    Raises:
        TapError: Nothing by that name.
    """
    if layers is None:
        return list(known)
    matches: dict[str, None] = {}
    for layer in texts("layers", layers, error=TapError):
        inside = [name for name in known if f"{name}.".startswith(f"{layer}.")]
        if not inside:
            blocks = list(dict.fromkeys(name.partition(".attentions")[0] for name in known))
            raise TapError(
                f"there is no {kind} in {shown(layer)}.{near_matches(layer, known)} "
                f"The {word} has it in {blocks}."
            )
        matches.update(dict.fromkeys(inside))
    return list(matches)
