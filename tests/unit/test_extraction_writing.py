"""Folders of features: written in any circumstances, gone on with, and read."""

import errno
import json
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from diffenc import DiffusionEncoder, Extractor, open_features, write_features
from diffenc.errors import ConfigError, ImageError, MissingExtraError, OutputError
from diffenc.extraction.decoding import decode_ahead
from diffenc.extraction.listing import list_pictures
from diffenc.extraction.reader import FeatureFolder

COUNT = 11
TAP = "mid_block"


class StopError(BaseException):
    """What no code expects."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for place in range(COUNT):
        pixels = noise.integers(0, 256, (40 + place, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{place:02d}.png")
    return folder


@pytest.fixture(scope="module")
def make(tiny_sd_folder):
    def make(**options):
        options = {"taps": TAP, "size": 64, "device": "cpu", "batch_size": 2, **options}
        return Extractor(tiny_sd_folder, **options)

    return make


@pytest.fixture(scope="module")
def expected(tiny_sd_folder, pictures):
    """Maps of all pictures, by the encoder itself."""
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder, taps=TAP, size=64)
    return encoder.extract(sorted(pictures.glob("*.png")))[TAP]


@pytest.fixture(scope="module")
def written(pictures, make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "features"
    return write_features(pictures, folder, make(), shard_size=4)


def close(result, expected):
    return float((result - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.long
def test_every_picture_has_its_row_under_its_name(written, pictures, expected):
    assert written.ids == tuple(sorted(path.name for path in pictures.glob("*.png")))
    assert close(written.stack(TAP), expected)
    for place in (0, 3, 4, 10):
        row = written[f"{place:02d}.png"]
        assert set(row) == {"id", TAP}
        assert close(row[TAP], expected[place])
        assert torch.equal(row[TAP], written[place][TAP])
    assert [row["id"] for row in written] == list(written.ids)
    assert [row["id"] for row in written[8:]] == ["08.png", "09.png", "10.png"]
    assert written[-1]["id"] == "10.png"
    assert "03.png" in written
    assert "3.png" not in written
    assert written.shapes == {TAP: tuple(expected.shape[1:])}
    assert written.made_from["config"]["size"] == 64
    assert "pictures=11" in repr(written)


def test_the_files_are_what_the_guide_says(written):
    shards = [f"shard-{number:06d}.safetensors" for number in range(3)]
    assert files(written.folder) == ["features.json", "index.parquet", *shards]
    table = pq.read_table(written.folder / "index.parquet").to_pydict()
    assert table["shard"] == [0] * 4 + [1] * 4 + [2] * 3
    assert table["row"] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]


def test_a_loader_reads_it_in_any_order_and_workers_can_pickle_it(written, expected):
    copy = pickle.loads(pickle.dumps(written))
    batches = list(DataLoader(copy, batch_size=4, shuffle=True))
    names = [name for batch in batches for name in batch["id"]]
    rows = torch.cat([batch[TAP] for batch in batches])
    assert sorted(names) == list(written.ids)
    places = [written.ids.index(name) for name in names]
    assert close(rows, expected[places])


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        ("3.png", KeyError, "no picture is called '3.png'. Did you mean"),
        (11, IndexError, "there are 11 rows; there is no row 11"),
        (-12, IndexError, "no row -12"),
        (1.5, ConfigError, "by a picture's name, its place or a slice"),
    ],
)
def test_a_row_that_is_not_there_is_told(written, key, error, message):
    with pytest.raises(error, match=message):
        written[key]


def test_a_kind_of_feature_that_is_not_there_is_told(written):
    with pytest.raises(ConfigError, match=r"no features 'mid'.*Did you mean 'mid_block'"):
        written.stack("mid")


def test_each_picture_is_read_under_its_own_text(tiny_sd_folder, pictures, make, tmp_path):
    texts = ["a red circle", "", "circle " * 99]
    rows = [{"image": str(pictures / "00.png"), "q": t, "k": n} for n, t in enumerate(texts)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    extractor = make(image_column="image", prompt_column="q", pool="mean")
    features = write_features(
        tmp_path / "list.jsonl", tmp_path / "out", extractor, id_column="k", shard_size=2
    )
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder, taps=TAP, size=64)
    maps = encoder.extract([pictures / "00.png"] * 3, texts)
    assert close(features.stack(TAP), maps[TAP].mean(dim=(2, 3)))
    assert [row["prompt"] for row in features] == texts
    assert features.table["truncated"].to_pylist() == [0, 0, 99 + 2 - 77]


def test_a_stopped_run_goes_on_without_what_is_done(pictures, make, expected, tmp_path):
    folder, calls = tmp_path / "out", []

    def stop(done, total):
        calls.append(done)
        if done >= 9:
            raise StopError

    with pytest.raises(StopError):
        write_features(pictures, folder, make(), shard_size=4, progress=stop)
    assert files(folder) == ["features.json", *(f"shard-00000{n}.safetensors" for n in (0, 1))]
    with pytest.raises(ConfigError, match=r"not complete \(2 shards are there\): repeat"):
        open_features(folder)
    # What a program that is killed leaves: something half written, and a shard that is cut off.
    (folder / ".123456abcdef.partial.safetensors").write_bytes(b"half")
    shard = folder / "shard-000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    first, outlooks = (folder / "shard-000000.safetensors").stat().st_mtime_ns, []
    calls.clear()
    features = write_features(
        *(pictures, folder, make(batch_size=3, threads=1)),
        shard_size=4,
        progress=lambda done, total: calls.append(done),
        announce=outlooks.append,
    )
    assert outlooks[0].done == 4
    assert outlooks[0].needed == 7 * expected[0].numel() * 4
    assert calls[0] > 4
    assert calls[-1] == COUNT
    assert (folder / "shard-000000.safetensors").stat().st_mtime_ns == first
    assert close(features.stack(TAP), expected)
    assert not list(folder.glob(".*partial*"))


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(tiny_sd_folder, pictures, expected, tmp_path):
    code = f"""
import os, signal
from diffenc import Extractor, write_features
extractor = Extractor({str(tiny_sd_folder)!r}, taps={TAP!r}, size=64, batch_size=1)
write_features({str(pictures)!r}, {str(tmp_path / "out")!r}, extractor, shard_size=2, progress=
    lambda done, _: os.kill(os.getpid(), signal.SIGKILL) if done == LAST else None)
"""
    for kill in (5, 9, 0):
        command = [sys.executable, "-c", code.replace("LAST", str(kill))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr
    features = open_features(tmp_path / "out")
    assert len(set(features.ids)) == COUNT
    assert close(features.stack(TAP), expected)


@pytest.mark.parametrize(
    ("options", "shard_size", "message"),
    [
        ({"pool": "mean"}, 4, "pool was none and is 'mean'. Give the same options"),
        ({"timestep": 7}, 4, "timestep was 50 and is 7"),
        ({"prompt": "a"}, 4, "the prompt was none and is 'a'"),
        ({"size": 72}, 4, "size was 64 and is 72"),
        ({"dtype": "bfloat16"}, 4, "the dtype was 'float32' and is 'bfloat16'"),
        ({}, 5, "the number of pictures per shard was 4 and is 5"),
    ],
    ids=str,
)
def test_another_configuration_is_refused_in_a_sentence(
    begun, pictures, make, options, shard_size, message
):
    with pytest.raises(OutputError, match=message):
        write_features(pictures, begun, make(**options), shard_size=shard_size)


@pytest.fixture(scope="module")
def begun(pictures, make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun") / "out"
    with pytest.raises(StopError):
        write_features(pictures, folder, make(), shard_size=4, progress=_stop)
    return folder


def _stop(done, _total):
    if done >= 6:
        raise StopError


def test_other_pictures_and_another_model_are_refused(
    begun, pictures, make, tiny_sd21_base_folder, tmp_path
):
    some = sorted(pictures.glob("*.png"))
    with pytest.raises(OutputError, match="the number of pictures was 11 and is 5"):
        write_features(some[:5], begun, make(), shard_size=4)
    with pytest.raises(OutputError, match="names, the order or the texts of the pictures are"):
        write_features(some, begun, make(), shard_size=4)
    other = Extractor(tiny_sd21_base_folder, taps=TAP, size=64, device="cpu")
    with pytest.raises(OutputError, match=r"begun in another way: the model was .* and is "):
        write_features(pictures, begun, other, shard_size=4)


def test_other_pictures_of_the_same_names_are_refused_and_a_mended_one_is_not(
    pictures, make, expected, tmp_path
):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    for path in sorted(pictures.glob("*.png")):
        (tmp_path / "first" / path.name).write_bytes(path.read_bytes())
        Image.new("RGB", (90, 70), "red").save(tmp_path / "second" / path.name)
    whole = (tmp_path / "first/09.png").read_bytes()
    (tmp_path / "first/09.png").write_bytes(whole[:100])
    with pytest.raises(ImageError, match=r"09.png"):
        write_features(tmp_path / "first", tmp_path / "out", make(), shard_size=4)
    with pytest.raises(OutputError, match="the pictures of these names are others, by what a"):
        write_features(tmp_path / "second", tmp_path / "out", make(), shard_size=4)
    (tmp_path / "first/09.png").write_bytes(whole)
    (tmp_path / "first").rename(tmp_path / "moved")
    features = write_features(tmp_path / "moved", tmp_path / "out", make(), shard_size=4)
    torch.testing.assert_close(features.stack(TAP), expected, rtol=1e-4, atol=1e-4)


def test_other_pictures_of_the_same_names_and_sizes_are_refused(make, tmp_path):
    for folder, color in (("first", "red"), ("second", "blue")):
        (tmp_path / folder).mkdir()
        for place in range(5):
            Image.new("RGB", (64, 64), color).save(tmp_path / folder / f"{place}.bmp")
    with pytest.raises(StopError):
        write_features(
            tmp_path / "first", tmp_path / "out", make(), shard_size=1, progress=_stop_after_two
        )
    with pytest.raises(OutputError, match="the pictures of these names are others, by what a few"):
        write_features(tmp_path / "second", tmp_path / "out", make(), shard_size=1)


def _stop_after_two(done, _total):
    if done >= 2:
        raise StopError


def test_a_folder_with_something_else_in_it_is_left_alone(written, pictures, make, tmp_path):
    with pytest.raises(OutputError, match="holds complete features; name another folder"):
        write_features(pictures, written.folder, make())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds other files, such as notes.txt"):
        write_features(pictures, tmp_path, make(), overwrite=True)
    with pytest.raises(OutputError, match="exists and is a file"):
        write_features(pictures, tmp_path / "notes.txt", make())
    assert files(tmp_path) == ["notes.txt"]


def test_a_run_can_begin_anew_with_fewer_shards(pictures, make, tmp_path):
    write_features(pictures, tmp_path / "out", make(pool="max"), shard_size=3)
    some = sorted(pictures.glob("*.png"))[:2]
    features = write_features(some, tmp_path / "out", make(), overwrite=True)
    assert features.ids == tuple(map(str, some))
    assert len(list((tmp_path / "out").glob("shard-*"))) == 1


def test_broken_pictures_stop_a_run_or_are_left_out_with_a_report(
    pictures, make, expected, tmp_path
):
    names = ["00.png", "cut.png", "01.png", "02.png", "03.png", "web.jpg", "04.png"]
    for name in names:
        whole = (pictures / name).read_bytes() if name[0] == "0" else b"<html>"
        (tmp_path / name).write_bytes(whole)
    (tmp_path / "cut.png").write_bytes((pictures / "05.png").read_bytes()[:2000])
    paths = [tmp_path / name for name in names]
    with pytest.raises(ImageError, match=r"cannot read the image .*cut.png.*; 0 of 7 .*skip_brok"):
        write_features(paths, tmp_path / "out", make(), shard_size=2)
    features = write_features(paths, tmp_path / "out", make(skip_broken=True), shard_size=2)
    assert [Path(name).name for name in features.ids] == [name for name in names if name[0] == "0"]
    assert close(features.stack(TAP), expected[:5])
    assert list(features.skipped) == [str(tmp_path / "cut.png"), str(tmp_path / "web.jpg")]
    assert "web page" in features.skipped[str(tmp_path / "web.jpg")]
    lines = (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == list(features.skipped)
    with pytest.raises(KeyError, match="was left out: cannot read the image"):
        features[str(tmp_path / "web.jpg")]


def test_a_shard_of_broken_pictures_alone_is_no_obstacle_but_a_whole_run_is(make, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "c.png")
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    extractor = make(skip_broken=True)
    features = write_features(tmp_path, tmp_path / "out", extractor, shard_size=1)
    assert features.ids == ("c.png",)
    assert features[0]["id"] == "c.png"
    (tmp_path / "c.png").write_bytes(b"")
    with pytest.raises(ImageError, match="3 of 3 images cannot be read"):
        write_features(tmp_path, tmp_path / "none", extractor, shard_size=1)


def test_missing_files_are_named_before_a_model_is_loaded(pictures, tmp_path):
    (tmp_path / "list.txt").write_text(f"{pictures / '00.png'}\ngone.png\nalso gone.png\n")
    with pytest.raises(ImageError, match=r"2 of 3 .*gone.png.*also gone.png; --skip-broken"):
        write_features(tmp_path / "list.txt", tmp_path / "out", Extractor("no/such/model"))
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_pictures_of_every_mode_become_what_the_encoder_makes_of_them(
    tiny_sd_folder, make, tmp_path
):
    noise = np.random.default_rng(3)
    colors = noise.integers(0, 256, (30, 44, 3), np.uint8)
    deep = noise.integers(300, 60000, (30, 44)).astype(np.uint16)
    rgb = Image.fromarray(colors)
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(deep).save(tmp_path / "deep.png")
    alpha = np.dstack([colors, noise.integers(0, 256, (30, 44), np.uint8)])
    Image.fromarray(alpha).save(tmp_path / "alpha.webp", lossless=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    rgb.save(tmp_path / "turned.jpg", exif=turned)
    rgb.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (44, 30))])
    rgb.convert("L").save(tmp_path / "grey.tif")
    features = write_features(tmp_path, tmp_path / "out", make(pool="mean"))
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder, taps=TAP, size=64)
    for name in features.ids:
        with Image.open(tmp_path / name) as picture:
            features_of_picture = encoder.extract(picture)[TAP].mean(dim=(2, 3))[0]
        assert close(features[name][TAP], features_of_picture), name
    assert len(features) == 6


def test_a_full_disk_ends_in_a_sentence_and_what_is_done_stays(
    pictures, make, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr("safetensors.torch.save_file", _full_after(1))
    with pytest.raises(OutputError, match=r"shard-000001.safetensors: No space left on device"):
        write_features(pictures, tmp_path / "out", make(), shard_size=4)
    assert files(tmp_path / "out") == ["features.json", "shard-000000.safetensors"]
    monkeypatch.undo()
    assert close(
        write_features(pictures, tmp_path / "out", make(), shard_size=4).stack(TAP), expected
    )


def _full_after(count):
    from safetensors.torch import save_file

    written = []

    def save(tensors, path, metadata):
        if len(written) == count:
            path.write_bytes(b"some")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        save_file(tensors, path, metadata=metadata)

    return save


def test_two_programs_do_not_write_to_one_folder(pictures, make, tmp_path):
    def again(done, _total):
        write_features(pictures, tmp_path / "out", make(), shard_size=4)

    with pytest.raises(OutputError, match="another program is writing features to it"):
        write_features(pictures, tmp_path / "out", make(), shard_size=4, progress=again)


def test_sizes_are_told_before_the_first_picture_is_read(pictures, make, tmp_path):
    def look(outlook):
        assert outlook.pictures == COUNT
        assert outlook.shards == 2  # of 10, whole batches
        assert outlook.picture_bytes == 16 * 4
        assert outlook.free > 0
        raise StopError

    with pytest.raises(StopError):
        write_features(pictures, tmp_path / "out", make(pool="mean"), shard_size=10, announce=look)
    assert files(tmp_path / "out") == ["features.json"]


def test_without_pyarrow_the_extra_is_named_before_anything_happens(
    pictures, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'diffenc\[parquet\]'"):
        write_features(pictures, tmp_path / "out", Extractor("no/such/model"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("opens", [open_features, FeatureFolder])
@pytest.mark.parametrize("path", [str, Path])
@pytest.mark.parametrize("name", ["gone", "file", "empty"])
def test_what_is_no_folder_of_features_is_told(tmp_path, name, path, opens):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no such folder of features|holds no features"):
        opens(path(tmp_path / name))


def test_the_class_opens_a_folder_too(pictures, make, tmp_path):
    write_features(pictures, tmp_path / "out", make(pool="mean"))
    opened = FeatureFolder(str(tmp_path / "out"))
    assert (len(opened), opened.folder) == (COUNT, tmp_path / "out")


def test_a_folder_that_lost_a_shard_says_which(pictures, make, tmp_path):
    features = write_features(pictures, tmp_path / "out", make(pool="mean"), shard_size=4)
    (tmp_path / "out/shard-000001.safetensors").unlink()
    opened = open_features(tmp_path / "out")
    assert torch.equal(opened[0][TAP], features[0][TAP])
    with pytest.raises(ConfigError, match=r"shard-000001.safetensors: there is no such file"):
        opened[4]


def test_a_shard_of_another_run_is_not_read(pictures, make, tmp_path):
    for name in ("a red circle", "a blue square"):
        write_features(pictures, tmp_path / name, make(prompt=name, pool="mean"), shard_size=4)
    strange = tmp_path / "a red circle/shard-000001.safetensors"
    strange.replace(tmp_path / "a blue square/shard-000001.safetensors")
    opened = open_features(tmp_path / "a blue square")
    assert opened[0][TAP].shape == opened[8][TAP].shape
    for read in (lambda: opened[4], lambda: opened.stack(TAP)):
        with pytest.raises(ConfigError, match=r"shard-000001.* is of another run than features.js"):
            read()


def test_an_index_of_other_pictures_is_not_read(pictures, make, tmp_path):
    paths = sorted(pictures.glob("*.png"))
    mixed = write_features(paths[:4], tmp_path / "features", make(), shard_size=2).folder
    other = write_features(paths[4:8], tmp_path / "other", make(), shard_size=2).folder
    (mixed / "index.parquet").write_bytes((other / "index.parquet").read_bytes())
    for read in (lambda folder: folder[0], lambda folder: folder.stack(TAP)):
        with pytest.raises(ConfigError, match=r"other pictures than index\.parquet says"):
            read(open_features(mixed))


def test_an_index_in_another_order_is_not_stacked(pictures, make, tmp_path):
    paths = sorted(pictures.glob("*.png"))[:3]
    folder = write_features(paths, tmp_path / "features", make()).folder
    index = pq.read_table(folder / "index.parquet")
    pq.write_table(index.take([2, 0, 1]), folder / "index.parquet")
    with pytest.raises(ConfigError, match=r"other pictures than index\.parquet says"):
        open_features(folder).stack(TAP)


def test_a_shard_that_was_written_anew_is_not_read_by_a_folder_opened_before(
    pictures, make, tmp_path, monkeypatch
):
    monkeypatch.setattr("diffenc.extraction.reader._OPEN_SHARDS", 1)
    paths = sorted(pictures.glob("*.png"))
    features = write_features(paths[:2], tmp_path / "features", make(), shard_size=1)
    features.stack(TAP)
    write_features(paths[4:6], features.folder, make(), shard_size=1, overwrite=True)
    with pytest.raises(ConfigError, match="written anew since it was opened"):
        features[0]


def test_pictures_of_one_name_are_refused_however_they_are_listed(pictures, make, tmp_path):
    first, second = sorted(pictures.glob("*.png"))[:2]
    names = [first, second, first]
    listing = list_pictures(names)
    assert len(listing) == 3  # for a file, in which rows have places alone
    for source in (names, listing):
        with pytest.raises(ConfigError, match=r"list of pictures names .* as pictures 1 and 3"):
            write_features(source, tmp_path / "out", make())
    assert files(tmp_path) == []


def test_texts_that_would_not_be_read_and_texts_that_are_not_there_are_refused(
    pictures, make, tmp_path
):
    table = tmp_path / "list.csv"
    table.write_text(f"image,question\n{pictures / '00.png'},a red circle\n")
    with pytest.raises(ConfigError, match="reads the texts of 'question', and the listing has no"):
        write_features(list_pictures(table), tmp_path / "out", make(prompt_column="question"))
    asked = list_pictures(table, prompt_column="question")
    for options in ({}, {"prompt": "a blue square"}):
        with pytest.raises(ConfigError, match="a text for each picture, and the extractor reads n"):
            write_features(asked, tmp_path / "out", make(**options))


def test_a_run_does_not_go_on_with_an_adapter_of_another_scale(tiny_sd_folder, pictures, tmp_path):
    for alpha in (4, 16):
        encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder, taps=TAP, size=64)
        encoder.add_lora(rank=4, alpha=alpha)
        for parameter in encoder.trainable_parameters():
            torch.nn.init.constant_(parameter, 0.1)
        encoder.save_pretrained(tmp_path / f"scale{alpha}")
    first, second = (Extractor(tmp_path / f"scale{alpha}", device="cpu") for alpha in (4, 16))
    with pytest.raises(StopError):
        write_features(pictures, tmp_path / "out", first, shard_size=4, progress=_stop)
    with pytest.raises(OutputError, match="trained on top of the model are others"):
        write_features(pictures, tmp_path / "out", second, shard_size=4)


def test_pictures_come_in_order_from_several_threads_and_not_all_at_once():
    begun, lock = [], threading.Lock()

    def decode(place):
        with lock:
            begun.append(place)
        if place == 3:
            raise ImageError("broken")
        return place * 10

    decoded = decode_ahead(range(500), decode, threads=3, ahead=8, together=2)
    first = [next(decoded) for _ in range(5)]
    assert [each.place for each in first] == [0, 1, 2, 3, 4]
    assert [each.picture for each in first] == [0, 10, 20, None, 40]
    assert str(first[3].error) == "broken"
    decoded.close()
    assert len(begun) < 40


def test_an_unforeseen_error_of_a_thread_comes_out():
    def decode(place):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(decode_ahead(range(5), decode, threads=2, ahead=2))


def test_a_digest_knows_the_same_listing_again(pictures):
    assert list_pictures(pictures).digest() == list_pictures(pictures).digest()
