"""lmms-eval itself, run on the miniature twins, against the evaluators of diffenc.

Skipped without lmms-eval; `make lmms` installs it into an environment of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: make lmms")

import tiny_llava
from diffenc.evals import FunctionAnswerer, SavedVLM
from diffenc.evals.choices import evaluate_choices, shapes_naturalbench
from diffenc.evals.llava_bench import WordJudge, evaluate_llava_bench
from diffenc.evals.lmms_eval.opening import open_model
from diffenc.hosts.transformers import (
    DiffEncLlavaForConditionalGeneration,
    DiffEncLlavaProcessor,
)
from diffenc.mllm import DiffusionVLM
from lmms.twin_tasks import (
    SOURCES,
    benchmarks,
    released_rows,
    write_released_tasks,
    write_tasks,
)

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]

TOKENS = 8


def run_lmms_eval(folder: Path, *names: str, options: str, batch_size: int = 4) -> dict[str, Any]:
    """Numbers of a run, its answers by id of the question, and its log of prompts."""
    out, log = folder / "out", folder / "prompts.jsonl"
    command = [sys.executable, "-m", "lmms_eval", "--model", "diffenc", "--log_samples"]
    command += ["--model_args", f"{options},log_prompts={log}", "--batch_size", str(batch_size)]
    command += ["--tasks", ",".join(names), "--device", "cpu"]
    command += ["--include_path", str(folder / "tasks"), "--output_path", str(out)]
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=500
    )
    written = list(out.rglob("*_results.json"))  # it exits with 0 after errors, too
    assert len(written) == 1, done.stdout[-2000:] + done.stderr[-4000:]
    (results,) = written
    answers = {}
    for name in names:
        (samples,) = out.rglob(f"*_samples_{name}.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        answers[name] = [row["filtered_resps"] for row in sorted(rows, key=lambda r: r["doc_id"])]
    numbers = json.loads(results.read_text())["results"]
    prompts = [json.loads(line) for line in log.read_text().splitlines()]
    return {"numbers": numbers, "answers": answers, "prompts": prompts}


@pytest.fixture(scope="module")
def twins() -> dict[str, Any]:
    return benchmarks(1)


@pytest.fixture(scope="module")
def vlm_run(tmp_path_factory: pytest.TempPathFactory, twins: dict[str, Any]) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("vlm")
    torch.manual_seed(0)
    DiffusionVLM("shapes", "shapes-lm").save_pretrained(folder / "model")
    write_tasks(folder / "tasks", twins, tokens=TOKENS)
    write_released_tasks(folder / "tasks", released_rows(twins))
    options = f"pretrained={folder / 'model'},prompt=question,question_field=question"
    names = [f"twin_{name}" for name in twins] + [f"local_{name}" for name in SOURCES]
    return {"folder": folder, **run_lmms_eval(folder, *names, options=options)}


def test_answers_are_those_of_the_evaluators_item_by_item(vlm_run, twins):
    saved = SavedVLM(vlm_run["folder"] / "model", max_new_tokens=TOKENS)
    for name, benchmark in twins.items():
        questions = [getattr(item, "text", item.question) for item in benchmark.items]
        pictures = [[each.open() for each in item.pictures] for item in benchmark.items]
        prompts = [item.question for item in benchmark.items]
        assert vlm_run["answers"][f"twin_{name}"] == saved.answer(pictures, questions, prompts), (
            name
        )


def test_yes_and_no_count_as_in_the_evaluator_of_naturalbench(vlm_run, twins):
    replies = iter(vlm_run["answers"]["twin_naturalbench"])
    model = FunctionAnswerer("log", lambda images, texts: [next(replies) for _ in texts])
    ours = evaluate_choices(twins["naturalbench"], model, batch_size=1)
    theirs = vlm_run["numbers"]["twin_naturalbench"]
    # An answer with neither word is neither right nor wrong there, and no pair is counted right.
    for name, number in (
        ("Q_Acc", ours.all_right("question")),
        ("I_Acc", ours.all_right("image")),
        ("G_Acc", ours.overall),
    ):
        assert theirs[f"naturalbench_{name},none"] == pytest.approx(number / 100), name


def test_reviews_count_as_in_the_evaluator_of_llava_bench(vlm_run, twins):
    replies = iter(vlm_run["answers"]["twin_bench"])
    model = FunctionAnswerer("log", lambda images, texts: [next(replies) for _ in texts])
    ours = evaluate_llava_bench(twins["bench"], model, WordJudge(), batch_size=1)
    theirs = vlm_run["numbers"]["twin_bench"]["llava_bench_all,none"]
    assert theirs == pytest.approx(ours.overall, abs=0.06)  # they round to one place


def test_each_question_is_the_prompt_of_its_pictures(vlm_run, twins):
    logged = {(line["task"], line["doc_id"]): line for line in vlm_run["prompts"]}
    for name, benchmark in twins.items():
        for number, item in enumerate(benchmark.items):
            line = logged[f"twin_{name}", number]
            assert (line["prompt"], line["pictures"]) == (item.question, len(item.pictures))


def test_tasks_that_lmms_eval_brings_run_on_local_data(vlm_run, twins):
    """Their texts go to the language model, the bare question to the encoder."""
    rows = released_rows(twins)
    for name, table in rows.items():
        lines = [each for each in vlm_run["prompts"] if each["task"] == f"local_{name}"]
        column = "Question" if name == "mmvp" else "question"
        assert [line["prompt"] for line in lines] == [row[column] for row in table], name
        assert all(row[column] in line["question"] for line, row in zip(lines, table, strict=True))
        assert {line["pictures"] for line in lines} == {2 if name == "blink" else 1}
    numbers = vlm_run["numbers"]
    assert "single word" in next(
        each["question"] for each in vlm_run["prompts"] if each["task"] == "local_gqa"
    )
    answers = vlm_run["answers"]["local_pope"]
    true = [row["answer"] for row in rows["pope"]]
    right = sum(answer == each for answer, each in zip(answers, true, strict=True)) / len(true)
    assert numbers["local_pope"]["pope_accuracy,none"] == pytest.approx(right)
    for name, metric in (
        ("gqa", "exact_match"),
        ("mmvp", "mmvp_pair_accuracy"),
        ("blink", "blink_acc"),
        ("cv_bench", "cv_bench_acc"),
    ):
        assert 0 <= numbers[f"local_{name}"][f"{metric},none"] <= 1


def is_right_there(name: str, item: Any, answer: str) -> bool:
    """Whether lmms-eval's own task counts an answer as right."""
    from lmms_eval.tasks.blink.utils import blink_process_results
    from lmms_eval.tasks.mmvp.utils import mmvp_process_results

    letter = f"({'ABCD'[item.answer]})"
    if name == "mmvp":
        counted = mmvp_process_results({"Index": 1, "Correct Answer": letter}, [answer])
        return bool(counted["mmvp_accuracy"]["is_correct"])
    counted = blink_process_results({"idx": "1", "sub_task": "", "answer": letter}, [answer])
    return bool(counted["blink_acc"]["is_correct"])


@pytest.mark.parametrize("name", ["mmvp", "blink"])
@pytest.mark.parametrize("form", ["{}", "({})", "{}.", "({}) it is"])
@pytest.mark.parametrize("shift", [0, 1], ids=["right", "wrong"])
def test_letters_count_as_in_the_evaluators_of_mmvp_and_blink(twins, name, form, shift):
    items = twins[name].items
    letters = [form.format("ABCD"[(item.answer + shift) % len(item.options)]) for item in items]
    waiting = iter(letters)
    model = FunctionAnswerer("letters", lambda images, texts: [next(waiting)])
    ours = evaluate_choices(twins[name], model, batch_size=1)
    for item, letter in zip(items, letters, strict=True):
        right = ours.choices[item.id].right
        assert is_right_there(name, item, letter) == right == (shift == 0)


def test_a_llava_checkpoint_of_transformers_answers_as_by_itself(tmp_path):
    model = tiny_llava.build("diffenc:shapes?t=50", DiffEncLlavaForConditionalGeneration)
    model.save_pretrained(tmp_path / "model")
    tower = tiny_llava.tower_of(model)
    DiffEncLlavaProcessor(
        tiny_llava.image_processor(tower),
        tiny_llava.tokenizer(),
        patch_size=tower.config.patch_size,
        prompt_model="shapes",
    ).save_pretrained(tmp_path / "model")
    twin = shapes_naturalbench(1)
    write_tasks(tmp_path / "tasks", {"naturalbench": twin}, tokens=TOKENS)
    options = f"pretrained={tmp_path / 'model'},guidance_scale=4"
    run = run_lmms_eval(tmp_path, "twin_naturalbench", options=options)
    assert [line["prompt"] for line in run["prompts"]] == [item.question for item in twin.items]
    loaded = open_model(
        str(tmp_path / "model"),
        device=torch.device("cpu"),
        dtype=torch.float32,
        guidance_scale=4,
    )
    alone = [
        loaded.generate(
            [[item.pictures[0].open()]],
            [[{"from": "human", "value": f"<image>\n{item.text}"}]],
            [item.question],
            max_new_tokens=TOKENS,
            do_sample=False,
        )[0]
        for item in twin.items
    ]
    assert run["answers"]["twin_naturalbench"] == alone
