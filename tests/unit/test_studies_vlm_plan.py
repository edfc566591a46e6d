import pytest

from diffenc.errors import ConfigError
from diffenc.studies.vlm import STUDIES, bundled_plan, read_plan
from diffenc.studies.vlm.estimate import Costs, work_of
from diffenc.studies.vlm.measurements import FIGURES, parse_prompting
from diffenc.studies.vlm.plan_file import parse_plan

PLAN = """
title = "A study"
about = "What is asked."
paper = ["guidance"]
plots = ["captions/named"]

[data]
scenes = 40

[model]
encoder = "shapes"
language_model = "some-lm"
options = { conditioning = "cfg", guidance_scale = 1.5, grid = 4 }

[align]
batch_size = 4
device_batch_size = 4
precision = "fp32"

[instruct]
batch_size = 4
device_batch_size = 4
epochs = 2

[adapt]
language_model = "lora"

[train.writer]
stage = "align"
model = { kind = "vision", encoder = "shapes-clip" }

[train.first]
stage = "align"
prompts = "caption(first) | dropout(0.3)"
options = { guidance_scale = 4.5 }

[train.second]
label = "the second"
stage = "instruct"
start = "first"
prompts = "question"

[measure.honest]
kind = "captions"
prompts = "by writer"
of = ["first"]
items = 10
passes = 2

[measure.answers]
kind = "answers"
prompts = "question + by writer"
of = ["second"]

[[finding]]
statement = "It helps."
paper = "Table 5."
holds_if = ["first/honest/named.2 > first/honest/named.1"]
"""


def plan(old="", new=""):
    assert old in PLAN
    return parse_plan("mine", PLAN.replace(old, new, 1))


def config(name, **more):
    files = {"align": "a.json", "instruct": "i.json", "images": "pictures"}
    return plan().config(name, files=files, output="out", seed=3, **more)


@pytest.mark.parametrize("name", STUDIES)
def test_every_bundled_study_is_whole(name):
    told = bundled_plan(name)
    assert told.seeds == 3
    assert told.findings
    assert all(finding.paper and finding.if_not for finding in told.findings)
    measured = {training.name for training, _ in told.pairs()}
    writers = {each.writer for each in told.measurements.values()}
    starts = {each.start for each in told.trainings.values()}
    assert set(told.trainings) <= measured | writers | starts, "a training that nothing needs"
    for training in told.trainings:
        made = told.config(training)
        assert made.optimizing.precision == "fp32"
        assert not made.optimizing.gradient_checkpointing


@pytest.mark.parametrize("name", STUDIES)
def test_every_bundled_study_needs_less_than_forty_minutes_and_that_of_tokens_ninety(name):
    """With what a picture, a sample and an answer cost on two cores that are free."""
    told = bundled_plan(name)
    work = work_of(told, (), Costs(encode=0.0065, learn=0.009, answer=0.012))
    assert work.total < (90 if name == "tokens" else 40) * 60


def test_studies_share_trainings():
    """They are found by what they are, so equal ones must be described equally."""
    leakage, refinement, guidance = map(bundled_plan, ("leakage", "refinement", "guidance"))
    for name in ("cfg1", "dropout", "clip"):
        assert leakage.config(name) == refinement.config(name)
    assert leakage.config("cfg4") == guidance.config("cfg4")


def test_a_training_gets_what_all_share_and_what_is_its_own():
    first = config("first")
    assert first.model.options == {"conditioning": "cfg", "guidance_scale": 4.5, "grid": 4}
    assert first.model.language_model == "some-lm"
    assert first.data.prompts == "caption(first) | dropout(0.3)"
    assert (first.optimizing.batch_size, first.optimizing.learning_rate) == (4, 1e-3)
    assert (first.seed, first.output, first.data.annotations) == (3, "out", "a.json")
    assert first.data.cache == "on"


def test_a_second_stage_takes_over_the_model_it_starts_from():
    second = config("second", start="folder/model")
    assert second.model.start == "folder/model"
    assert second.model.options["guidance_scale"] == 4.5
    assert second.data.annotations == "i.json"
    assert second.adapting.language_model == "lora"
    assert second.optimizing.epochs == 2


def test_a_vision_model_takes_no_options_of_the_diffusion_model():
    assert config("writer").model.options == {}
    assert plan().model("writer")["encoder"] == "shapes-clip"


def test_tokens_of_an_encoder_that_learns_are_not_kept():
    told = plan('prompts = "question"', 'prompts = "question"\nadapt = { unet_rank = 2 }')
    made = told.config("second")
    assert (made.adapting.unet_rank, made.data.cache) == (2, "off")


def test_labels_are_names_where_there_are_none():
    told = plan()
    assert [each.label for each in told.trainings.values()] == ["writer", "first", "the second"]
    assert told.measurements["honest"].label == "honest"


def test_figures_of_single_passes_have_names_of_their_own():
    assert {"named", "named.1", "named.2"} < set(plan().measurements["honest"].figures)
    assert plan().measurements["answers"].figures == FIGURES["answers"]


def test_models_and_seeds_can_be_changed():
    told = plan().with_options(seeds=2, language_model="other", clip="my-clip")
    assert told.seeds == 2
    assert told.shared.model["language_model"] == "other"
    assert told.trainings["writer"].model["encoder"] == "my-clip"
    assert told.trainings["first"].model == {}


def test_quick_is_one_pass_over_a_few_pictures():
    told = plan().quick()
    assert (told.seeds, told.data.scenes) == (1, 32)
    assert told.config("second").optimizing.epochs == 1
    assert {each.items for each in told.measurements.values()} == {8}


def test_work_counts_steps_and_answers():
    work = work_of(plan(), (), Costs(encode=1.0, learn=0.0, answer=0.0))
    pieces = {piece.name: piece for piece in work.pieces}
    assert pieces["first",].count == 10
    assert pieces["second",].count == 20
    assert pieces["first", "honest"].count == 20
    # two prompts of a picture in one epoch: one is seen; two halves of the U-Net
    assert pieces["first",].seconds == 40 * 1 * 2
    assert pieces["second",].seconds == 40 * 2 * 2
    assert pieces["writer",].seconds == 0
    assert work.total == pytest.approx(3 * sum(piece.seconds for piece in work.pieces))
    without = work_of(plan(), ("writer",), Costs())
    assert ("first", "honest") not in {piece.name for piece in without.pieces}


@pytest.mark.parametrize(
    ("text", "question", "caption"),
    [
        ("none", "", ""),
        ("oracle", "", "C"),
        ("by clip", "", "C"),
        ("question", "Q", ""),
        ("question + by clip", "Q", "C"),
        ("by clip + question", "Q", "C"),
    ],
)
def test_prompts_have_the_question_first(text, question, caption):
    wanted = " ".join(part for part in (question, caption) if part)
    assert parse_prompting(text).text(question="Q", caption="C") == wanted


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[data]", "[data", "no TOML"),
        ('title = "A study"', "", "a key is missing: title"),
        ('title = "A study"', "title = 3", "title must be a text, got 3"),
        ("[data]", "[datta]", "unknown key datta.*Did you mean 'data'"),
        ("scenes = 40", "scenes = 0", "data.scenes must be an int of 1 or more, got 0"),
        ("scenes = 40", 'scenes = "many"', "data.scenes must be a whole number"),
        ("scenes = 40", "scenes = 40\nseed = 900000", "held out"),
        ("scenes = 40", "szenes = 40", "unknown key data.szenes.*Did you mean 'scenes'"),
        ('paper = ["guidance"]', 'paper = ["guidence"]', "Did you mean 'guidance'"),
        ('paper = ["guidance"]', 'paper = "guidance"', "paper must be a list of texts"),
        ('paper = ["guidance"]', "seeds = 0", "seeds must be an int of 1 or more"),
        (
            "captions/named",
            "captions/nmaed",
            "plots must be one of .*got 'captions/nmaed'.*Did you mean 'captions/named'",
        ),
        ("captions/named", "mmvp/pairs", "plots must be one of .*got 'mmvp/pairs'"),
        pytest.param(
            'stage = "instruct"',
            'stage = "instruckt"',
            "Did you mean 'instruct'",
            marks=pytest.mark.wrong_type,
        ),
        ('stage = "instruct"', "", "a key is missing: train.second.stage"),
        ('start = "first"', 'start = "frist"', "Did you mean 'first'"),
        (
            'start = "first"',
            'start = "second"',
            "train.second.start: a training before it must be .*got 'second'",
        ),
        ('prompts = "question"', 'prompts = "qestion"', "no source of a prompt policy"),
        ("guidance_scale = 4.5", "guidence_scale = 4.5", "train.first.*Did you mean 'guidance_sc"),
        (
            "options = { guidance",
            "option = { guidance",
            "unknown key train.first.option.*Did you mean 'options'",
        ),
        ("[train.first]", '[train."First one"]', "names have small letters"),
        ("[train.first]", "[train]\nfirst = 3\n[train.other]", "train.first must be a table"),
        ("batch_size = 4", "batch_size = 5", "train.*no multiple"),
        ("[align]", "[align]\nlearning = 3", "train.writer.*learning"),
        ('kind = "captions"', 'kind = "caption"', "Did you mean 'captions'"),
        (
            'prompts = "by writer"',
            'prompts = "by wrter"',
            "measure.honest: a training must be .*got 'wrter'.*Did you mean 'writer'",
        ),
        ('prompts = "by writer"', 'prompts = "wrter"', "is no prompt"),
        ('prompts = "by writer"', 'prompts = "question"', 'without a "question"'),
        ('prompts = "by writer"', 'prompts = "oracle + by writer"', "two captions"),
        (
            'of = ["first"]',
            'of = ["fist"]',
            "measure.honest: a training must be .*got 'fist'.*Did you mean 'first'",
        ),
        ('of = ["first"]', 'of = "first"', "measure.honest.of must be a list"),
        ("items = 10", "items = 2", "items must be an int of 3 or more, got 2"),
        ("items = 10", "items = 1.5", "must be a whole number"),
        ("passes = 2", "passes = 0", "passes must be an int of 1 or more"),
        ('kind = "answers"', 'kind = "answers"\npasses = 2', 'passes is for kind = "captions"'),
        ('kind = "answers"', 'kind = "leakage"', "prompts of its own"),
        ("[measure.answers]", "[measure.answers]\noptions = { gid = 3 }", "unknown options"),
        ("[[finding]]", "[finding]", "two brackets"),
        ('statement = "It helps."', "", "a key is missing: finding 1.statement"),
        ('statement = "It helps."', "statement = 3", "finding 1.statement must be a text, got 3"),
        ("holds_if", "holds_when", "unknown key finding 1.holds_when"),
        (
            "first/honest/named.2",
            "frst/honest/named.2",
            "named.1': a training must be .*got 'frst'.*Did you mean 'first'",
        ),
        (
            "first/honest/named.2",
            "second/honest/named.2",
            "a measurement of 'second' must be one of .'answers'., got 'honest'",
        ),
        (
            "first/honest/named.2",
            "first/honest/named.3",
            "a figure of 'honest' must be .*got 'named.3'",
        ),
        ("named.2 >", "named.2 is more than", "one < or >"),
    ],
)
def test_what_is_wrong_is_named(old, new, message):
    with pytest.raises(ConfigError, match=message):
        plan(old, new)


def test_a_file_is_named_in_the_message(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(PLAN.replace("[data]", "[datta]"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mine\.toml: unknown key datta"):
        read_plan("mine", path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_plan("mine", tmp_path / "none.toml")


def test_an_unknown_study_is_refused():
    with pytest.raises(ConfigError, match="Did you mean 'leakage'"):
        bundled_plan("leakge")


def test_a_second_kind_of_stage_may_learn_captions():
    told = plan('start = "first"', 'start = "first"\ndata = "align"')
    files = {"align": "a.json", "instruct": "i.json", "images": "pictures"}
    made = told.config("second", files=files)
    assert (made.stage, made.data.annotations) == ("instruct", "a.json")
    with pytest.raises(ConfigError, match=r"train\.second\.data must be one of"):
        plan('start = "first"', 'start = "first"\ndata = "captions"')
