import random
from collections import Counter

import pytest
from transformers import CLIPTokenizer

from diffenc.errors import ConfigError, PromptError
from diffenc.inputs.policies import (
    Caption,
    Empty,
    PromptDropout,
    PromptSample,
    Question,
    WordDeletion,
    captions_of,
    draw_prompts,
    parse_policy,
    strip_template,
    without_captions,
)
from diffenc.models.shapes import shapes_folder
from diffenc.shapes.questions import conversation
from diffenc.shapes.scenes import sample_scene

TURNS = [
    {"from": "human", "value": "<image>\nwhat color is the star?"},
    {"from": "gpt", "value": "red"},
    {"from": "human", "value": "how many circles are there?"},
    {"from": "gpt", "value": "two"},
]
SAMPLE = PromptSample("7", TURNS, ("two circles and a red star", "a picture of a red star"))
TALK = [
    {"from": "human", "value": "describe the picture."},
    {"from": "gpt", "value": "a red circle"},
]
QUESTIONS = {"what color is the star?", "how many circles are there?"}


def drawn(text: str, count: int = 400, sample: PromptSample = SAMPLE) -> Counter[str]:
    policy = parse_policy(text)
    return Counter(policy(sample, epoch=epoch) for epoch in range(count))


def test_each_source_draws_from_its_own_texts() -> None:
    assert set(drawn("empty")) == {""}
    assert set(drawn("caption")) == set(SAMPLE.captions)
    assert set(drawn("caption(first)")) == {SAMPLE.captions[0]}
    assert set(drawn("question")) == QUESTIONS
    assert set(drawn("question(first)")) == {"what color is the star?"}
    joined = {f"{q} {c}" for q in QUESTIONS for c in SAMPLE.captions}
    assert set(drawn("question + caption")) == joined


def test_random_questions_come_about_equally_often() -> None:
    counts = drawn("question")
    assert min(counts.values()) > 150


@pytest.mark.parametrize("p", [0.0, 0.1, 0.3, 1.0])
def test_dropout_empties_the_share_of_prompts_that_it_names(p: float) -> None:
    share = drawn(f"caption | dropout({p})", 2000)[""] / 2000
    assert share == pytest.approx(p, abs=0.035)


def test_word_deletion_keeps_order_and_share_and_never_everything() -> None:
    words = [f"w{index}" for index in range(200)]
    kept = WordDeletion(0.3).change(" ".join(words), random.Random(0)).split()
    assert kept == sorted(kept, key=words.index)
    assert len(kept) == pytest.approx(140, abs=25)
    for seed in range(50):
        assert WordDeletion(1.0).change("a red star", random.Random(seed)) in {"a", "red", "star"}
    assert WordDeletion(0.3).change("", random.Random(0)) == ""
    assert WordDeletion(0.0).change("a red star", random.Random(0)) == "a red star"


def test_a_sample_has_one_prompt_an_epoch_whatever_the_order() -> None:
    policy = parse_policy("question+caption | noisy(0.3) | dropout(0.3)")
    samples = [PromptSample(str(key), TURNS, SAMPLE.captions) for key in range(50)]
    forward = [policy(sample, seed=1, epoch=2) for sample in samples]
    backward = [policy(sample, seed=1, epoch=2) for sample in reversed(samples)]
    assert forward == backward[::-1]
    assert forward != [policy(sample, seed=1, epoch=3) for sample in samples]
    assert forward != [policy(sample, seed=2, epoch=2) for sample in samples]


def test_a_change_does_not_alter_what_its_source_draws() -> None:
    plain, dropped = parse_policy("question"), parse_policy("question | dropout(0.5)")
    for epoch in range(50):
        found = dropped(SAMPLE, epoch=epoch)
        assert found in ("", plain(SAMPLE, epoch=epoch))


def test_global_randomness_is_left_alone(pytestconfig) -> None:
    if pytestconfig.getoption("jaxtyping_packages", None):
        pytest.skip("the run-time type checker draws from the global generator itself")
    random.seed(5)
    before = random.getstate()
    parse_policy("question | noisy | dropout")(SAMPLE)
    assert random.getstate() == before


@pytest.mark.parametrize(
    "text",
    [
        "empty",
        "caption",
        "question(first)",
        "question+caption",
        "question+caption | noisy(0.3) | dropout(0.1)",
    ],
)
def test_a_policy_is_written_as_it_is_read(text: str) -> None:
    assert str(parse_policy(text)) == text
    assert parse_policy(str(parse_policy(text))) == parse_policy(text)


def test_policies_are_composed_from_objects_too() -> None:
    assert Question() | WordDeletion() | PromptDropout(0.1) == parse_policy(
        "question | noisy(0.3) | dropout(0.1)"
    )
    with pytest.raises(TypeError):
        Question() | Caption()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("qestion", "'question'"),
        ("", "known are empty, caption, question"),
        ("question | caption", "no change"),
        ("question | dropout(1.2)", "0 to 1, got 1.2"),
        ("question | dropout(-0.1)", "0 to 1"),
        ("question | noisy(much)", "needs a probability"),
        ("question | noisy(nan)", "0 to 1"),
        pytest.param("caption(last)", "'random' or 'first'", marks=pytest.mark.wrong_type),
        ("empty(1)", "takes no argument"),
        ("question+", "no source"),
        ("question | dropout(0.3", "no change"),
    ],
)
def test_what_is_no_policy_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        parse_policy(text)


def test_samples_that_lack_something_are_named() -> None:
    bare = PromptSample("b/7")
    with pytest.raises(PromptError, match="'b/7' has no caption"):
        Caption()(bare)
    with pytest.raises(PromptError, match="'b/7' has no question"):
        Question()(bare)
    only_image = PromptSample("c", [{"from": "human", "value": "<image>\n"}])
    with pytest.raises(PromptError, match="has no question"):
        Question()(only_image)
    odd = PromptSample("d", [{"from": "human"}])
    with pytest.raises(PromptError, match="'d', turn 0"):
        Question()(odd)
    assert Empty()(bare) == ""


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("<image>\nwhat is this?", "what is this?"),
        ("what is this?\n<image>", "what is this?"),
        ("USER: <image>\nwhat is this? ASSISTANT:", "what is this?"),
        ("[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nwhat is this? [/INST]", "what is this?"),
        ("<|im_start|>user\nwhat is this?<|im_end|>\n<|im_start|>assistant\n", "what is this?"),
        ("### Human: what is this?\n### Assistant:", "what is this?"),
        ("who uses a user: manual?", "who uses a user: manual?"),
    ],
)
def test_templates_are_stripped(text: str, bare: str) -> None:
    assert strip_template(text) == bare


def test_what_the_text_encoder_will_not_read_is_counted() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(shapes_folder() / "tokenizer")
    long = PromptSample("long", captions=("a red star " * 20,))
    found = draw_prompts(Caption(), [SAMPLE, long], tokenizer)
    assert found.truncated == (0, 60 + 2 - tokenizer.model_max_length)
    assert draw_prompts(Caption(), [], tokenizer).texts == ()


def test_conversations_of_the_miniature_world_fit() -> None:
    rng = random.Random(0)
    for seed in range(20):
        scene = sample_scene(rng)
        sample = PromptSample(str(seed), conversation(scene, seed=seed))
        prompt = Question()(sample)
        assert prompt
        assert "<image>" not in prompt


def test_users_import_policies_from_prompts() -> None:
    from diffenc.inputs import policies, prompts

    for name in ("PromptSample", "PromptPolicy", "parse_policy", "draw_prompts", "DrawnPrompts"):
        assert name in prompts.__all__
        assert getattr(prompts, name) is getattr(policies, name)


@pytest.mark.parametrize(
    ("policy", "left"),
    [
        ("caption", "empty"),
        ("caption(first) | dropout(0.3)", "empty | dropout(0.3)"),
        ("question(first)+caption | noisy(0.2)", "question(first) | noisy(0.2)"),
        ("caption+question+empty", "question+empty"),
        ("question", "question"),
    ],
)
def test_without_captions_the_other_sources_stay(policy, left):
    assert str(without_captions(parse_policy(policy))) == left


@pytest.mark.parametrize(
    ("record", "captions"),
    [
        ({"captions": ["a", "b"], "caption": "c", "conversations": TALK}, ("a", "b")),
        ({"caption": "c", "conversations": TALK}, ("c",)),
        ({"captions": [], "conversations": TALK}, ("a red circle",)),
        ({"conversations": [*TALK, *TALK]}, ()),
        ({"conversations": TALK[:1]}, ()),
        ({}, ()),
    ],
)
def test_the_only_answer_of_a_record_without_captions_is_its_caption(record, captions):
    assert captions_of(record) == captions
