"""Symbolic pictures, which the miniature language model reads, say what is in the scene."""

import random
import re

import pytest
import torch
from torch import nn

from diffenc.shapes.scenes import Scene, SceneObject
from shapes_tools import shapes_tools

NAMES = ("documents", "patches", "symbolic", "training", "train_lm")
SCENE = Scene(
    (
        SceneObject("star", "red", "large", x=0.25, y=0.25, radius=0.2),
        SceneObject("circle", "blue", "small", x=0.75, y=0.8, radius=0.1),
    ),
    "gray",
)
TOLD = [
    {"from": "human", "value": "<image>\nwhat color is the star?"},
    {"from": "gpt", "value": "red"},
]


@pytest.fixture(scope="module")
def tools():
    with shapes_tools(*NAMES) as modules:
        yield modules


def words(shapes_tokenizer, ids):
    return {shapes_tokenizer.decode([each]).strip() for each in ids.tolist()}


def test_cells_say_what_lies_there(tools, shapes_tokenizer):
    cells = tools["symbolic"].cell_words(shapes_tokenizer, SCENE).view(8, 8, 3)

    assert words(shapes_tokenizer, cells[1, 1]) == {"red", "star", "large"}  # around (0.19, 0.19)
    assert words(shapes_tokenizer, cells[6, 5]) == {
        "blue",
        "circle",
        "small",
    }  # around (0.69, 0.81)
    assert words(shapes_tokenizer, cells[0, 7]) == {"gray"}
    assert 4 <= (cells[..., 0] != cells[..., 1]).sum() <= 16  # of 64, what two objects cover


def test_a_picture_is_the_noisy_sum_of_words_where_the_mark_stood(
    tools, shapes_tokenizer, monkeypatch
):
    symbolic = tools["symbolic"]
    monkeypatch.setattr(symbolic, "MISSING", 0.0)
    monkeypatch.setattr(symbolic, "NOISE", 0.0)
    embedding = nn.Embedding(len(shapes_tokenizer), 16)
    states, labels = symbolic.SymbolicPictures(shapes_tokenizer).embed(
        embedding, [SCENE], [TOLD], torch.Generator().manual_seed(0)
    )

    before = shapes_tokenizer("<|user|>\n").input_ids
    after = shapes_tokenizer("\nwhat color is the star?\n<|assistant|>\n", add_special_tokens=False)
    answer = shapes_tokenizer("red<eos>", add_special_tokens=False).input_ids
    length = len(before) + 64 + len(after.input_ids) + len(answer)
    assert states.shape == (1, length, 16)
    torch.testing.assert_close(states[0, : len(before)], embedding(torch.tensor(before)))
    picture = states[0, len(before) : len(before) + 64].view(8, 8, 16)
    spoken = shapes_tokenizer(" red star large", add_special_tokens=False).input_ids
    torch.testing.assert_close(picture[1, 1], embedding(torch.tensor(spoken)).sum(0))
    plain = shapes_tokenizer(" gray", add_special_tokens=False).input_ids
    torch.testing.assert_close(picture[0, 7], embedding(torch.tensor(plain))[0])
    assert labels[0, : length - len(answer)].eq(-100).all()
    assert labels[0, length - len(answer) :].tolist() == answer


def test_words_go_missing_and_batches_repeat_by_seed(tools, shapes_tokenizer, monkeypatch):
    symbolic = tools["symbolic"]
    monkeypatch.setattr(symbolic, "NOISE", 0.0)
    embedding = nn.Embedding(len(shapes_tokenizer), 16)
    pictures = symbolic.SymbolicPictures(shapes_tokenizer)
    whole = symbolic.cell_words(shapes_tokenizer, SCENE)
    torch.manual_seed(0)
    states, _ = pictures.embed(embedding, [SCENE] * 50, [TOLD] * 50, torch.Generator())
    summed = embedding(whole).sum(1)
    objects = whole[:, 0] != whole[:, 1]
    start = len(shapes_tokenizer("<|user|>\n").input_ids)
    found = states[:, start : start + 64][:, objects]
    kept = (found - summed[objects]).abs().amax(-1) < 1e-5
    assert 0.5 < kept.float().mean() < 0.72  # 0.85 ** 3 have all of their words

    one, two = (pictures.batch(embedding, 3, "seed") for _ in range(2))
    torch.testing.assert_close(one[0], two[0], rtol=0, atol=0)
    assert pictures.batch(embedding, 3, "other")[0].shape != one[0].shape


def test_a_readable_prompt_holds_its_answer(tools):
    rng = random.Random(0)
    for _ in range(200):
        prompt, answer = tools["documents"].readable(rng)
        said, _, asked = prompt.removesuffix("\n<|assistant|>\n").rpartition("\n")
        assert answer in said
        assert asked.endswith("?")
        assert answer not in asked.split()


def test_options_are_listed_once_each_and_the_answer_is_one_of_them(tools):
    rng = random.Random(0)
    for _ in range(200):
        asked, listed = tools["documents"].lettered(rng)
        options, _, letter = listed.partition("\n<|assistant|>\n")
        named = dict(re.findall(r" \(([a-d])\) ([a-z ]+?)(?= \(|$)", options))
        assert asked.endswith("?")
        assert list(named) == list("abcd")[: len(named)]
        assert len(named) == len(set(named.values())) > 1
        assert letter.strip("()") in named


def test_options_are_practised_with_their_letter(tools, shapes_tokenizer):
    train_lm, lettered = tools["train_lm"], tools["documents"].lettered
    ids, labels = train_lm.prompts_and_answers(shapes_tokenizer, "seed", lettered, 5)

    assert len(ids) == 5
    for row, label in zip(ids, labels, strict=True):
        practised = shapes_tokenizer.decode(label[label != -100])
        assert practised.startswith(" (a) ")
        assert practised.endswith(")<eos>")
        assert f"?{practised}" in shapes_tokenizer.decode(row)


def test_looking_back_is_learnt_from_answers_alone(tools, shapes_tokenizer):
    ids, labels = tools["train_lm"].prompts_and_answers(shapes_tokenizer, "seed")

    assert ids.shape == labels.shape == (64, ids.shape[1])
    for row, label in zip(ids, labels, strict=True):
        places = (label != -100).nonzero().flatten()
        assert places.tolist() == list(range(places[0], places[-1] + 1))
        assert torch.equal(row[places], label[places])
        before, after = shapes_tokenizer.decode(row[: places[0]]), row[places[-1] + 1 :]
        answer = shapes_tokenizer.decode(label[places])
        assert before.endswith("<|assistant|>\n")
        assert answer.endswith("<eos>")
        assert answer.removesuffix("<eos>") in before  # a caption says it
        assert after.eq(shapes_tokenizer.pad_token_id).all()
