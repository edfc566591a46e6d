import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffenc.config import EncoderConfig
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError, NonFiniteError, ShapeError, TapError
from diffenc.models import load_backbone
from diffenc.shapes import captions, questions
from diffenc.shapes.render import masks, render
from diffenc.studies.charts import CellTable, draw_cells
from diffenc.studies.features import FeatureStudy, Reading, study_features
from diffenc.studies.features_page import best_table, draw_features, input_table, to_markdown
from diffenc.studies.focus import Focus, contrast, read_focus
from diffenc.studies.probes import Done, pool, require_distinct, tap_order
from diffenc.studies.readouts import PENALTIES, fit_readout
from diffenc.studies.spreads import Spread
from diffenc.studies.trials import CLASSES, PROPERTIES, Trial, chance_of, sample_trials

TAPS = ("conv_in", "mid_block", "up_blocks.1")


@pytest.fixture(scope="module")
def backbone(tiny_sd_folder):
    return load_backbone(str(tiny_sd_folder))


@pytest.fixture(scope="module")
def study(backbone):
    return study_features(
        backbone, taps=TAPS, timesteps=(261, 50), scenes=30, focus_scenes=5, seeds=2
    )


class TestReadouts:
    def test_the_errors_of_left_out_rows_choose_the_penalty(self):
        """Against refitting once per row with a solver: no singular values, no leverage."""
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(24, 7, generator=generator)
        labels = (features[:, 0] + torch.randn(24, generator=generator) > 0).long()
        standard = (features - features.mean(0)) / features.std(0)
        targets = nn.functional.one_hot(labels, 2).double()

        def left_out_error(penalty: float) -> float:
            errors = []
            for row in range(24):
                kept = [k for k in range(24) if k != row]
                x = torch.cat([torch.ones(24, 1), standard], dim=1).double()
                ridge = penalty * torch.eye(8).double()
                ridge[0, 0] = 0  # the mean is not penalised
                w = torch.linalg.solve(x[kept].T @ x[kept] + ridge, x[kept].T @ targets[kept])
                errors.append(((targets[row] - x[row] @ w) ** 2).mean())
            return float(torch.stack(errors).mean())

        assert fit_readout(features, labels, 2).penalty == min(PENALTIES, key=left_out_error)

    def test_a_class_between_two_others_is_found(self):
        """Least squares to one-hot classes alone finds none of the middle one."""
        line = torch.linspace(0, 3, 301)[:-1, None]
        labels = line[:, 0].long()
        assert fit_readout(line, labels, 3).accuracy(line, labels) > 0.95

    @pytest.mark.parametrize("channels", [3, 200])
    def test_noise_is_not_read(self, channels):
        generator = torch.Generator().manual_seed(1)
        features = torch.randn(600, channels, generator=generator)
        labels = torch.randint(0, 4, (600,), generator=generator)
        readout = fit_readout(features[:150], labels[:150], 4)
        assert abs(readout.accuracy(features[150:], labels[150:]) - 0.25) < 0.08

    def test_scale_and_place_of_the_features_change_nothing(self):
        generator = torch.Generator().manual_seed(2)
        features = torch.randn(60, 5, generator=generator)
        labels = (features[:, 1] > 0).long()
        moved = features * torch.tensor([1e-3, 1e3, 1.0, 7.0, 0.1]) + 40
        plain = fit_readout(features, labels, 2).predict(features)
        assert (fit_readout(moved, labels, 2).predict(moved) == plain).all()

    def test_constant_features_give_the_most_frequent_class(self):
        labels = torch.tensor([2] * 7 + [0] * 3)
        assert (fit_readout(torch.ones(10, 4), labels, 3).predict(torch.ones(2, 4)) == 2).all()

    def test_a_class_without_examples_is_never_chosen(self):
        features = torch.randn(40, 3, generator=torch.Generator().manual_seed(3))
        readout = fit_readout(features, (features[:, 0] > 0).long() * 2, 3)
        assert set(readout.predict(10 * features).tolist()) == {0, 2}

    @pytest.mark.wrong_type
    def test_as_many_labels_as_rows_are_asked_for(self):
        with pytest.raises(ShapeError, match="a label for each"):
            fit_readout(torch.zeros(4, 2), torch.zeros(3, dtype=torch.long), 2)

    def test_bad_input_is_refused(self):
        with pytest.raises(ShapeError, match="labels must be 0 to 1"):
            fit_readout(torch.zeros(2, 2), torch.tensor([0, 2]), 2)
        with pytest.raises(NonFiniteError):
            fit_readout(torch.full((2, 2), math.nan), torch.tensor([0, 1]), 2)


class TestTrials:
    def test_questions_do_not_hold_their_answers(self):
        for trial in sample_trials(60, seed=3):
            thing = trial.thing
            assert thing.color not in trial.question("color")
            assert thing.shape not in trial.question("shape")
            assert not set(trial.question("count").split()) & {"one", "two", "three"}
            assert trial.scene.count(shape=thing.shape) == trial.scene.count(color=thing.color) == 1

    def test_questions_are_those_of_the_world(self):
        """The bundled model was trained on its wordings, and on no others."""
        for trial in sample_trials(20, seed=1):
            known = {q.text for seed in range(12) for q in questions(trial.scene, seed=seed)}
            asked = {name: trial.question(name) for name in PROPERTIES}
            if trial.thing.place is None:
                del asked["position"]
            assert set(asked.values()) <= known

    def test_labels_agree_with_the_picture(self):
        for trial in sample_trials(40, seed=5):
            mask = masks(trial.scene)[trial.target]
            rows, columns = np.nonzero(mask)
            ninth = 3 * int(3 * rows.mean() / 64) + int(3 * columns.mean() / 64)
            middle = [abs(3 * centre / 64 % 1 - 0.5) for centre in (rows.mean(), columns.mean())]
            if max(middle) < 0.4:  # a star's or triangle's mean lies off its centre
                assert trial.label("position") == ninth
            assert trial.label("count") == len(masks(trial.scene)) - 1
            assert all(0 <= trial.label(name) < CLASSES[name] for name in PROPERTIES)

    def test_every_number_of_objects_is_equally_frequent(self):
        counts = [len(trial.scene.objects) for trial in sample_trials(60, seed=0)]
        assert [counts.count(k) for k in (1, 2, 3)] == [20, 20, 20]
        assert {len(trial.scene.objects) for trial in sample_trials(9, seed=0, least=2)} == {2, 3}

    def test_a_caption_names_every_object(self):
        for trial in sample_trials(12, seed=2):
            words = trial.caption().replace(",", "").split()
            for thing in trial.scene.objects:
                assert words.count(thing.color) == words.count(thing.shape) == 1
            assert captions(trial.scene, 1)  # the scene is one that the world can describe

    def test_seeds_differ_and_repeat(self):
        assert sample_trials(5, seed=0) == sample_trials(9, seed=0)[:5]
        assert sample_trials(5, seed=0) != sample_trials(5, seed=1)

    @pytest.mark.parametrize("bad", [{"count": -1}, {"seed": -1}, {"least": 4}])
    def test_bad_numbers_are_refused(self, bad):
        with pytest.raises(ConfigError, match="trials need"):
            sample_trials(**{"count": 1, "seed": 0, **bad})


def test_pooling_weighs_cells_by_what_they_cover():
    maps = torch.arange(2.0 * 1 * 3 * 4).reshape(1, 2, 1, 3, 4)
    weights = torch.zeros(1, 6, 8)
    weights[0, 0:2, 0:2] = 1  # the whole of cell (0, 0)
    weights[0, 2, 2] = 1  # a quarter of cell (1, 1)
    expected = [(4 * a + b) / 5 for a, b in ((0, 5), (12, 17))]
    torch.testing.assert_close(pool(maps, weights)[0, :, 0], torch.tensor(expected))


def test_taps_stand_from_input_to_output(backbone):
    wanted = ["up_blocks.1", "mid_block", "conv_in", "up_blocks.1.attentions.0", "down_blocks.*"]
    down = [f"down_blocks.{k}" for k in range(4)]
    expected = ("conv_in", *down, "mid_block", "up_blocks.1.attentions.0", "up_blocks.1")
    assert tap_order(backbone.taps(), wanted, ()) == expected
    assert set(backbone.default_taps) < set(tap_order(backbone.taps(), None, backbone.default_taps))


class TestContrast:
    def test_uniform_maps_have_none(self):
        inside = torch.zeros(2, 12, 8)
        inside[:, 2:5, 1:4] = 1
        for measure in ("attention", "change"):
            found = contrast(torch.full((2, 6, 4), 3.0), inside, measure)
            torch.testing.assert_close(found, torch.zeros(2))

    def test_a_share_is_compared_with_all_or_with_the_rest(self):
        maps = torch.tensor([[[6.0, 1.0], [1.0, 2.0]]])
        inside = torch.zeros(1, 2, 2)
        inside[0, 0, 0] = 1
        assert math.exp(contrast(maps, inside, "attention")) == pytest.approx(6 / 2.5)
        assert math.exp(contrast(maps, inside, "change")) == pytest.approx(6 / (4 / 3))


class TestFocus:
    @pytest.mark.long
    def test_a_map_of_one_cell_prefers_nothing(self, study):
        """The mid block of the tiny model has one cell: whatever rounding does is a draw."""
        for timestep in (50, 261):
            entry = study.focus_at("change", "mid_block", timestep)
            assert entry.preferred.values == (0.5, 0.5)
            assert entry.asked.values == pytest.approx((1.0, 1.0), abs=1e-4)

    def test_a_model_that_looks_where_it_is_told_is_found_out(self, backbone, monkeypatch):
        """Attention is replaced by the truth: all of it on the object that the text names."""
        trials, truth = [], {}
        for trial in sample_trials(20, seed=0, least=2):
            named = {
                f"{'an' if thing.color[0] in 'aeiou' else 'a'} {thing.color} {thing.shape}": mask
                for thing, mask in zip(trial.scene.objects, masks(trial.scene), strict=True)
            }
            if not named.keys() & truth.keys():  # a text names one object of all scenes
                trials.append(trial)
                truth |= named
        assert len(trials) > 2

        def pointing(_encoder, _images, texts, _named, _timestep, layers):
            maps = torch.from_numpy(np.stack([truth[text] for text in texts])).float()
            return dict.fromkeys(layers, maps + 0.01)

        monkeypatch.setattr("diffenc.studies.focus._attention", pointing)
        config = EncoderConfig(taps=("mid_block",), timestep=(50,), batch_size=2)
        found = read_focus(DiffusionEncoder(backbone, config), trials, done=lambda _: None)
        (attention,) = (entry for entry in found if entry.measure == "attention")
        assert attention.asked.mean > 3
        assert attention.control.mean < 0.5
        assert attention.preferred.mean == 1

    @pytest.mark.long
    def test_attention_follows_the_rows_whatever_their_words_are_spelled_with(self, backbone):
        """Words of different lengths go through the U-Net in groups; one by one it is the same."""
        config = EncoderConfig(taps=("up_blocks.1",), timestep=(50,), seed=3)
        encoder = DiffusionEncoder(backbone, config)
        trials = sample_trials(4, seed=7, least=2)
        kinds = {len(backbone.tokenizer(t.thing.color).input_ids) for t in trials}
        assert len(kinds) > 1
        together = read_focus(encoder, trials, done=lambda _: None)
        logs = {"asked": [], "control": []}
        for trial in trials:
            alone = read_focus(encoder, [trial], done=lambda _: None)
            (entry,) = (e for e in alone if e.measure == "attention")
            for part, values in logs.items():
                values.append(math.log(getattr(entry, part).mean))
        (entry,) = (e for e in together if e.measure == "attention")
        for part, values in logs.items():
            assert math.log(getattr(entry, part).mean) == pytest.approx(np.mean(values), abs=1e-4)


class TestStudy:
    @pytest.mark.long
    def test_every_place_is_read_once(self, study):
        assert study.taps == TAPS
        assert study.timesteps == (50, 261)
        places = {(r.property, r.conditioning, r.tap, r.timestep) for r in study.readings}
        assert len(places) == len(study.readings) == 4 * (3 * 3 * 2 + 2)
        assert all(0 <= v <= 1 for r in study.readings for v in r.accuracy.values)
        assert all(len(r.accuracy.values) == 2 for r in study.readings)
        assert all(1 / CLASSES[name] <= study.chance[name] < 1 for name in PROPERTIES)

    def test_before_the_first_attention_a_text_changes_nothing(self, study):
        for name in PROPERTIES:
            assert study.find(name, "question", "conv_in", 50) == study.find(
                name, "uncond", "conv_in", 50
            )
        assert not [entry for entry in study.focus if entry.tap == "conv_in"]
        assert study.focus_at("change", "mid_block", 50) is not None

    def test_taps_without_cross_attention_have_no_attention(self, study):
        found = {entry.tap for entry in study.focus if entry.measure == "attention"}
        assert found == {"mid_block", "up_blocks.1"}

    @pytest.mark.long
    def test_an_oracle_reads_the_same_features(self, study, backbone):
        """One number of the table, made again by hand: hooks, masks, and a plain loop."""
        trials = sample_trials(30, seed=1)
        vectors = []
        for index, trial in enumerate(trials):
            config = EncoderConfig(taps=("up_blocks.1",), timestep=261, seed=1_000_000 + index // 8)
            maps = DiffusionEncoder(backbone, config).extract(render(trial.scene))
            features = maps["up_blocks.1"][0]
            h, w = features.shape[1:]
            mask = masks(trial.scene)[trial.target].astype(np.float64)
            cells = mask.reshape(h, 64 // h, w, 64 // w).mean((1, 3))
            weighted = [
                sum(cells[y, x] * float(plane[y, x]) for y in range(h) for x in range(w))
                for plane in features
            ]
            vectors.append([value / cells.sum() for value in weighted])
        rows = torch.tensor(vectors)
        labels = torch.tensor([trial.label("shape") for trial in trials])
        accuracy = fit_readout(rows[:20], labels[:20], 4).accuracy(rows[20:], labels[20:])
        found = study.find("shape", "uncond", "up_blocks.1", 261)
        assert found is not None
        assert found.values[1] == pytest.approx(accuracy, abs=0.101)  # one scene may tip

    @pytest.mark.long
    def test_equal_calls_give_equal_results_and_leave_the_global_state_alone(
        self, backbone, study, pytestconfig
    ):
        torch.manual_seed(5)
        random.seed(5)
        before = torch.random.get_rng_state(), random.getstate()
        again = study_features(
            backbone, taps=TAPS, timesteps=(50, 261), scenes=30, focus_scenes=5, seeds=2
        )
        assert [r.accuracy for r in again.readings] == [r.accuracy for r in study.readings]
        for one, other in zip(again.focus, study.focus, strict=True):
            assert (one.measure, one.tap, one.timestep) == (
                other.measure,
                other.tap,
                other.timestep,
            )
            assert one.asked.values == pytest.approx(other.asked.values, rel=1e-4)
            assert one.control.values == pytest.approx(other.control.values, rel=1e-4)
        assert torch.equal(before[0], torch.random.get_rng_state())
        if not pytestconfig.getoption("jaxtyping_packages", None):  # that checker draws from it
            assert before[1] == random.getstate()

    def test_noise_does_not_tell_where_an_object_is(self, backbone):
        """Nearly all of what the U-Net sees is noise: under one noise for all, half are right."""
        found = study_features(
            backbone,
            taps=["conv_in"],
            timesteps=[990],
            conditionings=["uncond"],
            scenes=120,
            focus_scenes=0,
            seeds=1,
        )
        accuracy = found.find("position", "uncond", "conv_in", 990)
        assert accuracy is not None
        assert accuracy.mean < found.chance["position"] + 0.15

    @pytest.mark.long
    def test_the_batch_size_changes_nothing(self, backbone):
        one, other = (
            study_features(
                backbone,
                taps=["up_blocks.1"],
                timesteps=[50, 261],
                conditionings=["uncond"],
                scenes=30,
                focus_scenes=0,
                seeds=1,
                batch_size=rows,
            )
            for rows in (1, 100)
        )
        for a, b in zip(one.readings, other.readings, strict=True):
            assert a.accuracy.values == pytest.approx(b.accuracy.values, abs=0.101)

    def test_progress_counts_every_scene(self, backbone):
        told = []
        study_features(
            backbone,
            taps=["mid_block"],
            timesteps=[50],
            conditionings=["uncond"],
            scenes=30,
            focus_scenes=2,
            seeds=1,
            batch_size=8,
            progress=lambda done, total: told.append((done, total)),
        )
        assert told[-1] == (32, 32)
        assert told == sorted(set(told))

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ({"scenes": 29}, "scenes must be an int of 30 or more, got 29"),
            ({"seeds": 0}, "seeds must be an int of 1"),
            ({"timesteps": []}, "timesteps must be one or more"),
            ({"timesteps": [50, 50]}, "each once"),
            ({"timesteps": [1000]}, r"\[0, 1000\)"),
            pytest.param({"conditionings": ["cond"]}, "uncond", marks=pytest.mark.wrong_type),
            ({"focus_scenes": -1}, "focus_scenes"),
        ],
        ids=str,
    )
    def test_bad_options_are_refused_before_anything_runs(self, backbone, bad, message):
        with pytest.raises(ConfigError, match=message):
            study_features(backbone, **{"timesteps": [50], **bad})

    def test_an_unknown_tap_is_named(self, backbone):
        with pytest.raises(TapError, match="mid_blok"):
            study_features(backbone, taps=["mid_blok"])


def made_up() -> FeatureStudy:
    """Two taps, one of them better, with known differences."""
    readings = [
        Reading("color", None, "pixels", None, Spread((0.5, 0.7))),
        Reading("color", None, "latents", None, Spread((0.25, 0.25))),
    ]
    for tap, uncond, question in (("a", (0.2, 0.4), (0.3, 0.6)), ("b", (0.8, 0.6), (0.9, 0.6))):
        readings.append(Reading("color", "uncond", tap, 50, Spread(uncond)))
        readings.append(Reading("color", "question", tap, 50, Spread(question)))
    focus = Focus("change", "b", 50, Spread((2.0, 3.0)), Spread((1.0, 1.0)), Spread((1.0, 0.5)))
    settings = {"scenes": 9, "focus_scenes": 4, "seeds": 2, "size": 64, "dtype": "float32"}
    return FeatureStudy("m", ("a", "b"), (50,), tuple(readings), (focus,), {"color": 0.2}, settings)


class TestReport:
    def test_best_place_and_gain_are_those_of_the_numbers(self):
        (inputs,), (without, question) = input_table(made_up()).rows, best_table(made_up()).rows
        assert inputs == ("color", "0.20", "0.60 ± 0.14", "0.25 ± 0.00")
        assert without == ("color", "no text", "0.70 ± 0.14", "b", "50", "")
        assert question[-1] == "+0.100 ± 0.000"  # (.1 + .1) / 2 and (.2 + 0) / 2

    def test_markdown_tables_are_whole(self):
        text = to_markdown(made_up(), command="run it", made_with="By x.", picture="p.png")
        assert "`run it`" in text
        assert "](p.png)" in text
        tables = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
        assert len(tables) == 6
        for table in tables:
            assert len({line.count("|") for line in table.splitlines()}) == 1
        assert "| `b` | 50 | 2.50 ± 0.71 | 1.00 ± 0.00 | 0.75 ± 0.35 |" in text

    def test_json_is_plain(self):
        assert json.loads(json.dumps(made_up().to_dict()))["chance"] == {"color": 0.2}

    @pytest.mark.long
    def test_the_heat_map_shows_high_numbers_light(self, tmp_path):
        pytest.importorskip("matplotlib")
        picture, darker = (
            _drawn(study, tmp_path) for study in (made_up(), _with_best(made_up(), 0.2))
        )
        assert picture.shape == darker.shape
        assert picture.mean() > darker.mean()

    def test_cells_have_the_colours_of_their_values(self):
        plain = CellTable("t", [[0.0]], 0, 1)
        assert [plain.unit(v) for v in (-1, 0.25, 2)] == [0, 0.25, 1]
        assert CellTable("t", [[1.0]], 1, 4, logarithmic=True).unit(2.0) == pytest.approx(0.5)

    def test_tables_that_do_not_fit_are_refused(self, tmp_path):
        def draw(*tables):
            labels = {"rows": ["a"], "columns": ["x"], "title": "", "note": ""}
            draw_cells([tables] if tables else [], tmp_path / "p.png", **labels)

        with pytest.raises(ShapeError, match="rows of"):
            draw(CellTable("t", [[0.1, 0.2]], 0, 1))
        with pytest.raises(ConfigError, match="low must be below"):
            draw(CellTable("t", [[0.1]], 1, 1))
        with pytest.raises(ConfigError, match="one table or more"):
            draw()
        assert not list(tmp_path.iterdir())


def _drawn(study: FeatureStudy, folder: Path) -> np.ndarray:
    draw_features(study, folder / "p.png")
    with Image.open(folder / "p.png") as picture:
        return np.asarray(picture.convert("L")).astype(float)


def _with_best(study: FeatureStudy, value: float) -> FeatureStudy:
    values = tuple(
        Reading(r.property, r.conditioning, r.tap, r.timestep, Spread((value, value)))
        for r in study.readings
    )
    return FeatureStudy(
        study.model, study.taps, study.timesteps, values, study.focus, study.chance, study.settings
    )


def test_a_trial_asks_about_one_object():
    trial = sample_trials(1, seed=0)[0]
    assert isinstance(trial, Trial)
    assert trial.thing is trial.scene.objects[trial.target]


def test_what_is_done_is_added_up_and_told():
    calls = []
    done = Done(lambda count, total: calls.append((count, total)), 7)
    for count in (2, 4, 1):
        done.add(count)
    assert calls == [(2, 7), (6, 7), (7, 7)]
    Done(None, 7).add(3)


@pytest.mark.parametrize("values", [[], [50, 50], ["a", "b", "a"]])
def test_values_are_some_and_each_once(values):
    require_distinct("timesteps", (50, 261))
    with pytest.raises(ConfigError, match="timesteps must be one or more, each once"):
        require_distinct("timesteps", values)


def test_chance_is_the_share_of_the_most_frequent_answer():
    assert chance_of([3, 1, 3, 3]) == 0.75
    assert chance_of([5]) == 1.0
