import json
import re
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from answers_data import (
    coco,
    completion,
    judge_service,
    karpathy,
    llava_bench,
    mmvp,
    write_blink,
    write_picture,
)
from diffenc.cli.main import app
from diffenc.cli.progress import progress_bar
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError
from diffenc.evals.captioning import shapes_captions
from diffenc.evals.choices import shapes_mmvp
from diffenc.evals.choices.base import LETTER_INSTRUCTION
from diffenc.evals.run import run_task
from diffenc.evals.task import AskOptions
from diffenc.evals.tasks.leakage import Leakage
from diffenc.evals.tasks.mmvp import Mmvp
from diffenc.mllm import DiffusionVLM, VisionTokens
from diffenc.mllm.training.miniature import write_miniature
from evals_data import read_lines
from vlm_builders import save_tiny_lm, save_tiny_vision

COMMANDS = ("captions", "leakage", "mmvp", "blink", "naturalbench", "llava-bench")


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_sd_folder):
    """Runs `clip` (no text is read) and `sd`, and the language model `lm` of both."""
    folder = tmp_path_factory.mktemp("models")
    lm = save_tiny_lm(folder / "lm", context=4096)
    vision = VisionTokens.from_pretrained(save_tiny_vision(folder / "vision"), layer=-1)
    diffusion = DiffusionEncoder.from_pretrained(tiny_sd_folder)
    for name, encoder, policy in (
        ("clip", vision, "question"),
        ("sd", diffusion, "caption | dropout(0.3)"),
        ("both", DiffusionEncoder.from_pretrained(tiny_sd_folder, conditioning="concat"), "empty"),
    ):
        vlm = DiffusionVLM(encoder, str(lm), prompt_policy=policy)
        vlm.language_model.requires_grad_(False)
        vlm.save_pretrained(folder / name / "model")
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], prog_name="diffenc")


def done(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(result, message):
    assert result.exit_code == 2, result.output
    assert result.output.startswith("error: ")
    assert result.output.count("\n") == 1
    assert message in result.output


class Speech:
    """What models say, as the test has it, and what they were asked."""

    def __init__(self):
        self.says = lambda images, question, prompt, vlm: "a"
        self.asked, self.stops_after = [], None

    def generate(self, vlm, images, questions, prompts=None, **options):
        if self.stops_after is not None and len(self.asked) >= self.stops_after:
            raise KeyboardInterrupt
        rows = list(zip(images, questions, prompts, strict=True))
        self.asked += [(question, prompt, options) for _, question, prompt in rows]
        return [self.says(*row, vlm) for row in rows]


@pytest.fixture
def speech(monkeypatch):
    made = Speech()

    def generate(vlm, *args, **options):
        return made.generate(vlm, *args, **options)

    monkeypatch.setattr(DiffusionVLM, "generate", generate)
    return made


@pytest.fixture
def no_model(monkeypatch):
    """Whoever loads a model fails."""

    def load(*_args, **_kwargs):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(DiffusionVLM, "from_pretrained", load)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_is_needed(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    for words in ("MODEL", "--data", "--limit", "--seed", "--output", "--force", "--json"):
        assert words in result.output
    assert ("--prompts" in result.output) == (command != "leakage")
    assert f"\n  {command} " in run("--help").output


class TestCaptions:
    @pytest.mark.long
    def test_a_tiny_model_captions_twice_and_its_captions_are_prompts(self, models, tmp_path):
        result = done(
            *("captions", models / "sd", "--data", "shapes", "--limit", 3, "--passes", 2),
            *("--max-new-tokens", 3, "-o", "a.jsonl", "--json"),
        )
        first, second = json.loads(result.stdout)["passes"]
        assert first["prompts"] == {"0": "", "1": "", "2": ""}
        assert second["prompts"] == first["captions"]
        lines = read_lines(tmp_path / "a.jsonl")
        assert lines[1]["name"] == "sd"
        assert [line["answer"].strip() for line in lines[2:]] == [
            *first["captions"].values(),
            *second["captions"].values(),
        ]

    def test_metrics_are_added_without_asking_again(self, models, speech):
        pytest.importorskip("pycocoevalcap")
        truth = iter([item.references[0] for item in shapes_captions(4).items])
        speech.says = lambda *_: next(truth)
        arguments = ("captions", models / "clip", "--data", "shapes", "--limit", 4)
        plain = done(*arguments)
        assert "a true one" in plain.stdout
        assert "no metric was asked for" in plain.stderr
        assert plain.stdout.endswith("answers are in captions-results.jsonl\n")
        assert len(speech.asked) == 4
        speech.stops_after = 0
        scored = done(*arguments, "--metric", "rouge-l,bleu-4", "--tokenizer", "simple")
        assert "4 of 4 answers were there already" in scored.stdout
        assert re.search(r"^  clip +100\.00 +100\.00$", scored.stdout, re.MULTILINE)
        assert "they say nothing of photographs" in scored.stdout

    @pytest.mark.long
    def test_true_captions_as_prompts(self, models, speech):
        arguments = ("captions", models / "sd", "--data", "shapes", "--limit", 6)
        done(*arguments, "--prompts", "caption")
        wanted = [item.references for item in shapes_captions(6).items]
        assert all(prompt in own for (_, prompt, _), own in zip(speech.asked, wanted, strict=True))
        done(*arguments, "--prompts", "caption", "--seed", 1, "-o", "other.jsonl")
        prompts = [prompt for _, prompt, _ in speech.asked]
        assert prompts[:6] != prompts[6:]

    @pytest.mark.parametrize("command", ["captions", "leakage"])
    def test_the_miniature_is_asked_what_its_models_learnt(self, models, speech, tmp_path, command):
        """A request for a sentence that was never trained is answered with a word or none."""
        arguments = (command, models / "clip", "--data")
        done(*arguments, "shapes", "--limit", 4)
        learnt = json.loads(write_miniature(tmp_path / "made", scenes=1)["align"].read_text())
        questions = {question for question, _, _ in speech.asked}
        assert questions == {learnt[0]["conversations"][0]["value"].replace("<image>", "").strip()}
        speech.asked.clear()
        done(*arguments, "shapes", "--limit", 4, "--question", "what is it?", "-o", "b.jsonl")
        assert {question for question, _, _ in speech.asked} == {"what is it?"}
        speech.asked.clear()
        coco(tmp_path / "coco")
        done(*arguments, "coco", "-o", "c.jsonl")
        assert {question for question, _, _ in speech.asked} == {
            "Provide a one-sentence caption for the provided image."
        }

    def test_coco_and_the_paper_beside_it(self, models, speech, tmp_path):
        pytest.importorskip("pycocoevalcap")
        coco(tmp_path / "coco")
        arguments = ("captions", models / "clip", "--data", "coco", "--tokenizer", "simple")
        result = done(*arguments, "--metric", "cider")
        assert len(speech.asked) == 3
        assert re.search(
            r"^  paper: SDXL \(PT\), No captions, No captions +25\.8$", result.stdout, re.MULTILINE
        )
        limited = done(*arguments, "--metric", "cider", "--no-paper", "--limit", 2)
        assert "paper" not in limited.stdout
        assert "2 of 3 images; CIDEr depends on which ones" in limited.stderr
        (tmp_path / "coco/annotations/captions_train2014.json").write_text("{}")
        refused(run(*arguments), "captions_train2014.json, captions_val2014.json; say which by")
        elsewhere = tmp_path / "coco/annotations/captions_val2014.json"
        done(*arguments, "--annotations", elsewhere, "--limit", 2)

    def test_a_part_of_karpathys_split(self, models, speech, tmp_path):
        karpathy(tmp_path / "coco")
        arguments = ("captions", models / "clip", "--data", "coco", "--json")
        assert list(json.loads(done(*arguments).stdout)["passes"][0]["captions"]) == ["42", "7"]
        other = done(*arguments, "--split", "restval", "-o", "other.jsonl")
        assert json.loads(other.stdout)["benchmark"] == "karpathy-restval"

    def test_metrics_that_cannot_run_are_told_first(self, models, no_model, monkeypatch):
        arguments = ("captions", models / "clip", "--data", "shapes", "--metric", "cider")
        monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
        refused(run(*arguments, "--tokenizer", "simple"), "pip install 'diffenc[caption]'")
        monkeypatch.setattr("shutil.which", lambda _: None)
        refused(run(*arguments), "--tokenizer simple")


class TestFile:
    ARGUMENTS = ("--data", "shapes", "--limit", 8, "--batch-size", 2)

    def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_been(self, models, speech, tmp_path):
        arguments = ("captions", models / "clip", *self.ARGUMENTS, "--passes", 2)
        # every picture has a caption of its own
        speech.says = lambda images, question, prompt, vlm: f"{sum(images[0].tobytes())}{prompt}"
        whole = done(*arguments, "--json", "-o", "whole.jsonl")
        asked = list(speech.asked)
        speech.asked.clear()
        speech.stops_after = 10
        stopped = run(*arguments, "-o", "killed.jsonl")
        assert stopped.exit_code == 130
        assert "what was answered is in killed.jsonl, and the same command goes on" in (
            stopped.stderr
        )
        content = (tmp_path / "killed.jsonl").read_bytes()
        assert content.count(b'"type": "answer"') == 10
        (tmp_path / "killed.jsonl").write_bytes(content[:-9])  # the last line is torn
        speech.stops_after = None
        speech.asked.clear()
        again = done(*arguments, "--json", "-o", "killed.jsonl")
        assert again.stdout == whole.stdout
        assert speech.asked == asked[9:]
        lines = [(tmp_path / f"{name}.jsonl").read_bytes() for name in ("whole", "killed")]
        assert sorted(lines[0].splitlines()) == sorted(lines[1].splitlines())

    def test_another_configuration_is_refused_with_the_difference(self, models, speech, tmp_path):
        arguments = ("mmvp", models / "clip", *self.ARGUMENTS)
        done(*arguments)
        before = (tmp_path / "mmvp-results.jsonl").read_bytes()
        longer = run(*arguments, "--max-new-tokens", 5)
        refused(longer, "max_new_tokens is 5, was 16")
        assert "--force" in longer.output
        refused(run(*arguments, "--prompts", "empty"), 'prompts is "empty", was "question"')
        refused(run(*arguments, "--dtype", "bf16"), 'dtype is "bfloat16", was "float32"')
        refused(run("blink", models / "clip", *self.ARGUMENTS, "-o", "mmvp-results.jsonl"), "blink")
        assert (tmp_path / "mmvp-results.jsonl").read_bytes() == before
        assert len(speech.asked) == 8
        done(*arguments, "--max-new-tokens", 5, "--force")
        assert len(speech.asked) == 16
        assert [path.name for path in tmp_path.iterdir()] == ["mmvp-results.jsonl"]
        assert read_lines("mmvp-results.jsonl")[1]["description"]["max_new_tokens"] == 5

    def test_other_weights_are_another_model(self, models, speech, tmp_path):
        folder = tmp_path / "clip"
        DiffusionVLM.from_pretrained(models / "clip/model").save_pretrained(folder)
        arguments = ("mmvp", folder, *self.ARGUMENTS)
        done(*arguments)
        path = next(folder.rglob("projector.safetensors"))
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
        result = run(*arguments)
        refused(result, "holds answers of 'clip' in another configuration: weights is")
        assert len(speech.asked) == 8

    def test_two_models_in_one_file(self, models, speech, tmp_path):
        done("mmvp", models / "clip", *self.ARGUMENTS, "--name", "first")
        done("mmvp", models / "clip", *self.ARGUMENTS, "--name", "second")
        names = [x["name"] for x in read_lines("mmvp-results.jsonl") if x["type"] == "model"]
        assert names == ["first", "second"]

    def test_a_failure_before_the_first_answer_leaves_files_as_they_were(
        self, models, speech, tmp_path, monkeypatch
    ):
        arguments = ("mmvp", models / "clip", "--data", mmvp(tmp_path / "data"))
        done(*arguments)
        before = (tmp_path / "mmvp-results.jsonl").read_bytes()
        write_picture(tmp_path / "data/MMVP Images/2.jpg", 2)
        (tmp_path / "data/MMVP Images/2.jpg").write_bytes(b"")
        refused(run(*arguments, "--force"), "1 unreadable pictures (MMVP Images/2.jpg")
        refused(run(*arguments, "-o", "new.jsonl"), "by --skip-broken")
        speech.stops_after = 0
        assert run(*arguments, "--skip-broken", "--force").exit_code == 130
        assert (tmp_path / "mmvp-results.jsonl").read_bytes() == before
        assert {path.name for path in tmp_path.iterdir()} == {"data", "mmvp-results.jsonl"}

    def test_a_complete_file_needs_no_model(self, models, speech, monkeypatch):
        done("mmvp", models / "clip", *self.ARGUMENTS)

        def load(*_args, **_kwargs):
            raise AssertionError("a model is loaded")

        monkeypatch.setattr(DiffusionVLM, "from_pretrained", load)
        assert "8 of 8 answers were there" in done("mmvp", models / "clip", *self.ARGUMENTS).stdout


class TestGuidance:
    @pytest.mark.parametrize(
        "command", ["captions", "mmvp", "blink", "naturalbench", "llava-bench"]
    )
    def test_every_command_that_asks_can_guide(self, models, speech, command):
        scales = set()

        def says(images, question, prompt, vlm):
            scales.add((vlm.encoder.config.conditioning, vlm.encoder.config.guidance_scale))
            return "a"

        speech.says = says
        arguments = (command, models / "sd", "--data", "shapes", "--limit", 2, "--prompts", "empty")
        done(*arguments, "--guidance-scale", 4.5)
        assert scales == {("cfg", 4.5)}
        description = read_lines(f"{command}-results.jsonl")[1]["description"]
        assert description["guidance_scale"] == 4.5
        refused(run(*arguments), "guidance_scale is null, was 4.5")

    def test_a_model_that_reads_no_text_has_nothing_to_guide(self, models, no_model):
        arguments = ("mmvp", models / "clip", "--data", "shapes", "--guidance-scale", 2)
        refused(run(*arguments), "reads no text")


class TestCaptionsOfAnotherRun:
    """One model captions, another one's encoder reads what was said."""

    @pytest.mark.parametrize(
        ("command", "item"), [("mmvp", 4), ("blink", 1), ("naturalbench", 1), ("llava-bench", 3)]
    )
    def test_any_pictures_can_be_captioned_and_read(self, models, speech, command, item):
        data = ("--data", "shapes", "--limit", item)
        captions = iter(range(1000))
        speech.says = lambda *_: f" number {next(captions)}."
        first = done(command, models / "clip", *data, "--question", "describe the picture.")
        file = f"{command}-captions.jsonl"
        assert f"answers are in {file}" in first.stdout
        assert "nothing was counted" in first.stderr
        assert "number 0." in first.stdout
        assert {row[:2] for row in speech.asked} == {("describe the picture.",) * 2}
        assert {row[2]["max_new_tokens"] for row in speech.asked} == {32}
        items = [line["item"] for line in read_lines(file)[2:]]
        count = len(speech.asked)
        speech.asked.clear()
        speech.says = lambda *_: "a"
        done(command, models / "clip", *data, "--captions", file)
        assert len(speech.asked) == count
        prompts = [prompt for _, prompt, _ in speech.asked]
        assert [prompt.split()[-2:] for prompt in prompts] == [
            ["number", f"{number}."] for number in range(count)
        ]
        assert all(len(prompt.split()) > 2 for prompt in prompts)  # behind the question
        lines = read_lines(f"{command}-results.jsonl")
        assert lines[1]["description"]["prompts"] == "question+caption"
        assert [line["item"] for line in lines[2 : 2 + count]] == items

    def test_captions_are_prompts_alone_where_nothing_else_was_read(self, models, speech):
        speech.says = lambda *_: "a red circle"
        data = ("--data", "shapes", "--limit", 2)
        done("captions", models / "clip", *data, "-o", "said.jsonl")
        for name, policy in (("both", "caption"), ("sd", "caption")):
            speech.asked.clear()
            done("captions", models / name, *data, "--captions", "said.jsonl", "--force")
            assert {prompt for _, prompt, _ in speech.asked} == {"a red circle"}
            lines = read_lines("captions-results.jsonl")
            assert lines[1]["description"]["prompts"] == policy

    def test_captions_that_nothing_reads_or_that_are_of_other_data_are_refused(
        self, models, no_model, tmp_path
    ):
        (tmp_path / "said.json").write_text('{"0": "a red circle", "many": "b"}')
        arguments = ("captions", models / "sd", "--data", "shapes", "--captions", "said.json")
        refused(run(*arguments), "said.json has captions of 1 items that")
        refused(
            run(*arguments, "--limit", 2, "--prompts", "empty"), "prompts='empty' has none; write"
        )
        refused(run(*arguments, "--limit", 2), "1 items without a caption in said.json (id 1)")
        assert not (tmp_path / "captions-results.jsonl").exists()
        refused(run(*arguments[:4], "--captions", "none.json"), "cannot read none.json")
        with pytest.raises(ConfigError, match="takes no captions"):
            run_task(
                Leakage(data="shapes"), models / "sd", AskOptions(captions=tmp_path / "said.json")
            )


class TestLibrary:
    """The commands are a call of the library away."""

    def test_a_task_is_run_without_files(self, models, speech, tmp_path):
        speech.says = lambda *_: "a"
        steps = []
        outcome = run_task(
            Mmvp(data="shapes", limit=4),
            models / "clip",
            AskOptions(batch_size=2, prompts="empty"),
            progress=lambda *counts: steps.append(counts),
        )
        assert (outcome.count, outcome.fresh) == (4, 4)
        assert list(outcome.content["answers"]) == ["1", "2", "3", "4"]
        assert outcome.tables[0].columns == ("model", "questions", "pairs")
        assert steps == [(0, 4), (2, 4), (4, 4)]
        assert {prompt for _, prompt, _ in speech.asked} == {""}
        assert list(tmp_path.iterdir()) == []

    def test_answers_of_the_command_are_those_of_the_call(self, models, speech):
        done("mmvp", models / "clip", "--data", "shapes", "--limit", 4, "-o", "a.jsonl")
        speech.asked.clear()
        task = Mmvp(data="shapes", limit=4)
        outcome = run_task(task, models / "clip", results=Path("a.jsonl"))
        assert (outcome.fresh, speech.asked) == (0, [])


class TestLeakage:
    def test_one_number_by_guidance_scale(self, models, speech):
        def says(images, question, prompt, vlm):
            assert vlm.encoder.config.conditioning == "cfg"
            return prompt if vlm.encoder.config.guidance_scale > 4 else "a circle"

        speech.says = says
        arguments = ("leakage", models / "sd", "--data", "shapes", "--limit", 6)
        result = done(*arguments, "--guidance-scale", "1,1.5", "--guidance-scale", 7)
        rows = re.findall(
            r"^  (CFG=\S+), 30 % of prompts dropped +(\S+) ±", result.stdout, re.MULTILINE
        )
        assert rows == [("CFG=1", "0.000"), ("CFG=1.5", "0.000"), ("CFG=7", "1.000")]
        assert len(speech.asked) == 3 * 2 * 6
        again = done(*arguments, "--guidance-scale", "7,1", "--json")
        content = json.loads(again.stdout)
        assert content["curve"] == [[1.0, 0.0], [7.0, 1.0]]
        assert content["settings"][0]["readout"]["said"] == 1
        assert len(speech.asked) == 3 * 2 * 6

    @pytest.mark.long
    def test_guidance_reaches_the_features(self, models, speech):
        """The features of each row are those of an encoder that was loaded with its scale."""
        found = {}

        def says(images, question, prompt, vlm):
            shown = vlm.encode_images(images, [prompt])
            found[vlm.encoder.config.guidance_scale] = (images, prompt, shown)
            return "a"

        speech.says = says
        arguments = ("leakage", models / "sd", "--data", "shapes", "--limit", 3)
        done(*arguments, "--guidance-scale", "1,40")
        assert sorted(found) == [1, 40]
        assert (found[1][2] - found[40][2]).abs().max() > 1e-2
        for scale, (images, prompt, tokens) in found.items():
            options = {"conditioning": "cfg", "guidance_scale": scale}
            alone = DiffusionVLM.from_pretrained(models / "sd/model", **options)
            # Guidance enlarges the rounding of batches of other sizes.
            near = 1e-5 * scale * tokens.abs().max().item()
            wanted = alone.encode_images(images, [prompt])
            torch.testing.assert_close(tokens, wanted, rtol=0, atol=near)

    def test_a_model_that_reads_no_prompt_has_none_to_tell(self, models):
        result = done(
            *("leakage", models / "clip", "--data", "shapes", "--limit", 4),
            *("--max-new-tokens", 3, "--json"),
        )
        assert json.loads(result.stdout)["readout"]["value"] == 0

    def test_another_seed_is_another_exchange(self, models, speech):
        arguments = ("leakage", models / "clip", "--data", "shapes", "--limit", 6, "--json")
        prompts = [json.loads(done(*arguments, "--seed", k).stdout)["prompts"] for k in (0, 1)]
        assert prompts[0] != prompts[1]
        assert len(speech.asked) == 24

    @pytest.mark.parametrize(
        ("model", "scale", "message"),
        [
            ("clip", "1.5", "reads no text"),
            ("both", "1.5", "gives 'concat' features"),
            ("sd", "much", "--guidance-scale takes numbers with commas"),
            ("sd", "nan", "--guidance-scale takes numbers with commas"),
            ("sd", ",", "names no number"),
            ("sd", "1,1.0", "once each"),
        ],
    )
    def test_scales_that_mean_nothing(self, models, no_model, model, scale, message):
        arguments = ("leakage", models / model, "--data", "shapes", "--guidance-scale", scale)
        refused(run(*arguments), message)

    def test_too_few_pictures(self, models, no_model, tmp_path):
        refused(
            run("leakage", models / "clip", "--data", "shapes", "--limit", 2),
            "need three images, got 2",
        )
        assert list(tmp_path.iterdir()) == []


class TestChoices:
    def test_right_answers_count_by_pairs(self, models, speech):
        benchmark = shapes_mmvp()
        truth = {
            (item.pictures[0].open().tobytes(), item.text): f"({'ab'[item.answer]})"
            for item in benchmark.items
        }
        wrong = benchmark.items[3].pictures[0].open().tobytes()

        def says(images, question, prompt, vlm):
            key = (images[0].tobytes(), question)
            return "none of these" if key[0] == wrong else truth[key]

        speech.says = says
        result = done("mmvp", models / "clip", "--data", "shapes", "--limit", 9)
        assert re.search(r"^  clip +87\.5 +75\.0$", result.stdout, re.MULTILINE)
        assert re.search(r"^  chance +\S+ +25\.0$", result.stdout, re.MULTILINE)
        assert "8 of 180 questions, by --limit" in result.stderr
        assert "letter 7; 1 unread" in result.stderr
        assert "paper" not in result.stdout
        assert {options["max_new_tokens"] for _, _, options in speech.asked} == {16}

    def test_errata_are_exchanged_on_request(self, models, speech, tmp_path):
        mmvp(tmp_path / "data", count=100)
        speech.says = lambda images, question, prompt, vlm: "(a)"
        arguments = ("mmvp", models / "clip", "--data", "data", "--prompts", "question")
        right = {}
        for switch in ((), ("--fix-errata",)):
            result = done(*arguments, *switch, "--json", "-o", "one.jsonl")
            answers = json.loads(result.stdout)["answers"]
            right[switch] = [name for name, answer in answers.items() if answer["right"]]
        assert right[()][-2:] == ["97", "99"]
        assert right["--fix-errata",][-2:] == ["97", "100"]
        assert len(speech.asked) == 100  # the answers are the same
        question, prompt, options = speech.asked[0]
        assert prompt == "Is the door of house 1 open, or closed?"
        assert question == f"{prompt} (a) Open (b) Closed\n{LETTER_INSTRUCTION}"
        assert options == {"max_new_tokens": 32}
        shown = done(*arguments, "-o", "one.jsonl").stdout
        assert re.search(r"^  paper: CLIP-LLaVA\S+, ViT-L14-336 ", shown, re.MULTILINE)

    def test_other_wordings(self, models, speech):
        done(
            *("mmvp", models / "sd", "--data", "shapes", "--limit", 2, "--prompts", "empty"),
            *("--instruction", "Say a letter."),
        )
        assert [prompt for _, prompt, _ in speech.asked] == ["", ""]
        assert all(question.endswith("\nSay a letter.") for question, _, _ in speech.asked)

    def test_some_tasks_of_blink(self, models, speech, tmp_path):
        write_blink(tmp_path / "data")
        speech.says = lambda *_: "A"
        result = done(
            *("blink", models / "clip", "--data", "data", "--limit", 2),
            *("--task", "Counting,Jigsaw", "--task", "IQ_Test"),
        )
        shown = result.stdout.splitlines()
        assert shown[0] == "blink, 6 questions, percent"
        head = ["task", "clip", "chance", "paper:"]
        assert shown[1].split()[:4] == head
        rows = {line.split()[0]: line.split()[1:] for line in shown[2:] if line}
        assert rows["Counting"][:3] == ["50.0", "25.0", "45"]
        assert list(rows)[:3] == ["Counting", "Jigsaw", "IQ_Test"]
        assert "11 of 14 tasks are left out of the mean" in result.stderr
        assert "6 of 9 questions, by --limit" in result.stderr

    def test_tasks_in_miniature(self, models, speech):
        arguments = ("blink", models / "clip", "--data", "shapes", "--limit", 2)
        result = done(*arguments, "--task", "Change,Visual_Similarity", "--json")
        assert list(json.loads(result.stdout)["groups"]) == ["Change", "Visual_Similarity"]
        assert len(speech.asked) == 4
        refused(run(*arguments, "--task", "Jigsaw"), "the miniature has ['Counting'")


class TestLlavaBench:
    def test_words_are_compared_in_miniature(self, models, speech):
        speech.says = lambda images, question, prompt, vlm: "yes"
        result = done("llava-bench", models / "clip", "--data", "shapes", "--limit", 6)
        assert "judge words: 100 x mean score" in result.stdout
        assert re.search(r"^  clip( +\d+\.\d){4}$", result.stdout, re.MULTILINE)
        assert "numbers of different judges do not compare" in result.stderr

    def test_a_service_judges_with_a_key_of_the_environment(
        self, models, speech, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("SOME_KEY", "secret-7")
        monkeypatch.setenv("OPENAI_API_KEY", "secret-8")
        llava_bench(tmp_path / "bench")
        arguments = ("llava-bench", models / "clip", "--data", "bench", "--judge-model", "m-1")
        with judge_service() as service:
            arguments += ("--judge", service.url)
            service.replies = [completion("10 5"), completion("8 8"), completion("5 5")]
            result = done(*arguments, "--judge-key", "SOME_KEY")
            assert re.search(r"^  clip +100\.0 +50\.0 +100\.0 +78\.3$", result.stdout, re.MULTILINE)
            assert "paper: " in result.stdout
            path, headers, body = service.requests[0]
            assert headers["Authorization"] == "Bearer secret-7"
            assert (path, body["model"]) == ("/v1/chat/completions", "m-1")
            content = (tmp_path / "llava-bench-results.jsonl").read_text()
            assert "secret" not in content + result.output
            # everything is there: the service is asked for nothing but whether it lives
            done(*arguments)
            assert len(service.requests) == 3
            assert "Authorization" not in service.looks[-1][1]  # not its key: another host's
            service.look = (401, b"")
            refused(run(*arguments), "wants a key (401)")
        refused(run(*arguments), "cannot be reached")
        assert len(speech.asked) == 3

    @pytest.mark.long
    def test_a_language_model_judges(self, models, speech, tmp_path):
        llava_bench(tmp_path / "bench")
        arguments = ("llava-bench", models / "clip", "--data", "bench")
        result = run(*arguments, "--judge", models / "lm")
        # random weights say nothing that could be a score
        refused(result, "lm reviewed none of 3 answers: the reply does not begin with two scores")
        assert "also of another --judge" in result.output
        assert "3 of 6 answers were there" in done(*arguments, "--judge", "words").stdout
        assert len(speech.asked) == 3

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "--judge is missing"),
            (("--judge", "http://localhost:1"), "needs --judge-model"),
            (("--judge", "words", "--judge-model", "m"), "--judge-model belongs to a --judge"),
            (
                ("--judge", "https://api.openai.com/v1", "--judge-model", "m"),
                "OPENAI_API_KEY is not set",
            ),
            (
                ("--judge", "http://localhost:1", "--judge-model", "m", "--judge-key", "NONE_7"),
                "NONE_7 is not set",
            ),
            (("--judge", "nowhere/at-all"), "cannot load a judge from 'nowhere/at-all'"),
            (("--judge", "."), "holds no language model"),
        ],
    )
    def test_judges_that_cannot_be(
        self, models, no_model, tmp_path, monkeypatch, arguments, message
    ):
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        llava_bench(tmp_path / "bench")
        refused(run("llava-bench", models / "clip", "--data", "bench", *arguments), message)
        assert [path.name for path in tmp_path.iterdir()] == ["bench"]


BAD = [
    (["captions", "nowhere", "--data", "shapes"], "the folder nowhere does not exist"),
    (["captions", ".", "--data", "shapes"], "has no whole model in it"),
    (["captions", "MODEL", "--data", "nowhere"], "there is no folder nowhere"),
    (["captions", "MODEL", "--data", "."], "neither dataset_coco.json nor captions_*.json"),
    pytest.param(
        ["captions", "MODEL", "--data", "shapes", "--metric", "meteor"],
        "metrics must be one of",
        marks=pytest.mark.wrong_type,
    ),
    (["captions", "MODEL", "--data", "shapes", "--tokenizer", "odd"], "tokenizer must be one of"),
    (["captions", "MODEL", "--data", "shapes", "--prompts", "pic"], "is no source of a prompt"),
    (["captions", "MODEL", "--data", "shapes", "--split", "val"], "--split belongs to COCO's"),
    (["captions", "MODEL", "--data", "shapes", "--passes", 0], "--passes"),
    (["captions", "MODEL", "--data", "shapes", "-o", "a.csv"], "must end in .jsonl"),
    (["captions", "MODEL", "--data", "shapes", "-o", "no/a.jsonl"], "does not exist: no"),
    (["captions", "MODEL", "--data", "shapes", "--device", "tpu9"], "cannot use device 'tpu9'"),
    (["captions", "MODEL", "--data", "shapes", "--dtype", "int4"], "dtype must be one of"),
    (["leakage", "MODEL", "--data", ".", "--data-seed", 1], "--data-seed belongs to --data shapes"),
    (["mmvp", "MODEL", "--data", "MMVP/MMVP"], "hf download MMVP/MMVP"),
    (["mmvp", "MODEL", "--data", "."], "is no MMVP"),
    (["mmvp", "MODEL", "--data", "shapes", "--fix-errata"], "--fix-errata belongs to MMVP's"),
    (["mmvp", "MODEL", "--data", "shapes", "--limit", 1], "--limit"),
    (["mmvp", "MODEL", "--data", "shapes", "--prompts", "caption"], "has no caption"),
    (["blink", "MODEL", "--data", "shapes", "--task", "Count"], "unknown tasks ['Count']"),
    (["blink", "MODEL", "--data", ".", "--task", "Count"], "unknown tasks ['Count']"),
    (["blink", "MODEL", "--data", "."], "is no BLINK"),
    (["llava-bench", "MODEL", "--data", "."], "is no LLaVA-Bench"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line_before_a_model_is_loaded(
    models, no_model, tmp_path, arguments, message
):
    given = [models / "clip" if each == "MODEL" else each for each in arguments]
    refused(run(*given), message)
    assert list(tmp_path.iterdir()) == []


def test_a_policy_of_training_that_does_not_fit_says_how_to_choose(models, no_model):
    result = run("mmvp", models / "sd", "--data", "shapes")
    refused(result, "has no caption")
    assert "The policy is 'caption'; see --prompts" in result.output


def test_a_file_that_holds_something_else_is_left_alone(models, no_model, tmp_path):
    (tmp_path / "notes.jsonl").write_text('{"mine": 1}\n')
    result = run("mmvp", models / "clip", "--data", "shapes", "-o", "notes.jsonl")
    refused(result, "is no file of answers of diffenc: take another name")
    assert (tmp_path / "notes.jsonl").read_text() == '{"mine": 1}\n'


def test_the_bar_begins_anew_with_each_part(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress_bar("pass 1", "pass 2", unit="answers") as update:
        for done_now, total in ((4, 4), (1, 3), (3, 3)):
            update(done_now, total)
    shown = capsys.readouterr().err
    assert "pass 1" in shown
    assert "4/4" in shown
    assert "pass 2" in shown
    assert "3/3" in shown
