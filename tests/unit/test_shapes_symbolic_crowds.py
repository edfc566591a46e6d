"""Symbolic pictures of crowded scenes, on grids and as tokens of words."""

import math
import random

import pytest
import torch
from torch import nn

from diffenc.shapes.scenes import Scene, SceneObject
from shapes_tools import shapes_tools

NAMES = (
    "documents",
    "patches",
    "symbolic",
    "symbolic_crowds",
    "texts",
    "training",
    "train_clip",
    "train_lm",
)
SCENE = Scene(
    (
        SceneObject("star", "red", "large", x=0.25, y=0.25, radius=0.2),
        SceneObject("circle", "blue", "small", x=0.75, y=0.8, radius=0.1),
        SceneObject("circle", "red", "small", x=0.75, y=0.2, radius=0.06),
    ),
    "gray",
)


@pytest.fixture(scope="module")
def tools():
    with shapes_tools(*NAMES) as modules:
        yield modules


@pytest.fixture
def embedding(shapes_tokenizer):
    torch.manual_seed(0)
    return nn.Embedding(len(shapes_tokenizer), 16)


@pytest.fixture
def spell(tools, shapes_tokenizer, embedding, monkeypatch):
    """Tokens of the picture under a text, or of its grid, without noise."""
    crowds = tools["symbolic_crowds"]
    monkeypatch.setattr(crowds, "NOISE", 0.0)

    def spelled(text, placed=0.0):
        talk = [
            {"from": "human", "value": "<image>\nwhat color is the star?"},
            {"from": "gpt", "value": "red"},
        ]
        states, labels = crowds.CrowdedPictures(shapes_tokenizer).embed_under(
            embedding,
            [SCENE],
            [talk],
            [text],
            torch.Generator().manual_seed(0),
            placed=placed,
        )
        assert states.shape[1] == labels.shape[1]
        count = 64 if text is None else 12
        start = len(shapes_tokenizer("<|user|>\n").input_ids)
        assert (labels[0] != -100).sum() == 2  # "red" and the end
        return states[0, start : start + count]

    return spelled


def said(shapes_tokenizer, embedding, text):
    ids = shapes_tokenizer(f" {text}", add_special_tokens=False).input_ids
    return embedding(torch.tensor(ids)).sum(0)


def at(shapes_tokenizer, embedding, x, y):
    """An edge's word weighs three times the way from the middle, in sides of the picture."""
    away = math.hypot(x - 0.5, y - 0.5)
    shares = {
        "left": 3 * max(0.5 - x, 0),
        "right": 3 * max(x - 0.5, 0),
        "top": 3 * max(0.5 - y, 0),
        "bottom": 3 * max(y - 0.5, 0),
        "middle": max(1 - away / 0.2, 0),
    }
    return sum(share * said(shapes_tokenizer, embedding, word) for word, share in shares.items())


def test_a_cell_is_the_mean_of_what_lies_on_it(spell, shapes_tokenizer, embedding):
    grid = spell(None).view(8, 8, 16)
    star, gray = (said(shapes_tokenizer, embedding, text) for text in ("red star large", "gray"))
    torch.testing.assert_close(grid[1, 1], star)  # all of it on the star
    torch.testing.assert_close(grid[7, 0], gray)
    small = said(shapes_tokenizer, embedding, "red circle small")
    both = torch.stack([small, gray], dim=1)
    shares = torch.linalg.lstsq(both, grid[1, 6][:, None]).solution.detach()
    assert 0.2 < shares[0] < 0.9
    assert shares.sum().item() == pytest.approx(1, abs=1e-4)


def test_a_cell_may_say_its_place(spell, shapes_tokenizer, embedding):
    grid, placed = spell(None).view(8, 8, 16), spell(None, placed=1.0).view(8, 8, 16)
    for row, column in ((0, 0), (1, 6), (4, 3), (7, 2)):
        there = at(shapes_tokenizer, embedding, (column + 0.5) / 8, (row + 0.5) / 8)
        torch.testing.assert_close(placed[row, column] - grid[row, column], there)


def test_places_are_pulled_apart_and_nothing_else_is_moved(tools, shapes_tokenizer, embedding):
    def alike(first, second):
        states = [said(shapes_tokenizer, embedding, word) for word in (first, second)]
        return torch.cosine_similarity(*states, dim=0).item()

    with torch.no_grad():
        for word in ("left", "right"):  # as a language model has them that has read of both alike
            ids = shapes_tokenizer(f" {word}", add_special_tokens=False).input_ids
            embedding.weight[ids] = torch.ones(16)
    before = embedding.weight.detach().clone()
    assert alike("left", "right") == pytest.approx(1)
    tools["symbolic_crowds"].pull_apart(embedding, shapes_tokenizer)
    assert alike("left", "right") < 0.95
    moved = (embedding.weight != before).any(1).nonzero().flatten().tolist()
    words = "left right top bottom above below"
    assert sorted(moved) == sorted(
        shapes_tokenizer(f" {words}", add_special_tokens=False).input_ids
    )


def test_tokens_of_words_say_what_the_words_name_and_where(spell, shapes_tokenizer, embedding):
    tokens = spell("is the blue circle left of the star?")
    cells, words = tokens[:4], tokens[4:]
    assert words.shape == (8, 16)
    star = said(shapes_tokenizer, embedding, "red star large") + at(
        shapes_tokenizer, embedding, 0.25, 0.25
    )
    circle = said(shapes_tokenizer, embedding, "blue circle small") + at(
        shapes_tokenizer, embedding, 0.75, 0.8
    )
    torch.testing.assert_close(words[7], star)
    torch.testing.assert_close(words[2], circle)  # "blue": all that is blue
    torch.testing.assert_close(words[3], circle)
    whole = cells.mean(0) + at(shapes_tokenizer, embedding, 0.5, 0.5)
    torch.testing.assert_close(words[[0, 1, 4, 5, 6]], whole.expand(5, 16))


def test_a_word_for_several_gathers_their_mean_and_the_place_between_them(
    spell, shapes_tokenizer, embedding
):
    words = spell("circles")[4:]
    pair = [said(shapes_tokenizer, embedding, f"{color} circle small") for color in ("blue", "red")]
    between = at(shapes_tokenizer, embedding, 0.75, 0.5)
    torch.testing.assert_close(words[0], torch.stack(pair).mean(0) + between)
    assert not words[1:].any()  # words that are not there


def test_a_word_for_nothing_gathers_what_is_like_it(spell, shapes_tokenizer, embedding):
    star = said(shapes_tokenizer, embedding, "red star large") + at(
        shapes_tokenizer, embedding, 0.25, 0.25
    )
    torch.testing.assert_close(spell("green star")[5], star)


def test_no_text_has_no_words_and_long_ones_keep_those_that_name_something(
    spell, shapes_tokenizer, embedding
):
    assert not spell("")[4:].any()
    words = spell("we see that there is in the picture a blue circle and then also a star")[4:]
    star = said(shapes_tokenizer, embedding, "red star large") + at(
        shapes_tokenizer, embedding, 0.25, 0.25
    )
    circle = said(shapes_tokenizer, embedding, "blue circle small") + at(
        shapes_tokenizer, embedding, 0.75, 0.8
    )
    for named in (star, circle):
        assert (words - named).abs().amax(1).lt(1e-5).any()


def test_half_of_a_batch_are_grids_and_seeds_repeat(tools, shapes_tokenizer, embedding):
    pictures = tools["symbolic_crowds"].CrowdedPictures(shapes_tokenizer)
    one, two = (pictures.batch(embedding, 6, "seed") for _ in range(2))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    talks = (one[1] != -100).sum(1)
    lengths = [int(row.ne(0).any(-1).nonzero().max()) + 1 for row in one[0]]
    assert all(length > 64 for length in lengths[::2])
    assert all(length < 64 for length in lengths[1::2])
    assert (talks > 1).all()


def test_a_trained_clip_goes_on_with_larger_pictures(tools, tmp_path):
    from transformers import CLIPModel, CLIPTokenizer

    from diffenc.shapes.crowds import sample_crowds
    from diffenc.storage.pretrained import pretrained_source

    train_clip = tools["train_clip"]
    source = pretrained_source("shapes-clip")
    shapes_tokenizer = CLIPTokenizer.from_pretrained(source)
    larger = train_clip.build(shapes_tokenizer, 96)
    train_clip.begin_from(larger, source)
    before, after = (
        model.vision_model.embeddings.position_embedding.weight.detach()
        for model in (CLIPModel.from_pretrained(source).float(), larger)
    )
    assert after.shape == (1 + 12 * 12, 128)
    torch.testing.assert_close(after[0], before[0])
    grid = after[1:].view(12, 12, -1)
    for row, column in ((0, 0), (0, 11), (11, 0), (11, 11)):
        apart = (before[1:] - grid[row, column]).norm(dim=1)
        assert apart.argmin() == (row > 0) * 56 + (column > 0) * 7  # its own corner of 8 x 8
    scenes = list(sample_crowds(2, seed=5))
    with torch.no_grad():
        scores = train_clip.similarities(
            larger, shapes_tokenizer, scenes, ["a red star", "a circle"]
        )
    assert scores.shape == (2, 2)
    truth = tools["patches"].truths(scenes, 12)
    assert truth.shape == (2, 144, 3)
    assert all(len(row[row[:, 0] > 0].unique(dim=0)) >= 2 for row in truth)


def test_crowds_are_drawn_as_often_as_asked(tools):
    rng = random.Random(0)
    drawn = [len(tools["texts"].any_scene(rng, 0.65).objects) for _ in range(200)]
    assert 0.5 < sum(count > 3 for count in drawn) / 200 < 0.8
    assert all(len(tools["texts"].any_scene(rng, 0.0).objects) <= 3 for _ in range(50))
