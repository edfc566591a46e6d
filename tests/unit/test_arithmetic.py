"""Arithmetic of a pass of a transformer, beside a count of its layers by their shapes."""

from contextlib import ExitStack
from math import prod

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dit_builders
from diffenc.denoiser.transformers import layout_of
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.models.arithmetic import pass_operations
from diffenc.models.denoisers import config_of

STATES = {"pixart": 77, "sana": 77, "sd3": 77 + 256, "flux": 512, "schnell": 256}
"""Text states of a pass: PixArt and Sana leave padding out, and 77 tokens stand for a text."""


def made(kind):
    if kind == "schnell":
        return dit_builders.flux_pipeline(guidance=False).transformer
    return dit_builders.PIPELINES[kind]().transformer


def counted_by_shapes(denoiser, latents, states, pooled):
    """Twice the multiplications of linear layers, convolutions and attentions, as they run."""
    total = 0
    plain = F.scaled_dot_product_attention

    def of_layer(layer, args, output):
        nonlocal total
        if isinstance(layer, nn.Linear):
            total += 2 * prod(output.shape) * layer.in_features
        else:
            inner = layer.in_channels // layer.groups * prod(layer.kernel_size)
            total += 2 * prod(output.shape) * inner

    def attention(query, key, value, *args, **options):
        nonlocal total
        rows, heads, cells, width = query.shape
        total += 4 * rows * heads * cells * key.shape[2] * width
        return plain(query, key, value, *args, **options)

    def linear_attention(attn, args, kwargs, _output):
        nonlocal total  # values with ones beside them times keys, and that times queries
        cells = kwargs["hidden_states"].shape[1] if kwargs else args[0].shape[1]
        width = attn.to_q.out_features // attn.heads
        total += 4 * attn.heads * (width + 1) * width * cells

    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", attention)
        for name, module in denoiser.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                stack.callback(module.register_forward_hook(of_layer).remove)
            if name.endswith("attn1") and "Linear" in type(module.processor).__name__:
                handle = module.register_forward_hook(linear_attention, with_kwargs=True)
                stack.callback(handle.remove)
        texts = PromptEmbeds(states, pooled)
        arguments = layout_of(denoiser).arguments(
            denoiser.config, latents, torch.tensor(500), texts
        )
        denoiser(**arguments)
    return total


@pytest.mark.parametrize("kind", list(STATES))
def test_operations_are_those_of_all_layers_and_of_all_text_states(kind):
    denoiser = made(kind)
    config = config_of(denoiser)
    channels = 16 if kind in ("sd3", "flux", "schnell") else 4
    width = config.get("joint_attention_dim") or config["caption_channels"]
    pooled = config.get("pooled_projection_dim")
    expected = counted_by_shapes(
        denoiser,
        torch.zeros(1, channels, 12, 12),
        torch.zeros(1, STATES[kind], width),
        None if pooled is None else torch.zeros(1, pooled),
    )
    whole, _ = pass_operations(config, 12)
    assert whole == expected
