import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffenc import CrossAttnScorer, DiffusionEncoder, QueryBank, load_backbone
from diffenc.errors import (
    BackboneError,
    ConfigError,
    NonFiniteError,
    OutputError,
    PromptError,
    ShapeError,
)
from diffenc.scoring.bank_weights import model_mark

TEXTS = ["a red circle", "a blue square", "left"]


def picture(seed, size=(64, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


@pytest.fixture(scope="module")
def images():
    return [picture(seed) for seed in range(5)]


@pytest.fixture(scope="module")
def backbone(tiny_sd_folder):
    return load_backbone(tiny_sd_folder)


def scorer_of(backbone, **options):
    options = {"size": 64, "timesteps": (200, 700), "batch_size": 4, **options}
    return CrossAttnScorer.from_pretrained(backbone, preset="paper", mode="shared-query", **options)


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": "up_blocks.1", "draws": 2},
        {"calibration": "neutral", "reference_texts": ("blue",), "include_uncond": True},
        {"token_mask": "no_pad", "layer_weights": tuple(map(float, range(16)))},
        {"token_mask": "content", "lse_axis": "pixels", "calibration": "gray"},
    ],
    ids=["plain", "layers", "references", "mask", "words"],
)
def test_a_bank_scores_as_the_scorer_does(backbone, images, tmp_path, options):
    scorer = scorer_of(backbone, **options)
    bank = scorer.build_index(images, tmp_path / "bank", dtype=torch.float32, shard_bytes=4000)
    assert len(bank) == 5
    assert len(list((tmp_path / "bank").glob("*.safetensors"))) > 1
    torch.testing.assert_close(bank.scores(TEXTS), scorer(images, TEXTS), rtol=0, atol=1e-5)


@pytest.mark.long
def test_sdxl_banks_and_given_references(tiny_sdxl_folder, images, tmp_path):
    scorer = scorer_of(load_backbone(tiny_sdxl_folder))
    scorer.calibrate(images[3:])
    scorer.build_index(images[:3], tmp_path, dtype=torch.float32)
    bank = QueryBank.load(tmp_path)  # by the name of the backbone
    torch.testing.assert_close(bank.scores(TEXTS), scorer(images[:3], TEXTS), rtol=0, atol=1e-5)


def test_half_precision_banks_are_near_and_as_large_as_was_told(backbone, images, tmp_path):
    scorer = scorer_of(backbone, calibration="gray")
    bank = scorer.build_index(images, tmp_path)
    torch.testing.assert_close(bank.scores(TEXTS), scorer(images, TEXTS), rtol=0, atol=2e-3)
    written = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    told = scorer.index_bytes(5)
    assert told <= written < told + 8192  # headers


def test_search_gives_the_best_images_with_their_names(backbone, images, tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(5)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    done = []
    scorer = scorer_of(backbone)
    bank = scorer.build_index(paths, tmp_path / "bank", progress=done.append)
    for path in paths:
        path.unlink()  # the images are no longer needed
    found = QueryBank.load(tmp_path / "bank", backbone=backbone).search(TEXTS, top=2)
    scores = bank.scores(TEXTS)
    for column, results in zip(scores.T, found, strict=True):
        best = column.topk(2)
        assert [result.index for result in results] == best.indices.tolist()
        assert [result.name for result in results] == [str(paths[r.index]) for r in results]
        assert [result.score for result in results] == pytest.approx(best.values.tolist())
    assert done[-1] == 5
    assert len(bank.search("red", top=99)[0]) == 5


def test_searching_costs_no_pass(backbone, images, tmp_path, monkeypatch):
    bank = scorer_of(backbone).build_index(images, tmp_path)

    def fail(*_args, **_kwargs):
        raise AssertionError

    monkeypatch.setattr(backbone.unet, "forward", fail)
    monkeypatch.setattr(backbone.vae, "encode", fail)
    assert bank.scores(TEXTS).shape == (5, 3)


def test_other_weights_are_refused_and_other_dtypes_are_not(
    tiny_sd_folder, backbone, images, tmp_path
):
    scorer = scorer_of(backbone)
    scorer.build_index(images, tmp_path)
    low = QueryBank.load(tmp_path, dtype=torch.bfloat16)
    torch.testing.assert_close(low.scores(TEXTS), scorer(images, TEXTS), rtol=2e-2, atol=0)
    other = load_backbone(tiny_sd_folder)
    other.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.mul_(1.01)
    with pytest.raises(BackboneError, match="built with other weights"):
        QueryBank.load(tmp_path, backbone=other)


@pytest.mark.long
def test_text_encoders_that_were_exchanged_and_adapters_left_out_are_refused(
    tiny_sd_folder, images, tmp_path
):
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder)
    bank = scorer_of(encoder.backbone).build_index(images, tmp_path / "plain")
    bank.scores(TEXTS)
    other = copy.deepcopy(encoder.backbone.text_encoder)
    other.get_input_embeddings().weight.mul_(1.1)
    plain, encoder.backbone.text_encoder = encoder.backbone.text_encoder, other
    with pytest.raises(BackboneError, match="built with other weights"):
        bank.scores(TEXTS)
    encoder.backbone.text_encoder = plain
    bank.scores(TEXTS)
    encoder.add_lora(rank=2)
    for name, parameter in encoder.backbone.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    scorer_of(encoder.backbone).build_index(images, tmp_path / "adapted").scores(TEXTS)
    with pytest.raises(BackboneError, match="built with other weights"):
        QueryBank.load(tmp_path / "adapted")


def test_a_bank_is_not_gone_on_with_under_an_adapter_of_another_scale(tiny_sd_folder):
    marks = []
    for alpha in (2, 8):
        encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder)
        encoder.add_lora(rank=2, alpha=alpha)
        for parameter in encoder.trainable_parameters():
            torch.nn.init.constant_(parameter, 0.1)
        marks.append(model_mark(encoder.backbone))
    assert marks[0]["unet"] != marks[1]["unet"]
    assert marks[0]["vae"] == marks[1]["vae"]


def test_folders_that_hold_something_are_left_alone(backbone, images, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="exists and is not empty"):
        scorer_of(backbone).build_index(images, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_an_incomplete_bank_is_none(backbone, images, tmp_path):
    with pytest.raises(ShapeError, match="must have one size"):
        scorer_of(backbone, resize="none", batch_size=2).build_index(
            [picture(0), picture(1, (64, 96))], tmp_path / "bank"
        )
    with pytest.raises(BackboneError, match="no complete query bank"):
        QueryBank.load(tmp_path / "bank", backbone=backbone)


def test_broken_banks_say_what_is_wrong(backbone, images, tmp_path):
    bank = scorer_of(backbone).build_index(images, tmp_path)
    (tmp_path / "queries-00000.safetensors").write_bytes(b"no tensors")
    with pytest.raises(BackboneError, match=r"cannot read .*queries-00000"):
        bank.scores("red")
    contents = json.loads((tmp_path / "bank.json").read_text())
    (tmp_path / "bank.json").write_text(json.dumps({**contents, "format": 99}))
    with pytest.raises(BackboneError, match="has format 99, this version reads 2"):
        QueryBank.load(tmp_path, backbone=backbone)
    (tmp_path / "bank.json").write_text("{}")
    with pytest.raises(BackboneError, match="no table of contents"):
        QueryBank.load(tmp_path, backbone=backbone)


def test_bad_input(backbone, images, tmp_path):
    scorer = scorer_of(backbone)
    bank = scorer.build_index(images, tmp_path / "bank")
    with pytest.raises(PromptError, match="got no texts"):
        bank.search([])
    with pytest.raises(PromptError, match="must be a string or a list of strings, got set"):
        bank.search({"red", "blue"})
    with pytest.raises(ConfigError, match="names must be a list of texts, got a value of type set"):
        scorer.build_index(images, tmp_path / "other", names=set(map(str, range(len(images)))))
    with pytest.raises(ConfigError, match="top must be 1 or more"):
        bank.search("red", top=0)
    with pytest.raises(ShapeError, match="got 1 names for 5 images"):
        scorer.build_index(images, tmp_path / "other", names=["a"])
    with pytest.raises(ConfigError, match="scores by attention alone"):
        scorer.with_options(preset="discffusion", size=64).build_index(images, tmp_path / "other")


def test_queries_that_do_not_fit_are_an_error(tiny_sd_folder, images, tmp_path):
    backbone = load_backbone(tiny_sd_folder)
    attention = backbone.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.to_q.weight.mul_(1e7)
    with pytest.raises(NonFiniteError, match=r"do not fit into torch\.float16"):
        scorer_of(backbone).build_index(images, tmp_path)
