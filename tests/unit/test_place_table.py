"""The table of places: rows, the file that they are kept in, the page, and the command."""

import csv
import io

import pytest
from typer.testing import CliRunner

from dense_builders import write_navi, write_navi_ball, write_nyu
from diffenc.cli.main import app
from diffenc.denoiser.shortening import shortened
from diffenc.errors import ConfigError
from diffenc.models import TapInfo, describe
from diffenc.models.arithmetic import pass_operations
from diffenc.models.building import build_on_meta
from diffenc.studies.place_data import Extent, measures_of
from diffenc.studies.place_page import to_markdown
from diffenc.studies.place_table import joined, place_table, read_rows, write_rows
from diffenc.studies.probes import tap_order
from loaded import shared

TAPS = ("mid_block", "up_blocks.1")


class Counted:
    """A task whose figure tells what it was asked."""

    name, total = "toy", 3

    def measure(self, encoder, texts, done):
        done(3)
        places = [
            (t, s, x) for t in encoder.config.taps for s in encoder.config.timesteps for x in texts
        ]
        return {place: {"toy_share": 0.1 * index} for index, place in enumerate(places)}


@pytest.fixture(scope="module")
def rows(tiny_sd_folder):
    options = {"taps": TAPS, "timesteps": (50, 10), "size": 32, "batch_size": 2, "name": "tiny"}
    return place_table(shared(tiny_sd_folder), [Counted()], hardware="abacus", **options)


@pytest.mark.long
def test_every_tap_timestep_and_text_has_its_row_with_costs_times_and_figures(rows):
    assert len(rows) == 2 * 2 * 2
    assert [row["timestep"] for row in rows[:4]] == ["10", "10", "50", "50"]
    assert {row["text"] for row in rows} == {"none", "text"}
    assert [row["toy_share"] for row in rows[:3]] == ["0.0000", "0.1000", "0.2000"]
    for row in rows:
        assert (row["model"], row["size"], row["hardware"]) == ("tiny", "32", "abacus")
        assert float(row["ms"]) > 0
        assert float(row["images_per_s"]) > 0
        assert row["batch"] == "2"


@pytest.mark.long
def test_arithmetic_until_a_tap_is_that_of_a_unet_cut_there(tiny_sd_folder):
    config = describe(tiny_sd_folder).denoiser_config
    whole, until = pass_operations(config, 8, ["mid_block", "up_blocks.0"])
    assert 0 < until["mid_block"] < until["up_blocks.0"] < whole


@pytest.mark.long
def test_what_is_known_from_configs_needs_no_weights(tiny_sd_folder):
    (row,) = place_table(tiny_sd_folder, taps=["up_blocks.0"], timed=False)
    short = shortened(build_on_meta(describe(tiny_sd_folder))["unet"], ["up_blocks.0"])
    kept = sum(parameter.numel() for parameter in short.parameters())
    assert row["parameters_m"] == f"{kept / 1e6:.1f}"
    assert row["model"] == tiny_sd_folder.name
    assert "timestep" not in row
    assert "ms" not in row


def test_blocks_of_a_transformer_stand_in_order():
    known = [TapInfo(f"transformer_blocks.{number}", 8, 16) for number in range(12)]
    default = ("transformer_blocks.6",)
    assert tap_order(known, None, default) == default
    assert tap_order(known, ["*.10", "*.2"], default) == (
        "transformer_blocks.2",
        "transformer_blocks.10",
    )


@pytest.mark.long
def test_a_file_keeps_rows_and_another_run_extends_them(rows, tmp_path):
    path = tmp_path / "tiny.csv"
    write_rows(path, rows)
    kept = read_rows(path)
    assert kept == rows
    key = {column: rows[0][column] for column in ("model", "size", "tap", "timestep", "text")}
    again = [{**key, "toy_share": "0.9000", "spair_pck": "0.5000"}]
    write_rows(path, joined(kept, again))
    table = list(csv.DictReader(io.StringIO(path.read_text())))
    assert len(table) == len(rows)
    assert (table[0]["toy_share"], table[0]["spair_pck"]) == ("0.9000", "0.5000")
    assert table[0]["ms"] == rows[0]["ms"]
    assert table[1]["spair_pck"] == ""


def test_rows_of_costs_alone_make_room_for_rows_with_figures(rows):
    costs = [
        {"model": "tiny", "size": "32", "tap": tap, "gflop": "1"} for tap in (*TAPS, "conv_in")
    ]
    for table in (joined(costs, rows), joined(rows, costs)):
        assert [row["tap"] for row in table if "timestep" not in row] == ["conv_in"]
        assert len(table) == len(rows) + 1


def test_another_file_is_not_taken_for_a_table(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("name,value\na,1\n")
    with pytest.raises(ConfigError, match="its columns must begin with model, size, tap"):
        read_rows(path)


def test_a_page_has_a_table_for_each_model_and_says_where_times_come_from(rows):
    other = {"model": "other", "size": "64", "tap": "x", "gflop": "1.0"}
    text = to_markdown([other, *({**row, "spair_pck": "0.5000"} for row in rows)])
    assert "## tiny, 32 px\n\nTimes: abacus in float32, images/s in batches of 2." in text
    assert "## other, 64 px\n\nNot timed." in text
    assert text.index("## tiny") < text.index("## other")
    assert text.count("| `mid_block` |") == 4
    assert "diffenc study table -m tiny --data spair=FOLDER\n" in text
    assert "diffenc study table -m other --data none\n" in text


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("imagenet", "unknown data 'imagenet'; known are shapes, spair=FOLDER"),
        ("spar=x", "Did you mean 'spair'"),
        ("spair", "write spair=FOLDER"),
    ],
)
def test_unknown_data_is_named_with_what_is_known(entry, message):
    with pytest.raises(ConfigError, match=message):
        measures_of(entry, 64)


@pytest.mark.long
def test_the_miniature_has_a_probe_points_shapes_and_an_order():
    tasks = measures_of("shapes", 64, Extent(scenes=30, pairs=2))
    assert [type(task).__name__ for task in tasks] == ["Probe", "Points", "Labels", "Labels"]
    assert [task.total for task in tasks] == [30, 2, 40, 40]


@pytest.mark.long
def test_the_command_measures_a_dataset_and_goes_on_with_the_file(tiny_sd_folder, tmp_path):
    nyu = write_nyu(write_nyu(tmp_path / "nyu"), split="train")
    place = {"model": "tiny", "size": "32", "tap": "mid_block", "timestep": "50", "text": "none"}
    write_rows(tmp_path / "tiny.csv", [{**place, "spair_pck": "0.2500"}])
    command = ["study", "table", "-m", str(tiny_sd_folder), "--name", "tiny", "-o", str(tmp_path)]
    command += ["--taps", "mid_block", "--timesteps", "50", "--size", "32", "--texts", "none"]
    page = tmp_path / "page.md"
    command += ["--data", f"nyu={nyu}", "--no-time", "--page", str(page)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    (row,) = read_rows(tmp_path / "tiny.csv")
    assert row["spair_pck"] == "0.2500"
    assert 0 <= float(row["nyu_depth_delta1"]) <= 1
    assert "hardware" not in row
    assert "SPair PCK@0.1, points" in page.read_text()
    assert "NYU normals" in page.read_text()


@pytest.mark.long
def test_the_command_fills_depth_and_correspondence_of_navi(tiny_sd_folder, tmp_path):
    navi = write_navi_ball(write_navi(tmp_path / "navi", "multiview_00_pixel_6pro"), [0, 40, 80])
    command = ["study", "table", "-m", str(tiny_sd_folder), "--name", "tiny", "-o", str(tmp_path)]
    command += ["--taps", "mid_block", "--timesteps", "50", "--size", "32", "--texts", "none"]
    page = tmp_path / "page.md"
    command += ["--data", f"navi={navi}", "--no-time", "--page", str(page)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    (row,) = read_rows(tmp_path / "tiny.csv")
    limits = [float(row[f"navi_recall_{limit}"]) for limit in ("1cm", "2cm", "5cm")]
    assert 0 <= limits[0] <= limits[1] <= limits[2] <= 1
    assert 0 <= float(row["navi_depth_delta1"]) <= 1
    assert "NAVI recall 25 px" in page.read_text()
