"""Records of scores and answers: one run at a time goes on, nothing is doubled or mixed."""

import json
import threading
from dataclasses import replace

import pytest
import torch

from answers_data import Says
from diffenc.errors import ConfigError, NonFiniteError, OutputError
from diffenc.evals.captioning import evaluate_captions, shapes_captions
from diffenc.evals.matching.evaluate import evaluate, scores_file
from diffenc.evals.matching.metrics import correct
from diffenc.evals.matching.miniature import shapes_benchmark
from diffenc.evals.records import ANSWERS, RecordsFile
from diffenc.studies.spreads import Spread
from diffenc.studies.vlm.findings import parse_claim
from evals_data import RandomMatcher, read_lines


@pytest.fixture(scope="module")
def benchmark():
    return shapes_benchmark("winoground", per_label=1)


@pytest.fixture
def scored(benchmark, tmp_path):
    path = tmp_path / "scores.jsonl"
    evaluate(benchmark, [RandomMatcher()], trials=1, results=path)
    return path


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_the_same_run_again_adds_no_line(benchmark, scored):
    content = scored.read_bytes()
    again = RandomMatcher()
    assert evaluate(benchmark, [again], trials=1, results=scored).fresh == again.calls == 0
    assert scored.read_bytes() == content


def test_a_last_line_that_was_cut_off_is_made_again_and_once(benchmark, scored):
    whole = scored.read_bytes()
    for cut in (1, 20, 60):
        scored.write_bytes(whole[:-cut])
        assert evaluate(benchmark, [RandomMatcher()], trials=1, results=scored).fresh == 1
        assert scored.read_bytes() == whole


def test_a_line_that_stands_twice_is_refused(benchmark, scored):
    lines = read_lines(scored)
    for double in (lines[1], lines[-1], {**lines[-1], "scores": [[1, 2], [3, 4]]}):
        write_lines(scored, [*lines, double])
        with pytest.raises(ConfigError, match=rf"line {len(lines) + 1} of .* stands for the same"):
            evaluate(benchmark, [RandomMatcher()], trials=1, results=scored)


BAD = {
    "NaN": [[float("nan"), 1], [1, 1]],
    "text": [["1", 1], [1, 1]],
    "one text": "scores",
    "truth": [[True, 1], [1, 1]],
    "three": [[1, 1], [1, 1], [1, 1]],
    "flat": [1, 1, 1, 1],
    "lengths": [[1], [1, 1]],
    "parts": [[[1, 2], [1, 2]], [[1, 2], [1]]],
    "null": None,
    "table": {"0": [1, 1], "1": [1, 1]},
}


@pytest.mark.parametrize("scores", BAD.values(), ids=BAD.keys())
def test_scores_that_are_none_are_refused(benchmark, scored, scores):
    *lines, last = read_lines(scored)
    write_lines(scored, [*lines, {**last, "scores": scores}])
    with pytest.raises(ConfigError, match=rf"line {len(lines) + 1} of .* is broken"):
        evaluate(benchmark, [RandomMatcher()], trials=1, results=scored)


@pytest.mark.parametrize(
    "change",
    [
        {"model": 3},
        {"item": ["a"]},
        {"item": None},
        {"seed": True},
        {"seed": "0"},
        {"digest": 5},
        {"type": "answer"},
        {"type": ["score"]},
    ],
    ids=str,
)
def test_keys_of_other_types_are_refused(benchmark, scored, change):
    *lines, last = read_lines(scored)
    write_lines(scored, [*lines, {**last, **change}])
    with pytest.raises(ConfigError, match="is broken"):
        evaluate(benchmark, [RandomMatcher()], trials=1, results=scored)


def test_a_description_that_is_no_table_is_refused(benchmark, scored):
    first, model, *lines = read_lines(scored)
    write_lines(scored, [first, {**model, "description": [1]}, *lines])
    with pytest.raises(ConfigError, match=r"line 2 of .* description must be a table"):
        evaluate(benchmark, [RandomMatcher()], trials=1, results=scored)


def test_scores_of_items_that_are_gone_are_counted(benchmark, scored):
    lines = read_lines(scored)
    stray = [{**lines[-1], "item": f"gone-{k}"} for k in range(4)]
    write_lines(scored, [*lines, *stray])
    found = evaluate(benchmark, [RandomMatcher()], trials=1, results=scored)
    assert found.fresh == 0
    assert [note for note in found.notes if "gone-0, gone-1, gone-2, ..." in note and "4" in note]


def test_answers_to_questions_that_are_gone_are_counted(tmp_path):
    data = shapes_captions(3, seed=7)
    path = tmp_path / "answers.jsonl"
    options = {"metrics": (), "results": path}
    evaluate_captions(data, Says(lambda *_: "a"), **options)
    fewer = data.select(limit=2)
    found = evaluate_captions(fewer, Says(lambda *_: "a"), **options)
    assert found.fresh == 0
    assert "1 answers to questions that are not asked" in " ".join(found.notes)


def test_a_file_is_open_once(benchmark, scored):
    content = scored.read_bytes()
    with scores_file(scored, benchmark):
        with pytest.raises(OutputError, match=r"scores\.jsonl is in use: another program"):
            scores_file(scored, benchmark)
        with RecordsFile(scored.with_name("other.jsonl"), ANSWERS, {"task": "task"}):
            pass
    with scores_file(scored, benchmark):
        pass
    assert scored.read_bytes() == content


def test_of_two_runs_at_once_one_is_refused(benchmark, tmp_path):
    path, inside, outcome = tmp_path / "scores.jsonl", threading.Event(), []
    both = threading.Barrier(2, timeout=60)

    class Waiting(RandomMatcher):
        def __call__(self, *args, **options):
            if not inside.is_set():
                inside.set()
                both.wait()
            return super().__call__(*args, **options)

    def run():
        outcome.append(evaluate(benchmark, [Waiting()], trials=1, results=path).fresh)

    thread = threading.Thread(target=run)
    thread.start()
    inside.wait(60)
    try:
        with pytest.raises(OutputError, match="in use"):
            evaluate(benchmark, [RandomMatcher()], trials=1, results=path)
    finally:
        both.wait()
        thread.join()
    assert outcome == [len(benchmark.items)]
    assert len(read_lines(path)) == 2 + len(benchmark.items)


def test_a_refused_file_is_not_left_locked(benchmark, scored):
    other = shapes_benchmark("mmvp-vlm", per_label=1)
    for _ in range(2):
        with pytest.raises(ConfigError, match="another run"):
            scores_file(scored, other)


def test_answers_that_no_file_keeps_equal_those_read_again(tmp_path):
    data = shapes_captions(1, seed=7)
    answers = []
    for _ in range(2):
        model = Says(lambda *_: "a\ud83d b\u2028c")
        found = evaluate_captions(data, model, metrics=(), results=tmp_path / "a.jsonl")
        answers.append(found.passes[0].captions)
    assert answers[0] == answers[1]
    assert list(answers[0].values()) == ["a? b\u2028c"]


def test_comparisons_with_nan_are_refused():
    scores = torch.ones(3, 2, 2)
    scores[1, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        correct(scores)
    for values in ((float("nan"), 1.0), (float("inf"),), ()):
        with pytest.raises(NonFiniteError, match="figures must be finite"):
            Spread(values)
    for word in ("nan", "inf", "-inf", "1e999"):
        with pytest.raises(ConfigError, match="neither a number nor a figure"):
            parse_claim(f"a/b/c > {word}")


def test_items_of_one_id_are_refused_before_anything_is_scored(benchmark, tmp_path):
    double = replace(benchmark, items=(*benchmark.items, replace(benchmark.items[1], id="noun-0")))
    assert benchmark.items[0].id == "noun-0"
    matcher = RandomMatcher()
    with pytest.raises(ConfigError, match="1 ids more than once, such as 'noun-0'"):
        evaluate(double, [matcher], trials=1, results=tmp_path / "scores.jsonl")
    data = shapes_captions(2, seed=7)
    same = replace(data, items=(data.items[0], replace(data.items[1], id=data.items[0].id)))
    with pytest.raises(ConfigError, match="1 ids more than once"):
        evaluate_captions(same, Says(lambda *_: "a"), metrics=())
    assert matcher.calls == 0


def test_scores_whose_configuration_no_line_holds_are_refused(benchmark, scored):
    """A line of a model that was deleted by hand would let in scores of any configuration."""
    lines = [line for line in read_lines(scored) if line["type"] != "model"]
    write_lines(scored, lines)
    with pytest.raises(ConfigError, match="but no line says of which configuration"):
        evaluate(benchmark, [RandomMatcher()], trials=1, results=scored)
    assert read_lines(scored) == lines
