"""What is saved finds its model again: from any directory, after a move, and never another one."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler

import builders
from diffenc import CrossAttnScorer, DiffusionEncoder, FusedEncoder
from diffenc.errors import BackboneError, ConfigError
from diffenc.hosts.spec import TowerSpec
from diffenc.memory.digests import full_digest, is_marked, weights_mark
from diffenc.mllm import DiffusionVLM
from diffenc.mllm.model_folder import _encoder_told
from diffenc.mllm.training.token_cache import encoder_digest
from diffenc.mllm.vision import VisionTokens
from diffenc.models import describe, load_backbone
from diffenc.scoring.query_bank import QueryBank
from diffenc.storage.pretrained import lasting_name, pretrained_source, read_name, stored_name
from loaded import fresh
from state_builders import picture, stirred, tiny_backbone
from vlm_builders import save_tiny_lm, save_tiny_vision


@pytest.fixture
def models(tmp_path, monkeypatch, tiny_sd_folder):
    """A directory with a model in it, in which the program runs."""
    shutil.copytree(tiny_sd_folder, tmp_path / "here" / "models" / "sd")
    (tmp_path / "there" / "models").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def put_another_model(folder):
    """Other weights under the same name."""
    backbone = load_backbone(folder)
    backbone.unet = stirred(backbone.unet)
    backbone.unet.save_pretrained(folder / "unet")


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "name"),
    [(DiffusionEncoder, "models/sd"), (CrossAttnScorer, "../here/models/sd")],
)
def test_a_relative_folder_is_found_from_another_directory(models, monkeypatch, kind, name):
    saved = kind.from_pretrained(name)
    saved.save_pretrained("saved")
    shutil.copytree(models / "here" / "models" / "sd", models / "there" / "models" / "sd")
    put_another_model(models / "there" / "models" / "sd")
    monkeypatch.chdir(models / "there")
    again = kind.from_pretrained("../here/saved")
    assert again.backbone.name == str(models / "here" / "models" / "sd")
    for one, other in zip(saved.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [DiffusionEncoder, CrossAttnScorer])
def test_a_model_within_the_saved_folder_moves_with_it(models, monkeypatch, kind):
    (models / "here" / "saved").mkdir()
    shutil.move("models/sd", "saved/sd")
    kind.from_pretrained("saved/sd").save_pretrained("saved")
    shutil.move("saved", models / "moved")
    monkeypatch.chdir(models / "there")
    assert kind.from_pretrained("../moved").backbone.name == str(models / "moved" / "sd")


@pytest.mark.long
@pytest.mark.parametrize("kind", [DiffusionEncoder, CrossAttnScorer])
def test_another_model_in_the_same_place_is_refused(models, kind):
    kind.from_pretrained("models/sd").save_pretrained("saved")
    put_another_model(models / "here" / "models" / "sd")
    with pytest.raises(BackboneError, match=r"is not the model that .*saved was saved with"):
        kind.from_pretrained("saved")


@pytest.mark.long
def test_half_precision_and_a_cut_model_are_known_again(models):
    encoder = DiffusionEncoder.from_pretrained("models/sd", taps="mid_block", timestep=20)
    encoder.save_pretrained("saved")
    DiffusionEncoder.from_pretrained("saved", dtype=torch.bfloat16, truncate=True)
    other = stirred(encoder.backbone.unet)
    DiffusionEncoder.from_pretrained("saved", unet=other)  # the caller's own, on purpose


@pytest.mark.long
def test_a_bank_is_found_from_another_directory_and_knows_its_model(models, monkeypatch):
    scorer = CrossAttnScorer.from_pretrained(
        "models/sd", preset="paper", mode="shared-query", timesteps=(300,)
    )
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    bank = scorer.build_index(image, "bank")
    bank.scores("a red circle")
    for parameter in scorer.backbone.unet.down_blocks.parameters():
        parameter.mul_(1.2)
    with pytest.raises(BackboneError, match="other weights"):
        bank.scores("a red circle")
    monkeypatch.chdir(models / "there")
    again = QueryBank.load(models / "here" / "bank")
    assert again.backbone.name == str(models / "here" / "models" / "sd")


@pytest.mark.long
def test_an_alias_wins_over_a_folder_of_its_name(tmp_path, monkeypatch, tiny_sd_folder):
    for alias in ("shapes", "sdxl"):
        shutil.copytree(tiny_sd_folder, tmp_path / alias)
    (tmp_path / "shapes" / "config.json").write_text('{"backbone": "nothing"}')
    (tmp_path / "shapes" / "scorer_config.json").write_text('{"backbone": "nothing"}')
    (tmp_path / "shapes-clip").mkdir()
    monkeypatch.chdir(tmp_path)
    assert DiffusionEncoder.from_pretrained("shapes").backbone.name == "shapes"
    assert CrossAttnScorer.from_pretrained("shapes").backbone.name == "shapes"
    assert describe("sdxl").family == "sdxl"
    for folder in ("./sdxl", tmp_path / "sdxl"):
        assert describe(folder).family == "sd"
        assert load_backbone(folder).name == str(tmp_path / "sdxl")
    assert pretrained_source("shapes-clip") != str(tmp_path / "shapes-clip")
    assert pretrained_source("./shapes-clip") == str(tmp_path / "shapes-clip")
    assert TowerSpec.parse("diffenc:sdxl").model == "sdxl"


def test_a_hub_id_of_a_saved_config_never_becomes_a_folder(models, monkeypatch):
    encoder = DiffusionEncoder.from_pretrained("models/sd")
    encoder.save_pretrained("saved")
    config = json.loads((models / "here" / "saved" / "config.json").read_text())
    config["backbone"] = "models/sd"  # as a Hub id, or an earlier version's relative path
    (models / "here" / "saved" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=r"here/models/sd may be another model"):
        DiffusionEncoder.from_pretrained("saved")


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("sdxl", "sdxl"),
        ("owner/name", "owner/name"),
        ("/a/saved/inner/model", "./inner/model"),
        ("/a/savedmodel", "/a/savedmodel"),
        ("/a", "/a"),
    ],
)
def test_a_stored_name_is_read_as_it_was(name, stored):
    assert stored_name(name, "/a/saved") == stored
    assert read_name(stored, "/a/saved", aliases=("sdxl",)) == name


@pytest.mark.parametrize("name", [None, 3, "", ["x"]])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(BackboneError, match="names no model"):
        read_name(name, "/a/saved")


def test_the_home_folder_and_dots_are_written_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sd").mkdir()
    assert lasting_name("~/sd") == str(tmp_path / "sd")
    assert lasting_name("~/other/../sd") == str(tmp_path / "sd")
    assert lasting_name("owner/name") == "owner/name"
    assert lasting_name("shapes-clip") == "shapes-clip"


def test_a_tower_s_text_holds_the_whole_path(models, monkeypatch):
    spec = TowerSpec.parse("diffenc:./models/sd?t=20")
    text = str(spec)
    monkeypatch.chdir(models / "there")
    assert TowerSpec.parse(text) == spec
    assert TowerSpec.parse(text).model == str(models / "here" / "models" / "sd")


def test_a_vision_model_is_saved_by_its_whole_path_and_known_again(tmp_path, monkeypatch):
    folder = save_tiny_vision(tmp_path)
    monkeypatch.chdir(folder.parent)
    vision = VisionTokens.from_pretrained(folder.name)
    assert _encoder_told(vision, tmp_path / "elsewhere")["name"] == str(folder)
    mark = weights_mark(vision)
    assert is_marked(vision, mark)
    assert not is_marked(stirred(vision), mark)


def test_a_mark_tells_models_apart_and_outlives_rounding():
    unet = builders.tiny_unet()
    mark = weights_mark(unet)
    assert is_marked(unet, json.loads(json.dumps(mark)))
    for dtype in (torch.float16, torch.bfloat16):
        assert is_marked(builders.tiny_unet().to(dtype), mark)
    assert not is_marked(stirred(unet, 0.01), mark)
    for broken in (None, [], "mark", [float("nan")] * len(mark), mark[:-1], ["1"] * len(mark)):
        assert not is_marked(unet, broken)


@pytest.mark.long
def test_the_name_of_cached_tokens_follows_every_value_and_setting():
    def changed(change):
        encoder = DiffusionEncoder(tiny_backbone())
        change(encoder)
        return encoder_digest(encoder)

    def one_value(encoder):
        with torch.no_grad():
            encoder.backbone.unet.mid_block.resnets[0].conv1.weight[1, 2, 0, 1] += 1e-3

    def scaled(encoder):
        encoder.backbone.vae.register_to_config(scaling_factor=0.3)

    def padded(encoder):
        encoder.backbone.tokenizer.pad_token = "!"

    def slower(encoder):
        encoder.backbone.scheduler.alphas_cumprod[7] *= 0.99

    def configured(conditioning):
        return lambda encoder: setattr(
            encoder, "config", replace(encoder.config, conditioning=conditioning)
        )

    changes = [
        lambda encoder: None,
        one_value,
        scaled,
        padded,
        slower,
        lambda encoder: encoder.backbone.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
        lambda encoder: setattr(encoder.backbone, "uncond_rule", "zeros"),
        lambda encoder: encoder.bfloat16(),
        *map(configured, ("uncond", "cfg", "concat")),
        lambda encoder: setattr(encoder, "config", replace(encoder.config, timestep=7)),
        lambda encoder: setattr(encoder, "config", replace(encoder.config, taps=("mid_block",))),
        lambda encoder: setattr(encoder, "config", replace(encoder.config, guidance_scale=3.0)),
    ]
    digests = [changed(change) for change in changes]
    assert len(set(digests)) == len(changes)
    assert (
        changed(lambda encoder: encoder.extract(picture(), "red", conditioning="cfg")) == digests[0]
    )
    encoder = DiffusionEncoder(tiny_backbone())
    assert encoder_digest(encoder, "bf16") != digests[0]
    encoder.backbone.name = "elsewhere"
    assert full_digest(encoder) == full_digest(DiffusionEncoder(tiny_backbone()))


def test_the_name_of_cached_tokens_does_not_follow_the_folder(models):
    shutil.copytree("models/sd", "copy")
    digests = {encoder_digest(DiffusionEncoder.from_pretrained(n)) for n in ("models/sd", "copy")}
    assert len(digests) == 1


def test_a_multimodal_model_finds_and_knows_both_of_its_models(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    vision = save_tiny_vision(tmp_path / "here" / "eye")
    language = save_tiny_lm(tmp_path / "here" / "lm")
    vlm = DiffusionVLM(VisionTokens.from_pretrained(vision.name), "lm")
    vlm.save_pretrained("saved", include_language_model=False)
    monkeypatch.chdir(tmp_path / "there")
    again = DiffusionVLM.from_pretrained("../here/saved")
    assert again.language_model.name_or_path == str(language)
    assert again.encoder.name == str(vision)
    stirred(again.language_model).save_pretrained(language)
    with pytest.raises(BackboneError, match=r"is not the language model that .*saved was saved"):
        DiffusionVLM.from_pretrained("../here/saved")


def other_schedule(backbone):
    backbone.scheduler = DDPMScheduler(beta_end=0.05)


def other_target(backbone):
    backbone.scheduler.register_to_config(prediction_type="v_prediction")


def other_scale(backbone):
    backbone.vae.register_to_config(scaling_factor=0.5)


def other_padding(backbone):
    backbone.tokenizer.pad_token = "!"


def other_limit(backbone):
    backbone.tokenizer.model_max_length = 20


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_schedule, "its scheduler has other settings"),
        (other_target, "its scheduler has other settings"),
        (other_scale, "its vae has other settings"),
        (other_padding, "its tokenizer has other settings"),
        (other_limit, "its tokenizer has other settings"),
    ],
)
def test_settings_that_no_name_leads_to_are_not_lost_in_silence(
    tiny_sd_folder, tmp_path, change, said
):
    encoder = DiffusionEncoder.from_pretrained(fresh(tiny_sd_folder))
    change(encoder.backbone)
    CrossAttnScorer(encoder.backbone).save_pretrained(tmp_path / "scorer")
    encoder.save_pretrained(tmp_path / "encoder")
    for kind, name in ((CrossAttnScorer, "scorer"), (DiffusionEncoder, "encoder")):
        with pytest.raises(BackboneError, match=said):
            kind.from_pretrained(tmp_path / name)
    encoder.save_pretrained(tmp_path / "whole", include_backbone=True)
    DiffusionEncoder.from_pretrained(tmp_path / "whole")


@pytest.mark.long
def test_a_scorer_with_an_adapter_is_not_saved_without_it(tiny_sd_folder, tmp_path):
    encoder = DiffusionEncoder.from_pretrained(fresh(tiny_sd_folder))
    encoder.add_lora(rank=2)
    scorer = CrossAttnScorer(encoder.backbone)
    with pytest.raises(ConfigError, match="adapter 'default', which the folder of a scorer does"):
        scorer.save_pretrained(tmp_path / "scorer")
    encoder.set_lora(None)
    scorer.save_pretrained(tmp_path / "scorer")


@pytest.mark.parametrize("kind", ["fused", "vision"])
def test_an_image_processor_that_was_changed_is_saved(tmp_path, kind):
    seen = (
        FusedEncoder("shapes-clip", "shapes")
        if kind == "fused"
        else VisionTokens.from_pretrained("shapes-clip")
    )
    processor = seen.clip.image_processor if kind == "fused" else seen.image_processor
    processor.image_mean = [0.1, 0.2, 0.3]
    shown = picture(1)
    if kind == "fused":
        seen.save_pretrained(tmp_path / "saved")
        again = FusedEncoder.from_pretrained(tmp_path / "saved")
    else:
        DiffusionVLM(seen, "shapes-lm").save_pretrained(tmp_path / "saved")
        again = DiffusionVLM.from_pretrained(tmp_path / "saved").encoder
    assert torch.equal(seen(shown, "a red circle"), again(shown, "a red circle"))


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody/model", "a\0b", "./" + "y" * 5000])
def test_a_saved_name_that_nothing_can_have_is_no_foreign_error(tmp_path, name):
    try:
        read = read_name(name, tmp_path)
    except BackboneError:
        return
    assert read.endswith(name.removeprefix("./"))
