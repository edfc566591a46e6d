import json
import re

import pytest
from PIL import Image

from diffenc.errors import ConfigError, ImageError
from diffenc.evals.choices import shapes_blink, shapes_mmvp
from diffenc.inputs.policies import parse_policy
from diffenc.mllm import IMAGE_ID, Chat
from diffenc.mllm.training.data import read_samples, require_usable
from diffenc.mllm.training.dataset import (
    BROKEN,
    ConversationDataset,
    EpochSampler,
    ImageFile,
    collate,
)
from diffenc.mllm.training.miniature import write_miniature
from diffenc.shapes import sample_scenes
from shapes_oracle import answer
from vlm_builders import tiny_lm_tokenizer


def turns(*values):
    return [
        {"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)
    ]


ALTERNATING = turns("<image>\nhi", "yes")
RECORDS = [
    {"id": "good", "image": "a.png", "conversations": ALTERNATING},
    {"id": "good", "image": "a.png", "conversations": ALTERNATING},
    {"id": "text", "conversations": turns("hi", "yes", "and", "no")},
    {
        "id": "two",
        "image": ["a.png", "a.png"],
        "conversations": turns("<image><image>", "same"),
        "captions": ["x", "y"],
    },
    {"id": "lost", "image": "b.png", "conversations": ALTERNATING},
    {"id": "gone", "image": ["a.png", "c.png"], "conversations": turns("<image><image>", "x")},
    {"id": "order", "image": "a.png", "conversations": ALTERNATING[::-1]},
    {"id": "twice", "image": "a.png", "conversations": [ALTERNATING[0], *ALTERNATING]},
    {"id": "open", "image": "a.png", "conversations": ALTERNATING[:1]},
    {"id": "marks", "image": "a.png", "conversations": turns("hi", "yes")},
    {"id": "unseen", "conversations": ALTERNATING},
    {"id": "none"},
    "no record",
    {"id": "names", "image": [3], "conversations": ALTERNATING},
    {"id": "captions", "image": "a.png", "conversations": ALTERNATING, "captions": [1]},
]


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    return tmp_path


def test_everything_wrong_is_counted_and_told_at_once(folder):
    samples, report = read_samples(folder / "data.json", folder)
    assert [sample.key for sample in samples] == ["good", "good#2", "text", "two"]
    assert (report.samples, report.images, report.text_only, report.broken) == (4, 4, 1, 11)
    found = {kind.split()[1]: names for kind, names in report.problems.items()}
    assert report.problems["with missing images"] == ["b.png", "c.png"]
    assert found["turns"] == ["order", "twice"]
    assert found["do"] == ["open"]
    assert found["<image>"] == ["marks", "unseen"]
    with pytest.raises(ConfigError, match=r"11 of 15 samples.*2 with missing images.*skip_broken"):
        require_usable(report, skip_broken=False)
    require_usable(report, skip_broken=True)
    assert samples[0].captions == ("yes",)
    assert samples[2].captions == ()
    assert samples[3].captions == ("x", "y")


def test_nothing_usable_is_an_error_even_when_broken_ones_may_be_left_out(folder):
    (folder / "data.json").write_text(json.dumps(RECORDS[4:5]))
    _, report = read_samples(folder / "data.json", folder)
    with pytest.raises(ConfigError, match="no usable sample"):
        require_usable(report, skip_broken=True)


def test_json_lines_are_read_and_a_limit_is_kept(folder):
    lines = "\n".join(map(json.dumps, RECORDS[:4]))
    (folder / "data.jsonl").write_text(lines + "\n\n")
    assert len(read_samples(folder / "data.jsonl", folder)[0]) == 4
    assert len(read_samples(folder / "data.jsonl", folder, limit=3)[0]) == 3


@pytest.mark.parametrize(("text", "message"), [("{", "no JSON"), ('{"a": 1}', "must hold a list")])
def test_other_files_are_refused(folder, text, message):
    (folder / "data.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_samples(folder / "data.json", folder)
    with pytest.raises(ConfigError, match="cannot read"):
        read_samples(folder / "none.json", folder)


def test_what_a_prompt_policy_lacks_is_found_before_training(folder):
    talk = [{**RECORDS[0], "id": "long", "conversations": turns("<image>a", "b", "c", "d")}]
    (folder / "data.json").write_text(json.dumps([*RECORDS[:3], *talk]))
    _, report = read_samples(folder / "data.json", folder, policy=parse_policy("caption"))
    assert report.samples == 3  # the text has no picture, so no prompt either
    assert report.problems == {"without what the prompt policy 'caption' needs": ["long"]}


def test_captions_without_words_are_told_where_they_are_drawn_on(folder):
    captions = {"bare": [""], "half": ["a cat", "<image> "], "good": ["a cat"]}
    records = [{**RECORDS[0], "id": name, "captions": texts} for name, texts in captions.items()]
    records.append({"id": "mute", "image": "a.png", "conversations": turns("<image>", " ")})
    (folder / "data.json").write_text(json.dumps(records))
    for policy in ("caption", "question+caption | dropout(0.3)"):
        _, report = read_samples(folder / "data.json", folder, policy=parse_policy(policy))
        told = {name: kind for kind, names in report.problems.items() for name in names}
        assert told["bare"].startswith("with a caption without words, on which the prompt policy")
        assert (told.keys(), report.samples) == ({"bare", "half", "mute"}, 1)
    _, report = read_samples(folder / "data.json", folder, policy=parse_policy("empty"))
    assert report.samples == 4


def test_rows_depend_on_epoch_and_sample_alone(tmp_path):
    paths = write_miniature(tmp_path, scenes=6, seed=3)
    samples, _ = read_samples(paths["instruct"], paths["images"])
    chat = Chat(tiny_lm_tokenizer(), "chat")
    policy = parse_policy("question | dropout(0.5)")
    dataset = ConversationDataset(samples, chat, policy, tokens_per_image=4, seed=1)
    rows = {epoch: [dataset[epoch, index]["prompt"] for index in range(6)] for epoch in range(4)}
    assert [dataset[1, index]["prompt"] for index in (5, 4, 3)] == rows[1][:2:-1]
    assert len({tuple(row) for row in rows.values()}) > 1
    asked = {turn["value"].removeprefix("<image>\n") for turn in samples[0].conversation[::2]}
    assert {row[0] for row in rows.values()} <= asked | {""}
    batch = collate([dataset[0, 0], dataset[0, 1]])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert (batch["input_ids"] == IMAGE_ID).sum(1).tolist() == [1, 1]
    assert batch["images"][0][0].size == (64, 64)
    short = ConversationDataset(samples, chat, policy, tokens_per_image=4, max_length=12)
    assert short.tokens(0).length(4) == 12


def test_a_sample_whose_answer_is_cut_off_is_named(folder):
    text = [{"id": "far", "image": "a.png", "conversations": turns("<image> a " + "b " * 9, "c")}]
    (folder / "data.json").write_text(json.dumps([*RECORDS[:1], *text]))
    samples, _ = read_samples(folder / "data.json", folder)
    chat, policy = Chat(tiny_lm_tokenizer(), "v1", system=""), parse_policy("empty")
    length = ConversationDataset(samples, chat, policy, tokens_per_image=4).tokens(0).length(4)
    dataset = ConversationDataset(samples, chat, policy, tokens_per_image=4, max_length=length)
    assert "broken" not in dataset[0, 0]
    batch = collate([dataset[0, 0], dataset[0, 1]])
    assert batch[BROKEN] == [f"far: no token of its answer within data.max_length = {length}"]


def test_an_order_is_new_in_each_epoch_and_the_same_again():
    sampler = EpochSampler(7, seed=2)
    first = list(sampler)
    assert first == list(sampler)
    assert sorted(index for _, index in first) == list(range(7))
    sampler.set_epoch(1)
    second = list(sampler)
    assert {epoch for epoch, _ in second} == {1}
    assert [i for _, i in first] != [i for _, i in second]
    assert [i for _, i in EpochSampler(7, seed=3)] != [i for _, i in first]


def test_a_picture_is_named_by_its_content(tmp_path):
    for name, color in (("a", "red"), ("b", "red"), ("c", "blue")):
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{name}.png")
    a, b, c = (ImageFile.read(tmp_path / f"{name}.png") for name in "abc")
    assert a.digest == b.digest != c.digest
    assert a.open().getpixel((0, 0)) == (255, 0, 0)
    (tmp_path / "a.png").write_bytes(a.content[:30])
    with pytest.raises(ImageError, match="cannot read the picture"):
        ImageFile.read(tmp_path / "a.png").open()
    with pytest.raises(ImageError, match="cannot read"):
        ImageFile.read(tmp_path / "none.png")


def test_the_miniature_is_seeded_and_in_llavas_format(tmp_path):
    paths = write_miniature(tmp_path / "a", scenes=5, seed=1, turns=2)
    again = write_miniature(tmp_path / "b", scenes=5, seed=1, turns=2)
    other = write_miniature(tmp_path / "c", scenes=5, seed=2)
    for name in ("align", "instruct"):
        assert paths[name].read_bytes() == again[name].read_bytes() != other[name].read_bytes()
        samples, report = read_samples(paths[name], paths["images"], policy=parse_policy("caption"))
        assert (report.samples, report.broken) == (5, 0)
        assert all(sample.captions for sample in samples)
    records = json.loads(paths["align"].read_text())
    for record, scene in zip(records, sample_scenes(5, seed=1), strict=True):
        assert any(thing.shape in record["conversations"][1]["value"] for thing in scene.objects)
        assert len(set(record["captions"])) == len(record["captions"]) > 1
    with pytest.raises(ConfigError, match="1 or more"):
        write_miniature(tmp_path, scenes=0)


def test_options_are_listed_in_the_words_of_the_benchmarks_on_scenes_of_training_alone(tmp_path):
    paths = write_miniature(tmp_path, scenes=40, seed=1)
    form = r"[a-z ]+\?( \([a-d]\) [a-z ]+?){2,4}"
    items = (*shapes_mmvp(1).items, *shapes_blink(1).items)
    assert all(re.fullmatch(form, item.text) for item in items)
    lettered = []
    records = json.loads(paths["instruct"].read_text())
    for record, scene in zip(records, sample_scenes(40, seed=1), strict=True):
        values = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        for text, said in zip(values[::2], values[1::2], strict=True):
            if re.fullmatch(form, text):
                question = text.partition("?")[0] + "?"
                words = re.search(rf"{re.escape(said)} ([a-z ]+?)(?= \(|$)", text)[1]
                assert words == answer(question, scene)[0]
                lettered.append(text)
    assert len(lettered) == 80
    bare = json.loads(write_miniature(tmp_path / "b", scenes=9, lettered=0)["instruct"].read_text())
    assert not any("(a)" in turn["value"] for each in bare for turn in each["conversations"])
