import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from diffenc.cli.demo import TEXTS, demo_queries
from diffenc.cli.main import app
from diffenc.denoiser.attention import word_token_positions
from diffenc.shapes.example import CROWD, crowded_picture


def run(*arguments):
    return CliRunner().invoke(app, ["demo", *map(str, arguments)])


@pytest.mark.long
def test_numbers_are_printed_and_a_figure_is_written(tiny_sd_folder, tmp_path):
    output = tmp_path / "demo.png"
    result = run("--model", tiny_sd_folder, "-o", output)
    assert result.exit_code == 0, result.output
    for words in ("parameters", "16 x 48", "scores", "timings", f"wrote {output}", *TEXTS):
        assert words in result.stdout
    rows = (line.rsplit(maxsplit=2) for line in result.stdout.splitlines())
    scores = {row[0].strip(): float(row[1]) for row in rows if row and row[0].startswith("  a ")}
    assert set(scores) == set(TEXTS)
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    with Image.open(output) as figure:
        assert min(figure.size) > 800
        assert np.asarray(figure).std() > 20
    assert list(tmp_path.iterdir()) == [output]


def test_an_existing_figure_is_refused_before_the_model_is_looked_at(tmp_path):
    output = tmp_path / "demo.png"
    output.write_bytes(b"mine")
    result = run("--model", tmp_path / "no-model", "-o", output)
    assert result.exit_code == 2
    assert result.output.startswith("error: the output exists already")
    result = run("--model", tmp_path / "no-model", "-o", output, "--force")
    assert result.output.startswith("error: unknown model")
    assert output.read_bytes() == b"mine"


def test_each_question_has_one_answer_in_the_picture_and_its_word_stands_in_it(tiny_tokenizer):
    assert crowded_picture(64).size == (64, 64)
    for each in demo_queries():
        assert word_token_positions(tiny_tokenizer, each.text, each.word)
        named = [
            thing
            for thing in CROWD.objects
            if (thing.shape if each.trait == "color" else thing.color) in each.text
        ]
        assert [getattr(thing, each.trait) for thing in named] == [each.answer]
