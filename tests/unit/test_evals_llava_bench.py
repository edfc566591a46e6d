import json
import random
import shutil

import pytest

from answers_data import (
    Says,
    check_all_is_told_before_anything_is_asked,
    completion,
    judge_service,
    llava_bench,
)
from diffenc.errors import ConfigError, DiffencError
from diffenc.evals.llava_bench import (
    Case,
    FunctionJudge,
    JudgeError,
    OpenAIJudge,
    WordJudge,
    bench_table,
    evaluate_llava_bench,
    load_llava_bench,
    shapes_llava_bench,
)
from diffenc.evals.llava_bench.judge import read_scores
from evals_data import read_lines, write_jsonl

CASE = Case("a hill", "What is it?", "a hill", "a green hill", "Compare them.")


def answering(*_):
    return "an answer"


class Flaky:
    """A judge whose replies are given in advance; exceptions are raised."""

    name, description = "flaky", {}

    def __init__(self, *replies, then="8 6\nfine"):
        self.replies, self.then, self.cases = list(replies), then, []

    def review(self, case):
        self.cases.append(case)
        reply = self.replies.pop(0) if self.replies else self.then
        if isinstance(reply, Exception):
            raise reply
        return reply


class TestLayouts:
    def test_the_files_of_the_hub(self, tmp_path):
        benchmark = load_llava_bench(llava_bench(tmp_path))
        assert benchmark.problems == ()
        assert [item.category for item in benchmark.items] == ["conv", "detail", "complex"]
        item = benchmark.items[2]
        assert (item.id, item.question) == ("2", "Why is it?")
        assert (item.context, item.reference) == ("a lake\nwith a boat", "reference 2")
        assert item.picture.open().getpixel((0, 0))[0] == pytest.approx(2, abs=3)
        assert "3 questions where the benchmark has 60" in benchmark.notes
        assert "the judge's instruction is not LLaVA's own" in benchmark.notes[-1]

    def test_in_an_archive_and_with_other_references(self, tmp_path):
        folder = llava_bench(tmp_path / "data")
        shutil.move(folder / "answers_gpt4.jsonl", folder / "bard_0718.jsonl")
        archive = shutil.make_archive(tmp_path / "all", "zip", folder)
        assert len(load_llava_bench(archive, reference="bard_0718.jsonl").items) == 3
        with pytest.raises(ConfigError, match=r"it holds no answers_gpt4\.jsonl"):
            load_llava_bench(archive)

    def test_rules_of_llava_are_used_where_they_are(self, tmp_path):
        rules = {
            f"llava_bench_{c}": {"role": "Helper", "prompt": f"Rule of {c}."} for c in ("conv",)
        }
        (llava_bench(tmp_path) / "rule.json").write_text(json.dumps(rules))
        judge = Flaky()
        evaluate_llava_bench(load_llava_bench(tmp_path), Says(answering), judge)
        assert (judge.cases[0].rule, judge.cases[0].role) == ("Rule of conv.", "Helper")
        assert "[Helper 2]\nan answer\n\n[End of Helper 2]" in judge.cases[0].prompt
        assert judge.cases[1].rule.startswith("Two assistants, Assistant 1 and Assistant 2,")

    def test_problems_are_told_together_before_anything_is_asked(self, tmp_path):
        llava_bench(tmp_path)
        (tmp_path / "images/002.jpg").write_bytes(b"no picture")
        rows = read_lines(tmp_path / "questions.jsonl")
        rows.append({"question_id": 3, "image": "003.jpg", "text": "?", "category": "conv"})
        rows.append({"question_id": 0, "image": "001.jpg", "text": "", "category": ""})
        write_jsonl(tmp_path / "questions.jsonl", rows)
        path = tmp_path / "context.jsonl"
        path.write_text(path.read_text() + "{broken\n")
        (tmp_path / "rule.json").write_text('{"llava_bench_conv": {"prompt": "x"}}')
        check_all_is_told_before_anything_is_asked(
            lambda model: evaluate_llava_bench(load_llava_bench(tmp_path), model, WordJudge()),
            "1 broken rows (context.jsonl, line 3",
            "1 missing pictures (question 3: 003.jpg)",
            "1 missing contexts (question 3: 003.jpg)",
            "1 missing reference answers (question 3)",
            "1 missing questions (question 0)",
            "1 missing categories (question 0)",
            "1 broken rules (rule.json: 'role')",
            "1 unreadable pictures (images/002.jpg",
        )

    def test_renamed_columns(self, tmp_path):
        llava_bench(tmp_path)
        write_jsonl(tmp_path / "context.jsonl", [{"image": "001.jpg", "description": "a"}])
        with pytest.raises(ConfigError, match="no column 'caption'; its columns are"):
            load_llava_bench(tmp_path)


class TestScores:
    @pytest.mark.parametrize(
        ("reply", "scores"),
        [("8 7", (8, 7)), ("\n 9.5, 10 \nBecause 3 4", (9.5, 10)), ("1\t1", (1, 1))],
    )
    def test_the_first_line(self, reply, scores):
        assert read_scores(reply) == scores

    @pytest.mark.parametrize(
        "reply",
        ["", "8", "8 7 6", "Assistant 1: 8, Assistant 2: 7", "0 5", "8 11", "-8 7", "8/10 9/10",
         "I think\n8 7", "nan inf"],
    )  # fmt: skip
    def test_anything_else_is_a_failure(self, reply):
        with pytest.raises(JudgeError, match="does not begin with two scores"):
            read_scores(reply)

    @pytest.mark.parametrize(
        ("reply", "scores"),
        [
            ("8 7", (8, 7)),
            ("8,7", (8, 7)),
            ("8, 7", (8, 7)),
            ("8 , 7", (8, 7)),
            ("8.5 7", (8.5, 7)),
            ("8 7.", (8, 7)),
            ("8.0 7.25", (8, 7.25)),
            ("10 10", (10, 10)),
            ("1 1", (1, 1)),
            ("  9   6  ", (9, 6)),
            ("9\t6", (9, 6)),
            ("9 6\r\nBecause.", (9, 6)),
            ("\n\n9 6\n\nAssistant 1 names 3 of 4.", (9, 6)),
            ("08 07", (8, 7)),
            ("9.99 1.01", (9.99, 1.01)),
            ("7 9\n8 8", (7, 9)),
            ("6 6\nScore: 10/10", (6, 6)),
            ("3 4\n5", (3, 4)),
            ("4 8 \nI liked it", (4, 8)),
            ("10,1", (10, 1)),
        ],
        ids=repr,
    )  # fmt: skip
    def test_two_numbers_alone(self, reply, scores):
        assert read_scores(reply) == scores

    @pytest.mark.parametrize(
        "reply",
        [
            "Assistant 1: 8\nAssistant 2: 3", "Assistant 1: 8, Assistant 2: 3",
            "Assistant 1: 8 Assistant 2: 3", "Score: 8 7", "Scores: 8, 7", "8 7 Assistant 1 wins",
            "8/10 7/10", "8/10, 7/10", "8 out of 10 7 out of 10", "8 7 6", "8 7 (of 10)", "8", "8,",
            "8 vs 7", "8 and 7", "8 to 7", "8:7", "8-7", "8 - 7", "8;7", "8|7", "(8, 7)", "[8, 7]",
            "**8 7**", "**8** **7**", "`8 7`", "# 8 7", "- 8 7", "1. 8 7", "1. 8", "1. 8\n2. 7",
            "8 seven", "eight seven", "VIII VII", "A: 8, B: 7", "{8 7}", "8.5.1 7", "8,5 7,5",
            "8,,7", ", 8 7",
            "1,000 7", "0 7", "8 0", "0.99 5", "8 10.01", "11 8", "8 11", "-1 8", "8 -1", "+8 +7",
            "1e9 7", "1e0 7", "nan 7", "8 inf", "nan nan", "0x8 7", "1_0 7", "99999999999999999 7",
            "Both are good.\n8 7", "Here is my rating:\n8 7", "I would say 8 7", "80% 70%",
            "\u0668 \u0667", "\uff18 \uff17", "\u2467 \u2466", "8\u20037x", "8\u20287\n8 7 6",
            "\u20288 x", "", " ", "\n\n", "\x00", "8 7\x00", "...",
        ],
        ids=repr,
    )  # fmt: skip
    def test_nothing_else_is_read(self, reply):
        with pytest.raises(JudgeError, match="does not begin with two scores from 1 to 10"):
            read_scores(reply)

    def test_whatever_is_read_is_the_released_reading(self):
        rng = random.Random(5)
        read = 0
        for _ in range(5000):
            reply = "".join(rng.choices("0123456789..,,  \n-+e_x\t", k=rng.randint(3, 6)))
            try:
                scores = read_scores(reply)
            except JudgeError:
                continue
            parts = reply.strip().split("\n")[0].replace(",", " ").split()
            assert scores == tuple(float(part) for part in parts), reply
            read += 1
        assert read > 50

    def test_ratio_of_means_not_mean_of_ratios(self, tmp_path):
        benchmark = load_llava_bench(llava_bench(tmp_path))
        judge = Flaky("10 5", "2 2", "8 2")
        found = evaluate_llava_bench(benchmark, Says(answering), judge)
        assert found.by_category() == {"complex": 25, "conv": 50, "detail": 100}
        assert found.overall == 100 * (5 + 2 + 2) / (10 + 2 + 8)
        assert found.complete
        rows = bench_table([found]).rows
        assert rows[0] == ("model", "25.0", "50.0", "100.0", "45.0")
        assert rows[1] == ("paper: CLIP-LLaVA-v1.5-7B, ViT-L14-336", "75.4", "58", "60.2", "66.5")
        json.dumps(found.to_dict(), allow_nan=False)

    def test_what_the_judge_sees(self, tmp_path):
        judge = Flaky()
        model = Says(lambda images, question, prompt: f" {question} {prompt} ")
        benchmark = load_llava_bench(llava_bench(tmp_path))
        evaluate_llava_bench(benchmark, model, judge, prompts=lambda item: item.category)
        assert judge.cases[0].prompt.startswith(
            "[Context]\na hill\n\n[Question]\nWhat is it?\n\n[Assistant 1]\nreference 0\n\n"
            "[End of Assistant 1]\n\n[Assistant 2]\nWhat is it? conv\n\n[End of Assistant 2]\n\n"
            "[System]\n"
        )


class TestFailures:
    def run(self, folder, judge, **options):
        waits = []
        options = {"attempts": 3, "wait": 1.0, **options}
        found = evaluate_llava_bench(
            load_llava_bench(llava_bench(folder)),
            Says(answering),
            judge,
            sleep=waits.append,
            **options,
        )
        return found, waits

    def test_attempts_with_longer_and_longer_waits(self, tmp_path):
        judge = Flaky(JudgeError("busy"), "no scores", "7 5")
        found, waits = self.run(tmp_path, judge)
        assert found.complete
        assert waits == [1.0, 2.0]
        assert found.reviews["0"].candidate == 5
        _, waits = self.run(tmp_path, Flaky(*[JudgeError("busy")] * 9), attempts=9, wait=5)
        assert waits == [5, 10, 20, 40, 60, 60, 60, 60]

    def test_what_fails_for_good_is_never_scored(self, tmp_path):
        found, _ = self.run(tmp_path, Flaky("10 5", *["?"] * 3, "10 9"))
        assert set(found.reviews) == {"0", "2"}
        assert "does not begin with two scores" in found.failures["1"]
        assert not found.complete
        assert found.overall == 70
        assert found.by_category()["detail"] is None
        assert bench_table([found]).rows[0] == (
            *("model (2 of 3 reviewed)", "90.0", "50.0", "–", "70.0"),
        )
        assert "1 of 3 answers have no review" in found.notes[-1]

    def test_no_review_at_all_gives_no_number(self, tmp_path):
        found, _ = self.run(tmp_path, Flaky(then="?"))
        assert found.overall is None
        assert bench_table([found]).rows[0][1:] == ("–",) * 4

    def test_replies_of_the_file_that_hold_no_two_scores_are_asked_for_again(self, tmp_path):
        path = tmp_path / "answers.jsonl"
        self.run(tmp_path / "data", Flaky("10 5", "10 7", "10 9"), results=path)
        path.write_text(path.read_text().replace("10 7", "Assistant 1: 8\\nAssistant 2: 3"))
        found, _ = self.run(tmp_path / "data", judge := Flaky("10 6"), results=path)
        assert len(judge.cases) == 1
        assert [found.reviews[name].candidate for name in "012"] == [5, 6, 9]
        again, _ = self.run(tmp_path / "data", Flaky(), results=path)
        assert (again.fresh, again.overall) == (0, found.overall)

    def test_the_share_without_scores_is_told(self, tmp_path):
        found, _ = self.run(tmp_path, Flaky("10 5", *["?"] * 3, "10 9"))
        assert "(33.3 percent)" in found.notes[-1]
        assert found.to_dict()["unread"] == 1
        assert found.to_dict()["unread_share"] == pytest.approx(1 / 3)

    def test_the_next_call_tries_failures_again_and_nothing_else(self, tmp_path):
        path = tmp_path / "answers.jsonl"
        self.run(tmp_path / "data", Flaky("10 5", *["?"] * 3, "10 9"), results=path)
        judge = Flaky("10 1")
        found, _ = self.run(tmp_path / "data", judge, results=path)
        assert [case.question for case in judge.cases] == ["Describe it."]
        assert (found.complete, found.fresh, found.overall) == (True, 1, 50)
        lines = read_lines(path)
        assert [line["type"] for line in lines].count("answer") == 6

    def test_a_refusal_stops_and_keeps_what_was_done(self, tmp_path):
        path = tmp_path / "answers.jsonl"
        with pytest.raises(ConfigError, match="wrong key"):
            self.run(tmp_path / "data", Flaky("10 5", ConfigError("wrong key")), results=path)
        found, _ = self.run(tmp_path / "data", judge := Flaky(), results=path)
        assert len(judge.cases) == 2
        assert found.reviews["0"].candidate == 5

    def test_reviews_of_several_judges_and_models_share_a_file(self, tmp_path):
        path = tmp_path / "answers.jsonl"
        self.run(tmp_path / "data", Flaky(), results=path)
        other = FunctionJudge("other", lambda prompt: "5 5")
        found, _ = self.run(tmp_path / "data", other, results=path)
        assert (found.overall, found.fresh) == (100, 3)
        with pytest.raises(ConfigError, match="both called 'model'"):
            self.run(tmp_path / "data", FunctionJudge("model", str), results=path)

    def test_functions_that_lose_their_connection(self, tmp_path):
        calls = []

        def function(prompt):
            calls.append(prompt)
            if len(calls) == 1:
                raise ConnectionResetError("gone")
            return "4 2"

        found, waits = self.run(tmp_path, FunctionJudge("local", function))
        assert (found.overall, waits) == (50, [1.0])


@pytest.fixture
def server():
    with judge_service() as service:
        yield service


class TestService:
    def test_what_is_sent_and_what_comes_back(self, server, monkeypatch):
        monkeypatch.setenv("JUDGE_KEY", "secret")
        judge = OpenAIJudge("m-1", server.url, key_variable="JUDGE_KEY")
        server.replies = [completion("8 7\nfine")]
        assert judge.review(CASE) == "8 7\nfine"
        path, headers, body = server.requests[0]
        assert path == "/v1/chat/completions"
        assert headers["Authorization"] == "Bearer secret"
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("m-1", 0.2, 1024)
        assert body["messages"][-1] == {"role": "user", "content": CASE.prompt}
        assert "secret" not in json.dumps(dict(judge.description))

    def test_other_fields_and_no_key(self, server, monkeypatch):
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        options = {"max_tokens": None, "max_completion_tokens": 9}
        server.replies = [completion("8 7")]
        OpenAIJudge("m", server.url, options=options).review(CASE)
        _, headers, body = server.requests[0]
        assert "Authorization" not in headers
        assert "max_tokens" not in body
        assert body["max_completion_tokens"] == 9

    @pytest.mark.parametrize(
        "reply",
        [
            (429, b"slow down"),
            (503, b""),
            (200, b"<html>"),
            (200, b"{}"),
            (200, b'{"choices": []}'),
            completion(None),
        ],
        ids=str,
    )
    def test_what_may_pass_is_worth_another_attempt(self, server, reply):
        server.replies = [reply]
        with pytest.raises(JudgeError):
            OpenAIJudge("m", server.url).review(CASE)

    @pytest.mark.parametrize("status", [400, 401, 404])
    def test_refusals_are_final(self, server, status):
        server.replies = [(status, b"no such model")]
        with pytest.raises(
            ConfigError, match=rf"refuses the judge 'm' \({status}\): no such model"
        ):
            OpenAIJudge("m", server.url).review(CASE)

    def test_nobody_there(self, server):
        url = server.url
        server.shutdown()
        server.server_close()
        with pytest.raises(JudgeError, match="no reply from"):
            OpenAIJudge("m", url, timeout=5).review(CASE)
        with pytest.raises(ConfigError, match="must begin with http"):
            OpenAIJudge("m", "file:///etc")

    def test_an_evaluation_through_a_failing_service(self, server, tmp_path):
        server.replies = [(500, b"oops"), completion("9 3"), completion("9 6"), completion("9 9")]
        found = evaluate_llava_bench(
            load_llava_bench(llava_bench(tmp_path)),
            Says(answering),
            OpenAIJudge("m", server.url),
            sleep=lambda seconds: None,
        )
        assert found.overall == pytest.approx(100 * 18 / 27)
        assert issubclass(JudgeError, DiffencError)


class TestMiniature:
    def test_truth_has_all_and_nonsense_nothing(self):
        benchmark = shapes_llava_bench(6)
        truth = {(i.picture.open().tobytes(), i.question): i.reference for i in benchmark.items}
        right = Says(lambda images, question, prompt: truth[images[0].tobytes(), question])
        found = evaluate_llava_bench(benchmark, right, WordJudge())
        assert found.by_category() == {"complex": 100, "conv": 100, "detail": 100}
        wrong = evaluate_llava_bench(benchmark, Says(lambda *_: "bananas"), WordJudge())
        assert wrong.overall == 10
        assert len(bench_table([found]).rows) == 1

    def test_words_are_compared(self):
        def score(reference, candidate):
            return read_scores(WordJudge().review(Case("", "", reference, candidate, "")))[1]

        assert score("no", "No.") == 10
        assert score("no", "yes") == 1
        assert score("a red circle", "the circle is red") == 10
        assert score("a red circle", "a red star") == pytest.approx(1 + 9 / 2)
