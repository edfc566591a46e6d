"""A saved multimodal model as one that answers, and a saved language model as a judge."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from diffenc.errors import BackboneError, ConfigError
from diffenc.evals import FunctionAnswerer
from diffenc.evals.captioning import evaluate_captions, shapes_captions
from diffenc.evals.choices import evaluate_choices, shapes_naturalbench
from diffenc.evals.llava_bench import (
    Case,
    Judge,
    JudgeError,
    LocalJudge,
    WordJudge,
    evaluate_llava_bench,
    shapes_llava_bench,
)
from diffenc.evals.llava_bench.judge import SYSTEM
from diffenc.evals.saved_vlm import SavedVLM
from diffenc.mllm import DiffusionVLM, VisionTokens
from vlm_builders import picture, save_tiny_lm, save_tiny_vision, tiny_lm_tokenizer

CASE = Case("a hill", "What is it?", "a hill", "a green hill", "Compare them.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("saved")
    vision = VisionTokens.from_pretrained(save_tiny_vision(made / "vision"), layer=-1)
    policy = "question+caption | noisy(0.2) | dropout(0.5) | dropout(0.2)"
    vlm = DiffusionVLM(vision, str(save_tiny_lm(made / "lm")), prompt_policy=policy)
    vlm.language_model.requires_grad_(False)
    vlm.save_pretrained(made / "run/model")
    return made


class TestSavedVLM:
    def test_it_answers_as_the_model_does(self, folder):
        saved = SavedVLM(folder / "run", max_new_tokens=5)
        images, policies = [[picture(0)], [picture(1), picture(2)]], ["one", "another one"]
        vlm = DiffusionVLM.from_pretrained(folder / "run/model")
        expected = vlm.generate(images, policies, ["", "b"], max_new_tokens=5)
        assert saved.answer(images, policies, ["", "b"]) == expected
        saved.release()
        assert saved.answer(images, policies, ["", "b"]) == expected

    def test_the_folder_of_the_run_gives_the_name(self, folder, tmp_path):
        shutil.copytree(folder / "run/model", tmp_path / "mine")
        names = [SavedVLM(each).name for each in (folder / "run", folder / "run/model")]
        assert [*names, SavedVLM(tmp_path / "mine").name] == ["run", "run", "mine"]
        assert SavedVLM(folder / "run", name="other").name == "other"

    def test_what_answers_depend_on(self, folder, tmp_path):
        shutil.copytree(folder / "run/model", tmp_path / "copy")
        saved = SavedVLM(folder / "run", description={"prompts": "empty"})
        assert saved.description == {
            "weights": SavedVLM(tmp_path / "copy").description["weights"],
            "dtype": "float32",
            "max_new_tokens": 64,
            "prompts": "empty",
        }
        more = saved.described(prompts="question").description
        assert (more["prompts"], saved.description["prompts"]) == ("question", "empty")
        told = tmp_path / "copy/vlm.json"
        told.write_text(told.read_text() + " ")
        changed = SavedVLM(tmp_path / "copy", dtype=torch.bfloat16).description
        assert changed["weights"] != saved.description["weights"]
        assert changed["dtype"] == "bfloat16"

    def test_every_benchmark_asks_a_model_that_learnt_with_captions_without_any(self, folder):
        """Its policy is question and caption, and of what is asked no caption is known."""
        saved, policies = SavedVLM(folder / "run", max_new_tokens=2), []
        generate = DiffusionVLM.from_pretrained(folder / "run/model").generate
        plain = FunctionAnswerer("plain", generate, options={"max_new_tokens": 2})
        for model in (saved, plain):
            captions = evaluate_captions(shapes_captions(2), model, metrics=())
            choices = evaluate_choices(shapes_naturalbench(1), model)
            bench = evaluate_llava_bench(shapes_llava_bench(1), model, WordJudge())
            policies.append((captions.passes[0].captions, choices.choices, bench.answers))
        assert policies[0] == policies[1]

    def test_dropout_of_training(self, folder):
        saved = SavedVLM(folder / "run")
        assert saved.prompt_policy.startswith("question+caption")
        assert saved.prompt_dropout == pytest.approx(1 - 0.5 * 0.8)

    def test_what_is_no_model(self, folder, tmp_path):
        with pytest.raises(BackboneError, match="does not exist"):
            SavedVLM(tmp_path / "none")
        with pytest.raises(BackboneError, match=r"no whole model in it.*diffenc train"):
            SavedVLM(folder / "lm")
        with pytest.raises(ConfigError, match="max_new_tokens must be"):
            SavedVLM(folder / "run", max_new_tokens=0)
        shutil.copytree(folder / "run/model", tmp_path / "broken")
        for content in ("{", "[]", "{}", json.dumps({"encoder": 1, "prompt_policy": "empty"})):
            (tmp_path / "broken/vlm.json").write_text(content)
            with pytest.raises(BackboneError, match=r"is not what DiffusionVLM\.save_pretrained"):
                SavedVLM(tmp_path / "broken")


class TestLocalJudge:
    def by_hand(self, folder, text, length):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), tiny_lm_tokenizer()
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        with torch.no_grad():
            for _ in range(length):
                best = model(input_ids=ids).logits[0, -1].argmax()
                ids = torch.cat([ids, best.reshape(1, 1)], dim=1)
        return tokenizer.decode(ids[0, -length:], skip_special_tokens=True)

    def test_it_replies_by_its_template_with_the_likeliest_tokens(self, folder):
        freed = []
        judge = LocalJudge(
            folder / "lm", max_new_tokens=6, before_loading=lambda: freed.append(True)
        )
        judge.check()
        assert isinstance(judge, Judge)
        assert judge.name == "lm"
        assert freed == []
        text = f"<bos><|user|>{SYSTEM}\n\n{CASE.prompt}<|assistant|>"
        assert judge.review(CASE) == self.by_hand(folder / "lm", text, 6)
        judge.review(CASE)
        assert freed == [True]

    def test_without_a_template_the_text_is_bare(self, folder, tmp_path):
        shutil.copytree(folder / "lm", tmp_path / "bare")
        (tmp_path / "bare/chat_template.jinja").unlink(missing_ok=True)
        told = json.loads((tmp_path / "bare/tokenizer_config.json").read_text())
        told.pop("chat_template", None)
        (tmp_path / "bare/tokenizer_config.json").write_text(json.dumps(told))
        judge = LocalJudge(tmp_path / "bare", max_new_tokens=4)
        wanted = self.by_hand(tmp_path / "bare", f"{SYSTEM}\n\n{CASE.prompt}", 4)
        assert judge.review(CASE) == wanted

    def test_a_case_beyond_the_context(self, folder):
        judge = LocalJudge(folder / "lm")
        with pytest.raises(JudgeError, match=r"lm holds 2048 tokens, and this case has \d{4}"):
            judge.review(Case("word " * 500, "", "", "", "rule"))
        near = Case("x" * 1700, "", "", "", "rule")  # little room is left, and used
        assert isinstance(judge.review(near), str)

    def test_what_is_no_language_model(self, folder, tmp_path):
        with pytest.raises(BackboneError, match=r"no config\.json in it"):
            LocalJudge(tmp_path)
        with pytest.raises(BackboneError, match="cannot load a judge from 'no/such'"):
            LocalJudge("no/such").check()
        with pytest.raises(ConfigError, match="max_new_tokens"):
            LocalJudge(folder / "lm", max_new_tokens=0)
