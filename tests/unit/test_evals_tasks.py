from pathlib import Path

import pytest

from diffenc.errors import ConfigError
from diffenc.evals.matching.options import MatchOptions
from diffenc.evals.run import run_task
from diffenc.evals.task import AskOptions
from diffenc.evals.tasks.captions import Captions
from diffenc.evals.tasks.leakage import Leakage
from diffenc.evals.tasks.matching import Winoground
from diffenc.evals.tasks.mmvp import Mmvp


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Mmvp, {"data": 3}, "data must be a text or a PathLike, got 3"),
        (Mmvp, {"data": None}, "data must be a text"),
        (Mmvp, {"limit": "2"}, "limit must be an int or None, got '2'"),
        (Mmvp, {"limit": True}, "limit must be an int"),
        (Mmvp, {"limit": 1}, "limit must be 2 or more, got 1"),
        (Mmvp, {"fix_errata": "no"}, "fix_errata must be True or False"),
        (Mmvp, {"instruction": 5}, "instruction must be a text or None"),
        (Winoground, {"limit": -1}, "limit must be 1 or more, got -1"),
        (Winoground, {"per_label": True}, "per_label must be an int"),
        (Winoground, {"data_seed": "x"}, "data_seed must be an int"),
        (Winoground, {"template": 3}, "template must be a text"),
        (Captions, {"metrics": "cider"}, "metrics must be a tuple of texts or None"),
        (Captions, {"passes": 0}, "passes must be 1 or more"),
        (Captions, {"annotations": 3}, "annotations must be a Path or None"),
        (Leakage, {"guidance_scales": 2.0}, "guidance_scales must be a tuple of finite numbers"),
        (Leakage, {"guidance_scales": ("x",)}, "guidance_scales must be"),
        (Leakage, {"guidance_scales": (float("nan"),)}, "guidance_scales must be"),
        (AskOptions, {"seed": "x"}, "seed must be an int, got 'x'"),
        (AskOptions, {"batch_size": 0}, "batch_size must be 1 or more"),
        (AskOptions, {"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        (AskOptions, {"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        (AskOptions, {"skip_broken": "no"}, "skip_broken must be True or False"),
        (AskOptions, {"paper": "no"}, "paper must be True or False or None"),
        (AskOptions, {"name": 3}, "name must be a text"),
        (AskOptions, {"prompts": 3}, "prompts must be a text"),
        (MatchOptions, {"presets": "calibrated"}, "presets must be a tuple of texts"),
        (MatchOptions, {"clip": 3}, "clip must be a tuple of texts"),
        (MatchOptions, {"trials": 0}, "trials must be 1 or more"),
        (MatchOptions, {"data_references": True}, "data_references must be an int"),
        (MatchOptions, {"references": (3,)}, "references must be a tuple of Paths"),
    ],
)
def test_values_of_other_kinds_are_refused(kind, values, message):
    data = {} if kind in (AskOptions, MatchOptions) else {"data": "shapes"}
    with pytest.raises(ConfigError) as refusal:
        kind(**{**data, **values})
    assert message in str(refusal.value)


def test_texts_stand_for_paths_and_lists_for_tuples(tmp_path):
    assert MatchOptions(references=["a.png"]).references == (Path("a.png"),)
    assert Captions(data=tmp_path, annotations="a.json").annotations == Path("a.json")
    assert Leakage(data="shapes", guidance_scales=[1, 2]).guidance_scales == (1.0, 2.0)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Captions(data="shapes", question=" "), "the question is empty"),
        (Leakage(data="shapes", guidance_scales=()), "guidance_scales holds no number"),
    ],
)
def test_empty_values_do_not_stand_for_defaults(task, message):
    with pytest.raises(ConfigError, match=message):
        task.check()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": Captions}, "task must be a benchmark that a model answers"),
        ({"task": "captions"}, "task must be"),
        ({"task": Winoground(data="shapes")}, "task must be"),
        ({"options": {"seed": 3}}, "options must be AskOptions"),
        ({"options": {}}, "options must be AskOptions"),
        ({"model": None}, "model must be the folder of a saved model, got None"),
        ({"model": b"x"}, "model must be"),
        ({"results": 3}, "results must be the path"),
        ({"progress": 3}, "progress must be a function"),
    ],
)
def test_other_arguments_of_a_run_are_refused(arguments, message):
    run = {"task": Captions(data="shapes"), "model": "nowhere", **arguments}
    with pytest.raises(ConfigError, match=message):
        run_task(**run)
