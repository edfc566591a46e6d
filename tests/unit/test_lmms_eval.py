"""Models for lmms-eval: its requests read, answered and told apart, without lmms-eval itself."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

import tiny_llava
from diffenc.errors import BackboneError, ConfigError, ImageError, PromptError
from diffenc.evals.hosted_vlm import HostedVLM, is_hosted
from diffenc.evals.lmms_eval import manifest, opening
from diffenc.evals.lmms_eval import model as plugin
from diffenc.evals.lmms_eval.generation import DEFAULT_TOKENS, Generation
from diffenc.evals.lmms_eval.llava_transformers import TransformersLlava
from diffenc.evals.lmms_eval.model import DiffencModel
from diffenc.evals.lmms_eval.opening import open_model
from diffenc.evals.lmms_eval.requests import SampleReader, conversation_of
from diffenc.evals.run import run_task
from diffenc.evals.task import AskOptions
from diffenc.evals.tasks.mmvp import Mmvp
from diffenc.hosts.transformers import (
    DiffEncLlavaForConditionalGeneration,
    DiffEncLlavaProcessor,
)
from diffenc.mllm import DiffusionVLM
from diffenc.shapes import render, sample_scenes
from diffenc.storage.reading import tomllib

GREEDY = {"max_new_tokens": 5, "temperature": 0, "do_sample": False}
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
QUESTIONS = ["what color is the circle?", "how many stars are there?"]
SCENES = [render(scene) for scene in sample_scenes(3, seed=0)]


def text(words):
    return {"type": "text", "text": words}


def image(picture):
    return {"type": "image", "url": picture}


def user(*content):
    return {"role": "user", "content": list(content)}


class TestConversations:
    def test_pictures_stand_where_the_message_shows_them(self):
        first, second = SCENES[:2]
        message = user(text("compare"), image(first), text("with"), image(second))
        turns, pictures = conversation_of([message], "here")
        assert turns == [{"from": "human", "value": "compare\n<image>\nwith\n<image>"}]
        assert [each.tobytes() for each in pictures] == [first.tobytes(), second.tobytes()]

    def test_marks_in_the_text_are_the_places(self):
        message = user(image(SCENES[0]), image(SCENES[1]), text("is <image> as <image>?"))
        turns, pictures = conversation_of([message], "here")
        assert (turns[0]["value"], len(pictures)) == ("is <image> as <image>?", 2)

    def test_examples_are_turns_and_the_system_comes_before_the_first(self):
        messages = [
            {"role": "system", "content": "be short"},
            user(image(SCENES[0]), text("what?")),
            {"role": "assistant", "content": [text("a star")]},
            user(text("and now?")),
        ]
        turns, _ = conversation_of(messages, "here")
        assert [(turn["from"], turn["value"]) for turn in turns] == [
            ("human", "be short\n<image>\nwhat?"),
            ("gpt", "a star"),
            ("human", "and now?"),
        ]

    def test_files_are_read_upright_and_rgb(self, tmp_path):
        SCENES[0].convert("L").save(tmp_path / "a.png")
        _, (picture,) = conversation_of([user(image(str(tmp_path / "a.png")), text("?"))], "here")
        assert picture.mode == "RGB"
        with pytest.raises(ImageError, match=r"here.*b\.png"):
            conversation_of([user(image(str(tmp_path / "b.png")))], "here")

    @pytest.mark.parametrize("kind", ["video", "audio"])
    def test_other_media_are_refused_with_the_task(self, kind):
        with pytest.raises(ConfigError, match=rf"here shows a {kind}.*leave\s+this task out"):
            conversation_of([user({"type": kind, "url": "a"}, text("?"))], "here")

    @pytest.mark.parametrize(
        ("roles", "error"),
        [
            (["assistant"], PromptError),
            (["user", "user"], PromptError),
            (["user", "assistant"], PromptError),
            ([], PromptError),
            (["tool"], ConfigError),
        ],
    )
    def test_roles_out_of_order_are_refused(self, roles, error):
        with pytest.raises(error, match="here"):
            conversation_of([{"role": role, "content": "a"} for role in roles], "here")


class TestPrompts:
    MESSAGE = user(image(SCENES[0]), text("what color is it?\nAnswer with one word."))

    def read(self, document=None, **options):
        return SampleReader(**{"policy": "question", **options}).read(
            [self.MESSAGE], document or {}, task="gqa", number=7
        )

    def test_the_text_of_the_request_is_the_prompt(self):
        sample = self.read()
        assert sample.prompt == "what color is it? Answer with one word."
        assert sample.question == "<image>\nwhat color is it?\nAnswer with one word."

    def test_a_column_has_the_bare_question(self):
        sample = self.read({"Question": "what color is it?"}, question_field="question")
        assert sample.prompt == "what color is it?"
        assert "one word" in sample.question

    def test_a_missing_column_is_told_with_those_there_are(self):
        with pytest.raises(ConfigError, match=r"'gqa', document 7.*\['answer', 'questions'\]"):
            self.read({"questions": "a", "answer": "b"}, question_field="question")

    def test_noise_and_dropout_are_for_training(self):
        assert self.read(policy="question | noisy(0.9) | dropout(1)").prompt == self.read().prompt
        assert self.read(policy="empty").prompt == ""

    def test_captions_are_not_to_be_had(self):
        with pytest.raises(ConfigError, match=r"needs captions.*prompt=question"):
            SampleReader("question+caption")
        with pytest.raises(ConfigError, match="prompt policy"):
            SampleReader("qestion")

    def test_marks_and_pictures_that_differ_are_told_with_the_document(self):
        message = user(image(SCENES[0]), text("is <image> as <image>?"))
        with pytest.raises(PromptError, match=r"task 'a', document 3: .* 2 pictures"):
            SampleReader("question").read([message], {}, task="a", number=3)


class TestGeneration:
    def test_temperature_decides_whether_tokens_are_sampled(self):
        greedy = Generation.of_task({"temperature": 0, "top_p": 0.9, "do_sample": True})
        assert dict(greedy.options) == {"do_sample": False}
        sampled = Generation.of_task({"temperature": 0.7, "top_p": 0.9, "num_beams": 2})
        assert dict(sampled.options) == {
            "do_sample": True,
            "num_beams": 2,
            "temperature": 0.7,
            "top_p": 0.9,
        }
        assert not dict(Generation.of_task({"temperature": 0.7, "do_sample": False}).options)[
            "do_sample"
        ]

    def test_length_is_the_tasks_within_the_limit_and_the_context(self):
        assert Generation.of_task({}).max_new_tokens == DEFAULT_TOKENS
        assert Generation.of_task({"max_new_tokens": 16}, most=64).max_new_tokens == 16
        long = Generation.of_task({"max_new_tokens": 4096}, most=64)
        assert long.max_new_tokens == 64
        assert (long.within(None), long.within(64)) == (long, long)
        assert long.within(9).max_new_tokens == 9
        with pytest.raises(ConfigError, match="fill the context"):
            long.within(0)
        for value in (0, True, "16"):
            with pytest.raises(ConfigError, match="max_new_tokens must be"):
                Generation.of_task({"max_new_tokens": value})

    def test_an_answer_ends_before_the_first_text_that_ends_it(self):
        ends = Generation.of_task({"until": ["ASSISTANT:", "\n\n"]})
        assert ends.ended("a star\n\nASSISTANT: more") == "a star"
        assert Generation.of_task({"until": "x"}).until == ("x",)
        with pytest.raises(ConfigError, match="until must be"):
            Generation.of_task({"until": [1]})

    def test_arguments_of_other_models_are_left_out_and_named(self):
        with pytest.warns(UserWarning, match=r"left out: \['patch_size'\]"):
            made = Generation.of_task({"patch_size": 16, "image_aspect_ratio": "original"})
        assert made == Generation.of_task({})


class Recorder:
    """Answers with the question's last word and the prompt, and keeps what it was asked."""

    prompt_policy = "question"

    def __init__(self, context=1000):
        self.calls, self.context = [], context

    def room(self, turns, pictures):
        return self.context - len(turns[-1]["value"])

    def generate(self, images, conversations, prompts, *, max_new_tokens, **options):
        words = [turns[-1]["value"].split()[-1] for turns in conversations]
        self.calls.append((words, [len(each) for each in images], max_new_tokens, options))
        return [f"{word}/{prompt}" for word, prompt in zip(words, prompts, strict=True)]


@pytest.fixture
def recorder(monkeypatch):
    made = Recorder()
    monkeypatch.setattr(plugin, "open_model", lambda *args, **kwargs: made)
    return made


def requests_of(documents, arguments=GREEDY, task="t"):
    """Requests in the form of lmms-eval's chat models."""

    def messages(document):
        shown = [image(each) for each in document["pictures"]]
        return [user(*shown, text(document["question"]))]

    return [
        SimpleNamespace(args=("", messages, dict(arguments), number, task, "test"))
        for number in range(len(documents))
    ]


def model_of(documents, folder="any", **options):
    model = DiffencModel(str(folder), device="cpu", **options)
    model.task_dict = {"t": {"test": documents}}
    return model


class TestModel:
    DOCUMENTS = tuple(
        {"question": f"is it {word}", "pictures": SCENES[: 1 + k % 2]}
        for k, word in enumerate(["red", "blue", "big", "small", "here"])
    )

    def test_answers_come_in_the_order_of_the_requests(self, recorder):
        model = model_of(self.DOCUMENTS, batch_size=2)
        requests = requests_of(self.DOCUMENTS)
        requests[1] = SimpleNamespace(
            args=(
                *requests[1].args[:2],
                {"max_new_tokens": 3, "num_beams": 2},
                *requests[1].args[3:],
            )
        )
        answers = model.generate_until(requests)
        assert answers == [
            f"{word}/is it {word}" for word in ("red", "blue", "big", "small", "here")
        ]
        assert [(words, shown, tokens) for words, shown, tokens, _ in recorder.calls] == [
            (["red", "big"], [1, 1], 5),
            (["small", "here"], [2, 1], 5),
            (["blue"], [2], 3),
        ]
        assert recorder.calls[2][3] == {"do_sample": False, "num_beams": 2}

    def test_a_full_context_shortens_the_answers_of_its_request_alone(self, recorder):
        documents = [*self.DOCUMENTS[:2], {"question": "long " * 30 + "end", "pictures": []}]
        recorder.context = 157
        model = model_of(documents, batch_size=3)
        assert model.generate_until(requests_of(documents))[2].startswith("end/")
        assert [(words, tokens) for words, _, tokens, _ in recorder.calls] == [
            (["red", "blue"], 5),
            (["end"], 4),
        ]

    def test_every_prompt_is_logged(self, recorder, tmp_path):
        model = model_of(self.DOCUMENTS, log_prompts=str(tmp_path / "log.jsonl"), prompt="empty")
        model.generate_until(requests_of(self.DOCUMENTS)[:2])
        lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert lines[1] == {
            "task": "t",
            "doc_id": 1,
            "pictures": 2,
            "question": "<image>\n<image>\nis it blue",
            "prompt": "",
            "answer": "blue/",
        }

    def test_unknown_and_impossible_options_are_refused(self, recorder):
        with pytest.raises(ConfigError, match=r"'prompts'; known are pretrained, prompt.*'prompt'"):
            model_of([], prompts="question")
        with pytest.raises(ConfigError, match="batch_size must be a number, got 'auto'"):
            model_of([], batch_size="auto")
        with pytest.raises(ConfigError, match="max_new_tokens must be"):
            model_of([], max_new_tokens=0)
        with pytest.raises(ConfigError, match="needs captions"):
            model_of([], prompt="caption")

    def test_what_the_model_cannot_do_is_said(self, recorder):
        model = model_of([])
        with pytest.raises(NotImplementedError, match="generate_until"):
            model.loglikelihood([])
        with pytest.raises(NotImplementedError, match="one round"):
            model.generate_until_multi_round([])


@pytest.fixture(scope="module")
def vlm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        DiffusionVLM(
            "shapes", "shapes-lm", prompt_policy="question | dropout(0.5)"
        ).save_pretrained(folder / "run/model")
    return folder / "run"


@pytest.fixture(scope="module")
def documents():
    """Two questions on one picture, and one on three."""
    first = [{"question": question, "pictures": SCENES[:1]} for question in QUESTIONS]
    return [*first, {"question": "which one is red?", "pictures": SCENES}]


@pytest.fixture(scope="module")
def vlm_model(vlm_folder, documents):
    return model_of(documents, vlm_folder, batch_size=3)


class TestSavedModel:
    def test_the_question_reaches_the_encoder(self, vlm_model, documents, monkeypatch):
        encoder, tokens = vlm_model.model.vlm.encoder, []
        forward = encoder.forward

        def noted(images, prompts=None):
            tokens.append((list(prompts), forward(images, prompts)))
            return tokens[-1][1]

        monkeypatch.setattr(encoder, "forward", noted)
        vlm_model.generate_until(requests_of(documents))
        ((prompts, features),) = tokens
        assert prompts == [*QUESTIONS, *["which one is red?"] * 3]
        same_picture = (features[0] - features[1]).abs().max()
        assert same_picture > 1e-2  # the questions alone differ

    def test_answers_are_those_of_the_model_alone_and_in_batches(self, vlm_model, documents):
        answers = vlm_model.generate_until(requests_of(documents))
        pictures = [each["pictures"] for each in documents]
        questions = [each["question"] for each in documents]
        vlm = vlm_model.model.vlm
        assert answers == vlm.generate(pictures, questions, questions, max_new_tokens=5)
        vlm_model.batch_size = 1
        assert vlm_model.generate_until(requests_of(documents)) == answers
        vlm_model.batch_size = 3

    def test_guidance_reaches_the_encoder(self, vlm_folder, documents):
        model = model_of(documents, vlm_folder, guidance_scale=4)
        config = model.model.vlm.encoder.config
        assert (config.conditioning, config.guidance_scale) == ("cfg", 4.0)

    def test_the_context_limits_the_answer(self, vlm_model, documents):
        turns = [{"from": "human", "value": "<image>\nwhat?"}]
        vlm = vlm_model.model.vlm
        room = vlm_model.model.room(turns, SCENES[:1])
        vlm.generate(SCENES[0], "what?", max_new_tokens=room)
        with pytest.raises(ValueError, match="holds"):
            vlm.generate(SCENES[0], "what?", max_new_tokens=room + 1)


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    model = tiny_llava.build("diffenc:shapes?t=50", DiffEncLlavaForConditionalGeneration)
    model.save_pretrained(folder)
    tower = tiny_llava.tower_of(model)
    DiffEncLlavaProcessor(
        tiny_llava.image_processor(tower),
        tiny_llava.tokenizer(),
        patch_size=tower.config.patch_size,
        prompt_model="shapes",
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava(llava_folder):
    made = open_model(str(llava_folder), **CPU)
    assert isinstance(made, TransformersLlava)
    return made


class TestLlavaOfTransformers:
    ASKED = (
        [{"from": "human", "value": "<image>\nwhat color"}],
        [{"from": "human", "value": "<image>\n<image>\nis the red circle ?"}],
        [{"from": "human", "value": "how many"}],
    )

    @pytest.mark.long
    def test_the_question_reaches_the_tower(self, llava, monkeypatch):
        tower, prompts = llava.model.require_tower().tower, []
        forward = tower.forward

        def noted(images, tokens=None):
            from diffenc.hosts.prompts import resolve_prompts

            prompts.append(resolve_prompts(tokens, len(images), tower.tokenizer).ids)
            return forward(images, tokens)

        monkeypatch.setattr(tower, "forward", noted)
        shown = [SCENES[:1], SCENES[:2], []]
        llava.generate(shown, self.ASKED, [*QUESTIONS, ""], max_new_tokens=2)
        expected = tower.tokenize([QUESTIONS[0], QUESTIONS[1], QUESTIONS[1]]).ids
        assert torch.equal(prompts[0], expected)

    def test_batches_are_answered_as_single_questions(self, llava):
        shown, prompts = [SCENES[:1], SCENES[:2], []], [*QUESTIONS, ""]
        options = {"max_new_tokens": 6, "min_new_tokens": 6}
        batch = llava.generate(shown, self.ASKED, prompts, **options)
        alone = [
            llava.generate([pictures], [turns], [prompt], **options)[0]
            for pictures, turns, prompt in zip(shown, self.ASKED, prompts, strict=True)
        ]
        assert batch == alone

    def test_guidance_reaches_the_tower(self, llava_folder):
        guided = open_model(str(llava_folder), guidance_scale=4, **CPU)
        config = guided.model.require_tower().tower.encoder.config
        assert (config.conditioning, config.guidance_scale) == ("cfg", 4)

    def test_room_counts_the_tokens_of_pictures(self, llava):
        context = llava.model.config.text_config.max_position_embeddings
        rooms = [llava.room(self.ASKED[2], []), llava.room(self.ASKED[0], SCENES[:1])]
        assert 0 < context - rooms[0] < 64 < context - rooms[1] < 128


class TestOpening:
    def test_what_is_no_model(self, tmp_path):
        with pytest.raises(BackboneError, match="does not exist"):
            open_model(str(tmp_path / "none"), **CPU)
        with pytest.raises(BackboneError, match="holds no model"):
            open_model(str(tmp_path), **CPU)
        (tmp_path / "config.json").write_text('{"model_type": "llava", "vision_config": {}}')
        with pytest.raises(BackboneError, match="no vision tower of diffenc"):
            open_model(str(tmp_path), **CPU)

    def test_options_of_llavas_package_belong_to_it(self, vlm_folder, llava_folder):
        with pytest.raises(ConfigError, match=r"conv_template belong to .* a DiffusionVLM"):
            open_model(str(vlm_folder), conv_template="vicuna_v1", **CPU)
        with pytest.raises(ConfigError, match=r"model_base belong to .* of transformers"):
            open_model(str(llava_folder), model_base="base", **CPU)

    def test_llavas_package_is_needed_for_its_checkpoints(self, tmp_path):
        (tmp_path / "config.json").write_text('{"mm_vision_tower": "diffenc:shapes?t=50"}')
        with pytest.raises(ConfigError, match=r"cannot import no_llava\.model"):
            open_model(str(tmp_path), package="no_llava", **CPU)


def test_the_entry_point_names_the_model_for_lmms_eval(monkeypatch):
    registry = ModuleType("lmms_eval.models.registry_v2")
    registry.ModelManifest = SimpleNamespace
    for name in ("lmms_eval", "lmms_eval.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    module, name = project["project"]["entry-points"]["lmms_eval.models"]["diffenc"].split(":")
    made = getattr(importlib.import_module(module), name)()
    assert made == manifest()
    module, name = made.chat_class_path.rsplit(".", 1)
    assert getattr(importlib.import_module(module), name) is DiffencModel
    assert not DiffencModel.is_simple  # of the kind that gets messages


def test_pictures_keep_their_size():
    picture = Image.new("RGB", (5, 9))
    _, (read,) = conversation_of([user(image(picture), text("?"))], "here")
    assert read.size == (5, 9)


# `diffenc evaluate` on the same checkpoints


@pytest.mark.long
def test_a_checkpoint_of_llava_is_asked_as_the_plug_in_asks_it(llava, llava_folder):
    model = HostedVLM(llava_folder, max_new_tokens=5)
    assert (model.prompt_policy, model.prompt_dropout) == ("question", 0)
    shown, questions = [SCENES[:1], SCENES[:2], []], [*QUESTIONS, QUESTIONS[0]]
    marks = ["<image>\n", "<image>\n<image>\n", ""]
    turns = [
        [{"from": "human", "value": mark + text}]
        for mark, text in zip(marks, questions, strict=True)
    ]
    prompts = [*QUESTIONS, ""]
    expected = llava.generate(shown, turns, prompts, max_new_tokens=5, do_sample=False)
    assert model.answer(shown, questions, prompts) == expected
    model.release()
    assert model.answer(shown[:1], questions[:1], prompts[:1]) == expected[:1]


def test_a_benchmark_runs_on_a_checkpoint_of_llava_and_goes_on(llava_folder, tmp_path):
    file = tmp_path / "answers.jsonl"
    options = AskOptions(max_new_tokens=2, guidance_scale=2)
    run_task(Mmvp(data="shapes", limit=2), llava_folder, options, results=file)
    written = [json.loads(line) for line in file.read_text().splitlines()]
    (model,) = [each for each in written if each["type"] == "model"]
    assert model["name"] == llava_folder.name
    assert model["description"]["guidance_scale"] == 2
    answers = [each for each in written if each["type"] == "answer"]
    assert len(answers) == 2
    assert all(each["prompt"] for each in answers)  # the question, as a tower is asked
    assert all(each["question"].startswith(each["prompt"]) for each in answers)
    before = file.read_text()
    run_task(Mmvp(data="shapes", limit=2), llava_folder, options, results=file)
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("name", "lora", "model_name", "base"),
    [
        ("llava-full", False, "llava-full", None),
        ("run1", False, "llava-run1", None),
        ("run1", True, "llava-run1-lora", "vicuna"),
        ("llava-lora", True, "llava-lora", "vicuna"),
    ],
)
def test_llavas_loader_is_told_what_a_folder_holds(
    tmp_path, monkeypatch, name, lora, model_name, base
):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"mm_vision_tower": "diffenc:shapes"}))
    if lora:
        adapter = {"base_model_name_or_path": "vicuna"}
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
    calls = []
    monkeypatch.setattr(opening, "open_model", lambda *args, **kwargs: calls.append(kwargs))
    assert is_hosted(folder)
    HostedVLM(folder).load()
    assert calls[0]["model_name"] == model_name
    assert calls[0].get("model_base") == base


def test_other_folders_are_no_checkpoints_of_llava(vlm_folder, tmp_path):
    assert not is_hosted(vlm_folder)
    assert not is_hosted(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"mm_vision_tower": "openai/clip"}))
    assert not is_hosted(tmp_path)
