import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import diffenc.viz.questions as questions_module
from diffenc.cli.main import app
from diffenc.denoiser.attention import nearest_layers, touching
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError, ImageError, PromptError, ShapeError, TapError
from diffenc.scorer import CrossAttnScorer, ScorerConfig
from diffenc.studies.look import look
from diffenc.viz.questions import TapMaps, question_figure, question_rows

QUESTIONS = ("where is the red circle?", "a blue square")
TAP = "up_blocks.1.attentions.0.transformer_blocks.0"


def noise_picture(height=40, width=60):
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def maps_of(questions=2, timesteps=(50,), tap="here", words=None, seed=0, registers=None):
    generator = torch.Generator().manual_seed(seed)
    uncond = torch.randn((len(timesteps), 6, 4, 5), generator=generator)
    cond = uncond + 0.1 * torch.randn((questions, *uncond.shape), generator=generator)
    return TapMaps(tap, uncond, cond, timesteps, registers=registers, words=words or {})


@pytest.fixture(scope="module")
def encoder(tiny_sd_folder):
    return DiffusionEncoder.from_pretrained(
        str(tiny_sd_folder), taps=("mid_block", TAP), timestep=(50, 261), seed=3
    )


@pytest.fixture(scope="module")
def result(encoder):
    return look(encoder, noise_picture(), QUESTIONS, words=["red circle", "square", "a"])


def texts_of(rows):
    return [[(each.title, each.caption) if each else None for each in row] for row in rows]


def test_every_question_has_a_column_in_rows_that_say_what_they_are():
    rows = question_rows(noise_picture(), maps_of(), ["one?", "two?"], side=64)
    titles = [[each.title for each in row[1:]] for row in rows]
    assert titles == [[kind] * 2 for kind in ("conditional", "difference", "what the text changed")]
    assert rows[0][0].title == "unconditional"
    assert "here: 4 x 5 cells, 6 channels" in rows[0][0].caption
    assert all([each.caption for each in row[1:]] == ["one?", "two?"] for row in rows)
    assert "f_c - f_u" in rows[1][0].caption
    heats = [panel.legend for panel in rows[2][1:]]
    assert heats[0].low == heats[1].low < heats[0].high == heats[1].high


def test_timesteps_words_and_guidance_have_rows_of_their_own():
    words = {(1, 261): {"red": questions_module.HeatMap(np.eye(3))}}
    maps = maps_of(timesteps=(50, 261), words=words)
    rows = question_rows(noise_picture(), maps, ["one?", "two?"], guidance_scale=4, side=64)
    last = [row[1].title for row in rows]
    assert last == [
        "conditional, t = 50",
        "guided, s = 4, t = 50",
        "difference, t = 50",
        "what the text changed, t = 50",
        "conditional, t = 261",
        "guided, s = 4, t = 261",
        "difference, t = 261",
        "what the text changed, t = 261",
        'where "red" is seen, t = 261',
    ]
    assert rows[-1][1].caption == "two?"
    assert rows[5][0] is None  # explained once


def test_equal_features_have_equal_colours_under_all_questions():
    maps = maps_of()
    maps.cond[1] = maps.uncond
    rows = question_rows(noise_picture(), maps, ["one?", "two?"], side=64)
    unconditional, _, same = (np.asarray(panel.image) for panel in rows[0])
    assert np.array_equal(unconditional, same)
    changed = rows[2][2].legend.array
    assert changed.max() == 0 < rows[2][1].legend.array.min()


def test_how_far_cells_move_is_a_share_of_the_mean_length():
    maps = maps_of(questions=1)
    (panel,) = question_rows(noise_picture(), maps, ["one?"], side=64)[2][1:]
    uncond, cond = maps.uncond[0].double().numpy(), maps.cond[0, 0].double().numpy()
    usual = np.sqrt((uncond**2).sum(axis=0)).mean()
    expected = np.sqrt(((cond - uncond) ** 2).sum(axis=0)) / usual
    assert panel.legend.array == pytest.approx(expected)


def test_pictures_keep_their_shape_in_every_panel():
    rows = question_rows(noise_picture(30, 90), maps_of(), ["one?", "two?"], side=90)
    assert {panel.image.size for row in rows for panel in row if panel and panel.image} == {
        (90, 30)
    }


def test_a_picture_that_lies_is_drawn_upright():
    lying = noise_picture(30, 90)
    lying.getexif()[0x0112] = 6
    rows = question_rows(lying, maps_of(), ["one?", "two?"], side=90)
    upright = question_rows(lying.rotate(-90, expand=True), maps_of(), ["one?", "two?"], side=90)
    for row, expected in zip(rows, upright, strict=True):
        for panel, other in zip(row, expected, strict=True):
            assert panel is other is None or panel.image == other.image
    drawn = question_figure(lying, [maps_of(questions=1)], ["one?"])
    turned = question_figure(lying.rotate(-90, expand=True), [maps_of(questions=1)], ["one?"])
    assert drawn == turned


def test_registers_are_white_at_their_place():
    cells = torch.zeros(1, 4, 5, dtype=torch.bool)
    cells[0, 1, 2] = True
    rows = question_rows(noise_picture(), maps_of(registers=cells), ["one?", "two?"], side=100)
    for row in rows[:2]:
        for panel in row:
            if panel.image is not None:
                height, width = np.asarray(panel.image).shape[:2]
                middle = np.asarray(panel.image)[3 * height // 8, width // 2]
                assert (middle > 240).all()


def test_a_figure_that_has_nothing_to_show_is_refused():
    with pytest.raises(ConfigError, match="0 questions"):
        question_figure(noise_picture(), [maps_of()], [])
    with pytest.raises(ConfigError, match="got 0 taps"):
        question_figure(noise_picture(), [], ["one?"])
    with pytest.raises(ShapeError, match="maps at here do not fit"):
        question_figure(noise_picture(), [maps_of()], ["one?"])


def test_a_look_holds_what_the_encoder_gives(encoder, result):
    features = encoder.extract(noise_picture(), QUESTIONS[1], conditioning="cfg")
    assert (result.taps, result.timesteps) == (("mid_block", TAP), (50, 261))
    for tap in result.taps:
        torch.testing.assert_close(result.uncond[tap], features.select("uncond")[tap][0])
        torch.testing.assert_close(result.cond[tap][1], features.select("cond")[tap][0])
        torch.testing.assert_close(
            result.difference(tap), result.cond[tap] - result.uncond[tap][None]
        )
        usual = result.uncond[tap].norm(dim=1).mean(dim=(1, 2))
        expected = (result.cond[tap] - result.uncond[tap]).norm(dim=2) / usual[:, None, None]
        torch.testing.assert_close(result.change(tap), expected)
        assert result.registers[tap].shape == (2, *result.uncond[tap].shape[2:])


def test_words_are_mapped_where_they_stand_at_each_timestep(encoder, result):
    # The middle and the block of the tap have one cross-attention each.
    assert set(result.words) == {(t, q, s) for t in result.taps for q in (0, 1) for s in (50, 261)}
    assert set(result.words[TAP, 0, 50]) == {"red circle"}
    assert set(result.words[TAP, 1, 50]) == {"square", "a"}
    scorer = CrossAttnScorer(encoder.backbone, ScorerConfig(seed=3))
    expected = scorer.word_maps(
        noise_picture(), QUESTIONS[0], "red circle", layers=f"{TAP}.attn2", timesteps=[261]
    )
    known = result.words[TAP, 0, 261]["red circle"].array
    assert known == pytest.approx(expected["red circle"].array)
    assert not np.allclose(known, result.words[TAP, 0, 50]["red circle"].array)


def test_a_look_is_drawn_with_all_its_taps(result):
    picture = result.figure(side=64, guidance_scale=2)
    plain = result.figure(side=64)
    assert picture.width == plain.width
    assert picture.height > plain.height > 64 * 2 * 2 * 3
    assert result.figure(side=64).tobytes() == plain.tobytes()


def test_all_words_or_one_question_as_a_plain_text(encoder):
    result = look(encoder, noise_picture(), "red", words=True)
    assert result.questions == ("red",)
    assert all(set(heats) == {"red"} for heats in result.words.values())


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (17, 31)], ids=str)
def test_odd_pictures_are_read(encoder, size):
    result = look(encoder, noise_picture(*size), "red circle")
    assert result.picture.size == size[::-1]
    assert result.figure(side=64).width > 128


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_drawn(tiny_sd_folder, dtype):
    encoder = DiffusionEncoder.from_pretrained(str(tiny_sd_folder), taps="mid_block", dtype=dtype)
    result = look(encoder, noise_picture(), QUESTIONS, words=["circle"])
    assert result.uncond["mid_block"].dtype == torch.float32
    assert np.asarray(result.figure(side=64)).std() > 10


def test_models_with_two_text_encoders_are_looked_at(tiny_sdxl_folder):
    encoder = DiffusionEncoder.from_pretrained(str(tiny_sdxl_folder), taps="mid_block")
    result = look(encoder, noise_picture(), QUESTIONS, words=True)
    assert float(result.change("mid_block").min()) > 0
    assert set(result.words["mid_block", 1, 50]) == {"a", "blue", "square"}


@pytest.mark.parametrize(
    ("questions", "words", "message"),
    [
        ([], False, "one text or more, got none"),
        ("", False, "needs a word or more"),
        (["red", " "], False, "needs a word or more"),
        ("?!", True, "no words to map"),
        (["a red circle", "a square"], ["star"], "'star' is in no question"),
        ("a red circle", ["circl"], "Did you mean 'circle'"),
    ],
    ids=str,
)
def test_questions_and_words_that_are_none(encoder, questions, words, message):
    with pytest.raises(PromptError, match=message):
        look(encoder, noise_picture(), questions, words=words)


def test_pictures_and_layers_that_are_none(encoder):
    with pytest.raises(ShapeError, match="one picture, got 2"):
        look(encoder, [noise_picture(), noise_picture()], "red")
    with pytest.raises(ImageError):
        look(encoder, "no-such-file.png", "red")
    with pytest.raises(TapError, match="no cross-attention in 'nowhere'"):
        look(encoder, noise_picture(), "red", words=True, layers=["nowhere"])
    with pytest.raises(ConfigError, match="no words are mapped"):
        look(encoder, noise_picture(), "red", layers="mid_block")


def test_words_are_read_near_a_tap():
    layers = ("down.0.attn2", "up.0.attn2", "up.1.a.attn2", "up.1.b.attn2")
    assert touching("up.1.b", layers) == ("up.1.b.attn2",)
    assert touching("up.1.b.attn2.to_q", layers) == ("up.1.b.attn2",)
    assert touching("up.1", layers) == layers[2:]
    assert touching("up.1.resnets", layers) == ()
    assert nearest_layers("up.1.resnets.2", layers) == layers[2:]
    assert nearest_layers("conv_in", layers) == layers


def run(*arguments):
    return CliRunner().invoke(app, ["look", *map(str, arguments)])


def test_the_command_writes_the_figure_and_says_what_moved(tiny_sd_folder, tmp_path):
    picture, output = tmp_path / "picture.png", tmp_path / "look.png"
    noise_picture().save(picture)
    options = ("-m", tiny_sd_folder, "--taps", "mid_block", "--timestep", "10,50", "--side", 64)
    result = run(picture, "-q", QUESTIONS[0], "-q", QUESTIONS[1], "-o", output, "--words", *options)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if "mid_block" in line]
    assert [row[1] for row in rows] == ["10", "10", "50", "50"]
    assert {row[-1] for row in rows} == {"0"}  # registers
    with Image.open(output) as figure:
        assert figure.width > 4 * 64
    again = run(picture, "-q", "red", "-o", output, *options)
    assert again.exit_code == 2
    assert "exists already" in again.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "Missing option '--question'"),
        (("-q", ""), "needs a word or more"),
        (("-q", "red", "--taps", "up_blocks.9"), "no tap matches 'up_blocks.9'"),
        (("-q", "red", "--preset", "gfd"), "Did you mean 'gdf'"),
        (("-q", "red", "--timestep", "fifty"), "timestep must be like"),
        (("-q", "red", "-o", "look.pdf"), "must end in .png"),
    ],
    ids=str,
)
def test_bad_options_are_one_line(options, message, tiny_sd_folder, tmp_path):
    picture = tmp_path / "picture.png"
    noise_picture(3, 3).save(picture)
    result = run(picture, "-m", tiny_sd_folder, "-o", tmp_path / "look.png", *options)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
