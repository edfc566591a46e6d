"""A U-Net whose cross-attention runs only for rows that have a text.

Without a prompt SDXL's text is zeros throughout. Cells then look at tokens that are all alike, so
that each of them gets the same, whatever it looks for: what one cell gets from one token.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from diffenc.denoiser.attention import cross_attentions
from diffenc.denoiser.replay import is_hooked, replaceable
from diffenc.denoiser.shortening import copy_ways
from diffenc.denoiser.transformers import layout_of

_USUAL = ("AttnProcessor", "AttnProcessor2_0")


class WordedRows(nn.Module):
    """Stands for a cross-attention, and runs it for some rows alone.

    Args:
        attention: Cross-attention.
        worded: Mask of the rows that have a text, on the CPU.
    """

    def __init__(self, attention: nn.Module, worded: Tensor) -> None:
        super().__init__()
        self.attention = attention
        self.worded, self.blank = worded.nonzero()[:, 0], (~worded).nonzero()[:, 0]

    def forward(
        self,
        hidden_states: Float[Tensor, "rows n c"],
        encoder_hidden_states: Float[Tensor, "rows l d"],
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Float[Tensor, "rows n c"]:
        """What the attention gives; rows without a text take that of one cell and one token."""
        row = self.blank[:1]
        states = encoder_hidden_states[row, :1]
        each: Tensor = self.attention(
            hidden_states[row, :1], encoder_hidden_states=states, **options
        )
        output = each.expand_as(hidden_states)
        if not len(self.worded):
            return output.contiguous()
        mask = None if attention_mask is None else attention_mask[self.worded]
        words: Tensor = self.attention(
            hidden_states[self.worded],
            encoder_hidden_states=encoder_hidden_states[self.worded],
            attention_mask=mask,
            **options,
        )
        return output.index_copy(0, self.worded.to(words.device), words)


def skipping_blank_texts(
    unet: nn.Module, states: Float[Tensor, "rows l d"], *, read: Sequence[str] = ()
) -> nn.Module:
    """The U-Net, or a copy that shares its modules and skips cross-attention where it can.

    On a CPU alone: elsewhere the copy costs more time than is saved.

    Args:
        unet: The denoiser; it is left as it is.
        states: Encoded texts of the rows that will be passed.
        read: Module paths that are read; an attention that one of them lies in runs for all rows.
    """
    on_cpu = next(unet.parameters()).device.type == "cpu"
    if not on_cpu or layout_of(unet) is not None:
        return unet
    worded = states.flatten(1).any(dim=1)
    return unet if worded.all() else skipping_rows(unet, worded, read=read)


def skipping_rows(
    unet: nn.Module, worded: Bool[Tensor, " rows"], *, read: Sequence[str] = ()
) -> nn.Module:
    """A copy that shares its modules and takes every text for blank that is not marked.

    Args:
        unet: The denoiser; it is left as it is.
        worded: Mask of the rows that have a text, on the CPU.
        read: Module paths that are read; an attention that one of them lies in runs for all rows.
    """
    attentions = [
        path
        for path, attention in cross_attentions(unet).items()
        if _is_usual(attention) and not any(name.startswith(f"{path}.") for name in read)
    ]
    paths = replaceable(unet, attentions)
    copies = copy_ways(unet, [path.rpartition(".")[0] for path in paths])
    for path in paths:
        parent, _, name = path.rpartition(".")
        attention = copies[parent]._modules[name]
        copies[parent]._modules[name] = WordedRows(attention, worded)
    copy: nn.Module = copies[""]
    return copy


def _is_usual(attention: Any) -> bool:
    """Whether cells get what the values of the tokens say and nothing else."""
    return (
        type(attention).__name__ == "Attention"
        and type(attention.processor).__name__ in _USUAL
        and not attention.residual_connection
        and attention.group_norm is attention.spatial_norm is None
        and not is_hooked(attention)
    )
