"""One object that turns columns of pictures into columns of features, in any process."""

import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffenc import DiffusionEncoder, Extractor
from diffenc.errors import ConfigError, ImageError, NonFiniteError, PromptError, ShapeError
from diffenc.extraction import extractor as module
from diffenc.extraction.rows import row_bytes

TAPS = ("mid_block", "up_blocks.3")


@pytest.fixture(scope="module")
def pictures():
    noise = np.random.default_rng(0)
    return [noise.integers(0, 256, (70, 50, 3), np.uint8) for _ in range(5)]


@pytest.fixture(scope="module")
def encoder(tiny_sd_folder):
    return DiffusionEncoder.from_pretrained(tiny_sd_folder, taps=TAPS, size=64, use_cache=False)


@pytest.fixture
def make(tiny_sd_folder):
    return lambda **options: Extractor(tiny_sd_folder, taps=TAPS, size=64, device="cpu", **options)


def close(result, expected):
    limit = 1e-5 * float(expected.abs().max())
    return float((torch.from_numpy(result) - expected).abs().max()) <= limit


def test_rows_are_what_the_encoder_gives_and_other_columns_stay(make, encoder, pictures):
    questions = ["a", "b", "c d", "", "e"]
    batch = {"image": pictures, "question": questions, "label": [3, 1, 4, 1, 5]}
    result = make(prompt_column="question", tokens=True, batch_size=2)(batch)
    plain = encoder.extract(pictures, questions)
    assert set(result) == {"question", "label", *TAPS, "tokens"}
    assert all(close(result[tap], plain[tap]) for tap in TAPS)
    assert close(result["tokens"], plain.tokens())
    assert result["question"].tolist() == questions
    assert result["label"].tolist() == [3, 1, 4, 1, 5]


def test_one_text_for_a_batch_is_read_as_a_whole_and_not_by_letters(make, pictures):
    extractor = make()
    shown = list(map(extractor.prepare(), pictures[:2]))
    one, each = (extractor.read(shown, prompts).tensors for prompts in ("ab", ["ab", "ab"]))
    assert all(torch.equal(one[tap], each[tap]) for tap in TAPS)


def test_cells_are_pooled_to_one_vector(make, encoder, pictures):
    maps = encoder.extract(pictures)
    mean, most = (make(tokens=True, pool=pool)({"image": pictures}) for pool in ("mean", "max"))
    for tap in TAPS:
        cells = maps[tap].flatten(2)
        assert close(mean[tap], cells.sum(dim=2) / cells.shape[2])
        assert close(most[tap], cells.sort(dim=2).values[..., -1])
    assert close(mean["tokens"], maps.tokens().sum(dim=1) / maps.tokens().shape[1])


@pytest.mark.parametrize("kind", ["arrays", "one array", "objects", "PIL", "bytes", "entries"])
def test_pictures_come_as_engines_have_them(make, encoder, pictures, tmp_path, kind):
    paths = [tmp_path / f"{place}.png" for place in range(5)]
    for path, values in zip(paths, pictures, strict=True):
        Image.fromarray(values).save(path)
    objects = np.empty(5, dtype=object)
    objects[:] = list(map(str, paths))
    column = {
        "arrays": pictures,
        "one array": np.stack(pictures),
        "objects": objects,
        "PIL": [Image.fromarray(values) for values in pictures],
        "bytes": [path.read_bytes() for path in paths],
        "entries": [{"bytes": None, "path": str(path)} for path in paths],
    }[kind]
    result = make()({"image": column})
    assert close(result["mid_block"], encoder.extract(pictures)["mid_block"])


def test_it_pickles_small_before_and_after_use_and_is_made_again(make, pictures):
    extractor = make(prompt="a circle", pool="mean")
    before = pickle.dumps(extractor)
    extractor({"image": pictures[:1]})
    assert pickle.dumps(extractor) == before
    assert len(before) < 2000
    copy = pickle.loads(before)
    assert copy == extractor == Extractor(**extractor.to_dict())
    assert copy != make(prompt="a square", pool="mean")
    assert hash(copy) == hash(extractor)


def test_copies_in_one_process_share_a_model_and_a_fork_does_not(make, monkeypatch):
    extractor = make()
    encoder = extractor.encoder
    assert pickle.loads(pickle.dumps(extractor)).encoder is encoder
    assert make(pool="mean", prompt="other").encoder is encoder  # what is kept changes no model
    assert make(timestep=7).encoder is not encoder
    monkeypatch.setattr(module.os, "getpid", os.getppid)
    assert make(timestep=7).encoder.config.timestep == 7
    assert make().encoder is not encoder


def test_a_folder_that_was_written_anew_is_loaded_anew(encoder, pictures, tmp_path):
    adapted = encoder.with_options(timestep=50)
    adapted.save_pretrained(tmp_path / "model")
    before = Extractor(tmp_path / "model", device="cpu")
    assert before.encoder.config.timestep == 50
    adapted.with_options(timestep=300).save_pretrained(tmp_path / "model")
    assert Extractor(tmp_path / "model", device="cpu").encoder.config.timestep == 300
    assert before.encoder.config.timestep == 50  # an object reads all its batches by one model


def test_features_beyond_half_precision_are_refused(make, pictures, monkeypatch):
    extractor = make(output_dtype="float16", pool="max")
    tap = dict(extractor.encoder.backbone.unet.named_modules())["mid_block"]
    hook = tap.register_forward_hook(lambda module, args, output: output * 1e7)
    try:
        with pytest.raises(NonFiniteError, match=r"'mid_block', of up to .*e\+0.* output_dtype='b"):
            extractor({"image": pictures[:1]})
        wide = make(output_dtype="bfloat16", pool="max")
        assert wide({"image": pictures[:1]})["mid_block"].max() > 65504
    finally:
        hook.remove()


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": True},
        {"size": (72, 136), "tokens": True},
        {"tokens": True, "pool": "mean", "conditioning": "concat", "prompt": "a"},
        {"timestep": (5, 50), "tokens": True, "output_dtype": "float16"},
        {"timestep": (50,), "tokens": True},
        {"word_tokens": 2, "prompt": "a red circle", "maps": False, "dtype": "bfloat16"},
        {"taps": "*_blocks.*", "size": 104, "grid": (3, 5), "tokens": True, "pool": "max"},
        {"taps": ("latents", "conv_in", "up_blocks.1.attentions.0"), "size": (88, 64)},
    ],
    ids=str,
)
def test_the_size_of_a_row_is_known_before_anything_is_computed(tiny_sd_folder, pictures, options):
    extractor = Extractor(tiny_sd_folder, **{"size": 64, "device": "cpu", "taps": TAPS, **options})
    shapes = extractor.row_shapes
    pictured = [extractor.prepare()(picture) for picture in pictures[:2]]
    tensors = extractor.read(pictured).tensors
    assert {n: (tuple(t.shape[1:]), t.dtype) for n, t in tensors.items()} == shapes
    assert row_bytes(shapes) == sum(t.numel() * t.element_size() for t in tensors.values()) // 2


@pytest.mark.parametrize("kind", ["words", "grid+words"])
def test_tokens_are_of_the_kind_that_a_saved_encoder_has(encoder, pictures, tmp_path, kind):
    config = replace(encoder.config, tokens=kind, word_count=3)
    saved = DiffusionEncoder(encoder.backbone, config, use_cache=False)
    saved.save_pretrained(tmp_path)
    options = {"tokens": True, "prompt": "a red circle", "device": "cpu"}
    extractor = Extractor(tmp_path, **options)
    result = extractor({"image": pictures[:2]})
    assert close(result["tokens"], saved(pictures[:2], "a red circle"))
    assert extractor.row_shapes["tokens"][0] == result["tokens"].shape[1:]
    with pytest.raises(ConfigError, match="gathers tokens of words by itself"):
        Extractor(tmp_path, **options, registers=False)({"image": pictures[:1]})


@pytest.mark.parametrize("kind", ["words", "grid+words"])
@pytest.mark.parametrize("pool", ["mean", "max"])
def test_pooled_tokens_are_those_of_the_words_that_there_are(
    encoder, pictures, tmp_path, kind, pool
):
    """However many words there is room for."""
    rows = []
    for count in (3, 16):
        config = replace(encoder.config, tokens=kind, word_count=count)
        folder = tmp_path / f"{count}"
        DiffusionEncoder(encoder.backbone, config, use_cache=False).save_pretrained(folder)
        options = {"tokens": True, "maps": False, "pool": pool, "device": "cpu"}
        extractor = Extractor(folder, prompt="red circle", **options)
        rows.append(extractor({"image": pictures[:2]})["tokens"])
    assert np.abs(rows[0] - rows[1]).max() <= 1e-5 * np.abs(rows[0]).max()
    assert (rows[1] != 0).all()


def test_a_number_of_words_is_for_an_encoder_that_has_them(make, encoder, pictures, tmp_path):
    config = replace(encoder.config, tokens="words", word_count=3)
    DiffusionEncoder(encoder.backbone, config).save_pretrained(tmp_path)
    more = Extractor(tmp_path, tokens=True, prompt="a", maps=False, device="cpu", word_count=5)
    assert more({"image": pictures[:1]})["tokens"].shape[1] == 5
    with pytest.raises(ConfigError, match="word_count=5 is read with tokens='words'"):
        make(tokens=True, prompt="a", word_count=5)({"image": pictures[:1]})


def test_no_pictures_give_no_rows_of_the_right_shape(make):
    result = make(pool="mean")({"image": [], "label": []})
    assert {name: rows.shape for name, rows in result.items()} == {
        "label": (0,),
        "mid_block": (0, 16),
        "up_blocks.3": (0, 8),
    }


def test_a_broken_picture_is_named_by_its_row_or_left_out_with_its_row(make, pictures):
    batch = {"image": [pictures[0], b"no picture", pictures[1]], "label": [0, 1, 2]}
    with pytest.raises(ImageError, match="row 1 of the batch: cannot read the image"):
        make()(batch)
    with pytest.warns(UserWarning, match=r"1 of 3 images cannot be read: row 1: .*left out"):
        result = make(skip_broken=True)(batch)
    assert result["label"].tolist() == [0, 2]
    assert len(result["mid_block"]) == 2


def test_bright_pictures_raise_no_warning_of_their_range(make, monkeypatch):
    monkeypatch.setattr("diffenc.inputs.pictures.values._warned", False)
    bright = np.linspace(150, 250, 90 * 90 * 3).reshape(90, 90, 3).astype(np.uint8)
    make()({"image": [bright]})  # a warning is an error here


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"picture": []}, ConfigError, r"no column 'image'; its columns are \['picture', 'q'\]"),
        ({"image": [1]}, ImageError, "row 0 of the batch: images must be PIL"),
        ({"image": ["no.png"], "q": [None]}, PromptError, "row 0 has no text in the column 'q'"),
        ({"image": ["no.png"], "q": ["a", "b"]}, ShapeError, "1 pictures and 2 of"),
        ({"image": np.zeros((4, 8, 8), np.uint8), "q": ["a"] * 4}, ShapeError, "one picture or of"),
        ([1, 2], ConfigError, "batched=True"),
    ],
)
def test_a_batch_that_fits_nothing_is_told(make, batch, error, message):
    with pytest.raises(error, match=message):
        make(prompt_column="q")({"q": ["a"], **batch} if isinstance(batch, dict) else batch)


def test_a_column_with_the_name_of_a_feature_is_refused_and_can_be_left_out(make, pictures):
    batch = {"image": pictures[:1], "mid_block": [1]}
    with pytest.raises(ConfigError, match="'mid_block', which is the name of a feature"):
        make()(batch)
    assert set(make(keep_columns=[])(batch)) == set(TAPS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tap": "mid_block"}, "unknown option 'tap' of an Extractor. Did you mean 'taps'"),
        ({"prompt": "a", "prompt_column": "b"}, "pass one"),
        ({"word_tokens": 2}, "pass a prompt"),
        ({"maps": False}, "nothing is kept"),
        ({"pool": "median"}, "pool must be one of"),
        ({"conditioning": "cfg"}, "needs a prompt or prompt_column"),
        ({"timestep": 1000}, r"timestep must be in \[0, 1000\)"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"output_dtype": "int8"}, "dtype must be one of"),
        ({"unet": torch.nn.Identity()}, "unet= must be a name or a path"),
        ({"batch_size": 0}, "batch_size must be an int of 1 or more"),
    ],
    ids=str,
)
def test_bad_options_are_refused_before_a_model_is_loaded(options, message):
    with pytest.raises(ConfigError, match=message):
        Extractor("no/such/model", **options)


def test_a_model_in_memory_is_refused_with_the_way_out(encoder):
    with pytest.raises(ConfigError, match="save_pretrained"):
        Extractor(encoder)
