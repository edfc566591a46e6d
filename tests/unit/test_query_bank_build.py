import json
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from diffenc import CrossAttnScorer, QueryBank, load_backbone
from diffenc.errors import BackboneError, ConfigError, ImageError, OutputError, ShapeError
from diffenc.scoring.bank_writing import BankWriter
from diffenc.storage.writing import locked
from marks import wrong_type

OPTIONS = {"size": 64, "timesteps": (200, 700), "layers": "up_blocks.1", "batch_size": 4}


def picture(seed, size=(64, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


@pytest.fixture(scope="module")
def backbone(tiny_sd_folder):
    return load_backbone(tiny_sd_folder)


def scorer_of(backbone, **options):
    options = {**OPTIONS, "calibration": "gray", **options}
    return CrossAttnScorer.from_pretrained(backbone, preset="paper", mode="shared-query", **options)


@pytest.fixture
def paths(tmp_path):
    """Seven pictures; two are computed at once."""
    (tmp_path / "pictures").mkdir()
    made = [tmp_path / "pictures" / f"{index}.png" for index in range(7)]
    for index, path in enumerate(made):
        picture(index).save(path)
    return made


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


class Stop(BaseException):
    """Such as a Ctrl-C: no exception that anybody catches."""


def build(scorer, paths, folder, **options):
    """A bank of one part a shard, by names that do not depend on where the pictures lie."""
    names = [path.stem for path in paths]
    return scorer.build_index(paths, folder, **{"shard_bytes": 1, "names": names, **options})


def interrupted(scorer, paths, folder, *, after=4, error=Stop, **options):
    def stop(done):
        if done >= after:
            raise error

    with pytest.raises(error):
        build(scorer, paths, folder, progress=stop, **options)


@pytest.fixture(scope="module")
def made(backbone, tmp_path_factory):
    """A bank that was built in one go, and one that was interrupted after four images."""
    folder = tmp_path_factory.mktemp("made")
    every = [folder / f"{index}.png" for index in range(7)]
    for index, path in enumerate(every):
        picture(index).save(path)
    build(scorer_of(backbone), every, folder / "whole")
    interrupted(scorer_of(backbone), every, folder / "begun")
    return folder


@pytest.fixture
def whole(made):
    return files_of(made / "whole")


@pytest.fixture
def begun(made, tmp_path):
    shutil.copytree(made / "begun", tmp_path / "bank")
    return tmp_path / "bank"


class TestGoingOn:
    def test_the_same_call_goes_on_and_gives_the_same_files(
        self, backbone, paths, begun, whole, monkeypatch
    ):
        with pytest.raises(BackboneError, match="it was begun, and the same call"):
            QueryBank.load(begun, backbone=backbone)
        calls, forward = [], backbone.unet.forward
        monkeypatch.setattr(
            backbone.unet, "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1]
        )
        done = []
        bank = build(scorer_of(backbone), paths, begun, progress=done.append)
        assert done == [4, 6, 7]
        assert len(calls) == 3  # two parts of images, one of the reference
        assert files_of(begun) == whole
        assert bank.names == tuple("0123456")

    @pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
    def test_however_it_was_interrupted(self, backbone, paths, tmp_path, whole, error):
        interrupted(scorer_of(backbone), paths, tmp_path / "bank", after=6, error=error)
        done = []
        build(scorer_of(backbone), paths, tmp_path / "bank", progress=done.append)
        assert done == [6, 7]
        assert files_of(tmp_path / "bank") == whole

    @pytest.mark.long
    def test_shards_of_several_parts_end_where_they_would_have(self, backbone, paths, tmp_path):
        scorer, options = scorer_of(backbone), {"shard_bytes": 3_000}
        build(scorer, paths, tmp_path / "whole", **options)
        assert 1 < len(list((tmp_path / "whole").glob("*.safetensors"))) < 5
        for after in (2, 6):
            folder = tmp_path / f"bank{after}"
            interrupted(scorer, paths, folder, after=after, **options)
            build(scorer, paths, folder, **options)
            assert files_of(folder) == files_of(tmp_path / "whole")

    def test_what_a_killed_program_leaves_is_put_right(self, backbone, paths, begun, whole):
        (begun / ".0123456789ab.partial.safetensors").write_bytes(b"half")
        (begun / ".ba9876543210.partial.json").write_bytes(b"{")
        content = (begun / "queries-00000.safetensors").read_bytes()
        (begun / "queries-00001.safetensors").write_bytes(content)
        done = []
        build(scorer_of(backbone), paths, begun, progress=done.append)
        assert done[0] == 2
        assert files_of(begun) == whole

    @pytest.mark.parametrize("damage", ["cut off", "changed"])
    def test_a_shard_that_is_not_whole_is_written_again(
        self, backbone, paths, begun, whole, damage
    ):
        path = begun / "queries-00000.safetensors"
        content = path.read_bytes()
        last = b"" if damage == "cut off" else bytes([content[-1] ^ 1])
        path.write_bytes(content[:-1] + last)
        done = []
        build(scorer_of(backbone), paths, begun, progress=done.append)
        assert done[0] == 0
        assert files_of(begun) == whole

    def test_when_only_the_table_of_contents_is_missing(
        self, backbone, paths, tmp_path, whole, monkeypatch
    ):
        def fail(*_args):
            raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(BankWriter, "finish", fail)
            with pytest.raises(Stop):
                build(scorer_of(backbone), paths, tmp_path / "bank")
        monkeypatch.setattr(backbone.unet, "forward", fail)
        build(scorer_of(backbone), paths, tmp_path / "bank")
        assert files_of(tmp_path / "bank") == whole

    def test_a_full_disk_leaves_what_is_whole(self, backbone, paths, begun, whole, monkeypatch):
        def full(tensors, path, metadata=None):
            path.write_bytes(b"half a shard")
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(safetensors.torch, "save_file", full)
            with pytest.raises(OutputError, match="No space left on device"):
                build(scorer_of(backbone), paths, begun)
        assert not [path for path in begun.iterdir() if ".partial" in path.name]
        done = []
        build(scorer_of(backbone), paths, begun, progress=done.append)
        assert done[0] == 4
        assert files_of(begun) == whole

    @pytest.mark.slow
    def test_a_killed_program_is_gone_on_with(
        self, tiny_sd_folder, backbone, paths, tmp_path, whole
    ):
        code = f"""
import os, signal
from diffenc import CrossAttnScorer
def kill(done):
    if done >= 4:
        os.kill(os.getpid(), signal.SIGKILL)
scorer = CrossAttnScorer.from_pretrained(
    {str(tiny_sd_folder)!r}, preset="paper", mode="shared-query", calibration="gray", **{OPTIONS!r}
)
scorer.build_index({list(map(str, paths))!r}, {str(tmp_path / "bank")!r}, progress=kill,
                   names=list("0123456"), shard_bytes=1)
"""
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
        done = []
        build(scorer_of(backbone), paths, tmp_path / "bank", progress=done.append)
        assert done[0] == 4
        assert files_of(tmp_path / "bank") == whole


class TestOtherCalls:
    def refused(self, scorer, paths, folder, match, **options):
        before = files_of(folder)
        with pytest.raises(OutputError, match=match):
            build(scorer, paths, folder, **options)
        assert files_of(folder) == before

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"seed": 1}, "config.seed was 0, is 1"),
            ({"timesteps": (200, 600)}, r"config.timesteps was \[200, 700\], is \[200, 600\]"),
            ({"layers": "mid_block"}, "config.layers was .*, is .*layers were 3, are 1"),
            ({"calibration": "neutral"}, "config.calibration was gray, is neutral"),
            ({"size": (64, 32)}, r"config.size was 64, is \[64, 32\]"),
        ],
        ids=str,
    )
    def test_another_config_says_what_differs(self, backbone, paths, begun, options, match):
        self.refused(scorer_of(backbone, **options), paths, begun, match)

    def test_other_images_say_what_differs(self, backbone, paths, begun):
        scorer = scorer_of(backbone)
        self.refused(scorer, paths[:-1], begun, "names were 7, are 6")
        self.refused(scorer, paths[::-1], begun, "names differ at 0, 1, 2, ..., the first from 0")
        picture(99).save(paths[5])
        self.refused(scorer, paths, begun, "pictures differ at 5, the first from 0")

    def test_other_types_and_sizes_of_files_say_so(self, backbone, paths, begun):
        scorer = scorer_of(backbone)
        self.refused(scorer, paths, begun, "dtype was float16, is bfloat16", dtype=torch.bfloat16)
        self.refused(scorer, paths, begun, "shard_bytes was 1, is 9", shard_bytes=9)

    @pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
    def test_other_weights_say_of_which_part(self, tiny_sd_folder, paths, begun, part):
        other = load_backbone(tiny_sd_folder)
        next(getattr(other, part).parameters()).mul_(1.001)
        self.refused(scorer_of(other), paths, begun, f"weights.{part} was")

    def test_other_types_of_the_model_say_so(self, tiny_sd_folder, paths, begun):
        other = load_backbone(tiny_sd_folder, dtype=torch.bfloat16)
        self.refused(scorer_of(other), paths, begun, "computed was float32 on cpu, is bfloat16 on")

    def test_begun_anew_on_request(self, backbone, paths, begun):
        bank = build(scorer_of(backbone, seed=1), paths[:3], begun, overwrite=True)
        assert (len(bank), bank.config.seed) == (3, 1)
        assert len(list(begun.glob("*.safetensors"))) == 3

    def test_nothing_is_lost_where_no_shard_is_there(self, backbone, paths, begun):
        for path in begun.glob("*.safetensors"):
            path.unlink()
        assert len(build(scorer_of(backbone, seed=1), paths[:2], begun)) == 2

    def test_a_plan_that_cannot_be_read(self, backbone, paths, begun):
        (begun / "plan.json").write_text("{")
        self.refused(scorer_of(backbone), paths, begun, r"plan\.json.*begin anew with overwrite")

    def test_complete_banks_are_left_alone_unless_on_request(self, backbone, paths, made, tmp_path):
        shutil.copytree(made / "whole", tmp_path / "bank")
        scorer = scorer_of(backbone)
        self.refused(scorer, paths, tmp_path / "bank", "holds a complete bank")
        assert len(build(scorer, paths[:2], tmp_path / "bank", overwrite=True)) == 2
        assert len(list((tmp_path / "bank").glob("*.safetensors"))) == 2

    def test_other_folders_are_not_overwritten_on_request(self, backbone, paths, tmp_path):
        (tmp_path / "letters").mkdir()
        (tmp_path / "letters" / "letter.txt").write_text("dear")
        scorer = scorer_of(backbone)
        self.refused(scorer, paths, tmp_path / "letters", "is not empty", overwrite=True)
        with pytest.raises(OutputError, match="is no folder"):
            build(scorer, paths, paths[0])
        with pytest.raises(OutputError, match="cannot write"):
            build(scorer, paths, paths[0] / "bank")


class TestOneWriter:
    def test_a_second_one_is_refused(self, backbone, paths, tmp_path):
        scorer = scorer_of(backbone)
        refusals = []

        def second(done):
            if done == 2:
                with pytest.raises(
                    OutputError, match="another program is building this index"
                ) as e:
                    scorer.build_index(paths, tmp_path / "bank", overwrite=True)
                refusals.append(e)

        bank = scorer.build_index(paths, tmp_path / "bank", progress=second)
        assert (len(bank), len(refusals)) == (7, 1)

    def test_two_threads_make_one_bank(self, backbone, paths, tmp_path):
        results = []

        def build(seed):
            try:
                results.append(scorer_of(backbone, seed=seed).build_index(paths, tmp_path / "bank"))
            except OutputError as error:
                results.append(error)

        threads = [threading.Thread(target=build, args=(seed,)) for seed in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (bank,) = (each for each in results if isinstance(each, QueryBank))
        scorer = scorer_of(backbone, seed=bank.config.seed)
        torch.testing.assert_close(bank.scores("red"), scorer(paths, "red"), rtol=0, atol=2e-3)

    def test_a_lock_that_somebody_holds(self, backbone, paths, tmp_path):
        (bank := tmp_path / "bank").mkdir()
        with (
            locked(bank, purpose="building this index"),
            pytest.raises(OutputError, match="in use"),
        ):
            scorer_of(backbone).build_index(paths, bank)
        assert len(scorer_of(backbone).build_index(paths[:1], bank)) == 1


class TestBrokenPictures:
    @pytest.fixture
    def broken(self, paths):
        paths[2].write_bytes(b"no picture")
        paths[5].write_bytes(paths[5].read_bytes()[:60])
        paths[6].unlink()
        return [paths[2], paths[5], paths[6]]

    def test_all_are_named_before_the_first_pass(
        self, backbone, paths, broken, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(backbone.unet, "forward", None)
        with pytest.raises(
            ImageError, match=r"3 of 7 images are broken.*skip_broken=True"
        ) as error:
            scorer_of(backbone).build_index(paths, tmp_path / "bank")
        assert all(str(path) in str(error.value) for path in broken)
        assert not (tmp_path / "bank").exists()

    def test_the_others_have_their_own_scores(self, backbone, paths, broken, tmp_path):
        scorer = scorer_of(backbone)
        bank = scorer.build_index(paths, tmp_path / "bank", dtype=torch.float32, skip_broken=True)
        whole = [path for path in paths if path not in broken]
        assert bank.names == tuple(map(str, whole))
        scores = scorer(whole, ["red", "blue"])
        torch.testing.assert_close(bank.scores(["red", "blue"]), scores, rtol=0, atol=1e-5)
        again = QueryBank.load(tmp_path / "bank", backbone=backbone)
        assert [name for name, _ in again.skipped] == [str(path) for path in broken]
        assert "cannot read the image" in again.skipped[0][1]
        assert "no such image file" in again.skipped[2][1]

    def test_names_stay_with_their_images(self, backbone, broken, paths, tmp_path):
        scorer = scorer_of(backbone)
        options = {"names": list("abcdefg"), "skip_broken": True}
        bank = scorer.build_index(paths, tmp_path / "bank", **options)
        assert bank.names == tuple("abde")
        assert [name for name, _ in bank.skipped] == list("cfg")

    def test_a_bank_of_nothing_but_broken_ones_is_none(self, backbone, tmp_path):
        with pytest.raises(ImageError, match="2 of 2 images are broken; mend them: "):
            scorer_of(backbone).build_index(["a.png", "b.png"], tmp_path / "x", skip_broken=True)

    def test_going_on_without_the_broken_ones(self, backbone, paths, broken, tmp_path):
        scorer = scorer_of(backbone)
        build(scorer, paths, tmp_path / "whole", skip_broken=True)
        interrupted(scorer, paths, tmp_path / "bank", after=2, skip_broken=True)
        build(scorer, paths, tmp_path / "bank", skip_broken=True)
        assert files_of(tmp_path / "bank") == files_of(tmp_path / "whole")

    def test_a_picture_that_changes_in_between_is_not_taken(self, backbone, paths, tmp_path):
        def exchange(done):
            if done == 2:
                picture(42).save(paths[6])

        with pytest.raises(ImageError, match=r"6\.png was changed while the bank was built"):
            scorer_of(backbone).build_index(paths, tmp_path / "bank", progress=exchange)


class TestNames:
    @pytest.mark.parametrize(
        ("names", "error", "match"),
        [
            (["a"], ShapeError, "got 1 names for 2 images"),
            ([], ShapeError, "got 0 names for 2 images"),
            ("ab", ConfigError, "must be a list of texts, got the text 'ab'"),
            wrong_type(["a", 1], ConfigError, "must be texts, got int for image 1"),
            wrong_type(["a", None], ConfigError, "must be texts, got NoneType for image 1"),
            (["a", "a"], ConfigError, "images 0 and 1 have the same name, 'a'"),
            (["a", "\udcff"], ConfigError, "no valid Unicode"),
        ],
        ids=str,
    )
    def test_one_text_for_each_image(self, backbone, tmp_path, names, error, match):
        with pytest.raises(error, match=match):
            scorer_of(backbone).build_index(
                [picture(0), picture(1)], tmp_path / "bank", names=names
            )
        assert not (tmp_path / "bank").exists()

    def test_names_of_any_text_come_back_as_they_were(self, backbone, tmp_path):
        names = ["", "a\u2028b\n\x00", "\U0001f600/../x", "'\"\\"]
        images = [picture(k) for k in range(4)]
        scorer_of(backbone).build_index(images, tmp_path, names=names)
        assert QueryBank.load(tmp_path, backbone=backbone).names == tuple(names)

    def test_an_image_given_twice_needs_names(self, backbone, paths, tmp_path):
        twice = [paths[0], paths[0]]
        with pytest.raises(ConfigError, match="give each image once, or pass names="):
            scorer_of(backbone).build_index(twice, tmp_path / "bank")
        bank = scorer_of(backbone).build_index(twice, tmp_path / "bank", names=["a", "b"])
        first, second = bank.search("red", top=2)[0]
        assert first.score == second.score

    @pytest.mark.parametrize("shard_bytes", [0, -1, wrong_type(1.5), True])
    def test_sizes_of_files_are_positive(self, backbone, paths, tmp_path, shard_bytes):
        with pytest.raises(ConfigError, match="shard_bytes must be an int of 1 or more"):
            scorer_of(backbone).build_index(paths, tmp_path / "x", shard_bytes=shard_bytes)

    def test_types_are_those_of_files(self, backbone, paths, tmp_path):
        for dtype in (torch.float64, torch.int8):
            with pytest.raises(ConfigError, match="dtype must be one of"):
                scorer_of(backbone).build_index(paths, tmp_path / "x", dtype=dtype)


def test_whole_pictures_of_odd_sizes(backbone, tmp_path):
    """Sides that levels of the U-Net do not halve evenly."""
    images = [picture(k, (40, 72)) for k in range(3)]
    scorer = scorer_of(backbone, size=None, resize="none", layers="all")
    bank = scorer.build_index(images, tmp_path / "bank", dtype=torch.float32)
    torch.testing.assert_close(bank.scores("red"), scorer(images, "red"), rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "bank" / "bank.json").read_text())["size"] == [40, 72]
    with pytest.raises(ShapeError, match=r"one size, got .* and for image 1"):
        scorer.build_index([images[0], picture(9)], tmp_path / "other")
    assert not (tmp_path / "other").exists()
