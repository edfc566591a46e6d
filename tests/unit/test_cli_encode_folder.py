"""`diffenc encode` of a folder, a list or an archive, into shards or into one file."""

import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from diffenc import DiffusionEncoder, open_features
from diffenc.cli import progress
from diffenc.cli.main import app

TAP = "mid_block"


def run(*arguments):
    return CliRunner().invoke(app, ["encode", *map(str, arguments)])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for place in range(5):
        pixels = np.random.default_rng(place).integers(0, 256, (50, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{place}.png")
    (folder / "notes.txt").write_text("x")
    return folder


@pytest.fixture
def options(tiny_sd_folder):
    return ["-m", tiny_sd_folder, "--taps", TAP, "--size", 64, "--device", "cpu"]


@pytest.fixture(scope="module")
def encoder(tiny_sd_folder):
    return DiffusionEncoder.from_pretrained(tiny_sd_folder, taps=TAP, size=64)


def test_a_folder_becomes_shards_after_the_sizes_are_told(pictures, options, encoder, tmp_path):
    out = tmp_path / "out"
    result = run(pictures, *options, "-p", "a", "--out", out, "--shard-size", 2, "--batch-size", 2)
    assert result.exit_code == 0, result.output
    assert "mid_block  16 x 1 x 1  float32  0.1 kB" in result.stdout
    assert "5 images in 3 shards of 2: 0.3 kB" in result.stdout
    assert f"wrote {out} (" in result.stdout
    assert "1 other files are no pictures by their names" in result.stderr
    features = open_features(out)
    expected = encoder.extract(sorted(pictures.glob("*.png")), "a")[TAP]
    torch.testing.assert_close(features.stack(TAP), expected, rtol=1e-4, atol=1e-5)
    again = run(pictures, *options, "-p", "a", "--out", out, "--shard-size", 2)
    assert again.exit_code == 2
    assert "holds complete features" in again.output


def test_a_stopped_run_goes_on_and_another_one_is_refused(pictures, options, tmp_path):
    out = tmp_path / "out"
    assert run(pictures, *options, "--out", out, "--shard-size", 2).exit_code == 0
    (out / "index.parquet").unlink()
    (out / "shard-000001.safetensors").unlink()
    other = run(pictures, *options, "--out", out, "--shard-size", 2, "--pool", "max")
    assert other.exit_code == 2
    assert "was begun in another way: pool was none and is 'max'" in other.output
    result = run(pictures, *options, "--out", out, "--shard-size", 2)
    assert result.exit_code == 0, result.output
    assert f"going on with {out}: 3 images are done" in result.stderr
    assert len(open_features(out)) == 5


def test_a_folder_fits_into_one_file_too(pictures, options, encoder, tmp_path):
    path = tmp_path / "f.safetensors"
    result = run(pictures, *options, "-o", path, "--tokens", "--pool", "mean")
    assert result.exit_code == 0, result.output
    maps = encoder.extract(sorted(pictures.glob("*.png")))
    expected = maps[TAP].mean(dim=(2, 3))
    torch.testing.assert_close(load_file(path)[TAP], expected, rtol=1e-4, atol=1e-5)


def test_texts_come_from_a_list_and_from_beside_the_pictures_of_an_archive(
    pictures, options, encoder, tmp_path
):
    texts = ["red", "a, b", "", "x", "y"]
    rows = [f'{pictures / f"{n}.png"},"{text}"' for n, text in enumerate(texts)]
    (tmp_path / "list.csv").write_text("image,question\n" + "\n".join(rows))
    with tarfile.open(tmp_path / "some.tar", "w") as archive:
        for place, text in enumerate(texts):
            archive.add(pictures / f"{place}.png", f"{place}.png")
            (tmp_path / "text").write_text(text)
            archive.add(tmp_path / "text", f"{place}.txt")
    expected = encoder.extract(sorted(pictures.glob("*.png")), texts)[TAP]
    for source, column in (("list.csv", "question"), ("some.tar", "txt")):
        out = tmp_path / f"out-{column}"
        result = run(tmp_path / source, *options, "--prompt-column", column, "--out", out)
        assert result.exit_code == 0, result.output
        features = open_features(out)
        torch.testing.assert_close(features.stack(TAP), expected, rtol=1e-4, atol=1e-5)
        assert [row["prompt"] for row in features] == texts


def test_broken_pictures_are_left_out_with_a_report(pictures, options, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes((pictures / "0.png").read_bytes())
    (tmp_path / "in/b.png").write_bytes(b"")
    out = tmp_path / "out"
    stopped = run(tmp_path / "in", *options, "--out", out)
    assert stopped.exit_code == 2
    assert "b.png: it is empty; 0 of 2 pictures are done and stay" in stopped.output
    result = run(tmp_path / "in", *options, "--out", out, "--skip-broken")
    assert result.exit_code == 0, result.output
    assert "warning: 1 of 2 images cannot be read" in result.stderr
    assert f"all that were left out: {out / 'skipped.jsonl'}" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{pictures}", "{pictures}/0.png"], "which is given alone"),
        (["{pictures}", "--prompt-column", "q"], "is a folder, which has no column 'q'"),
        (["{pictures}", "--prompt-column", "q", "-p", "a"], "both give texts"),
        (["{pictures}/0.png", "--shard-size", "2"], "is for a folder of shards"),
        (["{pictures}", "-p", "a", "-p", "b"], "2 prompts, 5 images"),
        (["{pictures}", "--pool", "median"], "pool must be one of"),
        (["{empty}"], "holds no pictures"),
        (["{empty}.csv"], "there is no such list"),
        (["{empty}.tar"], "there is no such file"),
        (["{pictures}", "--output-dtype", "int8"], "dtype must be one of"),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(
    pictures, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    names = {"pictures": pictures, "empty": tmp_path / "empty"}
    result = run(*(each.format(**names) for each in arguments), "-m", "no/such/model")
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert message in result.output
    assert result.output.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_log_gets_a_line_now_and_then(monkeypatch, capsys):
    now = iter([0.0, 0.0, 10.0, 40.0, 50.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.progress_lines("encoding", unit="images") as report:
        for done in (0, 100, 400, 500):
            report(done, 1600)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "encoding: 400 of 1,600 images, 10.0 a second, 2 minutes left\n"
