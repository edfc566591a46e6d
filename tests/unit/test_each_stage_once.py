"""Each stage once: a picture is decoded once per call, a model's files are read once per load."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFile

from diffenc import CrossAttnScorer, DiffusionEncoder, DiffusionVLM, FusedEncoder
from diffenc.errors import ImageError
from diffenc.models import describe, load_backbone, locating
from diffenc.models import folder as folder_of_models
from diffenc.shapes import render, sample_scenes
from diffenc.storage import reading
from vlm_builders import save_tiny_lm


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, scene in zip(paths, sample_scenes(3, seed=1), strict=True):
        render(scene).save(path)
    return [str(path) for path in paths]


@pytest.fixture
def decoded(monkeypatch):
    """Counts decodings of files."""
    counts = Counter()
    load = ImageFile.ImageFile.load

    def count(self, *args, **options):
        if self.tile:
            counts["files"] += 1
        return load(self, *args, **options)

    monkeypatch.setattr(ImageFile.ImageFile, "load", count)
    return counts


@pytest.fixture(scope="module")
def encoder():
    return DiffusionEncoder.from_pretrained("shapes")


@pytest.fixture(scope="module")
def captioned():
    encoder = DiffusionEncoder.from_pretrained("shapes")
    encoder.add_captioner("shapes-clip")
    return encoder


def once(files):
    return {"files": len(files)}


def test_an_encoder_decodes_once(encoder, files, decoded):
    encoder(files, "a red circle")
    assert decoded == once(files)


def test_a_captioner_reads_what_was_decoded(captioned, files, decoded):
    together = captioned(files, "a red circle")
    assert decoded == once(files)
    pictures = [Image.open(path) for path in files]
    torch.testing.assert_close(together, captioned(pictures, "a red circle"), rtol=0, atol=0)


@pytest.mark.parametrize("how", ["channel", "cross_attention"])
def test_both_streams_of_a_fusion_read_what_was_decoded(captioned, files, decoded, how):
    fused = FusedEncoder("shapes-clip", captioned, how)
    fused(files, "a red circle")
    assert decoded == once(files)


def test_a_multimodal_model_decodes_once(captioned, files, decoded, tmp_path):
    lm = save_tiny_lm(tmp_path / "lm", context=1024)
    fused = FusedEncoder("shapes-clip", captioned)
    DiffusionVLM(fused, str(lm)).encode_images(files, ["a red circle"] * 3)
    assert decoded == once(files)


def test_word_maps_and_scores_decode_once(files, decoded):
    scorer = CrossAttnScorer.from_pretrained("shapes", preset="calibrated")
    scorer.word_maps(files[0], "a red circle")
    assert decoded == once(files[:1])
    decoded.clear()
    scorer(files, ["a red circle", "a blue square"])
    assert decoded == once(files)


def test_told_sizes_are_those_of_the_decoded_pictures(files, decoded, tiny_sdxl_folder):
    encoder = DiffusionEncoder.from_pretrained(
        tiny_sdxl_folder, taps="mid_block", original_size="image"
    )
    encoder(files, "a red circle")
    assert decoded == once(files)


def test_a_file_that_breaks_says_which_of_several(captioned, files):
    Path(files[1]).write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"1\.png"):
        captioned(files, "a red circle")


@pytest.mark.parametrize("load", [DiffusionEncoder.from_pretrained, load_backbone, describe])
def test_each_file_of_a_model_is_read_once_per_load(monkeypatch, tiny_sd_folder, load):
    counts = Counter()
    read = reading._read

    def count(path, *args):
        counts[str(path)] += 1
        return read(path, *args)

    monkeypatch.setattr(reading, "_read", count)
    load(tiny_sd_folder)
    assert len(counts) >= 5
    assert set(counts.values()) == {1}


def test_a_model_is_described_once_per_load(monkeypatch, tiny_sd_folder):
    counts = Counter()
    read = folder_of_models.read_architecture

    def count(folder, **options):
        counts[str(folder)] += 1
        return read(folder, **options)

    monkeypatch.setattr(locating, "read_architecture", count)
    monkeypatch.setattr(folder_of_models, "read_architecture", count)
    DiffusionEncoder.from_pretrained(tiny_sd_folder, truncate=True)
    assert counts == {str(tiny_sd_folder): 1}
