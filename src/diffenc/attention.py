"""Which pixels a word attends to: cross-attention, read while a U-Net runs."""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diffenc.errors import PromptError, ShapeError, TapError, near_matches


class CrossAttnTaps:
    """Cross-attention maps of a U-Net while the `with` block is open.

    Queries and keys are read in hooks on `attn2.to_q` and `attn2.to_k` and multiplied once more,
    in float32: the forward pass keeps its own attention, its output stays bit-identical. Only the
    maps of the asked tokens are kept. Tokens that the U-Net is told to ignore get no attention.

    Args:
        unet: A `UNet2DConditionModel`.
        layers: Names of `cross_attention_layers`, or of modules around them ("up_blocks.1"); None
            reads all.
        tokens: Positions in the prompt, the start token being 0, for every row of the batch.
        merge_heads: Take the mean over heads; otherwise maps have an axis of heads after the
            tokens.

    Raises:
        TapError: No cross-attention by that name.
        ShapeError: No position, or one below 0.

    Example:
        >>> with CrossAttnTaps(unet, ["mid_block"], tokens=[2]) as taps:
        ...     _ = unet(noisy_latents, timestep, prompt_embeds)
        >>> taps.maps()["mid_block.attentions.0.transformer_blocks.0.attn2"].shape
        torch.Size([1, 1, 8, 8])
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
        self._layers = {name: known[name] for name in _match(layers, list(known))}
        if not tokens or min(tokens) < 0:
            raise ShapeError(f"tokens must be one position or more, 0 or above, got {list(tokens)}")
        self._tokens, self._merge_heads = list(tokens), merge_heads
        self._grids: dict[nn.Module, tuple[int, int]] = {}
        self._queries: dict[str, Tensor] = {}
        self._present: dict[str, Tensor | None] = {}
        self._maps: dict[str, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "CrossAttnTaps":
        self._maps.clear()
        with ExitStack() as stack:  # a failure half-way removes what is already registered
            for transformer in {transformer for transformer, _ in self._layers.values()}:
                handle = transformer.register_forward_pre_hook(self._note_grid, with_kwargs=True)
                stack.callback(handle.remove)
            for name, (transformer, attn) in self._layers.items():
                stack.callback(keep_present(attn, self._present, name).remove)
                read_query, read_key = self._readers(name, transformer, attn)
                stack.callback(attn.to_q.register_forward_hook(read_query).remove)
                stack.callback(attn.to_k.register_forward_hook(read_key).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()
        self._grids.clear()
        self._queries.clear()
        self._present.clear()

    def maps(self) -> dict[str, Float[Tensor, "b tokens *heads _h _w"]]:
        """Per layer the mean over its heads, in float32: how much each cell looks at a token.

        Over all tokens of a prompt the values of a cell sum to 1.

        Raises:
            TapError: A layer did not run.
        """
        if missing := [name for name in self._layers if name not in self._maps]:
            raise TapError(
                f"no attention was read at {missing}: the U-Net did not run inside the block, or "
                "its projections are fused (unet.unfuse_qkv_projections() separates them)"
            )
        return {name: self._maps[name] for name in self._layers}

    def _note_grid(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        self._grids[module] = (hidden_states.shape[-2], hidden_states.shape[-1])

    def _readers(
        self, name: str, transformer: nn.Module, attn: Any
    ) -> tuple[Callable[..., None], Callable[..., None]]:
        def read_query(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            self._queries[name] = output

        def read_key(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            maps = head_maps(
                self._queries.pop(name),
                output,
                self._tokens,
                heads=attn.heads,
                scale=attn.scale,
                present=self._present[name],
            )
            h, w = self._grids[transformer]
            maps = rearrange(maps, "b heads (h w) tokens -> b tokens heads h w", h=h, w=w)
            self._maps[name] = maps.mean(dim=2) if self._merge_heads else maps

        return read_query, read_key


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
        query: Projected image cells, heads side by side.
        key: Projected tokens, heads side by side.
        tokens: Positions on `l`; the softmax runs over all of `l`.
        heads: Number of heads.
        scale: Factor of the scores.
        present: Tokens that the U-Net sees; the others get nothing. None is all.

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
        attn: An `attn2`.
        kept: Gets the tokens.
        name: Under which.

    Returns:
        The handle that removes the hook.
    """

    def note(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bias = kwargs.get("attention_mask")  # (b 1 l): 0, or -10000 where a token is ignored
        kept[name] = None if bias is None else bias[:, 0] > -1

    return attn.register_forward_pre_hook(note, with_kwargs=True)


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
    if layers == "discffusion":
        return _last_of_each_stage(known)
    wanted = set(_match(None if layers == "all" else layers, known))
    return tuple(name for name in known if name in wanted)


def _last_of_each_stage(known: Sequence[str]) -> tuple[str, ...]:
    last_blocks = {name.partition("_block")[0]: name.partition(".attentions")[0] for name in known}
    last_of: dict[str, str] = {}  # per transformer
    for name in known:
        transformer = name.partition(".transformer_blocks")[0]
        if transformer.partition(".attentions")[0] in last_blocks.values():
            last_of[transformer] = name
    return tuple(last_of.values())


def _attentions(unet: nn.Module) -> dict[str, tuple[nn.Module, Any]]:
    """Per module path the attention, after the transformer that flattens the map around it."""
    modules = dict(unet.named_modules())
    found = {}
    for stage in ("down_blocks", "mid_block", "up_blocks"):  # registered in another order
        for path, transformer in modules.items():
            if path.startswith(stage) and type(transformer).__name__ == "Transformer2DModel":
                for name, module in transformer.named_modules(prefix=path):
                    if name.endswith(".attn2"):
                        found[name] = (transformer, module)
    return found


def _match(layers: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    if layers is None:
        return list(known)
    found: dict[str, None] = {}
    for layer in [layers] if isinstance(layers, str) else layers:
        inside = [name for name in known if f"{name}.".startswith(f"{layer}.")]
        if not inside:
            blocks = list(dict.fromkeys(name.partition(".attentions")[0] for name in known))
            raise TapError(
                f"there is no cross-attention in {layer!r}.{near_matches(layer, known)} "
                f"The U-Net has it in {blocks}."
            )
        found.update(dict.fromkeys(inside))
    return list(found)


def word_token_positions(
    tokenizer: Any, text: str, word: str, *, occurrence: int | None = None
) -> tuple[int, ...]:
    """Where the text encoder sees a word: positions of all its pieces, the start token being 0.

    Args:
        tokenizer: CLIP's, or one like it that marks the end of a word with "</w>".
        text: The prompt.
        word: A word of it, or several in a row; upper and lower case are one.
        occurrence: Which one counts if it stands there several times, from 0; None takes all.

    Raises:
        PromptError: The text has no such word, or not so many times, or it was cut off.
    """
    pieces = tokenizer.convert_ids_to_tokens(
        tokenizer(text, truncation=False, verbose=False).input_ids
    )
    wanted = tokenizer.convert_ids_to_tokens(
        tokenizer(word, add_special_tokens=False, truncation=False, verbose=False).input_ids
    )
    starts = [
        index
        for index in range(1, len(pieces) - len(wanted) + 1)
        if pieces[index : index + len(wanted)] == wanted
        and _ends_word(tokenizer, pieces[index - 1])
    ]
    if not wanted or not starts:
        words = re.findall(r"\w+", text.lower())
        raise PromptError(f"{word!r} is no word of {text!r}.{near_matches(word.lower(), words)}")
    if occurrence is not None:
        if not 0 <= occurrence < len(starts):
            raise PromptError(
                f"{word!r} stands {len(starts)} times in {text!r}; occurrence counts from 0, got "
                f"{occurrence}"
            )
        starts = [starts[occurrence]]
    room = tokenizer.model_max_length - 1  # the last place is the end token's
    kept = [start for start in starts if start + len(wanted) <= room]
    if not kept:
        raise PromptError(
            f"{word!r} was cut off: it is token {starts[0]} of {text!r}, and the text encoder "
            f"reads {tokenizer.model_max_length}; move it to the front or shorten the text"
        )
    return tuple(start + offset for start in kept for offset in range(len(wanted)))


def _ends_word(tokenizer: Any, piece: str) -> bool:
    return piece.endswith("</w>") or piece in tokenizer.all_special_tokens
