import copy
import pickle
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffenc import DiffusionEncoder, EncoderConfig
from diffenc.denoiser.hooks import ForwardTaps
from diffenc.errors import (
    BackboneError,
    ConfigError,
    ImageError,
    NonFiniteError,
    OutputError,
    PromptError,
    ShapeError,
    TapError,
)
from diffenc.inputs.images import to_pixel_values
from diffenc.inputs.noise import add_noise, shared_noise
from diffenc.passes.forward import predict_noise

TAPS = ("up_blocks.1", "mid_block", "up_blocks.2.attentions.0.transformer_blocks.0.attn2.to_q")


def picture(seed: int = 0, height: int = 64, width: int = 64) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def encoder(tiny_sd_folder):
    return DiffusionEncoder.from_pretrained(tiny_sd_folder, taps=TAPS)


@pytest.fixture(scope="module")
def sdxl_encoder(tiny_sdxl_folder):
    taps = ("up_blocks.0", "mid_block")
    return DiffusionEncoder.from_pretrained(tiny_sdxl_folder, taps=taps, size=64)


@pytest.fixture
def calls(encoder, monkeypatch):
    """Rows of each call of the U-Net; nothing is remembered from before."""
    encoder.clear_cache()
    rows: list[int] = []
    forward = encoder.backbone.unet.forward

    def counting(sample, *args, **kwargs):
        rows.append(len(sample))
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(encoder.backbone.unet, "forward", counting)
    return rows


def hooks(module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_features_come_in_tap_order_with_the_shapes_foretold(encoder):
    features = encoder.extract([picture(), picture(1)], "red circle")
    assert list(features) == list(TAPS) == [tap.name for tap in encoder.feature_info]
    for tap in encoder.feature_info:
        cells = 64 // tap.reduction
        assert features[tap.name].shape == (2, tap.channels, cells, cells)


def test_tokens_concatenate_the_taps_on_the_middle_grid(encoder):
    tokens = encoder([picture(), picture(1)], ["red", "blue"])
    features = encoder.extract([picture(), picture(1)], ["red", "blue"])
    assert features.grid == (4, 4)
    assert tokens.shape == (2, 16, encoder.hidden_size)
    assert torch.equal(tokens, features.tokens())
    assert features.tokens(3).shape == (2, 9, encoder.hidden_size)


def test_text_changes_features_and_unconditional_ones_have_none(encoder):
    red, blue = encoder(picture(), "red circle"), encoder(picture(), "blue square")
    assert not torch.allclose(red, blue)
    assert torch.equal(encoder(picture()), encoder(picture(), None))
    assert torch.equal(encoder(picture()), encoder(picture(), ""))


@pytest.mark.parametrize(
    ("conditioning", "rows"), [("uncond", 3), ("cond", 3), ("cfg", 6), ("concat", 6)]
)
def test_only_what_is_asked_is_computed_in_one_call(encoder, calls, conditioning, rows):
    encoder.extract([picture(i) for i in range(3)], "red", conditioning=conditioning)
    assert calls == [rows]


def test_a_second_question_costs_one_conditional_pass(encoder, calls, monkeypatch):
    pictures = []
    encode = encoder.backbone.vae.encode
    monkeypatch.setattr(
        encoder.backbone.vae, "encode", lambda x, *a: (pictures.append(len(x)), encode(x, *a))[1]
    )
    images = [picture(seed) for seed in range(3)]
    first = encoder.extract(images, "red", conditioning="cfg")
    assert (calls, pictures) == ([6], [3])
    second = encoder.extract(images, "blue", conditioning="cfg")
    assert (calls, pictures) == ([6, 3], [3])
    third = encoder.extract([images[2], picture(3)], "red", conditioning="cfg")
    assert (calls, pictures) == ([6, 3, 3], [3, 1])
    encoder.extract(images, conditioning="uncond")
    assert (calls, pictures) == ([6, 3, 3], [3, 1])
    for tap in TAPS:
        assert torch.equal(first.select("uncond")[tap], second.select("uncond")[tap])
        torch.testing.assert_close(third[tap][0], first[tap][2], atol=1e-5, rtol=1e-5)


def test_equal_images_of_a_batch_are_encoded_once(encoder, monkeypatch):
    encoder.clear_cache()
    pictures = []
    encode = encoder.backbone.vae.encode
    monkeypatch.setattr(
        encoder.backbone.vae, "encode", lambda x, *a: (pictures.append(len(x)), encode(x, *a))[1]
    )
    features = encoder.extract([picture(), picture(1), picture()], "red")["mid_block"]
    assert pictures == [2]
    torch.testing.assert_close(features[0], features[2], atol=1e-5, rtol=1e-5)


def test_caches_are_bypassed_when_weights_train_or_the_switch_is_off(tiny_sd_folder):
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder, taps=("mid_block",))
    caches = encoder.backbone.caches

    def kept() -> tuple[int, int, int]:
        encoder.clear_cache()
        encoder.extract(picture(), "red", conditioning="cfg")
        return len(caches.latents), len(caches.prompts), len(caches.features)

    assert kept() == (1, 2, 1)
    encoder.use_cache = False
    assert kept() == (0, 0, 0)
    encoder.use_cache = True
    encoder.backbone.unet.requires_grad_(True)
    assert kept() == (1, 2, 0)
    encoder.backbone.unet.requires_grad_(False)
    encoder.backbone.text_encoder.train()
    assert kept() == (1, 0, 0)
    encoder.backbone.text_encoder.eval()
    encoder.backbone.vae.requires_grad_(True)
    assert kept() == (0, 2, 0)


def test_new_weights_and_other_dtypes_are_seen(tiny_sd_folder):
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder, taps=("mid_block",))
    before = encoder.extract(picture())["mid_block"]
    halved = {k: v / 2 for k, v in encoder.state_dict().items()}
    encoder.load_state_dict(halved)
    assert not torch.allclose(encoder.extract(picture())["mid_block"], before)
    assert encoder.to(torch.bfloat16).extract(picture())["mid_block"].dtype == torch.bfloat16


def test_returned_maps_do_not_alias_the_cache(encoder):
    encoder.clear_cache()
    encoder.extract(picture(), "red", conditioning="cfg")["mid_block"]
    first = encoder.extract(picture(), conditioning="uncond")["mid_block"]
    expected = first.clone()
    first.zero_()
    assert torch.equal(encoder.extract(picture(), conditioning="uncond")["mid_block"], expected)


def test_several_timesteps_stand_on_a_dimension_of_their_own(encoder):
    options = {"taps": TAPS, "conditioning": "cfg"}
    several = DiffusionEncoder.from_pretrained(encoder.backbone, timestep=(50, 261, 600), **options)
    features = several.extract([picture(), picture(1)], "red")
    for index, timestep in enumerate((50, 261, 600)):
        alone = DiffusionEncoder.from_pretrained(encoder.backbone, timestep=timestep, **options)
        one = alone.extract([picture(), picture(1)], "red")
        for tap in TAPS:
            assert features[tap].shape[:2] == (2, 3)
            difference = (features[tap][:, index] - one[tap]).abs().max()
            assert difference <= 1e-5 * one[tap].abs().max()
        torch.testing.assert_close(features.tokens()[:, index], one.tokens(), atol=1e-5, rtol=1e-4)


def test_draws_are_averaged(encoder, calls):
    mean = DiffusionEncoder.from_pretrained(encoder.backbone, taps=TAPS, draws=3)
    features = mean.extract(picture(), "red")
    assert calls == [3]
    by_hand = []
    for draw in range(3):
        latents = encoder.backbone.vae.encode(
            to_pixel_values(picture(), size=64)
        ).latent_dist.mode()
        latents = latents * encoder.backbone.vae.config.scaling_factor
        noise = shared_noise((4, 8, 8), seed=0, timestep=50, draw=draw)
        noisy = add_noise(encoder.backbone.scheduler, latents, noise, 50)
        embeds = encoder.backbone.embed(["red"], size=(64, 64))
        with torch.no_grad(), ForwardTaps(encoder.backbone.unet, ["mid_block"]) as taps:
            encoder.backbone.unet(noisy, 50, **embeds.unet_kwargs())
        by_hand.append(taps["mid_block"])
    torch.testing.assert_close(features["mid_block"], sum(by_hand) / 3, atol=1e-5, rtol=1e-4)


def test_without_noise_the_latents_stay_clean(encoder):
    clean = [
        DiffusionEncoder.from_pretrained(encoder.backbone, taps=TAPS, noise=None, seed=seed)
        for seed in (0, 1)
    ]
    assert torch.equal(clean[0](picture(), "red"), clean[1](picture(), "red"))
    assert not torch.allclose(clean[0](picture(), "red"), encoder(picture(), "red"))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_splitting_a_batch_changes_nothing(encoder, calls, batch_size):
    images = [picture(seed) for seed in range(3)]
    split = DiffusionEncoder.from_pretrained(encoder.backbone, taps=TAPS, batch_size=batch_size)
    parts = split.extract(images, "red", conditioning="cfg")
    assert sum(calls) == 6
    assert max(calls) == batch_size
    encoder.clear_cache()
    whole = encoder.extract(images, "red", conditioning="cfg")
    for tap in TAPS:
        assert (parts[tap] - whole[tap]).abs().max() <= 1e-5 * whole[tap].abs().max()


def test_running_out_of_memory_is_answered_with_smaller_calls(encoder, calls, monkeypatch):
    forward = encoder.backbone.unet.forward

    def small_only(sample, *args, **kwargs):
        if len(sample) > 2:
            raise torch.cuda.OutOfMemoryError("too large")
        return forward(sample, *args, **kwargs)

    images = [picture(seed) for seed in range(5)]
    expected = encoder.extract(images, "red")
    with monkeypatch.context() as patch:
        patch.setattr(encoder.backbone.unet, "forward", small_only)
        with pytest.warns(UserWarning, match="batch_size=2") as warned:
            features = encoder.extract(images, "red")
    assert len(warned) == 1
    for tap in TAPS:
        torch.testing.assert_close(features[tap], expected[tap], atol=1e-5, rtol=1e-4)


def test_prompts_may_be_encoded_before(encoder):
    embeds = encoder.backbone.embed(["red circle"], size=(64, 64))
    assert torch.equal(encoder(picture(), embeds), encoder(picture(), "red circle"))


def test_the_empty_prompt_of_sdxl_is_a_text_and_not_the_unconditional_one(sdxl_encoder):
    """Of its pipeline's prompts only an absent one is zeros."""
    features = sdxl_encoder.extract([picture(), picture()], ["", "red"], conditioning="cfg")
    empty = sdxl_encoder.extract(picture(), sdxl_encoder.backbone.embed([""], size=(64, 64)))
    absent, alone = sdxl_encoder.extract(picture()), sdxl_encoder.extract(picture(), "")
    assert (absent.conditioning, alone.conditioning) == ("uncond", "cond")
    for tap in features:
        uncond, cond = features.select("uncond")[tap], features.select("cond")[tap]
        torch.testing.assert_close(cond[:1], empty[tap], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(alone[tap], empty[tap], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(absent[tap], uncond[:1], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(cond[0], uncond[0], atol=1e-3)


@pytest.mark.parametrize("rule", ["zeros", "empty", None])
def test_no_prompt_and_the_empty_one_are_remembered_apart(tiny_sdxl_folder, rule):
    encoder = DiffusionEncoder.from_pretrained(
        tiny_sdxl_folder, taps=("mid_block",), size=64, uncond=rule
    )
    plain = DiffusionEncoder(encoder.backbone, encoder.config, use_cache=False)
    assert torch.equal(plain(picture(), ""), plain(picture())) == (rule == "empty")
    for prompts in ("", None, "", None):
        assert torch.equal(encoder(picture(), prompts), plain(picture(), prompts))


def test_non_finite_features_name_tap_and_remedy(tiny_sd_folder):
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder, taps=("mid_block",))
    with torch.no_grad():
        encoder.backbone.unet.conv_in.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"'mid_block'.*bfloat16"):
        encoder(picture(), "red")


def test_gradients_flow_where_something_requires_them_and_nowhere_else(tiny_sd_folder):
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder, taps=("mid_block",))
    assert not encoder(picture(), "red").requires_grad
    pixels = torch.zeros(1, 3, 64, 64, requires_grad=True)
    encoder(pixels, "red").sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert all(p.grad is None for p in encoder.parameters())
    weight = encoder.backbone.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight
    weight.requires_grad_(True)
    encoder(picture(), "red").sum().backward()
    assert weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert not encoder(picture(), "red").requires_grad


def test_the_fused_pass_equals_two_passes(encoder):
    images, prompts = [picture(), picture(1)], ["red circle", "blue square"]
    fused = encoder.extract(images, prompts, conditioning="cfg")
    for half in ("uncond", "cond"):
        alone = encoder.extract(images, prompts, conditioning=half)
        for tap in TAPS:
            scale = alone[tap].abs().max()
            difference = (fused.select(half)[tap] - alone[tap]).abs().max()
            assert difference <= 1e-5 * scale


def test_guidance_is_linear_in_its_scale_and_exact_at_its_ends(encoder):
    features = encoder.extract(picture(), "red", conditioning="cfg", guidance_scale=4.5)
    uncond, cond = features.select("uncond"), features.select("cond")
    for tap in TAPS:
        expected = uncond[tap] + 4.5 * (cond[tap] - uncond[tap])
        torch.testing.assert_close(features[tap], expected)
        assert torch.equal(features.select("cfg", guidance_scale=1)[tap], cond[tap])
        assert torch.equal(features.select("cfg", guidance_scale=0)[tap], uncond[tap])


def test_concat_doubles_the_channels(tiny_sd_folder, encoder):
    double = DiffusionEncoder.from_pretrained(tiny_sd_folder, taps=TAPS, conditioning="concat")
    features = double.extract(picture(), "red")
    assert double.hidden_size == 2 * encoder.hidden_size == features.tokens().shape[2]
    halves = torch.cat(
        [features.select("uncond")["mid_block"], features.select("cond")["mid_block"]], 1
    )
    assert torch.equal(features["mid_block"], halves)


def test_an_image_s_features_do_not_depend_on_the_rest_of_the_batch(encoder):
    images = [picture(seed) for seed in range(7)]
    prompts = [f"{'red ' * seed}circle" for seed in range(7)]
    together = encoder(images, prompts)
    for index in (0, 3, 6):
        alone = encoder(images[index], prompts[index])[0]
        assert (together[index] - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_equal_calls_give_equal_features_and_leave_the_global_generator(encoder):
    state = torch.random.get_rng_state()
    assert torch.equal(encoder(picture(), "red"), encoder(picture(), "red"))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_seed_and_timestep_matter(tiny_sd_folder, encoder):
    base = encoder(picture(), "red")
    for option in ({"seed": 1}, {"timestep": 500}, {"posterior": "sample"}):
        other = DiffusionEncoder.from_pretrained(encoder.backbone, taps=TAPS, **option)
        assert not torch.allclose(other(picture(), "red"), base)


@pytest.mark.parametrize("size", [(288, 352), (264, 280), (40, 72)], ids=str)
def test_odd_sizes_work_without_resizing(tiny_sd_folder, encoder, size):
    whole = DiffusionEncoder.from_pretrained(encoder.backbone, taps=TAPS, resize="none")
    features = whole.extract(picture(0, *size), "red", conditioning="cfg")
    height, width = features["up_blocks.2.attentions.0.transformer_blocks.0.attn2.to_q"].shape[2:]
    assert (height, width) == tuple(-(-side // 16) for side in size)


def test_no_hook_survives_and_nothing_is_aliased(encoder):
    before = hooks(encoder)
    features = encoder.extract(picture(), "red", conditioning="cfg")
    pointers = {
        half[tap].untyped_storage().data_ptr()
        for half in (features.select("uncond"), features.select("cond"))
        for tap in TAPS
    }
    assert len(pointers) == 2 * len(TAPS)
    kept = features["mid_block"].clone()
    encoder.extract(picture(1), "blue", conditioning="cfg")
    assert torch.equal(features["mid_block"], kept)
    assert hooks(encoder) == before


def test_a_failure_inside_the_unet_leaves_no_hook(encoder, monkeypatch):
    before = hooks(encoder)

    def fail(*_args, **_kwargs):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(encoder.backbone.unet.mid_block, "forward", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            encoder(picture(), "red")
    assert hooks(encoder) == before
    encoder(picture(), "red")


def test_two_threads_may_share_an_encoder(encoder):
    prompts = ["red circle", "blue square"]
    expected = [encoder(picture(i), prompts[i]) for i in range(2)]
    results: list[list[torch.Tensor]] = [[], []]

    def work(index: int) -> None:
        for _ in range(5):
            results[index].append(encoder(picture(index), prompts[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert len(results[index]) == 5
        assert all(torch.equal(result, expected[index]) for result in results[index])


@pytest.mark.long
def test_the_backbone_is_registered_copied_and_pickled(encoder):
    assert any(name.startswith("backbone.unet.") for name in encoder.state_dict())
    for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        # Other memory may be aligned otherwise and summed in another order.
        torch.testing.assert_close(twin(picture(), "red"), encoder(picture(), "red"))
    halved = copy.deepcopy(encoder).to(torch.bfloat16)
    assert halved(picture(), "red").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_close_to_float32(tiny_sd_folder, encoder, dtype):
    half = DiffusionEncoder.from_pretrained(tiny_sd_folder, taps=TAPS, dtype=dtype)
    exact, rounded = encoder(picture(), "red"), half(picture(), "red")
    assert rounded.dtype == dtype
    # Six levels of random layers: measured 1 % of the largest magnitude in bfloat16.
    assert (rounded.float() - exact).abs().max() <= 0.05 * exact.abs().max()


def test_sdxl_is_told_the_size_and_zeros_differ_from_empty(sdxl_encoder):
    by_rule = sdxl_encoder.extract(picture())["mid_block"]
    empty = DiffusionEncoder.from_pretrained(
        sdxl_encoder.backbone, taps=("mid_block",), size=64, uncond="empty"
    )
    assert not torch.allclose(empty.extract(picture())["mid_block"], by_rule)
    embeds = sdxl_encoder.backbone.embed(["red"], size=(64, 96))
    assert embeds.time_ids.tolist() == [[64, 96, 0, 0, 64, 96]]


def test_truncated_prompts_are_counted(encoder):
    limit = encoder.backbone.tokenizer.model_max_length
    features = encoder.extract([picture(), picture()], ["red", "red " * (limit + 1)])
    assert features.truncated == (0, 3)


@pytest.mark.parametrize("conditioning", ["cond", "cfg", "concat"])
def test_a_list_holds_the_maps_from_fine_to_coarse(encoder, conditioning):
    several = DiffusionEncoder.from_pretrained(
        encoder.backbone, taps=("mid_block", "up_blocks.3", "up_blocks.1", "mid_block.resnets.0")
    )
    features = several.extract(picture(), "red", conditioning=conditioning)
    maps = several.extract(picture(), "red", conditioning=conditioning, output="list")
    assert isinstance(maps, list)
    assert [m.shape[2] for m in maps] == [8, 4, 1, 1]
    order = ["up_blocks.3", "up_blocks.1", "mid_block", "mid_block.resnets.0"]
    for name, found in zip(order, maps, strict=True):
        assert (found - features[name]).abs().max() <= 1e-5 * features[name].abs().max()


def test_latents_are_a_tap_that_needs_no_unet(encoder, calls):
    backbone = encoder.backbone
    latents = DiffusionEncoder.from_pretrained(
        backbone, taps=("latents",), timestep=(50, 261), posterior="sample", draws=2
    )
    features = latents.extract([picture(), picture(1)], "red", conditioning="cfg")
    assert calls == []
    pixel_values = to_pixel_values([picture(), picture(1)], size=64)
    posterior = backbone.vae.encode(pixel_values).latent_dist
    drawn = [shared_noise((4, 8, 8), seed=0, timestep=-1, draw=draw) for draw in range(2)]
    expected = posterior.mean + posterior.std * sum(drawn) / 2
    expected = expected * backbone.vae.config.scaling_factor
    assert features["latents"].shape == (2, 2, 4, 8, 8)
    for step in range(2):
        torch.testing.assert_close(features["latents"][:, step], expected, atol=1e-5, rtol=1e-4)
    assert latents.feature_info[0].reduction == 8
    assert latents.hidden_size == 4


def test_sdxl_may_be_told_the_original_size(sdxl_encoder, tmp_path):
    """By hand: the first two time ids are the picture's own height and width."""
    backbone = sdxl_encoder.backbone
    picture(2, 100, 80).save(tmp_path / "b.png")
    images = [picture(1, 96, 48), tmp_path / "b.png"]
    expected = []
    for image, original in zip(images, [(96, 48), (100, 80)], strict=True):
        embeds = backbone.embed(["red"], size=(64, 64))
        embeds.time_ids.copy_(torch.tensor([[*original, 0, 0, 64, 64]]))
        expected.append(sdxl_encoder.extract(image, embeds)["mid_block"])
    options = {"taps": ("mid_block",), "size": 64}
    told = DiffusionEncoder.from_pretrained(backbone, original_size="image", **options)
    found = told.extract(images, "red", conditioning="cfg")
    cond, uncond = found.select("cond")["mid_block"], found.select("uncond")["mid_block"]
    torch.testing.assert_close(cond, torch.cat(expected), atol=1e-5, rtol=1e-4)
    plain = sdxl_encoder.extract(images, conditioning="uncond")["mid_block"]
    assert not torch.allclose(uncond, plain)
    fixed = DiffusionEncoder.from_pretrained(backbone, original_size=(96, 48), **options)
    torch.testing.assert_close(
        fixed.extract(images[0], "red")["mid_block"], expected[0], atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        fixed.extract(images, conditioning="uncond")["mid_block"][:1],
        uncond[:1],
        atol=1e-5,
        rtol=1e-4,
    )


@pytest.mark.long
def test_save_and_load_is_identity(tiny_sd_folder, tmp_path, encoder):
    options = {"taps": ("mid_block",), "timestep": 261, "size": (64, 96), "guidance_scale": 4.5}
    first = DiffusionEncoder.from_pretrained(tiny_sd_folder, **options)
    first.save_pretrained(tmp_path / "saved")
    second = DiffusionEncoder.from_pretrained(tmp_path / "saved")
    assert second.config == first.config == EncoderConfig(**options)
    assert torch.equal(second(picture(), "red"), first(picture(), "red"))
    assert DiffusionEncoder.from_pretrained(tmp_path / "saved", timestep=50).config.timestep == 50


@pytest.mark.wrong_type
def test_words_that_are_none_of_the_choices_are_answered(encoder):
    with pytest.raises(ConfigError, match="must be one of"):
        encoder.extract(picture(), "red", conditioning="guided")
    with pytest.raises(ConfigError, match=r"output must be one of .*'list'"):
        encoder.extract(picture(), "red", output="maps")


def test_bad_calls_are_answered(encoder, tmp_path):
    with pytest.raises(PromptError, match="3 prompts, 2 images"):
        encoder([picture(), picture()], ["a", "b", "c"])
    with pytest.raises(ConfigError, match="'cfg' needs prompts"):
        encoder.extract(picture(), conditioning="cfg")
    with pytest.raises(ShapeError, match="no images"):
        encoder([], "red")
    with pytest.raises(ImageError, match="no such image file"):
        encoder("nowhere.png")
    features = encoder.extract(picture(), "red")
    with pytest.raises(ConfigError, match="needs the uncond features"):
        features.select("cfg")
    with pytest.raises(TapError, match=r"Did you mean .*'up_blocks\.1'"):
        features["up_blocks.3"]
    with pytest.raises(TapError, match="Did you mean 'mid_block'"):
        DiffusionEncoder(encoder.backbone, EncoderConfig(taps=("midblock",)))
    with pytest.raises(ConfigError, match="Did you mean 'timestep'"):
        DiffusionEncoder.from_pretrained(encoder.backbone, timesteps=3)
    with pytest.raises(ShapeError, match="multiples of 8"):
        DiffusionEncoder.from_pretrained(encoder.backbone, size=60)(picture())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BackboneError, match="save_pretrained"):
        DiffusionEncoder.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        encoder.save_pretrained(tmp_path / "file")


def test_an_unknown_tap_is_refused_before_weights_are_loaded(tiny_sd_folder, tmp_path):
    hollow = shutil.copytree(
        tiny_sd_folder, tmp_path / "hollow", ignore=shutil.ignore_patterns("*.safetensors")
    )
    with pytest.raises(TapError, match="Did you mean 'mid_block'"):
        DiffusionEncoder.from_pretrained(hollow, taps="midblock")


@pytest.mark.parametrize("kind", ["tiny_sd_folder", "tiny_sdxl_folder"])
def test_a_truncated_encoder_gives_the_same_features_from_fewer_weights(request, kind):
    folder = request.getfixturevalue(kind)
    options = {"taps": ("mid_block", "up_blocks.1.attentions.0"), "size": (64, 96)}
    whole = DiffusionEncoder.from_pretrained(folder, **options)
    short = DiffusionEncoder.from_pretrained(folder, truncate=True, **options)
    expected = whole.extract(picture(), "red", conditioning="cfg")
    found = short.extract(picture(), "red", conditioning="cfg")
    for tap in expected:
        torch.testing.assert_close(found[tap], expected[tap], atol=1e-6, rtol=1e-5)
    kept = {name for name, _ in short.backbone.unet.named_parameters()}
    assert kept < {name for name, _ in whole.backbone.unet.named_parameters()}
    assert not any(name.startswith("up_blocks.1.resnets.1") for name in kept)
    assert all(parameter.device.type != "meta" for parameter in short.parameters())


def test_a_truncated_encoder_says_what_it_cannot_do(tiny_sd_folder):
    short = DiffusionEncoder.from_pretrained(tiny_sd_folder, taps="mid_block", truncate=True)
    message = r"'up_blocks\.1' lies behind 'mid_block.*was truncated.*without truncate"
    with pytest.raises(TapError, match=message):
        DiffusionEncoder.from_pretrained(short.backbone, taps="up_blocks.1")
    with pytest.raises(TapError, match=r"'up_blocks\.0' lies behind"):
        DiffusionEncoder.from_pretrained(short.backbone, taps=("mid_block", "up_blocks.*"))
    inside = DiffusionEncoder.from_pretrained(
        tiny_sd_folder, taps="up_blocks.1.resnets.0", truncate=True
    )
    with pytest.raises(TapError, match=r"'up_blocks\.1' lies behind"):  # the block is cut short
        DiffusionEncoder.from_pretrained(inside.backbone, taps="up_blocks.1")
    assert DiffusionEncoder.from_pretrained(inside.backbone, taps="up_blocks.0").feature_info
    with pytest.raises(TapError, match="no tap matches 'midblock'"):
        DiffusionEncoder.from_pretrained(short.backbone, taps="midblock")
    embeds = short.backbone.embed(["red"], size=(64, 64))
    with pytest.raises(ConfigError, match="truncated"):
        predict_noise(short.backbone, torch.zeros(1, 4, 8, 8), 50, embeds)
    with pytest.raises(ConfigError, match="is not truncated"):
        DiffusionEncoder.from_pretrained(short.backbone, truncate=True)


def test_missing_weights_of_a_truncated_unet_are_named(tiny_sd_folder, tmp_path):
    broken = shutil.copytree(tiny_sd_folder, tmp_path / "broken")
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("conv_in.weight")
    save_file(weights, file)
    with pytest.raises(BackboneError, match=r"lacks 1 weights, such as 'conv_in\.weight'"):
        DiffusionEncoder.from_pretrained(broken, taps="mid_block", truncate=True)


@pytest.mark.long
def test_a_compiled_encoder_gives_the_same_features_without_graph_breaks(
    tiny_sd_folder, pytestconfig
):
    if pytestconfig.getoption("jaxtyping_packages", None):
        pytest.skip("the run-time type checker breaks the graph")
    torch._dynamo.reset()
    options = {"taps": TAPS, "size": (72, 40), "conditioning": "cfg", "use_cache": False}
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder, **options)
    before = hooks(encoder)
    expected = encoder.extract([picture(), picture(1)], "red")
    encoder.compile(backend="eager", fullgraph=True)
    found = encoder.extract([picture(), picture(1)], "red")
    assert hooks(encoder) == before
    for tap in TAPS:
        # of the whole: single values near zero differ by more than their own rounding
        assert (found[tap] - expected[tap]).norm() < 2e-6 * expected[tap].norm()
    other = encoder.extract([picture(1), picture()], "blue")
    for tap in TAPS:
        assert not torch.equal(other[tap], found[tap])


def test_a_copy_of_a_compiled_encoder_is_not_compiled(tiny_sd_folder):
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder, taps=("mid_block",))
    encoder.compile(backend="eager")
    assert encoder.backbone.compiled
    assert not copy.deepcopy(encoder).backbone.compiled


def test_token_channels_tell_tap_and_half_of_each_channel(encoder):
    options = {"conditioning": "concat", "taps": TAPS}
    both = DiffusionEncoder(encoder.backbone, EncoderConfig(**options))
    groups = both(picture(), "a red circle").split(both.token_channels, dim=-1)
    features = both.extract(picture(), "a red circle")
    expected = [
        features.select(half).tokens()[..., sum(widths[:tap]) : sum(widths[: tap + 1])]
        for widths in [[info.channels for info in both.feature_info]]
        for tap in range(len(TAPS))
        for half in ("uncond", "cond")
    ]
    for group, channels in zip(groups, expected, strict=True):
        torch.testing.assert_close(group, channels)


def test_texts_made_elsewhere_have_the_shapes_that_sdxl_reads(sdxl_encoder):
    embeds = sdxl_encoder.backbone.embed(["red", "blue"], size=(64, 64))
    images = [picture(), picture()]
    for name, values in (
        ("pooled_prompt_embeds", embeds.pooled_prompt_embeds[:, :3]),
        ("pooled_prompt_embeds", embeds.pooled_prompt_embeds[:1]),
        ("time_ids", embeds.time_ids[:, :4]),
        ("prompt_embeds", embeds.prompt_embeds[0]),
    ):
        with pytest.raises(ShapeError, match=rf"^{name} must be of shape \("):
            sdxl_encoder.extract(images, replace(embeds, **{name: values}))
