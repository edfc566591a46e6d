"""What the miniature language model practises on spelled-out pictures, and the hints it gets."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from diffenc.mllm.language import load_language_model
from diffenc.shapes.scenes import SHAPES
from shapes_tools import shapes_tools

NAMES = (
    "documents",
    "patches",
    "symbolic",
    "symbolic_crowds",
    "symbolic_practice",
    "texts",
    "training",
    "train_clip",
    "train_lm",
)
KINDS = {"position", "relation", "pair", "letters", "color"}


@pytest.fixture(scope="module")
def tools():
    with shapes_tools(*NAMES) as modules:
        yield modules


@pytest.fixture
def embedding(shapes_tokenizer):
    torch.manual_seed(0)
    return nn.Embedding(len(shapes_tokenizer), 64)


@pytest.fixture
def pictures(tools, shapes_tokenizer):
    return tools["symbolic_practice"].PracticePictures(
        tools["symbolic_crowds"].CrowdedPictures(shapes_tokenizer)
    )


@pytest.fixture
def practice(tools, pictures, embedding):
    """A batch of one lesson, its tokens read back from their embeddings, and its answers."""

    def made(*, words=False, placed=1.0, crowds=0.0):
        counts = {"words": 40, "grids": 0} if words else {"words": 0, "grids": 40}
        lesson = tools["symbolic_practice"].Lesson(1.0, **counts, placed=placed, crowds=crowds)
        (batch,) = pictures.batches(embedding, "seed", lesson)
        ids = (batch.states @ embedding.weight.T).argmax(-1)
        return batch, [[pictures.tokenizer.decode([token]).strip() for token in row] for row in ids]

    return made


def answers_of(shapes_tokenizer, labels):
    """Texts of the answers of a row, in turn."""
    said, inside = [], False
    for token in labels.tolist():
        if token != -100 and not inside:
            said.append([])
        if token != -100:
            said[-1].append(token)
        inside = token != -100
    return [shapes_tokenizer.decode(ids).replace("<eos>", "").strip() for ids in said]


def test_grids_are_talked_about_in_turns_and_words_once(practice, shapes_tokenizer):
    grids, _ = practice()
    assert grids.states.shape[1] > 64
    assert {kind for kinds in grids.kinds for kind in kinds} == KINDS
    assert max(map(len, grids.kinds)) == 5
    words, _ = practice(words=True)
    assert words.states.shape[1] < 64
    assert {kind for kinds in words.kinds for kind in kinds} == {"position", "relation", "letters"}
    assert {len(kinds) for kinds in words.kinds} == {1}
    for batch in (grids, words):
        for kinds, labels in zip(batch.kinds, batch.labels, strict=True):
            assert len(answers_of(shapes_tokenizer, labels)) == len(kinds)


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("crowds", [0.0, 1.0])
def test_named_things_are_where_the_answer_says(practice, shapes_tokenizer, words, crowds):
    batch, texts = practice(words=words, crowds=crowds)
    places = batch.places.tolist()
    assert places
    sides = 0
    for row, token, x, y in places:
        assert texts[int(row)][int(token)] in {*SHAPES, "object"}
        assert max(abs(x), abs(y)) < 0.5
        before = texts[int(row)][: int(token)]
        if "where" not in before[-6:]:
            continue
        turn = before.count("where") and [
            kind for kind in batch.kinds[int(row)] if kind == "position"
        ]
        if len(turn) != 1:
            continue
        answer = answers_of(shapes_tokenizer, batch.labels[int(row)])[
            batch.kinds[int(row)].index("position")
        ]
        for word, holds in (("left", x < 0), ("right", x > 0), ("top", y < 0), ("bottom", y > 0)):
            if word in answer.split():
                assert holds
                sides += 1
    assert sides > 3


@pytest.mark.parametrize("words", [False, True])
def test_both_things_of_a_relation_are_hinted_in_the_order_of_the_question(
    practice, shapes_tokenizer, words
):
    batch, texts = practice(words=words)
    compared = 0
    for row, kinds in enumerate(batch.kinds):
        if kinds[0] != "relation":
            continue
        first, second = [hint for hint in batch.places.tolist() if hint[0] == row][:2]
        between = texts[row][int(first[1]) + 1]  # left, right, above, below
        away = {"left": second[2] - first[2], "right": first[2] - second[2]} | {
            "above": second[3] - first[3],
            "below": first[3] - second[3],
        }
        assert (away[between] > 0) is (answers_of(shapes_tokenizer, batch.labels[row])[0] == "yes")
        compared += 1
    assert compared > 3


@pytest.mark.parametrize("words", [False, True])
def test_beside_everything_places_are_asked_with_letters_too(
    tools, pictures, embedding, shapes_tokenizer, words
):
    lesson = replace(
        tools["symbolic_practice"].AFTERWARDS, words=60 * words, grids=60 * (not words), placed=0.0
    )
    (batch,) = pictures.batches(embedding, "seed", lesson)
    ids = (batch.states @ embedding.weight.T).argmax(-1)
    checked = 0
    for row, kinds in enumerate(batch.kinds):
        if kinds[0] != "letters of places":
            continue
        question = shapes_tokenizer.decode(ids[row]).partition("<|assistant|>")[0].partition("?")
        (letter,) = answers_of(shapes_tokenizer, batch.labels[row])[:1]
        option = question[2].partition(letter)[2].partition("(")[0].split()
        x, y = batch.places[batch.places[:, 0] == row][0, 2:].tolist()
        if "where" in question[0]:
            for word, holds in (
                ("left", x < 0),
                ("right", x > 0),
                ("top", y < 0),
                ("bottom", y > 0),
            ):
                assert holds or word not in option
        else:
            assert option in (["yes"], ["no"])
        checked += 1
    assert checked > 3
    kinds = {kind for kinds in batch.kinds for kind in kinds}
    assert kinds >= {"letters", "letters of places", "position", "relation"}


def test_grids_say_places_and_show_crowds_as_the_lesson_wants(tools, shapes_tokenizer, practice):
    plain, _ = practice(placed=0.0)
    placed, _ = practice(placed=1.0)
    assert plain.kinds == placed.kinds
    assert (plain.states != placed.states).any(-1).sum(1).min() >= 64
    lessons = [tools["symbolic_practice"].lesson_at(done) for done in (0.0, 0.2, 0.6, 0.9, 1.0)]
    assert [each.placed for each in lessons] == [0.5, 1.0, 0.5, 0.5, 0.5]
    assert lessons[0].words > lessons[1].words
    assert set(lessons[0].kinds) == {"color", "shape", "size"}
    assert [each.crowds > 0 for each in lessons] == [False, False, False, True, True]


def test_practice_pulls_places_apart_trains_and_goes_on_where_it_was(
    tools, pictures, tmp_path, monkeypatch
):
    model, shapes_tokenizer = load_language_model("shapes-lm")
    before = model.get_input_embeddings().weight.detach().clone()
    lesson = tools["symbolic_practice"].Lesson(1.0, words=2, grids=2, placed=0.5, crowds=0.5)
    monkeypatch.setattr(tools["train_lm"], "lesson_at", lambda _: lesson)

    def practise():
        tools["train_lm"].practise(model, pictures, 2, tmp_path, lr=1e-3, bfloat16=False)
        return model.get_input_embeddings().weight.detach().clone()

    after = practise()
    moved = (after - before).norm(dim=1)
    words = " left right top bottom above below"
    places = shapes_tokenizer(words, add_special_tokens=False).input_ids
    assert moved[places].min() > 1
    assert 0 < moved[shapes_tokenizer(" red", add_special_tokens=False).input_ids[0]] < 0.1
    torch.testing.assert_close(practise(), after)  # nothing is left to do in this folder


def test_a_hint_costs_nothing_where_a_state_tells_its_place(tools, practice):
    batch, _ = practice()
    hints = tools["train_lm"].Hints(4)
    rows, tokens = batch.places[:, :2].long().unbind(1)
    x, y = batch.places[:, 2:].unbind(1)
    telling = torch.stack([x, -x, y, -y], dim=-1)
    states = torch.zeros(*batch.states.shape[:2], 4)
    states[rows, tokens] = telling
    with torch.no_grad():
        hints.place[0].eps = 1.0  # leaves states as small as these nearly as they are
        hints.place[1].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 0, 1.0, 0]]))
        hints.place[1].bias.zero_()
        nothing = hints(torch.zeros_like(states), batch.places)
        known = hints(states, batch.places)
    assert nothing.item() == pytest.approx((x.square().mean() + y.square().mean()).item() / 0.1)
    assert known < 0.05 * nothing


def test_an_answer_is_whole_where_all_its_tokens_are_right(tools):
    targets = torch.tensor([[-100, 1, 2, -100, 3, -100], [4, 5, -100, -100, -100, 1]])
    logits = torch.eye(6)[targets.clamp(min=0)]
    logits[0, 1] = torch.eye(6)[0]
    logits[0, 0] = torch.eye(6)[5]
    assert tools["train_lm"].whole_answers(logits, targets) == [[False, True], [True, True]]
