"""Pictures that are broken before the work, or break during it: refused by name, or left out."""

import io
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from answers_data import Says
from diffenc.cli.app import app
from diffenc.errors import ConfigError, ImageError
from diffenc.evals.captioning import evaluate_captions
from diffenc.evals.captioning.data import CaptionItem, CaptionSet
from diffenc.evals.choices import evaluate_choices
from diffenc.evals.choices.base import ChoiceBenchmark, ChoiceItem
from diffenc.evals.items import Picture
from diffenc.evals.matching.base import Item, MatchingBenchmark
from diffenc.evals.matching.evaluate import evaluate
from diffenc.inputs import images as images_module
from diffenc.mllm.training import train, write_miniature
from diffenc.mllm.training.dataset import BROKEN, collate
from evals_data import RandomMatcher
from train_builders import Parts, config
from vlm_builders import save_tiny_lm, save_tiny_vision

FAST = ("--size", 64, "--timesteps", "200")


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture
def pictures(tmp_path):
    """Four pictures, of which the second and the fourth are broken."""
    paths = [tmp_path / f"{name}.png" for name in "abcd"]
    for seed, path in enumerate(paths):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    paths[1].write_bytes(paths[1].read_bytes()[:-400])  # a header that is whole
    paths[3].write_bytes(b"<html>")
    return paths


def breaks_after(monkeypatch, path, reads):
    """Let a picture be read so often, and be gone afterwards."""
    read, counts = images_module.load_image, {"left": reads}

    def reading(source, **options):
        if str(source) == str(path):
            counts["left"] -= 1
            if counts["left"] < 0:
                raise ImageError(f"no such image file: {path}")
        return read(source, **options)

    monkeypatch.setattr(images_module, "load_image", reading)


@pytest.mark.parametrize(
    "command",
    [("encode", "-o", "out.safetensors"), ("score", "-t", "red")],
    ids=lambda command: command[0],
)
def test_all_broken_files_are_named_before_any_work(command, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*command, *pictures, "-m", tmp_path / "no-model")
    assert result.exit_code == 2
    assert result.output.startswith("error: 2 of 4 images cannot be read: cannot read the image ")
    assert result.output.count("\n") == 1
    for part in ("b.png: ", "d.png: it holds a web page", "--skip-broken goes on without them"):
        assert part in result.output
    assert "a.png" not in result.output
    gone = run(*command, pictures[1], pictures[3], "--skip-broken", "-m", tmp_path / "no-model")
    assert gone.exit_code == 2
    assert gone.output.startswith("error: 2 of 2 images cannot be read")
    assert "--skip-broken" not in gone.output


def test_encode_leaves_out_what_is_broken_with_its_prompt(tiny_sd_folder, pictures, tmp_path):
    output, whole = tmp_path / "f.safetensors", tmp_path / "whole.safetensors"
    options = ("-m", tiny_sd_folder, "--taps", "mid_block", "--batch-size", 2)
    prompts = [part for text in ("red", "blue", "a square", "no") for part in ("-p", text)]
    result = run("encode", *pictures, *prompts, *options, "--skip-broken", "-o", output)
    assert result.exit_code == 0, result.output
    assert "warning: 2 of 4 images cannot be read: " in result.stderr
    expected = run(
        "encode", pictures[0], pictures[2], "-p", "red", "-p", "a square", *options, "-o", whole
    )
    assert expected.exit_code == 0, expected.output
    assert torch.equal(load_file(output)["mid_block"], load_file(whole)["mid_block"])
    with safe_open(output, "pt") as opened:
        metadata = json.loads(opened.metadata()["diffenc"])
    assert metadata["images"] == [str(pictures[0]), str(pictures[2])]
    assert metadata["prompts"] == ["red", "a square"]
    assert metadata["left_out"] == [str(pictures[1]), str(pictures[3])]


def test_encode_goes_on_where_a_picture_breaks_on_the_way(
    tiny_sd_folder, pictures, tmp_path, monkeypatch
):
    good = [pictures[0], pictures[2], shutil.copy(pictures[0], tmp_path / "e.png")]
    options = ("-m", tiny_sd_folder, "--taps", "mid_block", "--batch-size", 1)
    output = tmp_path / "f.safetensors"
    with monkeypatch.context() as patch:
        breaks_after(patch, good[1], 1)
        refused = run("encode", *good, *options, "-o", output)
    assert (refused.exit_code, output.exists()) == (2, False)
    assert "c.png" in refused.output
    breaks_after(monkeypatch, good[1], 1)
    result = run("encode", *good, *options, "--skip-broken", "-o", output)
    assert result.exit_code == 0, result.output
    assert "1 of 3 images" in result.stderr
    rows = load_file(output)["mid_block"]
    assert len(rows) == 2
    assert torch.equal(rows[0], rows[1])


def test_score_leaves_out_what_is_broken_before_and_on_the_way(
    tiny_sd_folder, pictures, tmp_path, monkeypatch
):
    good = [pictures[0], pictures[2], tmp_path / "e.png"]
    shutil.copy(pictures[2], good[2])
    arguments = ("-t", "red", *FAST, "-m", tiny_sd_folder, "--preset", "paper", "--json")
    breaks_after(monkeypatch, good[2], 1)
    result = run("score", *pictures, good[2], *arguments, "--skip-broken")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["images"] == list(map(str, good[:2]))
    assert found["left_out"] == [str(pictures[1]), str(pictures[3]), str(good[2])]
    expected = json.loads(run("score", *good[:2], *arguments).stdout)
    np.testing.assert_allclose(found["mean"], expected["mean"], rtol=1e-6)


class Fading:
    """A file's bytes, so often; then it is gone."""

    def __init__(self, number, reads):
        stream = io.BytesIO()
        Image.new("RGB", (16, 16), (number, 90, 10)).save(stream, "PNG")
        self.content, self.left = stream.getvalue(), reads

    def __call__(self):
        self.left -= 1
        if self.left < 0:
            raise FileNotFoundError(2, "No such file or directory")
        return self.content


def fading(number, reads=99):
    return Picture(f"{number}.png", Fading(number, reads))


def test_a_matcher_is_not_asked_about_what_breaks_on_the_way():
    def benchmark():
        pairs = [(fading(2 * n), fading(2 * n + 1, 1 if n == 1 else 99)) for n in range(3)]
        items = [Item(str(n), pair, ("a cup", "a cat")) for n, pair in enumerate(pairs)]
        return MatchingBenchmark(
            name="winoground", source="here", items=tuple(items), label_kind="tag"
        )

    with pytest.raises(ImageError, match=r"cannot read the image 3\.png: No such file"):
        evaluate(benchmark(), [RandomMatcher()])
    found = evaluate(benchmark(), [RandomMatcher("a"), RandomMatcher("b")], skip_broken=True)
    assert [item.id for item in found.items] == ["0", "2"]
    assert [len(scores[0]) for scores in found.scores.values()] == [2, 2]
    (problem,) = found.problems
    assert (problem.kind, problem.where) == ("unreadable pictures", "id 1")


def test_a_question_whose_picture_breaks_takes_its_pair_along():
    def benchmark(broken):
        items = [
            ChoiceItem(
                id=str(n),
                pictures=(fading(n, 1 if n in broken else 99),),
                question="what?",
                text=f"what is {n}?",
                options=("a", "b"),
                answer=0,
                group=str(n // 2),
            )
            for n in range(6)
        ]
        return ChoiceBenchmark(name="mmvp", source="here", items=tuple(items), score="pairs")

    with pytest.raises(ImageError, match=r"cannot read the image 3\.png"):
        evaluate_choices(benchmark({3}), Says(lambda *_: "(a)"))
    model = Says(lambda *_: "(a)")
    found = evaluate_choices(benchmark({3}), model, skip_broken=True, batch_size=2)
    assert [item.id for item in found.items] == ["0", "1", "4", "5"]
    assert len(model.asked) == 5
    assert "1 problems, left out: 1 unreadable pictures (id 3: 3.png" in found.notes[0]
    with pytest.raises(ConfigError, match="no question is left: 6 unreadable pictures"):
        evaluate_choices(benchmark(set(range(6))), model, skip_broken=True)


def test_two_pictures_of_one_name_are_refused_and_one_may_stand_twice():
    def benchmark(*pictures):
        items = [
            ChoiceItem(str(n), (each,), "what?", "what?", ("a", "b"), 0, "all")
            for n, each in enumerate(pictures)
        ]
        return ChoiceBenchmark(name="mine", source="here", items=tuple(items), score="tasks")

    red, blue = (Picture("picture", Image.new("RGB", (8, 8), color)) for color in ("red", "blue"))
    model = Says(lambda *_: "(a)")
    with pytest.raises(ConfigError, match="two pictures that are called 'picture'"):
        evaluate_choices(benchmark(red, blue), model)
    torn = Picture("picture", lambda: b"no picture")
    for pair in ((red, torn), (torn, red)):
        found = evaluate_choices(benchmark(*pair, fading(1, 9)), model, skip_broken=True)
        assert [item.id for item in found.items] == ["2"]
    same = Picture("picture", Image.new("RGB", (8, 8), "red"))
    assert evaluate_choices(benchmark(red, same, red), model).accuracy == 100


def test_captions_go_on_in_the_next_pass_without_it():
    items = tuple(CaptionItem(str(n), fading(n, 2 if n == 1 else 99), ("a cup",)) for n in range(3))
    found = evaluate_captions(
        CaptionSet(name="coco", source="here", items=items),
        Says(lambda *_: "a cup"),
        metrics=(),
        passes=3,
        skip_broken=True,
    )
    assert [item.id for item in found.items] == ["0", "2"]
    first, *others = (sorted(each.captions) for each in found.passes)
    assert (first, others) == (["0", "1", "2"], [["0", "2"]] * 2)
    assert len(found.problems) == 1


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return save_tiny_vision(folder / "vision"), save_tiny_lm(folder / "lm")


@pytest.fixture
def parts(models, tmp_path):
    data = write_miniature(tmp_path / "data", scenes=8)
    return Parts(vision=models[0], language_model=models[1], data=data)


def files_of(parts):
    records = json.loads(parts.data["align"].read_text())
    return [parts.data["images"] / record["image"] for record in records]


TRAINING = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@TRAINING
def test_training_names_all_that_cannot_be_decoded_before_it_begins(parts, tmp_path):
    files = files_of(parts)
    for file in (files[1], files[6]):
        file.write_bytes(file.read_bytes()[:-60])
    files[4].unlink()
    run_config = config(parts, tmp_path / "run")
    calls = []
    with pytest.raises(ConfigError) as refused:
        train(run_config, looking=lambda *done: calls.append(done))
    message = str(refused.value)
    assert "3 of 8 samples cannot be used" in message
    assert "1 with missing images" in message
    assert "2 with unreadable images" in message
    assert all(str(files[index]) in message for index in (1, 6))
    assert "data.skip_broken = true" in message
    assert not (tmp_path / "run").exists()
    assert calls == [(7, 7)]
    result = train(config(parts, tmp_path / "run", skip_broken=True, epochs=1))
    assert (result.data.samples, result.data.images, result.data.broken) == (5, 5, 3)
    assert (result.steps, result.skipped) == (2, ())
    with pytest.raises(ImageError, match=r"cannot read the picture .*skip_broken = true"):
        train(config(parts, tmp_path / "unseen", check_images=False, limit=3))


def at_step(step, action):
    def progress(done, total, loss):
        if done == step:
            action()

    return progress


@TRAINING
@pytest.mark.parametrize(("cache", "damage"), [("off", "gone"), ("on", "cut")])
def test_a_picture_that_breaks_while_it_trains_is_skipped_and_counted(
    parts, tmp_path, caplog, cache, damage
):
    file = files_of(parts)[2]

    def action():
        if damage == "gone":
            file.unlink(missing_ok=True)
        else:
            file.write_bytes(file.read_bytes()[:70])

    options = {"cache": cache, "epochs": 3, "batch_size": 2, "device_batch_size": 1}
    told = config(parts, tmp_path / "run", skip_broken=True, **options)
    with caplog.at_level(logging.WARNING, logger="diffenc.mllm.training.trainer"):
        result = train(told, progress=at_step(1, action))
    (skipped,) = result.skipped
    assert str(file) in skipped
    assert result.steps == 12
    assert result.data.broken == 0
    told_of = [record.getMessage() for record in caplog.records]
    assert told_of.count(f"trained without the sample {skipped}") == 1
    assert np.isfinite(result.loss)


@TRAINING
def test_without_being_told_to_skip_it_ends_with_the_name(parts, tmp_path):
    file = files_of(parts)[2]
    told = config(parts, tmp_path / "run", epochs=3, workers=1)
    with pytest.raises(ImageError) as ended:
        train(told, progress=at_step(1, lambda: file.unlink(missing_ok=True)))
    assert str(ended.value).startswith(
        f"cannot read the picture: no such image file: {file}. Repair it"
    )
    assert "Traceback" not in str(ended.value)


@pytest.mark.long
@TRAINING
def test_a_run_goes_on_with_the_samples_that_it_began_with(parts, tmp_path):
    files = files_of(parts)
    files[0].write_bytes(b"")
    told = config(parts, tmp_path / "run", skip_broken=True, batch_size=2, epochs=2)
    train(told, stop_after=4)
    files[3].unlink()
    files[5].write_bytes(b"broken too")
    result = train(told, resume=True)
    assert (result.resumed_at, result.steps) == (4, 8)
    assert result.data.samples == 7
    assert len(result.skipped) == 2


@TRAINING
def test_a_blank_sample_has_the_shape_of_the_others_and_teaches_nothing(parts, tmp_path):
    from diffenc.inputs.policies import parse_policy
    from diffenc.mllm.chat import IGNORE_ID, Chat
    from diffenc.mllm.training.data import read_samples
    from diffenc.mllm.training.dataset import ConversationDataset
    from vlm_builders import tiny_lm_tokenizer

    samples, _ = read_samples(parts.data["instruct"], parts.data["images"])
    chat = Chat(tiny_lm_tokenizer(), "chat")
    for as_files in (False, True):
        dataset = ConversationDataset(
            samples, chat, parse_policy("question"), as_files=as_files, skip_broken=True
        )
        before = [dataset[0, 0], dataset[0, 1]]
        content = samples[0].images[0].read_bytes()
        samples[0].images[0].write_bytes(b"GIF89a")
        after = [dataset[0, 0], dataset[0, 1]]
        samples[0].images[0].write_bytes(content)
        batches = collate(before), collate(after)
        assert BROKEN not in batches[0]
        assert batches[1][BROKEN] == [f"{samples[0].key}: {after[0]['broken'].partition(': ')[2]}"]
        assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
        assert torch.equal(batches[0]["labels"][1], batches[1]["labels"][1])
        assert (batches[1]["labels"][0] == IGNORE_ID).all()
        (blank,) = after[0]["images"]
        assert (blank.open() if as_files else blank).size == (64, 64)
