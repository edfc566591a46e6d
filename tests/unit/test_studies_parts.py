import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from diffenc import DiffusionEncoder
from diffenc.cli.main import app
from diffenc.errors import BackboneError, ConfigError
from diffenc.shapes import masks
from diffenc.shapes.scenes import COLORS, SHAPES
from diffenc.studies import parts as parts_module
from diffenc.studies.parts import COMPARISONS, PartStudy, study_parts
from diffenc.studies.parts_page import accuracy_table, gain_table, norm_table, to_markdown
from diffenc.studies.parts_run import PARTS, PartRun
from diffenc.studies.token_readers import (
    ASKED,
    AnswerReader,
    Questions,
    TokenRows,
    accuracy_of,
    cell_kinds,
    fit_reader,
    norm_accuracy,
    scale_cases,
)
from diffenc.studies.trials import CLASSES, sample_trials
from vlm_builders import save_tiny_clip

QUICK = {"scenes": 30, "seeds": 1, "reader_epochs": 2, "rank": 2, "grid": 4, "batch_size": 30}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"), hidden_size=12)


@pytest.fixture(scope="module")
def study(tiny_sd_folder: Path, clip_folder: Path) -> PartStudy:
    return study_parts(str(tiny_sd_folder), clip=str(clip_folder), **{**QUICK, "seeds": 2})


@pytest.fixture(scope="module")
def questions() -> Questions:
    return Questions.of(sample_trials(40, seed=0, least=2))


def test_questions_have_the_answers_of_their_scenes(questions) -> None:
    trials = sample_trials(40, seed=0, least=2)
    first = {"color": 0, "shape": len(COLORS), "position": len(COLORS) + len(SHAPES)}
    for row, text in enumerate(questions.texts):
        trial, name = trials[row // 3], ASKED[row % 3]
        assert text == trial.question(name)
        assert questions.labels[row] == first[name] + trial.label(name)
        allowed = questions.allowed[row % 3]
        assert allowed.sum() == CLASSES[name]
        assert allowed[questions.labels[row]]


def test_a_told_reader_knows_the_text_and_a_blind_one_the_property(questions) -> None:
    told, blind = questions.queries["told"].tolist(), questions.queries["blind"].tolist()
    assert len(set(zip(questions.texts, told, strict=True))) == len(set(told))
    assert len(set(questions.texts)) == len(set(told))
    assert [number - min(blind) for number in blind] == [0, 1, 2] * 40
    assert not set(told) & set(blind)
    assert questions.count == len(set(told)) + 3


def test_answers_that_make_no_sense_are_never_given(questions) -> None:
    logits = torch.full((3, 19), -5.0)
    logits[:, 7] = 9.0  # a shape
    given = questions.masked(logits, torch.tensor([0, 1, 2])).argmax(dim=1)
    assert [bool(questions.allowed[k][answer]) for k, answer in enumerate(given)] == [True] * 3
    assert given[1] == 7


def test_shared_tokens_are_repeated_and_channels_joined() -> None:
    scenes, rows = torch.randn(4, 5, 2), torch.randn(12, 5, 3)
    taken = TokenRows((scenes, rows), 12).take(torch.tensor([0, 4, 11]))
    expected = torch.stack(
        [torch.cat([scenes[s], rows[r]], dim=-1) for s, r in ((0, 0), (1, 4), (3, 11))]
    )
    assert torch.equal(taken, expected)
    mean, deviation = TokenRows((scenes, rows), 12).statistics(6)
    torch.testing.assert_close(mean[:2], scenes[:2].mean(dim=(0, 1)))
    torch.testing.assert_close(deviation[2:], rows[:6].reshape(-1, 3).std(dim=0))


def test_the_reader_is_an_attention_and_a_linear_layer() -> None:
    reader = AnswerReader(torch.ones(3), 2 * torch.ones(3), tokens=4, queries=2, answers=5)
    tokens, queries = torch.randn(2, 4, 3), torch.tensor([1, 0])
    assert torch.equal(reader(tokens, queries), torch.zeros(2, 5))
    for parameter in reader.parameters():
        torch.nn.init.normal_(parameter)
    for row in range(2):
        standard = (tokens[row] - 1) / 2 * 4 / 3**0.5
        weight = torch.exp(standard @ reader.query[queries[row]])
        weight = weight / weight.sum()
        expected = reader.prior[queries[row]].clone()
        for cell in range(4):
            expected += weight[cell] * (reader.value @ standard[cell] + reader.place[:, cell])
        torch.testing.assert_close(reader(tokens, queries)[row], expected)


def planted(questions: Questions, *, marked: bool) -> torch.Tensor:
    """Two cells with answers under names; the right one is marked where that is asked for."""
    generator = torch.Generator().manual_seed(0)
    names, answers = questions.count, questions.allowed.shape[1]
    tokens = 0.1 * torch.randn(len(questions.texts), 6, names + answers + 1, generator=generator)
    for row, label in enumerate(questions.labels.tolist()):
        right, wrong = torch.randperm(6, generator=generator)[:2].tolist()
        others = [n for n in questions.allowed[row % 3].nonzero().flatten().tolist() if n != label]
        other = others[int(torch.randint(len(others), (), generator=generator))]
        name = int(questions.queries["told"][row])
        tokens[row, right, name] += 1
        tokens[row, right, names + label] += 1
        alike = sorted(set(questions.queries["told"][row % 3 :: 3].tolist()) - {name})
        tokens[row, wrong, alike[int(torch.randint(len(alike), (), generator=generator))]] += 1
        tokens[row, wrong, names + other] += 1
        tokens[row, right, -1] += marked
    return tokens


def test_only_the_told_reader_finds_what_no_token_tells() -> None:
    questions = Questions.of(sample_trials(240, seed=1, least=2))
    found = {}
    for marked in (False, True):
        rows = TokenRows((planted(questions, marked=marked),), 720)
        for reader in ("told", "blind"):
            model = fit_reader(rows, questions, reader, split=480, epochs=12, seed=0)
            accuracy = accuracy_of(model, rows, questions, reader, split=480)
            found[marked, reader] = sum(accuracy.values()) / 3
    assert found[False, "told"] > 0.9
    assert found[False, "blind"] < 0.7
    assert found[True, "blind"] > 0.9


def test_only_rows_behind_the_split_are_measured(questions) -> None:
    tokens = TokenRows((torch.randn(120, 4, 3),), 120)
    model = fit_reader(tokens, questions, "told", split=60, epochs=1, seed=0)
    before = accuracy_of(model, tokens, questions, "told", split=60)
    spoilt = TokenRows((torch.cat([torch.zeros(60, 4, 3), tokens.sources[0][60:]]),), 120)
    assert accuracy_of(model, spoilt, questions, "told", split=60) == before
    again = fit_reader(tokens, questions, "told", split=60, epochs=1, seed=0)
    assert torch.equal(again.value, model.value)


@pytest.mark.long
@pytest.mark.parametrize("part", ["lora", "lora-empty", "captioner"])
def test_training_moves_what_is_added_and_nothing_else(tiny_sd_folder, clip_folder, part) -> None:
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder, grid=4)
    counts = []
    trials = sample_trials(6, seed=0, least=2)
    run = PartRun(encoder, trials, seed=0, reader_epochs=1, batch_size=4, done=counts.append)
    torch.manual_seed(0)
    if part == "captioner":
        encoder.add_captioner(clip_folder)
    else:
        encoder.add_lora(rank=2)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    trained = {name for name, _ in encoder.named_trainable_parameters()}
    reader = AnswerReader(
        torch.zeros(encoder.hidden_size),
        torch.ones(encoder.hidden_size),
        tokens=16,
        queries=run.questions.count,
        answers=19,
    )
    torch.nn.init.normal_(reader.value)
    prompts = {"lora": run.questions.texts, "lora-empty": ("",) * 18, "captioner": None}[part]
    run.train(encoder, {"told": reader}, prompts=prompts, epochs=2, rate=1e-2)
    after = encoder.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == trained
    assert sum(counts) == (8 if part == "captioner" else 24)
    assert not list(encoder.trainable_parameters())


@pytest.mark.long
def test_every_part_is_read_by_both_readers(study) -> None:
    assert {(row.part, row.reader) for row in study.rows} == {
        (part, reader) for part in PARTS for reader in ("told", "blind")
    }
    for row in study.rows:
        assert set(row.accuracy) == set(ASKED)
        assert all(0 <= value <= 1 for s in row.accuracy.values() for value in s.values)
        assert len(row.mean.values) == 2
    assert study.missing == {}
    assert [row.norm for row in study.norms] == [False, True] * 3
    assert len(study.rms) == len(study.taps)


@pytest.mark.long
def test_gains_are_differences_within_a_seed(study) -> None:
    over, under = study.find("cond", "told"), study.find("uncond", "told")
    for seed in range(2):
        expected = sum(
            over.accuracy[n].values[seed] - under.accuracy[n].values[seed] for n in ASKED
        )
        assert study.gain("cond", "uncond", "told").values[seed] == pytest.approx(expected / 3)


@pytest.mark.long
def test_the_control_trains_on_the_same_rows_without_their_texts(
    tiny_sd_folder, monkeypatch
) -> None:
    seen: dict[str, list] = {"trained": [], "read": []}
    plain = DiffusionEncoder.extract

    def watched(self, images, prompts=None, **options):
        texts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        kind = "trained" if self.training else "read"
        if self.lora_names:
            seen[kind].append((self.seen_as, [image.tobytes() for image in images], texts))
        return plain(self, images, prompts, **options)

    def named(self, **options):
        self.seen_as = len({run for run, *_ in seen["trained"]})
        return plain_lora(self, **options)

    plain_lora = DiffusionEncoder.add_lora
    monkeypatch.setattr(DiffusionEncoder, "extract", watched)
    monkeypatch.setattr(DiffusionEncoder, "add_lora", named)
    study_parts(str(tiny_sd_folder), clip=None, **QUICK)
    asked = [call for call in seen["trained"] if call[0] == 0]
    empty = [call for call in seen["trained"] if call[0] == 1]
    assert [images for _, images, _ in asked] == [images for _, images, _ in empty]
    assert all(text.endswith("?") for _, _, texts in asked for text in texts)
    assert {text for _, _, texts in empty for text in texts} == {""}
    assert {text for run, _, texts in seen["read"] for text in texts if run == 1} == {""}
    assert sum(len(images) for run, images, _ in seen["read"] if run == 1) == QUICK["scenes"]


def test_what_is_owed_to_the_text_is_a_gain_less_a_gain(study) -> None:
    for reader in ("told", "blind"):
        for seed, owed in enumerate(study.lora_by_text(reader).values):
            lora, cond, empty, uncond = (
                study.find(part, reader).mean.values[seed]
                for part in ("lora", "cond", "lora-empty", "uncond")
            )
            assert owed == pytest.approx((lora - cond) - (empty - uncond))
    page = to_markdown(study, command="c", made_with="m.")
    for reader in ("told", "blind"):
        assert f"{study.lora_by_text(reader).mean:+.3f}" in page
    without = replace(study, rows=tuple(r for r in study.rows if r.part != "lora-empty"))
    assert "owed to the text (" not in to_markdown(without, command="c", made_with="m.")
    assert without.lora_by_text("told") is None


@pytest.mark.long
def test_the_model_is_left_as_it_was_and_runs_repeat(tiny_sd_folder, clip_folder) -> None:
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder)
    before = {name: value.clone() for name, value in encoder.backbone.state_dict().items()}
    state = torch.random.get_rng_state()
    told = []
    first = study_parts(
        encoder.backbone,
        clip=str(clip_folder),
        progress=lambda done, total: told.append((done, total)),
        **QUICK,
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    after = encoder.backbone.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    second = study_parts(encoder.backbone, clip=str(clip_folder), **{**QUICK, "batch_size": 16})
    assert second.rms == pytest.approx(first.rms, rel=1e-5)  # batches of 16 round otherwise
    assert second == replace(first, model=second.model, rms=second.rms)


@pytest.mark.long
def test_without_a_clip_its_parts_are_missing_and_said_to_be(tiny_sd_folder, monkeypatch) -> None:
    found = study_parts(str(tiny_sd_folder), clip=None, **QUICK)
    assert found.parts == ["uncond", "cond", "concat", "lora", "lora-empty"]
    assert set(found.missing) == {"clip", "clip+uncond", "clip+cond", "captioner"}
    page = to_markdown(found, command="c", made_with="m.")
    assert "Not studied: CLIP alone" in page
    assert not any("CLIP" in cell for row in gain_table(found).rows for cell in row)

    def unbundled(name: str) -> None:
        raise BackboneError("not bundled")

    monkeypatch.setattr(parts_module.ClipTokens, "from_pretrained", unbundled)
    assert parts_module._missing("shapes-clip")["clip"] == "not bundled"
    with pytest.raises(BackboneError):
        parts_module._missing("another")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scenes": 29}, "scenes must be an int of 30 or more, got 29"),
        ({"seeds": 0}, "seeds must be an int of 1 or more"),
        ({"rank": 0}, "rank must be"),
        ({"epochs": 0}, "epochs must be"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_numbers_that_are_too_small_are_named(options, said) -> None:
    with pytest.raises(ConfigError, match=said):
        study_parts(**options)


def test_cells_have_the_kind_of_what_covers_them() -> None:
    trials = sample_trials(5, seed=3, least=2)
    kinds = cell_kinds(trials, 64, 8)
    for trial, row in zip(trials, kinds, strict=True):
        inside = masks(trial.scene, 64)
        for cell, kind in enumerate(row.tolist()):
            y, x = 8 * (cell // 8), 8 * (cell % 8)
            shares = [mask[y : y + 8, x : x + 8].mean() for mask in inside]
            thing = trial.scene.objects[max(range(len(shares)), key=shares.__getitem__)]
            expected = 4 * COLORS.index(thing.color) + SHAPES.index(thing.shape)
            assert kind == (expected if max(shares) > 0.5 else -1)


def test_a_norm_per_tap_makes_the_projector_blind_to_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(0, 4, (30, 16), generator=generator)
    signal = torch.nn.functional.one_hot(kinds, 4).float()
    noise = torch.randn(30, 16, 8, generator=generator)
    tokens = torch.cat([noise, signal + 0.1 * torch.randn(30, 16, 4, generator=generator)], -1)
    found = {
        (scale, norm): norm_accuracy(
            tokens, kinds, (8, 4), (scale, 1.0), norm=norm, split=20, epochs=20, seed=0
        )
        for scale in (1.0, 100.0)
        for norm in (True, False)
    }
    assert found[1.0, True] == pytest.approx(found[100.0, True], abs=0.02)
    assert found[100.0, True] > 0.9
    assert found[100.0, False] < found[1.0, False] - 0.1


def test_scales_are_tried_where_there_are_several_taps() -> None:
    assert scale_cases(1) == [(1.0,)]
    assert scale_cases(3) == [(1, 1, 1), (100, 1, 1), (1, 1, 100)]


def test_the_page_holds_every_number_of_the_tables(study) -> None:
    page = to_markdown(study, command="diffenc study parts", made_with="On a machine.")
    for table in (accuracy_table(study), gain_table(study), norm_table(study)):
        for row in table.rows:
            assert f"| {' | '.join(row)} |" in page
    assert len(gain_table(study).rows) == len(COMPARISONS)
    for name in ("accuracy", "gains", "norms"):
        assert f"[start:{name}]" in page
    assert "`diffenc study parts`" in page


def run(*arguments: object):
    return CliRunner().invoke(app, ["study", "parts", *map(str, arguments)])


@pytest.mark.long
def test_the_command_prints_tables_and_writes_two_files(
    tiny_sd_folder, clip_folder, tmp_path
) -> None:
    folder = tmp_path / "new"
    result = run("-b", tiny_sd_folder, "--clip", clip_folder, "-o", folder, "--quick")
    assert result.exit_code == 0, result.output
    for words in ("accuracy of answers", "gains in mean accuracy", "norm per tap", "wrote"):
        assert words in result.stdout
    assert {path.name for path in folder.iterdir()} == {"parts.md", "parts.json"}
    found = json.loads((folder / "parts.json").read_text("utf-8"))
    assert found["settings"]["scenes"] == 30
    assert len(found["gains"]) == 2 * len(COMPARISONS)
    page = (folder / "parts.md").read_text("utf-8")
    assert f"--clip {clip_folder} --quick" in page


@pytest.mark.long
def test_no_clip_and_existing_files(tiny_sd_folder, tmp_path) -> None:
    result = run("-b", tiny_sd_folder, "--clip", "none", "-o", tmp_path, "--quick")
    assert result.exit_code == 0, result.output
    assert "not studied: clip, clip+uncond, clip+cond, captioner" in result.stdout
    result = run("-b", tmp_path / "no-model", "-o", tmp_path)
    assert result.exit_code == 2
    assert result.output.startswith("error: the output exists already")
    result = run("--scenes", "3", "-o", tmp_path, "--force", "--clip", "none")
    assert result.exit_code == 2
    assert "scenes must be an int of 30 or more" in result.output
