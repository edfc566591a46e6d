import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from diffenc import DiffusionEncoder, __version__
from diffenc.cli.main import app
from diffenc.cli.parsing import parse_size, parse_timestep
from diffenc.errors import ConfigError
from marks import wrong_type

TAPS = ["mid_block", "up_blocks.3"]


def run(*arguments):
    return CliRunner().invoke(app, ["encode", *map(str, arguments)])


def read(path):
    with safe_open(path, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return tensors, json.loads(opened.metadata()["diffenc"])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / "a.png", folder / "b.jpg", folder / "c.png"]
    # Not flat: those are normalised by next to no variance, which enlarges rounding a lot.
    for seed, (path, size) in enumerate(zip(paths, (64, 40, 80), strict=True)):
        pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


@pytest.mark.long
def test_the_file_holds_what_the_encoder_gives(tiny_sd_folder, pictures, tmp_path):
    output = tmp_path / "f.safetensors"
    prompts = ["a red circle", "blue", "a square"]
    result = run(
        *pictures,
        *(part for prompt in prompts for part in ("-p", prompt)),
        *("--model", tiny_sd_folder, "--taps", ",".join(TAPS), "--timestep", 100, "--seed", 3),
        *("--conditioning", "cfg", "--guidance-scale", 2, "--size", "64x96", "--tokens"),
        *("--batch-size", 2, "-o", output),
    )
    assert result.exit_code == 0, result.output
    assert f"wrote {output}" in result.stdout
    assert "3 x 16 x 1 x 2  float32" in result.stdout
    tensors, metadata = read(output)
    encoder = DiffusionEncoder.from_pretrained(
        tiny_sd_folder, taps=TAPS, timestep=100, size=(64, 96), seed=3
    )
    expected = encoder.extract(pictures, prompts, conditioning="cfg", guidance_scale=2.0)
    assert set(tensors) == {*TAPS, "tokens"}
    for found, wanted in (
        *((tensors[tap], expected[tap]) for tap in TAPS),
        (tensors["tokens"], expected.tokens()),
    ):
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert metadata["images"] == list(map(str, pictures))
    assert metadata["prompts"] == prompts
    assert metadata["version"] == __version__
    assert metadata["conditioning"] == "cfg"
    assert metadata["config"]["timestep"] == 100
    assert [tap["name"] for tap in metadata["taps"]] == TAPS
    assert metadata["truncated"] == [0, 0, 0]


def test_equal_calls_write_equal_files_and_cut_prompts_are_told(tiny_sd_folder, pictures, tmp_path):
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path in paths:
        result = run(
            *(pictures[0], "-p", "circle " * 99, "-m", tiny_sd_folder, "--dtype", "bf16"),
            *("--taps", "mid_block", "--no-maps", "--tokens", "-o", path),
        )
        assert result.exit_code == 0, result.output
        assert "warning: 1 prompts are longer" in result.output
        assert "--long-prompts chunk" in result.output
    assert paths[0].read_bytes() == paths[1].read_bytes()
    tensors, metadata = read(paths[0])
    assert {name: rows.dtype for name, rows in tensors.items()} == {"tokens": torch.bfloat16}
    assert metadata["truncated"] == [99 + 2 - 77]
    assert run(pictures[0], "-o", paths[0]).exit_code == 2
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_long_prompts_are_read_whole_on_request(tiny_sd_folder, pictures, tmp_path):
    path = tmp_path / "f.safetensors"
    result = run(
        *(pictures[0], "-p", "circle " * 99, "-m", tiny_sd_folder, "--taps", "mid_block"),
        *("--long-prompts", "chunk", "-o", path),
    )
    assert result.exit_code == 0, result.output
    assert "warning" not in result.output
    assert read(path)[1]["truncated"] == [0]


def test_images_of_different_sizes_need_a_common_one(tiny_sd_folder, pictures, tmp_path):
    result = run(
        *(*pictures, "-m", tiny_sd_folder, "--taps", "up_blocks.3", "--resize", "none"),
        *("--batch-size", 1, "-o", tmp_path / "f.safetensors"),
    )
    assert result.exit_code == 2
    assert "the images have different sizes: up_blocks.3 is (8, 8, 8) for" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "a", "-p", "b"], "2 prompts, 3 images"),
        (["-m", "no/such/model"], "unknown model 'no/such/model'"),
        (["-m", "shape"], "Did you mean 'shapes'"),
        (["--taps", "up_block.3"], "Did you mean 'up_blocks.3'"),
        (["--size", "65"], "64 and 72 are the nearest"),
        (["--size", "huge"], "size must be like 512 or 384x512"),
        (["--timestep", "1000"], "timestep must be in [0, 1000)"),
        wrong_type(["--conditioning", "both", "-p", "a"], "conditioning must be one of"),
        (["--conditioning", "cfg"], "needs --prompt"),
        (["--guidance-scale", "2", "-p", "a"], "--conditioning cfg alone"),
        wrong_type(["--long-prompts", "cut", "-p", "a"], "long_prompts must be one of"),
        (["--unet", "nowhere.safetensors"], "no such weights file: nowhere.safetensors"),
        (["--architecture", "sd1.5"], "architecture= is for a single file"),
        wrong_type(["--resize", "stretch"], "resize must be one of"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--device", "gpu"], "cannot use device 'gpu'"),
        (["--no-maps"], "nothing to write"),
        (["-o", "features.npz"], "must end in .safetensors"),
        (["-o", "no/such/folder/f.safetensors"], "folder of the output does not exist"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tiny_sd_folder, pictures, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    result = run(*pictures, "-m", tiny_sd_folder, *arguments)
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert message in result.output
    assert result.output.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_a_corrupt_image_is_found_before_the_model_is_loaded(tmp_path, content):
    broken = tmp_path / "broken.png"
    broken.write_bytes(content)
    result = run(broken, "-m", tmp_path / "no-model", "-o", tmp_path / "f.safetensors")
    assert result.exit_code == 2
    assert result.output.startswith(f"error: cannot read the image {broken}: ")
    assert list(tmp_path.iterdir()) == [broken]


def test_a_broken_model_folder(tmp_path, pictures):
    (tmp_path / "model").mkdir()
    arguments = (pictures[0], "-m", tmp_path / "model", "-o", tmp_path / "f.safetensors")
    assert "has no model_index.json" in run(*arguments).output
    (tmp_path / "model/model_index.json").write_text("{")
    result = run(*arguments)
    assert result.exit_code == 2
    assert "model_index.json is broken" in result.output


def test_several_timesteps_add_an_axis(tiny_sd_folder, pictures, tmp_path):
    output = tmp_path / "f.safetensors"
    result = run(
        *(*pictures[:2], "-m", tiny_sd_folder, "--taps", "up_blocks.3", "--timestep", "50,261"),
        *("--draws", 2, "-o", output),
    )
    assert result.exit_code == 0, result.output
    tensors, metadata = read(output)
    assert tensors["up_blocks.3"].shape == (2, 2, 8, 8, 8)
    assert metadata["config"]["timestep"] == [50, 261]


@pytest.mark.parametrize(("text", "size"), [("512", 512), ("384x512", (384, 512))])
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(("text", "timestep"), [("50", 50), ("50, 261", (50, 261))])
def test_timesteps_are_read(text, timestep):
    assert parse_timestep(text) == timestep


@pytest.mark.parametrize("text", ["", "x", "64x", "-64", "64x64x64", "64.0", "1,,2"])
def test_anything_else_is_no_size_and_no_timestep(text):
    with pytest.raises(ConfigError, match="size must be like"):
        parse_size(text)
    with pytest.raises(ConfigError, match="timestep must be like"):
        parse_timestep(text)


@pytest.mark.parametrize("kind", ["words", "grid", "grid+words"])
def test_a_value_behind_the_switch_of_tokens_is_no_picture(pictures, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    for arguments in ((pictures[0], "--tokens", kind), ("--tokens", kind, pictures[0])):
        refused = run(*arguments)
        assert refused.exit_code == 2
        assert f"--tokens takes no value, and '{kind}' is no picture" in refused.output
        assert "--word-tokens N" in refused.output
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / kind)
    assert run("--tokens", kind, "-o", "f.safetensors").exit_code == 0
    assert set(read(tmp_path / "f.safetensors")[0]) > {"tokens"}


def test_register_cells_are_replaced_in_maps_and_tokens(
    tiny_sd_folder, pictures, tmp_path, monkeypatch
):
    def corner(features, *, ratio):
        cells = torch.zeros(*features.shape[:-3], *features.shape[-2:], dtype=torch.bool)
        cells[..., 0, 0] = True
        return cells

    monkeypatch.setattr("diffenc.features.register_cells", corner)
    files = {}
    for flag in ("--registers", "--no-registers"):
        output = tmp_path / f"{flag}.safetensors"
        options = ("--model", tiny_sd_folder, "--taps", "up_blocks.3", "--tokens", "-o", output)
        result = run(pictures[0], *options, flag)
        assert result.exit_code == 0, result.output
        files[flag] = read(output)
    (plain, about), (cleared, said) = files.values()
    maps, other = plain["up_blocks.3"], cleared["up_blocks.3"]
    mean = (maps[0, :, 0, 1] + maps[0, :, 1, 0] + maps[0, :, 1, 1]) / 3
    torch.testing.assert_close(other[0, :, 0, 0], mean)
    assert torch.equal(other[..., 1:], maps[..., 1:])
    assert not torch.equal(plain["tokens"], cleared["tokens"])
    assert "registers" not in about
    assert said["registers"] is False


def test_taps_that_a_preset_asks_for_are_not_held_against_the_caller(pictures, tmp_path):
    arguments = (pictures[0], "-o", tmp_path / "features.safetensors", "--preset", "gdf")
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert "preset 'gdf' reads taps that this model does not have: no tap" in refused.output
    assert "Did you mean" not in refused.output
    assert run(*arguments, "--taps", "mid_block").exit_code == 0


def test_a_preset_reads_as_a_published_method_does(tiny_sd_folder, pictures, tmp_path):
    output = tmp_path / "f.safetensors"
    arguments = (pictures[0], "-m", tiny_sd_folder, "-o", output, "--preset")
    result = run(*arguments, "hyperfeatures", "--timestep", 100)
    assert result.exit_code == 0, result.output
    tensors, metadata = read(output)
    assert tensors
    assert all(".resnets." in name and name.endswith(".conv2") for name in tensors)
    assert metadata["config"]["posterior"] == "sample"
    assert metadata["config"]["timestep"] == 100  # what is given beside it wins
    unknown = run(*arguments, "hyperfeature", "--force")
    assert unknown.exit_code == 2
    assert "Did you mean 'hyperfeatures'" in unknown.output


@pytest.mark.long
def test_word_tokens_are_written_with_their_places_and_their_words(
    tiny_sd_folder, pictures, tmp_path
):
    output = tmp_path / "f.safetensors"
    prompts = ["a red circle left of a square", "blue", "a red square"]
    result = run(
        *pictures,
        *(part for prompt in prompts for part in ("-p", prompt)),
        *("--model", tiny_sd_folder, "--taps", "up_blocks.1", "--size", 64, "--batch-size", 2),
        *("--no-maps", "--word-tokens", 2, "-o", output),
    )
    assert result.exit_code == 0, result.output
    tensors, metadata = read(output)
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder, taps="up_blocks.1", size=64)
    expected = encoder.word_tokens(pictures, prompts, count=2)
    assert metadata["words"] == list(map(list, expected.words))
    assert set(tensors) == {"word_tokens", "word_places", "word_mask"}
    assert tensors["word_mask"].tolist() == [[True, True], [True, False], [True, True]]
    torch.testing.assert_close(tensors["word_tokens"], expected.tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tensors["word_places"], expected.places, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--word-tokens", 2], "gathered by the words of --prompt"),
        (["--word-tokens", 2, "-p", "?!"], "has no words"),
        (["--word-tokens", 2, "-p", "a", "--no-registers"], "leave --no-registers out"),
        (["--no-maps"], "needs --tokens or --word-tokens"),
    ],
)
def test_word_tokens_without_words_are_refused_before_a_model_is_loaded(pictures, options, message):
    result = run(pictures[0], "--model", "no-such-model", *options)
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())
