import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from diffenc.errors import ConfigError, NonFiniteError, OutputError, ShapeError
from diffenc.evals import (
    Item,
    MatchingBenchmark,
    Picture,
    evaluate,
    load_mmvp_vlm,
    load_winoground,
    shapes_benchmark,
)
from diffenc.evals.matching.inspection import inspect
from evals_data import (
    ColorMatcher,
    RandomMatcher,
    encoded,
    mmvp_vlm,
    picture,
    read_lines,
    winoground_jsonl,
)


@pytest.fixture
def benchmark():
    return shapes_benchmark("winoground", per_label=2)


def one_item(first, second, captions=("a", "b"), name="0"):
    return Item(name, (Picture("one", first), Picture("two", second)), captions)


def test_a_perfect_model_is_right_and_a_constant_one_never(tmp_path):
    data = load_winoground(winoground_jsonl(tmp_path))

    class Constant(RandomMatcher):
        def __call__(self, images, texts, *, seed):
            return torch.ones(2, 2)

    found = evaluate(data, [ColorMatcher("color"), Constant("constant")], trials=2)
    for metric in ("text", "image", "group"):
        assert found.results("color")[metric].trials == (100, 100)
        assert found.results("constant")[metric].trials == (0, 0)
    assert found.by_label("color")["Object"]["text"].items == 1
    assert found.label_kinds() == ("collapsed_tag", "num_main_preds", "tag", "secondary_tag")


def test_models_without_noise_run_once(benchmark):
    matchers = [RandomMatcher("a"), RandomMatcher("b", deterministic=True)]
    found = evaluate(benchmark, matchers, trials=3, seed=5)
    assert [matcher.calls for matcher in matchers] == [30, 10]
    assert found.seeds == {"a": (5, 6, 7), "b": (5,)}
    assert found.scores["a"].shape == (3, 10, 2, 2)
    assert found.results("b")["text"].std is None


def test_nothing_is_scored_twice(benchmark, tmp_path):
    path = tmp_path / "scores.jsonl"
    first = RandomMatcher()
    whole = evaluate(benchmark, [first], trials=2, results=path)
    assert (first.calls, whole.fresh) == (20, 20)
    again = RandomMatcher()
    repeated = evaluate(benchmark, [again], trials=2, results=path)
    assert (again.calls, repeated.fresh) == (0, 0)
    assert torch.equal(repeated.scores["random"], whole.scores["random"])
    third = evaluate(benchmark, [again, RandomMatcher("other")], trials=3, results=path)
    assert again.calls == 10
    assert torch.equal(third.scores["random"][:2], whole.scores["random"])
    larger = evaluate(shapes_benchmark("winoground", per_label=3), [again], results=path)
    assert (again.calls, len(larger.items)) == (25, 15)


@pytest.mark.parametrize("cut", [1, 5, 60, 200])
def test_a_torn_last_line_is_scored_again_and_nothing_else(benchmark, tmp_path, cut):
    path = tmp_path / "scores.jsonl"
    whole = evaluate(benchmark, [RandomMatcher()], trials=1, results=path)
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    left = content[:-cut].rpartition(b"\n")[0].count(b'"type": "score"')
    assert left < 10
    again = RandomMatcher()
    found = evaluate(benchmark, [again], trials=1, results=path)
    assert again.calls == 10 - left
    assert torch.equal(found.scores["random"], whole.scores["random"])
    assert path.read_bytes() == content


def test_a_file_torn_in_its_first_line_begins_anew(benchmark, tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_bytes(b'{"type": "bench')
    found = evaluate(benchmark, [RandomMatcher()], trials=1, results=path)
    assert found.fresh == 10
    assert len(read_lines(path)) == 12


KILLED = """
import sys, time
from pathlib import Path
from evals_data import RandomMatcher
from diffenc.evals import evaluate, shapes_benchmark

class Slow(RandomMatcher):
    def __call__(self, images, texts, *, seed):
        time.sleep(0.05)
        return super().__call__(images, texts, seed=seed)

evaluate(shapes_benchmark("winoground", per_label=8), [Slow()], results=Path(sys.argv[1]))
"""


@pytest.mark.long
def test_a_killed_run_goes_on_without_loss(tmp_path):
    path = tmp_path / "scores.jsonl"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen([sys.executable, "-c", KILLED, path], env=environment)
    try:
        limit = time.monotonic() + 60
        while not (path.exists() and path.read_bytes().count(b"\n") > 8):
            assert time.monotonic() < limit
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = [line for line in read_lines(path) if line["type"] == "score"]
    assert 0 < len(before) < 120
    data = shapes_benchmark("winoground", per_label=8)
    matcher = RandomMatcher()
    found = evaluate(data, [matcher], results=path)
    assert matcher.calls == found.fresh == 120 - len(before)
    after = [line for line in read_lines(path) if line["type"] == "score"]
    assert after[: len(before)] == before
    assert len({(line["model"], line["seed"], line["item"]) for line in after}) == len(after) == 120
    assert torch.equal(found.scores["random"], evaluate(data, [RandomMatcher()]).scores["random"])


def test_an_exception_keeps_what_was_scored(benchmark, tmp_path):
    class Failing(RandomMatcher):
        def __call__(self, images, texts, *, seed):
            if self.calls == 4:
                raise KeyboardInterrupt
            return super().__call__(images, texts, seed=seed)

    path = tmp_path / "scores.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(benchmark, [Failing()], trials=1, results=path)
    assert evaluate(benchmark, [RandomMatcher()], trials=1, results=path).fresh == 6


def test_another_configuration_is_refused_with_the_difference(benchmark, tmp_path):
    path = tmp_path / "scores.jsonl"
    config = {"timesteps": [189, 389], "mode": "exact"}
    evaluate(benchmark, [RandomMatcher(config=config)], results=path, trials=1)
    content = path.read_bytes()
    changed = RandomMatcher(config={**config, "timesteps": [189]}, weights="abc")
    with pytest.raises(ConfigError) as refused:
        evaluate(benchmark, [changed], results=path, trials=1)
    assert "config.timesteps is [189], was [189, 389]" in str(refused.value)
    assert 'weights is "abc", was null' in str(refused.value)
    assert "mode" not in str(refused.value)
    assert changed.calls == 0
    assert path.read_bytes() == content


def test_another_benchmark_and_template_are_refused(benchmark, tmp_path):
    path = tmp_path / "scores.jsonl"
    evaluate(benchmark, [RandomMatcher()], results=path, trials=1)
    with pytest.raises(ConfigError, match='benchmark is "mmvp-vlm", was "winoground"'):
        evaluate(shapes_benchmark("mmvp-vlm", per_label=1), [RandomMatcher()], results=path)


def test_other_pictures_under_the_same_ids_are_refused(benchmark, tmp_path):
    path = tmp_path / "scores.jsonl"
    evaluate(benchmark, [RandomMatcher()], results=path, trials=1)
    other = shapes_benchmark("winoground", per_label=2, seed=961_000)
    with pytest.raises(ConfigError, match=r"made from other data: .* item 'noun-0' differ"):
        evaluate(other, [RandomMatcher()], results=path, trials=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no json\n", "is no file of scores of diffenc"),
        (b"a picture, say", "is no file of scores of diffenc"),
        (b'{"type": "score"}\n', "is no file of scores of diffenc"),
    ],
)
def test_other_files_are_refused_and_left_alone(benchmark, tmp_path, content, message):
    path = tmp_path / "scores.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        evaluate(benchmark, [RandomMatcher()], results=path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"type": "score", "model": "random"}'])
def test_a_broken_line_in_the_middle_is_told_by_number(benchmark, tmp_path, line):
    path = tmp_path / "scores.jsonl"
    evaluate(benchmark, [RandomMatcher()], results=path, trials=1)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:4], line, *lines[4:]]))
    with pytest.raises(ConfigError, match=r"line 5 of .* is broken"):
        evaluate(benchmark, [RandomMatcher()], results=path, trials=1)


def test_a_folder_that_is_not_there_is_told(benchmark, tmp_path):
    with pytest.raises(OutputError, match=r"cannot use .*No such file"):
        evaluate(benchmark, [RandomMatcher()], results=tmp_path / "no/scores.jsonl")


def test_broken_items_are_reported_together_before_anything_is_scored(tmp_path):
    mmvp_vlm(tmp_path)
    images = tmp_path / "MLLM_VLM Images"
    (images / "Presence/3.jpg").write_bytes(b"no picture")
    cut = images / "State/6.jpg"
    cut.write_bytes(cut.read_bytes()[:200])
    (images / "Text/15.jpg").unlink()
    data, matcher = load_mmvp_vlm(tmp_path), RandomMatcher()
    with pytest.raises(ConfigError) as refused:
        evaluate(data, [matcher], results=tmp_path / "scores.jsonl")
    message = str(refused.value)
    assert "has 3 problems" in message
    assert "1 missing pictures (pair 15-16: Text/15.jpg)" in message
    assert "2 unreadable pictures (id 3-4: MLLM_VLM Images/Presence/3.jpg" in message
    assert "6 items are whole; go on with those by --skip-broken" in message
    assert matcher.calls == 0
    assert not (tmp_path / "scores.jsonl").exists()
    found = evaluate(data, [matcher], trials=1, skip_broken=True)
    assert (len(found.items), matcher.calls, len(found.problems)) == (6, 6, 3)
    assert "6 items where mmvp-vlm has 135" in "; ".join(found.notes)


def test_nothing_that_is_whole_is_refused_even_when_skipping(tmp_path):
    item = one_item(lambda: b"", picture(0, 0))
    data = MatchingBenchmark(name="winoground", source="here", items=(item,), label_kind="tag")
    with pytest.raises(ConfigError, match="no item that can be scored: 1 unreadable"):
        evaluate(data, [RandomMatcher()], skip_broken=True)


def test_duplicates_and_cut_texts_are_counted():
    items = (
        one_item(picture(0, 0), picture(0, 1), ("a red cup", "a cup"), "0"),
        one_item(picture(0, 0), picture(0, 1), ("a red cup", "a cup"), "1"),
        one_item(picture(1, 0), picture(1, 0), ("x", "a very long text indeed"), "2"),
        one_item(picture(2, 0), picture(2, 1), ("same", "same"), "3"),
    )
    data = MatchingBenchmark(name="winoground", source="here", items=items, label_kind="tag")
    looked_at = []
    found = inspect(
        data,
        [RandomMatcher("short", limit=2), RandomMatcher("long")],
        progress=lambda *counts: looked_at.append(counts),
    )
    assert found.problems == ()
    assert set(found.notes) == {
        "1 items have the same picture twice and cannot be right",
        "1 items have the same caption twice and cannot be right (3)",
        "2 captions occur in several items",
        "1 items are copies of others: same pictures, same captions",
        "short does not read all of 3 of 8 texts: up to 3 tokens are cut",
    }
    assert looked_at == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_file_and_its_pixels_in_memory_are_told_apart_by_content_alone():
    content = encoded(picture(0, 0), "png")
    assert Picture("a", lambda: content).read()[1] == Picture("b", lambda: content).read()[1]
    assert Picture("a", picture(0, 0)).read()[1] == Picture("b", picture(0, 0)).read()[1]
    assert Picture("a", picture(0, 0)).read()[1] != Picture("a", picture(0, 1)).read()[1]
    # equal bytes, other shape
    turned = picture(0, 0, size=(16, 24))
    assert Picture("a", picture(0, 0)).read()[1] != Picture("a", turned).read()[1]


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        (torch.zeros(2), ShapeError, r"it gave \(2,\)"),
        (torch.zeros(2, 3), ShapeError, r"it gave \(2, 3\)"),
        (torch.full((2, 2), torch.nan), NonFiniteError, "item 'noun-0'"),
    ],
)
def test_what_is_no_score_is_refused(benchmark, scores, error, message):
    class Odd(RandomMatcher):
        def __call__(self, images, texts, *, seed):
            return scores

    with pytest.raises(error, match=message):
        evaluate(benchmark, [Odd()])


@pytest.mark.parametrize("trials", [0, -1, True])
def test_trials_are_counted_from_one(benchmark, trials):
    with pytest.raises(ConfigError, match="trials must be an int"):
        evaluate(benchmark, [RandomMatcher()], trials=trials)


def test_models_need_names_of_their_own(benchmark):
    for matchers in ([], [RandomMatcher(), RandomMatcher()]):
        with pytest.raises(ConfigError, match="each with a name of its own"):
            evaluate(benchmark, matchers)


def test_progress_counts_what_was_there(benchmark, tmp_path):
    path = tmp_path / "scores.jsonl"
    evaluate(benchmark, [RandomMatcher()], trials=1, results=path)
    told = []
    evaluate(
        benchmark,
        [RandomMatcher()],
        trials=2,
        results=path,
        progress=lambda *counts: told.append(counts),
    )
    assert told == [(done, 20) for done in range(10, 21)]


def test_miniatures_are_equal_on_each_call_and_grow_without_changing():
    small, large = (shapes_benchmark("mmvp-vlm", per_label=n) for n in (1, 3))
    again = {item.id: item for item in large.items}
    for item in small.items:
        assert again[item.id].captions == item.captions
        assert again[item.id].pictures[1].read()[1] == item.pictures[1].read()[1]
    assert len(large.items) == 18
    assert small.expected is None
    with pytest.raises(ConfigError, match="1 or more"):
        shapes_benchmark("winoground", per_label=0)


def test_scores_survive_the_file_exactly(benchmark, tmp_path):
    class Third(RandomMatcher):
        def __call__(self, images, texts, *, seed):
            return torch.tensor([[1 / 3, 1 / 3], [1e-30, 3e38]])

    path = tmp_path / "scores.jsonl"
    found = [evaluate(benchmark, [Third()], trials=1, results=path) for _ in range(2)]
    assert torch.equal(found[0].scores["random"], found[1].scores["random"])
    assert found[0].scores["random"].float()[0, 0, 0, 0] == torch.tensor(1 / 3)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[2])["scores"][0][0] == json.loads(lines[2])["scores"][0][1]
