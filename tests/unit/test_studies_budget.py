import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from diffenc import DiffusionEncoder
from diffenc.cli.main import app
from diffenc.errors import BackboneError, ConfigError
from diffenc.shapes import Scene, SceneObject, masks, render
from diffenc.studies import budget as budget_module
from diffenc.studies import budget_choices, budget_costs, budget_run
from diffenc.studies.budget import BudgetStudy, decide, study_budget
from diffenc.studies.budget_arms import MASKS, MOONSHOT, Arm, Choice, CrowdTokens
from diffenc.studies.budget_page import (
    accuracy_table,
    arm_name,
    choice_table,
    example_table,
    growth_table,
    mistake_table,
    to_markdown,
    verdict_table,
    word_table,
)
from diffenc.studies.budget_run import BASES
from diffenc.studies.crowd_readers import (
    CrowdQuestions,
    CrowdReader,
    read_answers,
    standardised,
)
from diffenc.studies.crowd_trials import (
    ANSWERS,
    CROWD_PROPERTIES,
    CrowdQuestion,
    CrowdTrial,
    sample_crowd_trials,
)
from diffenc.studies.mistakes import count_mistakes
from diffenc.studies.spreads import Spread
from diffenc.studies.token_readers import TokenRows
from vlm_builders import save_tiny_clip

QUICK = {"scenes": 30, "validation": 30, "seeds": 1, "reader_epochs": 1, "batch_size": 30}


@pytest.fixture(scope="module")
def trials() -> list[CrowdTrial]:
    return sample_crowd_trials(90, seed=3)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"), hidden_size=12)


def half_right(
    tokens, questions, _reader, *, groups, split, start=None, **_options
) -> torch.Tensor:
    """Answers in place of a reader's: half of them true, the others drawn."""
    assert sum(groups) == tokens.sources[0].shape[2]
    source = torch.Generator().manual_seed(sum(groups))
    start = split if start is None else start
    allowed = questions.allowed[torch.arange(start, tokens.rows) % 4]
    drawn = torch.multinomial(allowed.float(), 1, generator=source)[:, 0]
    return torch.where(
        torch.rand(len(drawn), generator=source) < 0.5, questions.labels[start:], drawn
    )


@pytest.fixture(scope="module")
def study(tiny_sd_folder: Path, clip_folder: Path) -> Iterator[BudgetStudy]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget_run, "read_answers", half_right)
        patch.setattr(budget_choices, "read_answers", half_right)
        patch.setattr(budget_costs, "_CALLS", 1)
        yield study_budget(str(tiny_sd_folder), clip=str(clip_folder), **{**QUICK, "seeds": 2})


def of_words(scene: Scene, *words: str) -> list[SceneObject]:
    """Objects that all these words fit; "object" fits any."""
    return [
        thing
        for thing in scene.objects
        if all(word in (thing.color, thing.shape, "object") for word in words)
    ]


def answer_by_geometry(scene: Scene, text: str) -> str:
    """A second reader of the questions, which fails where words fit several objects."""
    if match := re.fullmatch(r"what color is the (\w+)\?", text):
        (thing,) = of_words(scene, match[1])
        return thing.color
    if match := re.fullmatch(r"what shape is the (\w+) object\?", text):
        (thing,) = of_words(scene, match[1])
        return thing.shape
    if match := re.fullmatch(r"where is the (\w+) (\w+)\?", text):
        (thing,) = of_words(scene, match[1], match[2])
        row = "top" if thing.y < 1 / 3 else "middle" if thing.y < 2 / 3 else "bottom"
        column = "left" if thing.x < 1 / 3 else "middle" if thing.x < 2 / 3 else "right"
        return f"{row} {column}"
    match = re.fullmatch(r"is the (\w+) (\w+) left of the (\w+) (\w+)\?", text)
    (first,), (second,) = of_words(scene, *match.groups()[:2]), of_words(scene, *match.groups()[2:])
    assert first.shape != second.shape
    assert abs(first.x - second.x) > abs(first.y - second.y)
    return "yes" if first.x < second.x else "no"


def test_answers_are_true_and_words_fit_one_object_only(trials) -> None:
    for trial in trials:
        assert 5 <= len(trial.scene.objects) <= 9
        assert tuple(question.asks for question in trial.questions) == CROWD_PROPERTIES
        for question in trial.questions:
            assert question.answer == answer_by_geometry(trial.scene, question.text)
            for thing, names, noun in zip(
                question.things, question.names, question.nouns, strict=True
            ):
                assert of_words(trial.scene, *names) == [trial.scene.objects[thing]]
                assert noun in question.text.rstrip("?").split()


def test_every_answer_is_right_equally_often(trials) -> None:
    for index, name in enumerate(CROWD_PROPERTIES):
        answers = [trial.questions[index].answer for trial in trials]
        each = len(trials) // len(ANSWERS[name])
        counts = {answer: answers.count(answer) for answer in ANSWERS[name]}
        assert all(abs(count - each) <= 1 for count in counts.values()), counts


def test_trials_depend_on_seed_and_index_alone(trials) -> None:
    assert sample_crowd_trials(7, seed=3) == trials[:7]
    assert sample_crowd_trials(7, seed=4) != trials[:7]
    assert sample_crowd_trials(7, seed=3, validation=True) != trials[:7]
    with pytest.raises(ConfigError, match="seed must be an int of 0 or more, got -1"):
        sample_crowd_trials(1, seed=-1)


def test_a_told_reader_knows_the_names_and_a_blind_one_the_property(trials) -> None:
    questions = CrowdQuestions.of(trials)
    words = (*CROWD_PROPERTIES, *ANSWERS["color"], *ANSWERS["shape"])

    def known(reader: str, row: int, head: int) -> set[str]:
        flags = questions.words[reader][row, head].tolist()
        return {word for word, flag in zip(words, flags, strict=True) if flag}

    for row, question in enumerate(questions.questions):
        objects = [question.things[0], question.things[-1]]
        for head in (0, 1):
            assert known("blind", row, head) == {question.asks}
            thing = trials[row // 4].scene.objects[objects[head]]
            assert known("told", row, head) - {question.asks} <= {thing.color, thing.shape}
            assert {question.asks, *question.names[min(head, len(question.names) - 1)]} == known(
                "told", row, head
            )
    assert [bool(x) for x in questions.allowed[0]] == [True] * 6 + [False] * 15


def test_the_reader_is_two_attentions_and_a_linear_layer(trials) -> None:
    questions = CrowdQuestions.of(trials[:2])
    reader = CrowdReader(3, tokens=4, answers=21, seed=0)
    reader.requires_grad_(False)
    tokens = torch.randn(8, 4, 3, generator=torch.Generator().manual_seed(0))
    words = questions.words["told"]
    assert torch.equal(reader(tokens, words), torch.zeros(8, 21))
    for parameter in reader.parameters():
        torch.nn.init.normal_(parameter)
    for row in range(8):
        logits = reader.prior.clone()
        for head in (0, 1):
            query = sum(words[row, head, w] * reader.query[w, head] for w in range(14))
            scores = [
                float(tokens[row, n] @ query + reader.slot[row % 4, head, n]) for n in range(4)
            ]
            weights = np.exp(scores) / np.exp(scores).sum()
            gathered = sum(float(weights[n]) * tokens[row, n] for n in range(4))
            logits = logits + reader.value[:, head] @ gathered
        torch.testing.assert_close(reader(tokens, words)[row], logits, atol=1e-4, rtol=1e-4)


def test_groups_of_channels_have_equal_lengths() -> None:
    source = torch.Generator().manual_seed(0)
    tokens = torch.randn(10, 7, 6, generator=source) * torch.tensor([1.0, 9, 2, 3, 1, 50]) + 5
    made = standardised(TokenRows((tokens,), 20), (2, 4), split=12).take(torch.arange(20))
    fitted = made[:12:2]
    torch.testing.assert_close(fitted.mean(dim=(0, 1)), torch.zeros(6), atol=1e-5, rtol=0)
    squares = fitted.square().sum(dim=(0, 1)) / (6 * 7 - 1)
    torch.testing.assert_close(squares[:2], torch.full((2,), 4.0))  # 8 of the length's square
    torch.testing.assert_close(squares[2:], torch.full((4,), 2.0))


@pytest.mark.long
def test_who_is_told_finds_the_object_and_who_is_not_guesses() -> None:
    """Tokens that are the truth, an object each, in an order that tells nothing."""
    rng, trials = np.random.default_rng(0), sample_crowd_trials(240, seed=1)
    rows = np.zeros((len(trials), 9, 6 + 4 + 9 + 2), np.float32)
    for scene, trial in enumerate(trials):
        for token, index in enumerate(rng.permutation(len(trial.scene.objects))):
            thing = trial.scene.objects[index]
            rows[scene, token, ANSWERS["color"].index(thing.color)] = 1
            rows[scene, token, 6 + ANSWERS["shape"].index(thing.shape)] = 1
            rows[scene, token, 10 + 3 * int(3 * thing.y) + int(3 * thing.x)] = 1
            rows[scene, token, 19:] = thing.x, 1
    questions = CrowdQuestions.of(trials)
    tokens = TokenRows((torch.from_numpy(rows),), 960)
    right = {}
    for reader in ("told", "blind"):
        answers = read_answers(
            tokens, questions, reader, groups=(21,), split=640, epochs=40, seed=0
        )
        assert bool(questions.allowed[torch.arange(640, 960) % 4, answers].all())
        right[reader] = (answers == questions.labels[640:]).double().view(-1, 4).mean(dim=0)
    assert right["told"].mean() > 0.9
    assert right["told"][3] > 0.8  # two attentions, one for each object
    assert right["blind"].mean() < 0.5


def test_rows_between_what_is_fitted_and_what_is_answered_are_left_out(
    trials,
) -> None:
    questions = CrowdQuestions.of(trials)
    source = torch.randn(360, 3, 2, generator=torch.Generator().manual_seed(0))
    options = {"groups": (2,), "split": 40, "epochs": 2, "seed": 0}
    every = read_answers(TokenRows((source,), 360), questions, "told", **options)
    some = read_answers(TokenRows((source,), 360), questions, "told", start=200, **options)
    assert torch.equal(some, every[160:])


def test_heads_of_a_blind_reader_part(trials) -> None:
    """Left or right of two tokens: who looks at one of them alone cannot tell."""
    rows = torch.zeros(360, 2, 2)
    for row, question in enumerate(q for trial in trials for q in trial.questions):
        for place, thing in enumerate(question.things):
            scene = trials[row // 4].scene
            rows[row, place] = torch.tensor([scene.objects[thing].x, 1.0])
    questions = CrowdQuestions.of(trials)
    answers = read_answers(
        TokenRows((rows,), 360),
        questions,
        "blind",
        groups=(2,),
        split=240,
        epochs=60,
        seed=0,
    )
    relations = (answers == questions.labels[240:]).view(-1, 4)[:, 3]
    assert relations.double().mean() > 0.85


@pytest.fixture(scope="module")
def tokens_of(tiny_sd_folder: Path, trials):
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder)
    tokens = CrowdTokens(
        encoder, trials[:5], sides=(1, 2, 8), batch_size=2, clip=None, done=lambda _rows: None
    )
    return encoder, tokens


def same(encoder: DiffusionEncoder, **options) -> DiffusionEncoder:
    return DiffusionEncoder(encoder.backbone, replace(encoder.config, **options))


@pytest.mark.parametrize("half", ["uncond", "cond"])
@pytest.mark.parametrize(("count", "rest"), [(2, True), (8, True), (16, True), (1, False)])
def test_words_are_those_that_the_encoder_hands_on(tokens_of, trials, count, rest, half) -> None:
    encoder, tokens = tokens_of
    taps = tuple(tap.name for tap in encoder.feature_info)
    made = tokens.tokens(Arm("words", words=count), Choice(taps, half, rest))
    for row in (0, 5, 10, 15, 19):
        image = render(trials[row // 4].scene, 64)
        text = trials[row // 4].questions[row % 4].text
        if rest:
            reference = same(encoder, tokens="words", word_count=count, conditioning=half)
            expected = reference(image, text)
            torch.testing.assert_close(made[row : row + 1].float(), expected, atol=5e-3, rtol=5e-3)
        else:
            words = encoder.word_tokens(image, text, count=count, conditioning=half)
            assert made.shape[1] == 1
            torch.testing.assert_close(
                made[row, :, :-32].float(), words.tokens[0], atol=5e-3, rtol=5e-3
            )


def test_grid_and_words_are_what_the_encoder_hands_on(tokens_of, trials) -> None:
    encoder, tokens = tokens_of
    taps = tuple(tap.name for tap in encoder.feature_info)
    made = tokens.tokens(MOONSHOT, Choice(taps, "cond", rest=True))
    reference = same(encoder, tokens="grid+words", word_count=8, grid=2)
    assert made.shape[1] == MOONSHOT.tokens == 12
    for row in (1, 7, 14, 19):
        image = render(trials[row // 4].scene, 64)
        expected = reference(image, trials[row // 4].questions[row % 4].text)
        torch.testing.assert_close(made[row : row + 1].float(), expected, atol=5e-3, rtol=5e-3)


def test_a_tap_alone_has_the_channels_of_that_tap(tokens_of, trials) -> None:
    encoder, tokens = tokens_of
    for tap in encoder.feature_info:
        alone = same(encoder, taps=(tap.name,))
        image = render(trials[2].scene, 64)
        cells = tokens.tokens(Arm("uncond", side=8), Choice((tap.name,)))
        expected = alone.extract(image, conditioning="uncond").tokens(8)
        assert cells.shape == (5, 64, tap.channels + 32)
        torch.testing.assert_close(cells[2:3, :, :-32].float(), expected, atol=5e-3, rtol=5e-3)
        asked = alone.extract(image, trials[2].questions[1].text).tokens(8)
        cells = tokens.tokens(Arm("cond", side=8), Choice((tap.name,)))
        torch.testing.assert_close(cells[9:10, :, :-32].float(), asked, atol=5e-3, rtol=5e-3)


def test_masks_gather_the_objects_that_are_named(tokens_of, trials) -> None:
    encoder, tokens = tokens_of
    taps = tuple(tap.name for tap in encoder.feature_info)
    made = tokens.tokens(MASKS, Choice(taps, "uncond"))
    assert not made[torch.arange(20) % 4 != 3, 1].any()  # one object is named
    for row in (0, 11, 15):
        trial, question = trials[row // 4], trials[row // 4].questions[row % 4]
        inside = masks(trial.scene, 64)
        features = encoder.extract(render(trial.scene, 64), conditioning="uncond")
        for place, thing in enumerate(question.things):
            parts = []
            for maps in features.values():
                side = maps.shape[-1]
                step = 64 // side
                cells = inside[thing].reshape(side, step, side, step).mean(axis=(1, 3))
                weights = torch.from_numpy(cells / cells.sum()).float()
                parts.append((maps[0] * weights).sum(dim=(1, 2)))
            expected = torch.cat(parts)
            torch.testing.assert_close(
                made[row, place, :-32].float(), expected, atol=5e-3, rtol=5e-3
            )


def test_a_second_question_reads_no_half_without_text_again(tiny_sd_folder, trials) -> None:
    counts: list[int] = []
    CrowdTokens(
        DiffusionEncoder.from_pretrained(tiny_sd_folder),
        trials[:4],
        sides=(1,),
        batch_size=4,
        clip=None,
        done=counts.append,
    )
    assert counts == [8, 4, 4, 4]


@pytest.mark.parametrize(
    ("values", "margin", "verdict"),
    [
        # deviation 0.01, three seeds: the limit is 2.92 * 0.01 / sqrt(3) = 0.0169
        ((0.00, 0.01, 0.02), -0.02, "holds"),
        ((-0.02, -0.01, 0.00), -0.02, "undecided"),
        ((-0.03, -0.02, -0.01), -0.02, "does not hold"),
        ((0.11, 0.12, 0.13), 0.10, "holds"),
        ((0.10, 0.11, 0.12), 0.10, "undecided"),
        ((0.07, 0.08, 0.09), 0.10, "does not hold"),
        ((0.5,), 0.10, "undecided"),
    ],
)
def test_seeds_decide_a_claim(values, margin, verdict) -> None:
    assert decide(Spread(values), margin) == verdict


def test_wrong_answers_are_counted_that_fit_another_object() -> None:
    things = (
        SceneObject("star", "red", "small", x=0.2, y=0.2, radius=0.06),
        SceneObject("circle", "blue", "small", x=0.8, y=0.8, radius=0.06),
        SceneObject("circle", "green", "small", x=0.8, y=0.2, radius=0.06),
    )
    questions = (
        CrowdQuestion("color", "", 0, (0,), (("star",),), ("star",)),
        CrowdQuestion("shape", "", 3, (0,), (("red",),), ("object",)),
        CrowdQuestion("position", "", 0, (0,), (("red", "star"),), ("star",)),
        CrowdQuestion("relation", "", 0, (0, 1), (("red", "star"), ("blue", "circle")), ("", "")),
    )
    trials = [CrowdTrial(Scene(things), questions)] * 3
    blue, orange, circle, square, star = 2, 5, 0, 1, 3
    answers = [blue, circle, 8, 1, orange, star, 2, 0, 0, square, 4, 1]
    counted = count_mistakes(MOONSHOT, "told", trials, answers)
    assert counted.wrong == {"color": 2, "shape": 2, "position": 3}
    assert counted.others == {"color": 1, "shape": 1, "position": 2}
    assert (counted + counted).wrong["position"] == 6


@pytest.mark.long
def test_settings_are_chosen_on_validation_scenes_alone(tiny_sd_folder, monkeypatch) -> None:
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder)
    widths = {tap.name: tap.channels for tap in encoder.feature_info}
    features = encoder.extract(render(sample_crowd_trials(1, seed=0)[0].scene, 64))
    fine = [tap for tap in widths if features[tap].shape[-1] >= 8]  # those that give 64 cells
    best = min(fine, key=widths.__getitem__)
    fitted: list[tuple[bool, int]] = []
    validation = {t.questions for t in sample_crowd_trials(30, seed=0, validation=True)}

    def reader_of_one_tap(tokens, questions, reader, *, split, start=None, **_options):
        start = split if start is None else start
        chosen_on = questions.questions[:4] in validation
        channels = tokens.sources[0].shape[2] - 32
        fitted.append((chosen_on, channels))
        right = questions.labels[start:]
        good = chosen_on == (channels == widths[best])  # elsewhere the other way round
        kinds = questions.allowed[torch.arange(start, tokens.rows) % 4]
        above = kinds[torch.arange(len(right)), (right + 1) % 21]
        return right if good else torch.where(above, right + 1, right - 1)

    monkeypatch.setattr(budget_run, "read_answers", reader_of_one_tap)
    monkeypatch.setattr(budget_choices, "read_answers", reader_of_one_tap)
    monkeypatch.setattr(budget_costs, "_CALLS", 1)
    study = study_budget(encoder.backbone, clip=None, **QUICK)
    chosen = {row.arm.family: row.choice.taps for row in study.rows}
    assert {tuple(widths[tap] for tap in taps) for taps in chosen.values()} == {(widths[best],)}
    assert {*chosen["uncond"], *chosen["cond"]} == {best}
    assert all(row.mean.mean == 0 for row in study.rows)
    kinds = [chosen_on for chosen_on, _ in fitted]
    assert kinds == sorted(kinds, reverse=True)  # nothing is chosen once held-out scenes are read
    assert {channels for chosen_on, channels in fitted if not chosen_on} == {widths[best]}


@pytest.mark.long
def test_every_number_of_tokens_is_read_by_both_readers(study) -> None:
    for reader in ("told", "blind"):
        for family in ("uncond", "cond"):
            curve = study.curve(family, reader)
            assert [row.arm.tokens for row in curve][:4] == [1, 4, 16, 64]
            assert all(row.cost.rows == 1 for row in curve)
        words = study.curve("words", reader)
        assert [row.arm.tokens for row in words] == [1, 2, 4, 8, 16]
        assert {row.cost.rows for row in words} == {2 if words[0].choice.half == "uncond" else 1}
        assert [row.arm for row in study.curve("mask", reader)] == [MASKS]
        assert study.find(MASKS, reader).cost is None
        assert [row.arm.tokens for row in study.curve("clip", reader)] == [1, 4, 16]  # of 4 x 4
        assert {row.cost.rows for row in study.curve("clip", reader)} == {0}
    for row in study.rows:
        assert set(row.accuracy) == set(CROWD_PROPERTIES)
        assert all(0 <= value <= 1 for s in row.accuracy.values() for value in s.values)
        assert len(row.mean.values) == 2
    counts = {(each.arm, each.reader): [] for each in study.growth}
    for each in study.growth:
        counts[each.arm, each.reader].append(each.scenes)
        if each.scenes == 20:  # all that are fitted to
            assert each.accuracy == study.find(each.arm, each.reader).mean
    assert list(counts.values()) == [[5, 10, 20]] * 6
    assert study.words_kept[16].values == (1.0, 1.0)
    assert list(study.words_kept) == [1, 2, 4, 8, 16]
    assert len(study.examples) == 20
    assert study.missing == ""


@pytest.mark.long
def test_gains_are_differences_within_a_seed(study) -> None:
    few, many = study.find(MOONSHOT, "blind"), study.find(BASES[0], "blind")
    for seed in range(2):
        expected = sum(
            few.accuracy[n].values[seed] - many.accuracy[n].values[seed] for n in CROWD_PROPERTIES
        )
        assert study.gain(BASES[0], "blind").values[seed] == pytest.approx(expected / 4)


@pytest.mark.long
def test_the_page_holds_every_number_of_the_tables(study, tmp_path) -> None:
    page = to_markdown(study, command="diffenc study budget", made_with="M.", picture="b.png")
    tables = [
        verdict_table(study),
        *(accuracy_table(study, reader) for reader in ("told", "blind")),
        choice_table(study),
        growth_table(study),
        word_table(study),
        mistake_table(study),
        example_table(study),
    ]
    for table in tables:
        assert table.rows
        for row in table.rows:
            assert f"| {' | '.join(row)} |" in page
    # what is known of a bundled CLIP is said of no other
    for clip, said in ((study.clip, False), ("shapes-clip", True), ("shapes-many-clip", True)):
        named = replace(study, clip=clip)
        text = to_markdown(named, command="budget", made_with="M.", picture="b.png")
        assert ("was trained on" in text) is said
    assert "![Accuracy over the number of tokens, by reader](b.png)" in page
    for reader in ("told", "blind"):
        assert f"{study.gain(BASES[0], reader).mean:+.3f}" in page
    assert arm_name(MOONSHOT) == "2 x 2 grid and 8 words"


@pytest.mark.long
def test_runs_repeat_and_leave_everything_as_it_was(tiny_sd_folder, monkeypatch) -> None:
    monkeypatch.setattr(budget_costs, "_CALLS", 1)
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder)
    before = {name: value.clone() for name, value in encoder.backbone.state_dict().items()}
    state = torch.random.get_rng_state()
    reports: list[tuple[int, int]] = []
    first = study_budget(
        encoder.backbone,
        clip=None,
        progress=lambda done, total: reports.append((done, total)),
        **QUICK,
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    after = encoder.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert reports[-1][0] == reports[-1][1]
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    assert first.missing == "no CLIP was asked for"
    assert "Not studied: CLIP (no CLIP was asked for)." in to_markdown(
        first, command="c", made_with="m.", picture="p"
    )
    second = study_budget(encoder.backbone, clip=None, **{**QUICK, "batch_size": 7})
    assert [row.accuracy for row in second.rows] == [row.accuracy for row in first.rows]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scenes": 29}, "scenes must be an int of 30 or more, got 29"),
        ({"validation": 0}, "validation must be an int of 30 or more"),
        ({"seeds": 0}, "seeds must be an int of 1 or more"),
        ({"reader_epochs": 0}, "reader_epochs must be"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_numbers_that_are_too_small_are_named(options, said) -> None:
    with pytest.raises(ConfigError, match=said):
        study_budget(**options)


def test_a_clip_that_is_not_there_is_an_error_unless_it_is_the_bundled_one(
    tiny_sd_folder, monkeypatch
) -> None:
    def unbundled(name: str, **_options: object) -> None:
        raise BackboneError("not bundled")

    monkeypatch.setattr(budget_module.ClipTokens, "from_pretrained", unbundled)
    assert budget_module._clip("shapes-clip", "cpu") == (None, "not bundled")
    with pytest.raises(BackboneError):
        study_budget(str(tiny_sd_folder), clip="another", **QUICK)


@pytest.mark.long
def test_the_command_prints_tables_and_writes_page_numbers_and_picture(
    tiny_sd_folder, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(budget_run, "read_answers", half_right)
    monkeypatch.setattr(budget_choices, "read_answers", half_right)
    monkeypatch.setattr(budget_costs, "_CALLS", 1)
    arguments = ["study", "budget", "-b", str(tiny_sd_folder), "--clip", "none", "--quick"]
    result = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for words in ("told the question", "asked through the encoder only", "undecided", "wrote"):
        assert words in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"budget.md", "budget.json", "budget.png"}
    numbers = json.loads((tmp_path / "budget.json").read_text("utf-8"))
    assert numbers["settings"]["scenes"] == 30
    assert len(numbers["comparisons"]) == 4
    assert numbers["rows"][0]["arm"] == {"family": "uncond", "side": 1, "words": 0}
    result = CliRunner().invoke(app, ["study", "budget", "--scenes", "3", "-o", str(tmp_path)])
    assert result.exit_code == 2
    assert result.output.startswith("error: the output exists already")
