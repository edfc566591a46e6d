import itertools
import json
from collections import Counter

import pytest

from answers_data import Says, shade
from diffenc.errors import ConfigError
from diffenc.evals.captioning import CaptionItem, CaptionSet, shapes_captions
from diffenc.evals.items import Picture
from diffenc.evals.leakage import (
    Setting,
    content_words,
    derangement,
    evaluate_leakage,
    leakage_table,
    mismatched_prompts,
    prompt_readout,
    sweep_leakage,
)


def items_of(*references):
    return [
        CaptionItem(str(k), Picture(f"picture {k}", shade(k)), tuple(texts))
        for k, texts in enumerate(references)
    ]


def parrot(images, question, prompt):
    return prompt


def blind(images, question, prompt):
    return "a red circle and a blue star"


def honest(data):
    """Says the first reference of the picture, whatever the prompt."""
    known = {item.picture.open().tobytes(): item.references[0] for item in data.items}
    return lambda images, question, prompt: known[images[0].tobytes()]


class TestDerangement:
    @pytest.mark.parametrize("count", [2, 3, 7, 100])
    def test_nothing_keeps_its_place_and_nothing_is_lost(self, count):
        for seed in range(20):
            found = derangement(count, seed=seed)
            assert sorted(found) == list(range(count))
            assert all(place != thing for place, thing in enumerate(found))

    def test_it_depends_on_the_seed_alone(self):
        assert derangement(50, seed=3) == derangement(50, seed=3)
        assert len({derangement(50, seed=seed) for seed in range(20)}) == 20

    def test_each_is_equally_likely(self):
        every = [
            p for p in itertools.permutations(range(4)) if all(k != v for k, v in enumerate(p))
        ]
        counts = Counter(derangement(4, seed=seed) for seed in range(1800))
        assert set(counts) == set(every)
        assert max(counts.values()) < 1.35 * 1800 / len(every)

    @pytest.mark.parametrize("count", [-1, 0, 1])
    def test_too_few(self, count):
        with pytest.raises(ConfigError, match="two images or more"):
            derangement(count, seed=0)


class TestPrompts:
    def test_each_image_has_captions_of_two_others_and_gives_one_to_each_set(self):
        data = shapes_captions(60)
        for seed in range(5):
            both = mismatched_prompts(data.items, seed=seed)
            assert mismatched_prompts(data.items, seed=seed) == both
            for one in both:
                assert sorted(one.donors) == list(range(60))
                for place, (donor, text) in enumerate(zip(one.donors, one.prompts, strict=True)):
                    assert donor != place
                    assert text in data.items[donor].references
                    assert text not in data.items[place].references
            assert all(a != b for a, b in zip(both[0].donors, both[1].donors, strict=True))
        assert both != mismatched_prompts(data.items, seed=0)

    def test_equal_captions_of_other_images_are_exchanged(self):
        items = items_of(["A cat."], ["a cat"], ["a dog"], ["a hen"], ["a cow"], ["a  Cat"])
        for seed in range(30):
            for one in mismatched_prompts(items, seed=seed):
                for place in (0, 1, 5):
                    assert "cat" not in one.prompts[place].lower()

    def test_too_few_different_captions(self):
        with pytest.raises(ConfigError, match="too few different captions"):
            mismatched_prompts(items_of(["a cat"], ["a cat"], ["a cat"], ["a dog"]), seed=0)
        with pytest.raises(ConfigError, match="need three images"):
            mismatched_prompts(items_of(["a cat"], ["a dog"]), seed=0)


class TestReadout:
    def test_words_are_whole_and_in_any_form_of_unicode(self):
        assert not content_words("redder incredible bluetooth red-orange") & {"red", "blue"}
        assert content_words("caf\u00e9") == content_words("cafe\u0301")

    def test_content_words(self):
        found = content_words("There are two RED circles, and a man's glass near them.")
        assert found == {"two", "red", "circle", "man", "glass"}

    def test_by_hand(self):
        prompts = ["a red circle above a cat"], ["a blue circle on a dog"]
        captions = ["a red cat on a lawn"], ["a dog and a cat"]
        # Foreign in the first prompt: red and above; circle is in both, cat is true. Red is said.
        # Foreign in the second: blue and dog. Dog is said.
        found = prompt_readout(prompts, captions, [["the cat on a lawn"]])
        assert (found.said, found.base, found.value) == (0.5, 0.0, 0.5)
        assert (found.error, found.images, found.skipped) == (None, 1, 0)

    def test_words_said_anyway_cancel(self):
        prompts = ["a red cat"], ["a green dog"]
        both = prompt_readout(prompts, (["red green cat dog"], ["red green cat dog"]), [["x"]])
        assert (both.said, both.base, both.value) == (1, 1, 0)

    def test_bounds(self):
        prompts = ["red cat", "pink hen"], ["green dog", "gray cow"]
        assert prompt_readout(prompts, prompts, [["x"], ["y"]]).value == 1
        assert prompt_readout(prompts, prompts[::-1], [["x"], ["y"]]).value == -1

    def test_its_error_is_that_of_a_mean(self):
        prompts = ["red", "pink", "gray", "teal"], ["cat", "dog", "hen", "cow"]
        said = ["red", "pink", "", ""], ["cat", "dog", "", ""]
        found = prompt_readout(prompts, said, [["x"]] * 4)
        assert found.value == 0.5
        assert found.error == pytest.approx((1 / 3) ** 0.5 / 2)

    def test_prompts_without_foreign_words_are_skipped(self):
        found = prompt_readout((["a x", "a b"], ["x", "c"]), (["", ""], ["", ""]), [["x"], ["y"]])
        assert (found.images, found.skipped) == (1, 1)
        with pytest.raises(ConfigError, match="no prompt holds a word"):
            prompt_readout((["a x"], ["x"]), (["x"], ["x"]), [["x"]])
        with pytest.raises(ConfigError, match="two prompts and two captions per image"):
            prompt_readout((["a"], ["b"]), (["a"], []), [["x"]])


class TestProtocol:
    def test_who_repeats_its_prompt_has_one_and_who_ignores_it_has_zero(self):
        data = shapes_captions(30)
        for says, value in ((parrot, 1), (blind, 0), (honest(data), 0)):
            found = evaluate_leakage(data, Says(says), metrics=())
            assert found.readout.value == value, says
            assert len(found.captions) == 30
            assert found.fresh == 60

    def test_half_of_the_words_is_a_half(self):
        """Prompts of two foreign words, of which one is said."""
        items = tuple(
            CaptionItem(str(k), Picture(f"p{k}", shade(k)), (f"noun{k} verb{k}",)) for k in range(9)
        )
        model = Says(lambda images, question, prompt: f"{prompt.split()[0]} something else")
        evaluation = evaluate_leakage(
            CaptionSet(name="words", source="memory", items=items), model, metrics=()
        )
        assert (evaluation.readout.said, evaluation.readout.base, evaluation.readout.value) == (
            0.5,
            0,
            0.5,
        )

    def test_scores_against_the_prompt_and_against_the_image(self):
        pytest.importorskip("pycocoevalcap.bleu.bleu")
        data = shapes_captions(20)
        options = {"metrics": ["rouge-l"], "tokenizer": "simple"}
        repeats = evaluate_leakage(data, Says(parrot, "parrot"), **options)
        true = evaluate_leakage(data, Says(honest(data), "honest"), **options)
        assert repeats.against_prompt.values["rouge-l"] == pytest.approx(100)
        assert repeats.against_image.values["rouge-l"] < 60
        assert repeats.floor.values["rouge-l"] < 60
        assert true.against_image.values["rouge-l"] == pytest.approx(100)
        assert true.against_prompt.values == true.floor.values
        assert true.floor.values["rouge-l"] < 60
        rows = leakage_table([("parrot", repeats), ("honest", true)], paper=True).rows
        assert rows[0][:3] == ("parrot", "1.000 ± 0.000", "100.00")
        assert ("paper: CFG=4.5", "–", "49.58", "–", "–") in rows
        json.dumps(repeats.to_dict(), allow_nan=False)

    def test_both_prompts_are_given_to_the_model(self):
        data, model = shapes_captions(10), Says(parrot)
        found = evaluate_leakage(data, model, metrics=(), seed=4)
        one, two = mismatched_prompts(data.items, seed=4)
        assert [prompt for _, _, prompt in model.asked] == [*one.prompts, *two.prompts]
        assert list(found.prompts.values()) == list(one.prompts)

    def test_it_goes_on_after_a_kill_and_other_seeds_stand_beside(self, tmp_path):
        data, path = shapes_captions(9), tmp_path / "answers.jsonl"
        options = {"metrics": (), "results": path, "batch_size": 2}
        with pytest.raises(KeyboardInterrupt):
            evaluate_leakage(data, Says(parrot, dies_after=12), **options)
        second = Says(parrot)
        assert evaluate_leakage(data, second, **options).readout.value == 1
        assert len(second.asked) == 18 - 13
        assert evaluate_leakage(data, Says(parrot), **options).fresh == 0
        assert evaluate_leakage(data, Says(parrot), seed=1, **options).fresh == 18


class TestSweep:
    def leaks(self, setting):
        """More with guidance, less with dropout: words up to a share of the prompt."""
        share = min(1.0, setting.guidance_scale / 8) * (1 - setting.prompt_dropout)

        def says(images, question, prompt):
            words = prompt.split()
            return " ".join(words[: round(share * len(words))])

        return Says(says, scale=setting.guidance_scale)

    def test_as_a_function_of_guidance_and_dropout(self, tmp_path):
        data, path = shapes_captions(20), tmp_path / "answers.jsonl"
        settings = [
            Setting(guidance_scale=scale, prompt_dropout=dropout)
            for dropout in (0, 0.5)
            for scale in (8, 1, 4)
        ]
        made = []

        def make(setting):
            made.append(setting)
            return self.leaks(setting)

        found = sweep_leakage(data, make, settings, results=path, metrics=())
        assert made == settings
        scales, values = zip(*found.curve(), strict=True)
        assert scales == (1, 4, 8)
        assert list(values) == sorted(values)
        assert values[-1] == 1
        pairs = zip(found.curve(), found.curve(0.5), strict=True)
        assert all(plain[1] >= dropped[1] for plain, dropped in pairs)
        assert found.table().rows[3][0] == "CFG=8, 50 % of prompts dropped"
        again = sweep_leakage(data, self.leaks, settings, results=path, metrics=())
        assert sum(each.fresh for each in again.evaluations) == 0
        assert again == found

    def test_settings_that_are_none(self):
        data = shapes_captions(4)
        for settings in ([], [Setting(), Setting()]):
            with pytest.raises(ConfigError, match="one or more, each once"):
                sweep_leakage(data, self.leaks, settings)
        with pytest.raises(ConfigError, match="is a share"):
            Setting(prompt_dropout=30)
