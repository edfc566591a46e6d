"""One extractor under plain Python, `datasets` and Ray Data; skipped where those are not there."""

import os
import signal

import numpy as np
import pytest
from PIL import Image

from diffenc import Extractor

TAP = "mid_block"
COUNT = 24


@pytest.fixture(scope="module")
def extractor(tiny_sd_folder):
    return Extractor(
        str(tiny_sd_folder),
        taps=TAP,
        size=64,
        pool="mean",
        prompt_column="question",
        device="cpu",
        batch_size=4,
        threads=1,
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    listed = []
    for place in range(COUNT):
        path = folder / f"{place:02d}.png"
        Image.fromarray(noise.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
        listed.append({"image": str(path), "question": f"text {place % 3}", "id": place})
    return listed


@pytest.fixture(scope="module")
def plain(extractor, rows):
    """The features of plain Python."""
    return extractor({name: [row[name] for row in rows] for name in rows[0]})


def columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_datasets_map_gives_the_same_and_is_cached(extractor, rows, plain, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        image=datasets.Image(), question=datasets.Value("string"), id=datasets.Value("int64")
    )
    table = datasets.Dataset.from_dict(columns(rows), features=features)
    mapped = table.map(extractor, batched=True, batch_size=7, remove_columns=["image"])
    assert mapped["id"][:] == list(range(COUNT))
    mapped_rows = np.asarray(mapped.with_format("numpy")[TAP][:])
    np.testing.assert_allclose(mapped_rows, plain[TAP], rtol=1e-4, atol=1e-5)
    extractor.encoder  # noqa: B018  # loaded or not makes no other recipe
    again = table.map(extractor, batched=True, batch_size=7, remove_columns=["image"])
    assert again._fingerprint == mapped._fingerprint


def killed_once():
    """A class of extractors whose process is killed once, in the middle of the work.

    It is made here because Ray sends a class of a function whole. One of a module it sends by name,
    and its workers would have to import this file, which needs more of the tests' own modules.
    """

    class KilledOnce(Extractor):
        def __init__(self, marker, kill, **options):
            super().__init__(**options)
            self._marker, self._kill, self._calls = marker, kill, 0

        def __call__(self, batch):
            self._calls += 1
            if self._kill and self._calls == 2:
                try:
                    os.close(os.open(self._marker, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    pass
                else:
                    os.kill(os.getpid(), signal.SIGKILL)
            result = super().__call__(batch)
            return {**result, "worker": np.full(len(result["id"]), os.getpid())}

    return KilledOnce


@pytest.fixture(scope="module")
def ray():
    library = pytest.importorskip("ray", reason="the extra ray is not installed")
    library.init(num_cpus=2)
    yield library
    library.shutdown()


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kill", [False, True], ids=["two workers", "one of them killed"])
def test_ray_loses_nothing_and_doubles_nothing(ray, extractor, rows, plain, tmp_path, kill):
    marker = tmp_path / "killed"
    options = {"marker": str(marker), "kill": kill, **extractor.to_dict()}
    result = (
        ray.data.from_items(rows, override_num_blocks=8)
        .map_batches(
            killed_once(),
            fn_constructor_kwargs=options,
            batch_size=3,
            compute=ray.data.ActorPoolStrategy(size=2),
            num_cpus=0.5,
        )
        .take_all()
    )
    assert marker.exists() == kill
    assert sorted(row["id"] for row in result) == list(range(COUNT))
    assert len({row["worker"] for row in result}) >= 2
    for row in result:
        np.testing.assert_allclose(row[TAP], plain[TAP][row["id"]], rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
def test_ray_takes_the_object_itself_in_tasks(ray, extractor, rows, plain):
    table = ray.data.from_items(rows, override_num_blocks=2)
    result = table.map_batches(extractor, batch_size=6).take_all()
    assert sorted(row["id"] for row in result) == list(range(COUNT))
    for row in result:
        np.testing.assert_allclose(row[TAP], plain[TAP][row["id"]], rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
def test_ray_reads_pictures_and_writes_features(ray, extractor, rows, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    recipe = {**extractor.to_dict(), "prompt_column": None, "prompt": "what is it?"}
    paths = [row["image"] for row in rows]
    (
        ray.data.read_images(paths, include_paths=True)
        .map_batches(
            Extractor,
            fn_constructor_kwargs=recipe,
            batch_size=5,
            compute=ray.data.ActorPoolStrategy(size=2),
            num_cpus=0.5,
        )
        .write_parquet(str(tmp_path / "features"), mode="overwrite")
    )
    written = parquet.read_table(tmp_path / "features").to_pydict()
    assert sorted(written["path"]) == paths
    plain = dict(zip(paths, Extractor(**recipe)({"image": paths})[TAP], strict=True))
    for path, features in zip(written["path"], written[TAP], strict=True):
        np.testing.assert_allclose(features, plain[path], rtol=1e-4, atol=1e-5)
