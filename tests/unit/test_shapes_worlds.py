"""What training reads of scenes of shapes and of little pictures, and tokens for new nouns."""

import random
import sys

import numpy as np
import torch

from shapes_tools import FOLDER

sys.path.insert(0, str(FOLDER))

import worlds
from transformers import CLIPTextModel, CLIPTokenizer

from diffenc.models.shapes import shapes_folder
from diffenc.shapes import picture_masks, render_array, render_pictures, sample_pictures
from diffenc.shapes.phrases import scene_text
from diffenc.shapes.pictures import NOUNS, PictureScene
from diffenc.shapes.scenes import sample_scene


def test_new_nouns_are_one_token_each_and_old_texts_are_encoded_as_before(extended_shapes):
    folders = (shapes_folder(), extended_shapes)
    before, after = (CLIPTokenizer.from_pretrained(folder / "tokenizer") for folder in folders)
    assert [len(after.tokenize(noun)) for noun in NOUNS] == [1] * 48
    rng = random.Random(0)
    texts = [scene_text(sample_scene(rng), rng) for _ in range(200)]
    ids = before(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    again = after(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, again)
    states = [
        CLIPTextModel.from_pretrained(folder / "text_encoder").float()(ids).last_hidden_state
        for folder in folders
    ]
    assert torch.equal(*states)
    new = after("a dog left of a pizza", return_tensors="pt").input_ids
    assert new.max() >= len(before)
    model = CLIPTextModel.from_pretrained(extended_shapes / "text_encoder").float()
    dog, cat = (
        model(after(f"a {noun}", return_tensors="pt").input_ids)[0] for noun in ("dog", "cat")
    )
    assert (dog - cat).abs().max() > 0.1


def test_words_of_a_text_name_things_by_their_bits(extended_shapes):
    tokenizer = CLIPTokenizer.from_pretrained(extended_shapes / "tokenizer")
    scene = sample_pictures(random.Random(1), nouns=["dog", "cat", "dog", "key", "pizza"])
    bits = worlds.named(tokenizer, "a dog left of a key", scene, colors=True)
    assert bits[:8] == [0, 0, 0b101, 0, 0, 0, 0b1000, 0]
    assert len(bits) == 32


def test_shares_and_pixels_are_those_of_either_kind_of_scene():
    rng = random.Random(2)
    pictures, shapes = sample_pictures(rng), sample_scene(rng, count=2)
    pixels = worlds.pixels([pictures, shapes], 96)
    assert pixels.shape == (2, 3, 96, 96)
    for values, image in zip(
        pixels, (np.asarray(render_pictures(pictures)), render_array(shapes, 96)), strict=True
    ):
        restored = ((values + 1) * 127.5).round().byte().permute(1, 2, 0)
        assert np.array_equal(restored.numpy(), image)
    shares = worlds.covered(pictures, 96, 24, 9)
    count = len(pictures.objects)
    assert shares.shape == (9, 24, 24)
    areas = picture_masks(pictures).sum(axis=(1, 2)) / 16
    assert np.allclose(shares[:count].sum(dim=(1, 2)).numpy() / 255, areas, rtol=0.02)
    assert not shares[count:].any()


def test_shares_of_the_worlds_are_as_asked():
    rng = random.Random(3)
    scenes = [worlds.drawn(rng, crowds=0.5, pictures=0.4)[0] for _ in range(300)]
    of_pictures = sum(isinstance(scene, PictureScene) for scene in scenes) / 300
    crowded = sum(len(s.objects) > 4 and not isinstance(s, PictureScene) for s in scenes) / 300
    assert abs(of_pictures - 0.4) < 0.1
    assert abs(crowded - 0.3) < 0.1
    for scene in scenes[:60]:
        lines = [worlds.text(scene, rng) for _ in range(3)]
        false = worlds.false_texts(scene, lines, rng)
        assert len(false) == 3
        assert not set(lines) & set(false)
