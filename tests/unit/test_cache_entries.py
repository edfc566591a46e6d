"""Caches hit where nothing changed, and hold nothing that a caller can reach."""

import copy
import pickle
import weakref

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from diffenc import CrossAttnScorer, DiffusionEncoder
from diffenc.clip.tokens import ClipTokens
from diffenc.config import EncoderConfig
from diffenc.errors import BackboneError, ConfigError, TapError
from diffenc.memory.cache import TensorCache, recall
from diffenc.memory.model_state import state_key, structure_key
from state_builders import SIZE, TAPS, TEXT, picture, stirred, tiny_backbone


@pytest.fixture
def encoder() -> DiffusionEncoder:
    return DiffusionEncoder(tiny_backbone())


def counts(encoder: DiffusionEncoder) -> list[tuple[int, int]]:
    caches = encoder.backbone.caches
    return [(each.hits, each.misses) for each in (caches.latents, caches.prompts, caches.features)]


def guided(encoder: DiffusionEncoder) -> Tensor:
    return encoder.extract(picture(), TEXT, conditioning="cfg")[TAPS[0]]


def close(one: Tensor, other: Tensor) -> bool:
    """But for the rounding of batches, which hold other rows where some are remembered."""
    return torch.allclose(one, other, atol=1e-5, rtol=1e-5)


def tiny_clip(kind=CLIPVisionModel):
    config = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
        projection_dim=4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config).eval().requires_grad_(False)


def test_where_nothing_changed_everything_is_found_again(encoder):
    first = guided(encoder)
    assert counts(encoder) == [(0, 1), (0, 2), (0, 1)]
    for again in range(1, 4):
        assert close(guided(encoder), first)
        assert counts(encoder) == [(again, 1), (2 * again, 2), (again, 1)]


def test_a_copy_has_caches_of_its_own_that_work(encoder):
    first = guided(encoder)
    for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert counts(twin) == [(0, 0)] * 3
        assert close(guided(twin), first)
        assert close(guided(twin), first)
        assert counts(twin) == [(1, 1), (2, 2), (1, 1)]
        twin.backbone.unet = stirred(twin.backbone.unet)
        assert not close(guided(twin), first)
    guided(encoder)
    assert counts(encoder) == [(1, 1), (2, 2), (1, 1)]


def test_saving_a_model_forgets_nothing(encoder, tmp_path):
    guided(encoder)
    encoder.save_pretrained(tmp_path, include_backbone=True)
    guided(encoder)
    assert counts(encoder) == [(1, 1), (2, 2), (1, 1)]


def test_a_change_that_is_taken_back_is_none(encoder):
    block, first = encoder.backbone.unet.mid_block, guided(encoder)
    handle = block.register_forward_hook(lambda module, args, output: output * 2)
    assert not close(guided(encoder), first)
    handle.remove()
    assert close(guided(encoder), first)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(guided(encoder).float(), first)
    assert close(guided(encoder), first)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.scaling.update(default=5.0),
        lambda layer: layer.set_scale("default", 3.0),
        lambda layer: layer.lora_B["default"].weight.data.fill_(1.0),
        lambda layer: setattr(layer, "_disable_adapters", True),
    ],
    ids=["scaling", "set_scale", "behind-autograd", "switched-off"],
)
def test_an_adapter_that_is_changed_by_hand_answers_as_a_fresh_one(encoder, change, request):
    encoder.add_lora(rank=2)
    unet = encoder.backbone.unet
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    encoder.eval().requires_grad_(False)
    before = guided(encoder)
    layers = [module for module in unet.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        change(layer)
    if "behind" in request.node.callspec.id:
        encoder.clear_cache()  # as documented
    after = guided(encoder)
    assert not torch.equal(before, after)
    assert torch.equal(after, guided(DiffusionEncoder(encoder.backbone, use_cache=False)))


def test_settings_of_precision_are_part_of_the_key():
    module = nn.Linear(2, 2).eval().requires_grad_(False)
    torch.set_float32_matmul_precision("highest")
    before, threads = state_key(module), torch.get_num_threads()
    changes = (
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: torch.set_num_threads(threads + 1),
        lambda: torch.use_deterministic_algorithms(True),
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.backends.cuda.enable_math_sdp(False),
    )
    back = (
        lambda: torch.set_float32_matmul_precision("highest"),
        lambda: torch.set_num_threads(threads),
        lambda: torch.use_deterministic_algorithms(False),
        lambda: torch.set_default_dtype(torch.float32),
        lambda: torch.backends.cuda.enable_math_sdp(True),
    )
    for change, undo in zip(changes, back, strict=True):
        try:
            change()
            assert state_key(module) != before
        finally:
            undo()
        assert state_key(module) == before


def test_a_key_never_comes_back_with_another_model():
    keys = set()
    for _ in range(50):  # identities and addresses of the dead are given again at once
        keys.add(state_key(nn.Linear(4, 4).eval().requires_grad_(False)))
    assert len(keys) == 50
    module = nn.Sequential(nn.Linear(4, 4)).eval().requires_grad_(False)
    for _ in range(50):
        module[0] = nn.Linear(4, 4).eval().requires_grad_(False)
        keys.add(state_key(module))
        module[0].weight = nn.Parameter(torch.rand(4, 4), requires_grad=False)
        keys.add(state_key(module))
        module[0].weight.data = torch.rand(4, 4)
        keys.add(state_key(module))
    assert len(keys) == 200


def test_looking_at_a_model_keeps_no_part_of_it_alive(encoder):
    guided(encoder)
    unet = encoder.backbone.unet
    gone = [weakref.ref(unet), weakref.ref(unet.conv_in), weakref.ref(unet.conv_in.weight)]
    encoder.backbone.unet = stirred(unet)
    del unet
    assert [each() for each in gone] == [None] * 3


def test_what_may_give_another_result_each_time_has_no_key():
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval().requires_grad_(False)
    assert state_key(module) is not None
    module[1].train()
    assert state_key(module) is None
    module[1].eval()
    module.register_buffer("seen", torch.zeros(1, requires_grad=True))
    assert state_key(module) is None
    with torch.inference_mode():
        made = nn.Linear(2, 2).eval()
    assert state_key(made.requires_grad_(False)) is None


def test_what_a_caller_writes_into_a_result_stays_with_the_caller(encoder):
    scorer = CrossAttnScorer.from_pretrained(encoder.backbone, preset="paper", timesteps=(300,))
    bank = CrossAttnScorer.from_pretrained(
        encoder.backbone, preset="paper", timesteps=(300,), mode="shared-query"
    )
    clip = ClipTokens(tiny_clip(), _Processor())
    calls = (
        lambda: encoder.extract(picture())[TAPS[0]],
        lambda: encoder.extract(picture(), TEXT, conditioning="cfg").select("uncond")[TAPS[0]],
        lambda: encoder(picture()),
        lambda: scorer(picture(), [TEXT]),
        lambda: bank(picture(), [TEXT]),
        lambda: clip(picture()),
    )
    for call in calls:
        first = call()
        kept = first.clone()
        first.fill_(7.0)
        second = call()
        assert torch.equal(second, kept)
        second.fill_(7.0)
        assert torch.equal(call(), kept)


def test_a_selection_shares_no_memory_with_the_features_it_was_made_of(encoder):
    features = encoder.extract(picture(), TEXT, conditioning="cfg")
    cond = features.select("cond")
    kept = cond[TAPS[0]].clone()
    features.select("cond")[TAPS[0]].zero_()
    assert torch.equal(cond[TAPS[0]], kept)
    cond[TAPS[0]].zero_()
    assert torch.equal(features.select("cond")[TAPS[0]], kept)


def test_an_entry_that_was_computed_during_a_write_is_never_found(encoder):
    vae = encoder.backbone.vae
    encode = vae.encode

    def written_meanwhile(*args, **kwargs):
        with torch.no_grad():
            vae.quant_conv.bias.add_(1)  # as another thread might, half-way
        return encode(*args, **kwargs)

    vae.encode = written_meanwhile
    guided(encoder)
    del vae.encode
    after = guided(encoder)
    assert torch.equal(after, guided(DiffusionEncoder(encoder.backbone, use_cache=False)))


def test_entries_of_inference_mode_serve_training_too(encoder):
    with torch.inference_mode():
        guided(encoder)
    features = guided(encoder)
    assert counts(encoder)[2] == (1, 1)
    scale = torch.ones(1, requires_grad=True)
    (features * scale).sum().backward()
    assert scale.grad is not None


def test_the_empty_text_that_was_asked_for_is_not_the_one_that_is_added():
    backbone = tiny_backbone()

    def scorer(**options):
        return CrossAttnScorer.from_pretrained(
            backbone,
            preset="paper",
            include_uncond=True,
            token_mask="no_pad",
            timesteps=(300,),
            **options,
        )

    warm = scorer()
    warm(picture(), [TEXT])
    both = warm(picture(), [TEXT, ""])
    torch.testing.assert_close(both, scorer(use_cache=False)(picture(), [TEXT, ""]))


class _Processor:
    """Stands for an image processor of transformers: pixels in [-1, 1]."""

    def __call__(self, images, return_tensors):
        rows = [torch.tensor(list(image.convert("L").tobytes())).float() for image in images]
        planes = torch.stack(rows).view(-1, 1, SIZE, SIZE) / 127.5 - 1
        return {"pixel_values": planes.expand(-1, 3, -1, -1).contiguous()}


@pytest.mark.parametrize(
    "change",
    [
        lambda clip: setattr(clip, "layer", -1),
        lambda clip: setattr(clip, "model", stirred(clip.model)),
        lambda clip: clip.model.to(torch.bfloat16).to(torch.float32),
        lambda clip: clip.model.register_forward_hook(_halved),
    ],
    ids=["layer", "model", "rounded", "hook"],
)
def test_a_changed_clip_gives_the_tokens_of_a_fresh_one(change):
    clip = ClipTokens(tiny_clip(), _Processor())
    before = clip(picture())
    assert torch.equal(clip(picture()), before)
    assert (clip._cache.hits, clip._cache.misses) == (1, 1)
    change(clip)
    after = clip(picture())
    clip.use_cache = False
    assert torch.equal(after, clip(picture()))
    assert not torch.equal(after, before)


def _halved(module, args, output):
    output.hidden_states = tuple(states / 2 for states in output.hidden_states)
    return output


@pytest.mark.parametrize("change", ["mean", "weights", "crops"])
def test_a_captioner_listens_to_its_clip_as_it_is_now(encoder, change):
    encoder.add_captioner(tiny_clip(CLIPVisionModelWithProjection))
    encoder.eval().requires_grad_(False)
    encoder.captioner.gate.data.fill_(1.0)
    image = torch.cat([picture(), picture(1)], dim=3)
    before = encoder.extract(image)[TAPS[0]]
    if change == "mean":
        encoder.clip.mean = (0.1, 0.2, 0.3)
    elif change == "crops":
        encoder.clip.crops = not encoder.clip.crops
    else:
        encoder.clip.vision_model = stirred(encoder.clip.vision_model)
    after = encoder.extract(image)[TAPS[0]]
    encoder.use_cache = False
    assert torch.equal(after, encoder.extract(image)[TAPS[0]])
    assert not torch.equal(after, before)


def test_a_compiled_unet_is_compiled_again_when_it_was_exchanged(encoder, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)  # the copy, untraced
    encoder.compile(mode="default")
    first = guided(encoder)
    made = encoder.backbone.compiled[TAPS]
    assert close(guided(encoder), first)
    assert encoder.backbone.compiled[TAPS] is made
    for change in (
        lambda backbone: setattr(backbone, "unet", stirred(backbone.unet)),
        lambda backbone: setattr(backbone.unet, "mid_block", stirred(backbone.unet.mid_block)),
        lambda backbone: backbone.unet.enable_freeu(s1=0.5, s2=0.5, b1=1.9, b2=1.9),
        lambda backbone: backbone.unet.conv_in.register_forward_hook(lambda m, a, out: out * 2),
    ):
        change(encoder.backbone)
        eager = DiffusionEncoder(copy.deepcopy(encoder.backbone), use_cache=False)
        torch.testing.assert_close(guided(encoder), guided(eager))


def test_a_weight_that_is_written_leaves_the_structure_as_it_is():
    module = nn.Linear(2, 2)
    before = structure_key(module)
    with torch.no_grad():
        module.weight.add_(1)
    module.requires_grad_(False).bfloat16()
    assert structure_key(module) == before
    module.out_features = 3
    assert structure_key(module) != before


def test_what_is_missing_is_computed_in_one_batch_and_equal_rows_once():
    cache, batches = TensorCache(1000), []

    def compute(rows: list[int]):
        batches.append(rows)
        return [(torch.tensor([float(row)]),) for row in rows]

    entries = recall(cache, ["a", "b", "a"], compute)
    assert batches == [[0, 1]]
    assert [float(entry) for (entry,) in entries] == [0.0, 1.0, 0.0]
    entries = recall(cache, ["b", "c"], compute)
    assert batches == [[0, 1], [1]]
    assert [float(entry) for (entry,) in entries] == [1.0, 1.0]
    recall(cache, ["a", "b", "c"], compute)
    recall(None, ["a", "a"], compute)
    assert batches == [[0, 1], [1], [0, 1]]


def test_a_second_question_on_sdxl_finds_what_the_first_left(tiny_sdxl_folder):
    taps = ("up_blocks.0.attentions.0",)
    encoder = DiffusionEncoder.from_pretrained(tiny_sdxl_folder, taps=taps, size=64)
    image = Image.new("RGB", (64, 64), "red")
    encoder.extract(image, "a circle", conditioning="cfg")
    encoder.extract(image, "a square", conditioning="cfg")
    caches = encoder.backbone.caches
    assert (caches.features.hits, caches.latents.hits) == (1, 1)


def test_a_config_that_is_exchanged_is_read_by_the_next_call(encoder):
    guided(encoder)
    encoder.config = EncoderConfig(taps=("up_blocks.0",), timestep=300)
    assert list(encoder.extract(picture())) == ["up_blocks.0"]
    assert [tap.name for tap in encoder.feature_info] == ["up_blocks.0"]
    fresh = DiffusionEncoder(encoder.backbone, encoder.config, use_cache=False)
    assert torch.equal(encoder(picture()), fresh(picture()))
    encoder.config = EncoderConfig(taps=("nowhere",))
    with pytest.raises(TapError):
        encoder.extract(picture())


def test_two_text_encoders_are_remembered_from_the_first_call_on(tiny_sdxl_folder):
    encoder = DiffusionEncoder.from_pretrained(tiny_sdxl_folder, taps="mid_block", size=64)
    image = torch.zeros(1, 3, 64, 64)
    encoder.extract(image, "red", conditioning="cfg")
    encoder.extract(image, "red", conditioning="cfg")
    assert counts(encoder) == [(1, 1), (2, 2), (1, 1)]


def test_a_weight_that_was_written_while_another_one_trained_is_seen_afterwards():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval().requires_grad_(False)
    before = state_key(module)
    module[1].requires_grad_(True)
    with torch.no_grad():
        module[0].weight.add_(1)
    assert state_key(module) is None
    module[1].requires_grad_(False)
    assert state_key(module) not in (None, before)


def test_a_parameter_that_was_taken_out_counts_no_more():
    module = nn.Linear(2, 2).eval()
    kept = module.weight
    assert state_key(module) is None
    module.weight = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    module.bias.requires_grad_(False)
    assert kept.requires_grad
    assert state_key(module) is not None


@pytest.mark.parametrize("fused", [False, True])
def test_what_an_optimizer_wrote_is_seen_whatever_kernel_it_has(encoder, fused):
    unet = encoder.backbone.unet
    before = guided(encoder)
    unet.requires_grad_(True)
    encoder.extract(picture(), TEXT)[TAPS[0]].square().sum().backward()
    torch.optim.AdamW(unet.parameters(), lr=0.1, fused=fused).step()
    unet.requires_grad_(False)
    after = guided(encoder)
    assert not close(after, before)
    encoder.clear_cache()
    assert close(guided(encoder), after)


def test_a_model_without_values_and_parts_that_do_not_fit_are_refused(encoder):
    for part in ("text_encoder", "tokenizer"):
        with pytest.raises(BackboneError, match=f"{part} must be there, got None"):
            setattr(encoder.backbone, part, None)
    config = copy.deepcopy(encoder.backbone.text_encoder.config)
    config.hidden_size = 2 * config.hidden_size
    encoder.backbone.text_encoder = type(encoder.backbone.text_encoder)(config).eval()
    with pytest.raises(BackboneError, match="states of width 16 and the U-Net takes 8"):
        guided(encoder)
    with pytest.raises(ConfigError, match="the model is on the meta device"):
        guided(encoder.to("meta"))
