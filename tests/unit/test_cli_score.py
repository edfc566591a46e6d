import json
import re

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from diffenc import CrossAttnScorer, ScorerConfig
from diffenc.cli.main import app
from diffenc.inputs.pictures import world
from diffenc.shapes.example import example_picture
from diffenc.viz.word_maps import WordMaps


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    paths = [folder / "a.png", folder / "b.png", folder / "c.png"]
    for path, size in zip(paths, ((64, 64), (40, 80), (64, 64)), strict=True):
        Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(path)
    return paths


TEXTS = ["a red circle", "blue", "a square"]
ASKED = [part for text in TEXTS for part in ("--text", text)]
FAST = ("--size", 64, "--timesteps", "200,700")


@pytest.mark.long
def test_json_holds_what_the_scorer_gives(tiny_sd_folder, pictures):
    result = run(
        *("score", *pictures, *ASKED, *FAST, "-m", tiny_sd_folder, "--preset", "paper"),
        *("--trials", 2, "--seed", 3, "--layers", "mid_block,up_blocks.1", "--json"),
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    scorer = CrossAttnScorer.from_pretrained(
        tiny_sd_folder,
        preset="paper",
        size=64,
        timesteps=(200, 700),
        seed=3,
        layers=("mid_block", "up_blocks.1"),
    )
    scores = scorer.score(pictures, TEXTS, trials=2)
    np.testing.assert_allclose(found["mean"], scores.mean, rtol=1e-6)
    np.testing.assert_allclose(found["std"], scores.std, rtol=1e-4)
    assert ScorerConfig.from_dict(found["config"]) == scorer.config
    assert found["best_text"] == scores.mean.argmax(dim=1).tolist()
    assert found["images"] == list(map(str, pictures))
    assert found["seeds"] == [3, 4]


@pytest.mark.long
def test_the_table_marks_the_best_text_and_the_best_image(tiny_sd_folder, pictures):
    result = run("score", *pictures, *ASKED, *FAST, "-m", tiny_sd_folder, "--trials", 2)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "higher is better" in lines[0]
    assert lines[1].split("  ")[1] == "image"
    assert "deviation" in lines[1]
    scorer = CrossAttnScorer.from_pretrained(tiny_sd_folder, size=64, timesteps=(200, 700))
    best = scorer.score(pictures, TEXTS, trials=2).mean.argmax(dim=1).tolist()
    of_texts = lines[1].index("of texts")
    for image, wanted in enumerate(best):
        rows = lines[2 + 3 * image : 5 + 3 * image]
        assert [row[of_texts : of_texts + 4] == "best" for row in rows] == [
            text == wanted for text in range(3)
        ]


def test_one_text_and_one_image_need_no_marks(tiny_sd_folder, pictures):
    result = run("score", pictures[0], "-t", "red " * 99, *FAST, "-m", tiny_sd_folder)
    assert result.exit_code == 0, result.output
    assert "best" not in result.output
    assert "warning: 1 texts are longer" in result.output
    assert "of 1 texts are longer" not in result.output  # once is enough


def test_a_foreign_picture_under_the_bundled_model_is_warned_of(pictures, monkeypatch):
    monkeypatch.setattr(world, "_warned", False)  # whatever other tests have shown
    with pytest.warns(UserWarning, match="knows coloured shapes on a plain background alone"):
        result = run("score", pictures[0], "-t", "a red circle", "--timesteps", "200")
    assert result.exit_code == 0, result.output


def test_a_text_that_was_left_out_everywhere_has_no_best_image_and_names_tell_pictures(tmp_path):
    places = [tmp_path / part / "x.png" for part in ("one", "two")]
    for place in places:
        place.parent.mkdir()
        example_picture(64).save(place)
    options = ("score", *places, "-t", "a red circle", "-t", "zebra", "--timesteps", "200,700")
    table = run(*options, "--screen", 1)
    assert table.exit_code == 0, table.output
    lines = table.stdout.splitlines()[2:6]
    assert [line.split()[0] for line in lines] == [str(place) for place in places for _ in "12"]
    assert not any("dropped" in line and "best" in line for line in lines)
    content = json.loads(run(*options, "--screen", 1, "--json").stdout)
    (gone,) = {row.index(None) for row in content["mean"]}
    assert content["best_image"][gone] is None
    assert content["best_image"][1 - gone] == 0


@pytest.mark.long
def test_screened_texts_are_told_apart(tiny_sd_folder, pictures):
    options = ("score", *pictures[:1], *ASKED, *FAST, "-m", tiny_sd_folder, "--screen", 1)
    result = run(*options)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("dropped") == 1  # two steps: one halving
    content = json.loads(run(*options, "--json").stdout)
    assert sum(value is None for value in content["mean"][0]) == 1


def test_own_references_and_shared_queries(tiny_sd_folder, pictures):
    result = run(
        *("score", pictures[0], *ASKED, *FAST, "-m", tiny_sd_folder, "--mode", "shared-query"),
        *("--reference", pictures[1], "--reference", pictures[2], "--json"),
    )
    assert result.exit_code == 0, result.output
    config = json.loads(result.stdout)["config"]
    assert (config["mode"], config["calibration"]) == ("shared-query", "given")
    assert config["reference_digest"].startswith("2-")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("score", "none.png", "-t", "a"), "no such image file"),
        (("score", "{a}", "-t", "a", "--preset", "papers"), "Did you mean 'paper'"),
        (("score", "{a}", "-t", "a", "--timesteps", "x"), "timesteps must be like"),
        pytest.param(
            ("score", "{a}", "-t", "a", "--calibration", "grey"),
            "Did you mean 'gray'",
            marks=pytest.mark.wrong_type,
        ),
        (("score", "{a}"), "Missing option"),
        (("maps", "{a}", "-t", "a", "-o", "maps.txt"), "must end in .png"),
        (("maps", "{a}", "-t", "a", "--heads", "one"), "heads must be like"),
        (("maps", "{a}", "-t", "a", "-w", "zebra"), "is no word of"),
        (("search", "nowhere", "-t", "a"), "no complete query bank"),
    ],
    ids=str,
)
def test_what_the_caller_can_repair_is_one_line(
    pictures, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    result = run(*(str(part).format(a=pictures[0]) for part in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_maps_are_drawn_in_rows(tiny_sd_folder, pictures, tmp_path):
    output = tmp_path / "maps.png"
    result = run(
        *("maps", pictures[1], "-t", "a red circle left of a blue square", "-o", output),
        *("-m", tiny_sd_folder, "--size", "64x128", "--timesteps", "50", "--preset", "daam"),
    )
    assert result.exit_code == 0, result.output
    assert "8 x 16" in result.stdout
    with Image.open(output) as drawn:
        width, height = drawn.size
    assert (width > 4 * 256, height > 2 * 256) == (True, True)  # a picture and seven words
    assert run("maps", pictures[0], "-t", "red", "-o", output).exit_code == 2  # it exists


def test_the_figure_of_a_preset_says_what_it_maps(tiny_sd_folder, pictures, tmp_path, monkeypatch):
    notes = []

    def drawn(_maps, *, title, note):
        notes.append(note)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(WordMaps, "to_pil", drawn)
    options = ("-t", "red", "-m", tiny_sd_folder, "--size", 64, "--timesteps", "50,90", "--force")
    for preset in ((), ("--preset", "daam")):
        result = run("maps", pictures[0], *options, *preset, "-o", tmp_path / "maps.png")
        assert result.exit_code == 0, result.output
    assert ". Share of each cell's attention that the word gets, each word" in notes[0]
    assert ". Sum over timesteps of the share" in notes[1]


@pytest.mark.long
def test_a_bank_is_written_and_searched(tiny_sd_folder, pictures, tmp_path):
    bank = tmp_path / "bank"
    built = run(
        *("index", *pictures, "-o", bank, "-m", tiny_sd_folder, *FAST, "--layers", "up_blocks.1")
    )
    assert built.exit_code == 0, built.output
    told, written = re.findall(r"([\d.]+) kB", built.stdout)
    assert "3 images, 3 layers, 2 timesteps" in built.stdout
    assert float(told) < float(written)
    found = run("search", bank, "-t", "red", "-t", "blue", "--top", 2)
    assert found.exit_code == 0, found.output
    assert found.stdout.count(".png") == 4
    content = json.loads(run("search", bank, "-t", "red", "--json").stdout)
    scorer = CrossAttnScorer.from_pretrained(
        tiny_sd_folder,
        mode="shared-query",
        size=64,
        timesteps=(200, 700),
        layers="up_blocks.1",
    )
    expected = scorer(pictures, "red")[:, 0]
    for entry in content["red"]:
        assert entry["score"] == pytest.approx(float(expected[entry["index"]]), abs=2e-3)
    assert run("index", *pictures, "-o", bank, "-m", tiny_sd_folder).exit_code == 2


INDEX = (*FAST, "--layers", "up_blocks.1")


@pytest.mark.long
def test_an_interrupted_index_is_gone_on_with(tiny_sd_folder, pictures, tmp_path, monkeypatch):
    arguments = ("index", *pictures, "-o", tmp_path / "bank", "-m", tiny_sd_folder, *INDEX)
    small = {"shard_bytes": 1}
    build = CrossAttnScorer.build_index

    def stopped(self, *args, progress, **options):
        def tell(done):
            progress(done)
            raise KeyboardInterrupt

        options = {**options, **small, "progress": tell}
        scorer = self.with_options(batch_size=2)
        return build(scorer, *args, **options)

    monkeypatch.setattr(CrossAttnScorer, "build_index", stopped)
    assert run(*arguments).exit_code != 0
    assert "it was begun" in run("search", tmp_path / "bank", "-t", "red").output
    monkeypatch.setattr(
        CrossAttnScorer,
        "build_index",
        lambda self, *args, **options: build(
            self.with_options(batch_size=2), *args, **{**options, **small}
        ),
    )
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert f"going on with {tmp_path / 'bank'}: 1 images are in it" in result.stderr
    again = run(*arguments)
    assert again.exit_code == 2
    assert "holds a complete bank" in again.output
    assert run(*arguments, "--force").exit_code == 0


def test_broken_pictures_are_named_or_left_out(tiny_sd_folder, pictures, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    every = [tmp_path / "broken.png", *pictures, tmp_path / "none.png"]
    arguments = ("index", *every, "-o", tmp_path / "bank", "-m", tiny_sd_folder, *INDEX)
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert "2 of 5 images cannot be read" in refused.output
    assert "broken.png" in refused.output
    assert "none.png" in refused.output
    assert not (tmp_path / "bank").exists()
    result = run(*arguments, "--skip-broken")
    assert result.exit_code == 0, result.output
    assert "2 images left out" in result.stdout
    assert f"left out {tmp_path / 'none.png'}: no such image file" in result.stderr
    found = json.loads(run("search", tmp_path / "bank", "-t", "red", "--json").stdout)["red"]
    assert sorted(entry["name"] for entry in found) == sorted(map(str, pictures))


def test_a_number_of_many_digits_ends_in_a_sentence(pictures):
    for option in ("--batch-size", "--seed", "--screen", "--trials"):
        result = run("score", pictures[0], "--text", "a", "-m", "shapes", option, "9" * 23)
        assert result.exit_code == 2, result.output
        name = option.removeprefix("--").replace("-", "_")
        assert re.search(rf"error: {name} must be an int", result.output)
