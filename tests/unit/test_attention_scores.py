import math
from itertools import product

import pytest
import torch

import builders
from diffenc.denoiser.attention import cross_attention_layers, cross_attentions, match_layers
from diffenc.denoiser.attention_scores import (
    Pooling,
    crossed_scores,
    layer_mix,
    pooled_scores,
    read_queries,
    read_scores,
)
from diffenc.errors import ConfigError, TapError

HEADS, SCALE = 2, 0.5


@pytest.fixture
def unet(tiny_unet):
    yield tiny_unet
    assert not any(module._forward_hooks for module in tiny_unet.modules())


def tensors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(batch=2, height=8, width=12, length=5):
    return tensors(batch, 4, height, width), 10, tensors(batch, length, 8, seed=1)


def brute_force(query, key, pooling, kept):
    """One row, one head, one cell, one token at a time."""
    cells, tokens, d = len(query), len(key), query.shape[1] // HEADS
    per_head = []
    for head in range(HEADS):
        part = slice(head * d, (head + 1) * d)
        table = [
            [SCALE * float(query[n, part] @ key[j, part]) for j in range(tokens)]
            for n in range(cells)
        ]
        if pooling.space == "probs":
            sums = [sum(math.exp(a) for a in row) for row in table]
            table = [
                [math.exp(a) / total for a in row] for row, total in zip(table, sums, strict=True)
            ]

        def lse(values):
            return math.log(sum(math.exp(pooling.lse_lambda * a) for a in values))

        if pooling.axis == "tokens":
            found = sum(lse([row[j] for j in kept]) for row in table) / cells
        elif pooling.axis == "pixels":
            found = sum(lse([row[j] for row in table]) for j in kept) / len(kept)
        else:
            found = lse([row[j] for row in table for j in kept])
        per_head.append(found / pooling.lse_lambda)
    return max(per_head) if pooling.head_reduce == "max" else sum(per_head) / HEADS


@pytest.mark.parametrize(
    ("space", "axis", "lam", "heads"),
    list(product(["logits", "probs"], ["tokens", "pixels", "both"], [1.0, 3.0], ["mean", "max"])),
)
@pytest.mark.parametrize("masked", [False, True])
def test_pooling_equals_sums_by_hand(space, axis, lam, heads, masked):
    query, key = tensors(2, 3, 8), tensors(2, 5, 8, seed=1)
    pooling = Pooling(space, axis, lam, heads)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]).bool() if masked else None
    kept = [mask[row].nonzero().flatten().tolist() if masked else range(5) for row in range(2)]
    ours = pooled_scores(query, key, pooling, heads=HEADS, scale=SCALE, mask=mask)
    expected = [brute_force(query[row], key[row], pooling, kept[row]) for row in range(2)]
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    crossed = crossed_scores(query, key, pooling, heads=HEADS, scale=SCALE, mask=mask)
    table = [[brute_force(q, key[j], pooling, kept[j]) for j in range(2)] for q in query]
    torch.testing.assert_close(crossed, torch.tensor(table), rtol=1e-5, atol=1e-5)


def test_large_products_do_not_overflow_and_halves_are_pooled_in_float32():
    query, key = 300 * tensors(1, 4, 8), 300 * tensors(1, 5, 8, seed=1)
    exact = pooled_scores(query.double(), key.double(), Pooling(), heads=HEADS, scale=SCALE)
    assert torch.isfinite(exact).all()
    half = pooled_scores(query.bfloat16(), key.bfloat16(), Pooling(), heads=HEADS, scale=SCALE)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact.float(), rtol=2e-2, atol=0)


def test_a_layers_products_are_cut_into_parts_without_effect(monkeypatch):
    query, key = tensors(5, 6, 8), tensors(5, 7, 8, seed=1)
    whole = pooled_scores(query, key, Pooling(), heads=HEADS, scale=SCALE)
    crossed = crossed_scores(query, key, Pooling(), heads=HEADS, scale=SCALE)
    monkeypatch.setattr("diffenc.denoiser.attention_scores._CHUNK", {"cpu": 200, "other": 200})
    parts = pooled_scores(query, key, Pooling(), heads=HEADS, scale=SCALE)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
    parts = crossed_scores(query, key, Pooling(), heads=HEADS, scale=SCALE)
    torch.testing.assert_close(parts, crossed, rtol=0, atol=1e-6)
    torch.testing.assert_close(crossed.diagonal(), whole, rtol=0, atol=1e-6)


def test_the_output_is_bit_identical_unless_the_pass_ends_early(unet):
    plain = unet(*inputs()).sample
    outputs = []
    attentions = cross_attentions(unet)
    whole = read_scores(
        attentions, Pooling(), lambda: outputs.append(unet(*inputs()).sample), early_exit=False
    )
    assert torch.equal(outputs[0], plain)
    short = read_scores(
        attentions, Pooling(), lambda: outputs.append(unet(*inputs())), early_exit=True
    )
    assert len(outputs) == 1  # the second call never came to its end
    assert torch.equal(short, whole)
    assert whole.shape == (2, len(cross_attention_layers(unet)))


def test_an_early_exit_runs_nothing_behind_the_last_layer(unet):
    ran = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in unet.named_modules()
        if name in ("down_blocks.1", "mid_block", "up_blocks.0")
    ]
    chosen = {name: cross_attentions(unet)[name] for name in match_layers(unet, "mid_block")}
    read_scores(chosen, Pooling(), lambda: unet(*inputs()), early_exit=True)
    read_queries(chosen, lambda: unet(*inputs()))
    for handle in handles:
        handle.remove()
    assert ran == ["down_blocks.1"] * 2


def test_queries_and_keys_give_the_scores_of_the_pass(unet):
    attentions = cross_attentions(unet)
    states = inputs()[2]
    queries = read_queries(attentions, lambda: unet(*inputs()))
    scores = read_scores(attentions, Pooling(), lambda: unet(*inputs()), early_exit=True)
    for column, (name, attn) in enumerate(attentions.items()):
        late = pooled_scores(
            queries[name], attn.to_k(states), Pooling(), heads=attn.heads, scale=attn.scale
        )
        torch.testing.assert_close(late, scores[:, column], rtol=0, atol=1e-6)


def test_hooks_are_gone_after_an_exception(unet):
    def fail():
        raise KeyboardInterrupt

    for read in (
        lambda: read_scores(cross_attentions(unet), Pooling(), fail, early_exit=True),
        lambda: read_queries(cross_attentions(unet), fail),
    ):
        with pytest.raises(KeyboardInterrupt):
            read()


def test_layers_that_did_not_run_are_an_error(unet):
    for early_exit in (True, False):
        with pytest.raises(TapError, match="no attention was read at"):
            read_scores(cross_attentions(unet), Pooling(), lambda: None, early_exit=early_exit)


def test_peak_memory_does_not_grow_with_the_layers():
    """Products die with their layer: what is alive at once stays the same with more layers."""
    unet = builders.tiny_unet()
    alive, most = [], []
    pooling = Pooling()

    class Counting(Pooling):
        def __call__(self, logits, mask=None, present=None):
            import weakref

            alive.append(weakref.ref(logits))
            most.append(sum(ref() is not None for ref in alive))
            return pooling(logits, mask)

    read_scores(cross_attentions(unet), Counting(), lambda: unet(*inputs()), early_exit=True)
    assert len(most) == len(cross_attention_layers(unet)) > 2
    assert max(most) == 1


def test_layers_are_named_in_the_order_in_which_they_run(unet):
    every = cross_attention_layers(unet)
    assert match_layers(unet) == match_layers(unet, "all") == every
    assert match_layers(unet, ["up_blocks.0", "down_blocks.1"]) == tuple(
        name for name in every if not name.startswith("mid_block")
    )
    with pytest.raises(TapError, match="no cross-attention in 'up_block'"):
        match_layers(unet, ["up_block"])


def test_discffusion_reads_the_last_block_of_every_transformer(tiny_sdxl_folder):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_sdxl_folder, subfolder="unet")
    assert match_layers(unet, "discffusion") == (
        "down_blocks.2.attentions.0.transformer_blocks.2.attn2",
        "down_blocks.2.attentions.1.transformer_blocks.2.attn2",
        "mid_block.attentions.0.transformer_blocks.2.attn2",
        "up_blocks.1.attentions.0.transformer_blocks.1.attn2",
        "up_blocks.1.attentions.1.transformer_blocks.1.attn2",
        "up_blocks.1.attentions.2.transformer_blocks.1.attn2",
    )


def test_layer_weights_are_shares():
    scores = torch.tensor([[1.0, 2.0, 4.0]])
    assert (scores @ layer_mix(None, 3)).item() == pytest.approx(7 / 3)
    assert (scores @ layer_mix((1.0, 0.0, 3.0), 3)).item() == pytest.approx(13 / 4)
    with pytest.raises(ConfigError, match="got 2 for 3 layers"):
        layer_mix((1.0, 1.0), 3)
