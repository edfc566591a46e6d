"""Whatever stands in a file: a reader gives a result, or raises one of diffenc's own errors."""

import json
import random
import shutil
import zipfile

import pytest
import torch

from answers_data import coco, karpathy, llava_bench, mmvp, shade
from diffenc.clip.captioner import ImplicitCaptioner
from diffenc.config import EncoderConfig
from diffenc.denoiser.lora import read_origin
from diffenc.errors import DiffencError
from diffenc.evals.captioning import load_coco_captions, load_karpathy
from diffenc.evals.choices import load_mmvp
from diffenc.evals.files import DatasetFiles
from diffenc.evals.llava_bench import load_llava_bench
from diffenc.evals.matching.evaluate import evaluate, scores_file
from diffenc.evals.matching.miniature import shapes_benchmark
from diffenc.evals.matching.mmvp_vlm import load_mmvp_vlm
from diffenc.evals.matching.winoground import load_winoground
from diffenc.evals.records import ANSWERS, RecordsFile
from diffenc.evals.rows import Column, read_parquet
from diffenc.grounding.reading import find_phrases
from diffenc.hosts.fused_encoders import find_companion
from diffenc.mllm.model_folder import read_saved
from diffenc.mllm.training import read_log
from diffenc.mllm.training.config import TrainConfig
from diffenc.mllm.training.data import read_samples
from diffenc.models.encoder_folder import Contents, read_config, write_config
from diffenc.projector import FusedProjector, Projector
from diffenc.scoring.config import ScorerConfig
from diffenc.scoring.saved import read_scorer
from diffenc.studies.vlm.measure import Measured
from diffenc.studies.vlm.plan_file import bundled_text, read_plan
from diffenc.studies.vlm.study import read_measured
from evals_data import RandomMatcher, mmvp_vlm, winoground_jsonl, write_csv
from hostile import Reader, changed
from phrases_data import every_layout

RECORDS = [
    {
        "id": f"a{index}",
        "image": "0.jpg",
        "captions": ["a \u2028 b"],
        "conversations": [
            {"from": "human", "value": "<image>\nwhat?"},
            {"from": "gpt", "value": "ü"},
        ],
    }
    for index in range(3)
]
TRAIN = """stage = "align"
output = "run"
[data]
annotations = "a.json"
images = "images"
limit = 5
[model]
encoder = "shapes"
options = { timestep = [50, 100], taps = ["mid_block"], guidance_scale = 1.5 }
[optim]
learning_rate = 0.001
warmup = 0.03
"""


def items_of(benchmark):
    """What a benchmark's files say, without the functions that read pictures."""
    fields = ("id", "captions", "labels", "question", "text", "options", "answer", "references")
    items = [[getattr(item, name, None) for name in fields] for item in benchmark.items]
    return items, benchmark.problems


def write(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def json_lines(values):
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def configs(folder):
    yield "train.toml", write(folder, "a.toml", TRAIN), TrainConfig.read
    yield "plan.toml", write(folder, "p.toml", bundled_text("prompts")), lambda p: read_plan("x", p)
    encoder = folder / "encoder"
    encoder.mkdir()
    config = EncoderConfig(taps=("mid_block",), grid=(3, 4))
    write_config(encoder, config, Contents(backbone="shapes", parts={"unet": "x"}))
    yield "encoder", encoder / "config.json", lambda p: read_config(p.parent)
    scorer = {"backbone": "shapes", "parts": {}, **ScorerConfig(layers=("a",)).to_dict()}
    path = write(folder / "scorer", "scorer_config.json", scorer)
    yield "scorer", path, lambda p: ScorerConfig.from_dict(read_scorer(p.parent).options)
    saved = {
        "encoder": {"kind": "vision", "name": "x", "layer": -2},
        "language_model": "lm",
        "lora": False,
        "template": "v1",
        "system": None,
        "prompt_policy": "question",
        "image_batch_size": 4,
    }
    yield "vlm", write(folder / "vlm", "vlm.json", saved), lambda p: read_saved(p.parent)
    noted = {"backbone": "shapes", "taps": ["mid_block"], "fingerprint": [0.5] * 6}
    path = write(folder / "lora", "diffenc.json", noted)
    yield "lora note", path, lambda p: read_origin(p.parent)
    vision = {"vision_config": {"image_size": 32, "patch_size": 8, "hidden_size": 16}}
    path = write(folder / "clip", "config.json", vision)
    yield "companion", path, lambda p: find_companion(str(p.parent))
    measured = {"figures": {"a": 1.5, "b": None}, "examples": [{"given": "x", "said": "y"}]}
    yield "measured", write(folder, "m.json", measured), read_measured


def weights(folder):
    Projector(6, 4, "linear", norm_channels=(2, 4)).save_pretrained(folder / "one")
    FusedProjector((6, 4), 4, "linear", how="interleave").save_pretrained(folder / "two")
    ImplicitCaptioner(6, 4, length=5).save_pretrained(folder / "captioner")
    for name, kind in (
        ("one", Projector),
        ("two", FusedProjector),
        ("captioner", ImplicitCaptioner),
    ):
        for path in sorted((folder / name).iterdir()):
            yield (
                f"{name}, {path.suffix}",
                path,
                lambda p, kind=kind: kind.from_pretrained(p.parent),
            )
    Projector(6, 4).save_llava(folder / "a.bin")
    yield "llava", folder / "a.bin", lambda p: Projector(6, 4).load_llava(p)


def datasets(folder):
    path = winoground_jsonl(folder / "winoground") / "examples.jsonl"
    write(path.parent, "why_winoground_hard.json", {"0": ["a", "b"], "1": "c"})
    yield "winoground", path, lambda p: items_of(load_winoground(p.parent))
    hard = path.parent / "why_winoground_hard.json"
    yield "hard", hard, lambda p: items_of(load_winoground(p.parent))
    path = mmvp_vlm(folder / "mmvp-vlm") / "Questions.csv"
    yield "mmvp-vlm", path, lambda p: items_of(load_mmvp_vlm(p.parent))
    path = mmvp(folder / "mmvp") / "Questions.csv"
    yield "mmvp", path, lambda p: items_of(load_mmvp(p.parent))
    bench = llava_bench(folder / "bench")
    rule = {f"llava_bench_{name}": {"prompt": "p", "role": "r"} for name in ("conv", "detail")}
    write(bench, "rule.json", rule)
    for name in ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl", "rule.json"):
        yield name, bench / name, lambda p: items_of(load_llava_bench(p.parent))
    path, images = coco(folder / "coco")
    yield "coco", path, lambda p, images=images: items_of(load_coco_captions(p, images))
    path, images = karpathy(folder / "karpathy")
    yield "karpathy", path, lambda p, images=images: items_of(load_karpathy(p, images))
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a.txt", "b/c.txt"):
            archive.writestr(name, f"{name} text" * 5)
    yield "zip", folder / "a.zip", read_whole_archive
    yield from parquet(folder)
    images, paths = every_layout(folder / "phrases")
    for name, path in paths.items():
        yield name, path, lambda p, images=images: find_phrases(p, images)


def read_whole_archive(path):
    files = DatasetFiles(path)
    return {name: files.reader(name)() for name in files.names}


def parquet(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    path = folder / "a.parquet"
    rows = [{"id": k, "text": "ü" * k, "image": {"bytes": b"x"}} for k in range(5)]
    pq.write_table(pyarrow.Table.from_pylist(rows), path)
    columns = (Column("id"), Column("text"), Column("image", kind="any"))

    def read(path):
        table = read_parquet([path], columns, ("image",), path.name)
        return [(row.text("id"), row.text("text")) for row in table.rows], table.problems

    yield "parquet", path, read


def records(folder):
    images = folder / "images"
    images.mkdir(parents=True)
    shade(1).save(images / "0.jpg")
    for name, text in (("s.json", json.dumps(RECORDS)), ("s.jsonl", json_lines(RECORDS))):
        yield name, write(folder, name, text), lambda p: read_samples(p, images)
    log = json_lines({"step": k, "loss": 0.5, "learning_rate": 1e-3} for k in range(1, 5))
    yield "log", write(folder / "run", "log.jsonl", log), lambda p: read_log(p.parent)
    benchmark = shapes_benchmark("winoground", per_label=1)
    scores = folder / "scores" / "scores.jsonl"
    scores.parent.mkdir()
    evaluate(benchmark, [RandomMatcher()], trials=2, results=scores)
    yield "scores", scores, lambda p: opened(lambda: scores_file(p, benchmark))
    answers = folder / "answers" / "answers.jsonl"
    answers.parent.mkdir()
    with RecordsFile(answers, ANSWERS, {"task": "task"}) as file:
        file.add_model("me", {"a": [1, 2]})
        for item in "abc":
            file.add(("me", "pass 1", item), "digest", f"answer \u2028 {item}")
    yield "answers", answers, lambda p: opened(lambda: RecordsFile(p, ANSWERS, {"task": "task"}))


def opened(make):
    with make() as file:
        return dict(file._values)


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    found = []
    for kind in (configs, weights, datasets, records):
        (folder / kind.__name__).mkdir()
        for name, path, read in kind(folder / kind.__name__):
            found.append(Reader(name, path, lambda path=path, read=read: read(path)))
    assert len({reader.name for reader in found}) == len(found) > 25
    return found


def refused_or_read(reader, content):
    """Whether a reader refuses a content; every error but diffenc's own passes on."""
    reader.path.write_bytes(content)
    return refused(reader)


def refused(reader):
    error = None
    try:
        reader.read()
    except DiffencError as raised:
        error = raised
    str(error).encode()  # a message that every terminal takes
    return error is not None


def fuzz(readers, count):
    counts = {}
    for reader in readers:
        whole = reader.path.read_bytes()
        rng = random.Random(reader.name)
        try:
            reader.read()
            contents = (changed(reader.path, whole, rng) for _ in range(count))
            counts[reader.name] = sum(refused_or_read(reader, each) for each in contents)
        finally:
            reader.path.write_bytes(whole)
    return counts


@pytest.mark.long
def test_files_changed_at_random_raise_nothing_else(readers):
    counts = fuzz(readers, 30)
    assert sum(counts.values()) > 8 * len(counts)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_many_more_changes_of_each_file_raise_nothing_else(readers):
    counts = fuzz(readers, 600)
    assert sum(counts.values()) > 300 * len(counts)


HOSTILE = {
    "nothing": b"",
    "a null": b"null",
    "a number": b"3",
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
    "a long number": b"9" * 100_000,
    "UTF-16": '{"id": 1}'.encode("utf-16"),
    "null bytes": bytes(1000),
    "a lone mark": b"\xef\xbb\xbf",
    "a quote": b'"',
    "blank lines": b"\n" * 1000,
    "an unclosed quote": b'a,b\n"c,d\n',
    "PK": b"PK\x03\x04" + bytes(200),
    "an archive of nothing": b"PK\x05\x06" + bytes(18),
    "a long line": b"x" * 200_000,
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_files_of_something_else_raise_nothing_else(readers, content):
    for reader in readers:
        whole = reader.path.read_bytes()
        try:
            refused_or_read(reader, content)
        finally:
            reader.path.write_bytes(whole)


def test_files_that_are_missing_or_folders_raise_nothing_else(readers, tmp_path):
    for reader in readers:
        shutil.move(reader.path, tmp_path / "kept")
        try:
            refused(reader)
            reader.path.unlink(missing_ok=True)  # records begin anew where there are none
            reader.path.mkdir()
            refused(reader)
        finally:
            reader.path.rmdir()
            shutil.move(tmp_path / "kept", reader.path)


SAME = ("train.toml", "winoground", "mmvp-vlm", "questions.jsonl", "coco", "s.json", "s.jsonl")


@pytest.mark.parametrize("name", SAME)
def test_marks_and_line_ends_change_nothing(readers, name):
    reader = next(each for each in readers if each.name == name)
    whole = reader.path.read_bytes()
    expected = reader.read()
    try:
        for content in (b"\xef\xbb\xbf" + whole, whole.replace(b"\n", b"\r\n"), whole + b"\n\n"):
            reader.path.write_bytes(content)
            assert reader.read() == expected
    finally:
        reader.path.write_bytes(whole)


def test_a_table_of_other_types_is_told_row_by_row(tmp_path):
    path = winoground_jsonl(tmp_path) / "examples.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row, (key, value) in zip(
        rows, (("id", [1]), ("caption_0", {"a": 1}), ("caption_1", 5)), strict=True
    ):
        row[key] = value
    path.write_text(json_lines(rows), encoding="utf-8")
    data = load_winoground(tmp_path)
    assert not data.items
    assert [problem.kind for problem in data.problems] == ["broken rows"] * 3
    assert "id is no text and no number, but list" in data.problems[0].detail


@pytest.mark.parametrize(
    "header", [["Question ID", "Type", "Statement", "Statement"], ["id", "Question ID", "a", "b"]]
)
def test_a_column_that_stands_twice_is_refused(tmp_path, header):
    mmvp_vlm(tmp_path)
    text = (tmp_path / "Questions.csv").read_text(encoding="utf-8")
    body = "".join(f"{line},x\n" for line in text.splitlines()[1:])
    (tmp_path / "Questions.csv").write_text(",".join(header) + "\n" + body, encoding="utf-8")
    with pytest.raises(DiffencError, match=r"'Statement' twice|no column 'Type'"):
        load_mmvp_vlm(tmp_path)


@pytest.mark.parametrize("text", ["1.05", "1.0.0", "9" * 400, "\uff11", "-1", "1e3", "", "True"])
def test_numbers_of_questions_are_plain(tmp_path, text):
    mmvp_vlm(tmp_path)
    path = tmp_path / "Questions.csv"
    content = path.read_text(encoding="utf-8").split("\n")
    content[1] = content[1].replace("1,", f"{text},", 1)
    path.write_text("\n".join(content), encoding="utf-8")
    kinds = {problem.kind for problem in load_mmvp_vlm(tmp_path).problems}
    assert "ids that are no number" in kinds


def test_half_a_caption_file_of_coco_counts_what_it_lacks(tmp_path):
    path, images = coco(tmp_path)
    content = json.loads(path.read_text())
    content["images"][0]["id"] = [1]
    content["images"].append(dict(content["images"][1]))
    content["images"].append({"id": True, "file_name": "a.jpg"})
    content["annotations"] += [
        {"image_id": 1.5, "caption": "a"},
        {"image_id": content["images"][1]["id"], "caption": ["a"]},
        "a",
    ]
    path.write_text(json.dumps(content))
    kinds = [problem.kind for problem in load_coco_captions(path, images).problems]
    assert kinds.count("broken annotations") == 3
    assert kinds.count("broken images") == 2
    assert kinds.count("ids that occur twice") == 1


def test_weights_that_a_config_only_promises_take_no_memory(tmp_path):
    Projector(6, 4, "linear").save_pretrained(tmp_path)
    path = tmp_path / "projector.json"
    told = json.loads(path.read_text())
    for change in (
        {"out_features": 10**15},
        {"out_features": 2**63},
        {"kind": "mlp99x_gelu", "out_features": 10**8},
    ):
        path.write_text(json.dumps({**told, **change}))
        with pytest.raises(DiffencError):
            Projector.from_pretrained(tmp_path)
    for change in ({"kind": f"mlp{10**9}x_gelu"}, {"in_features": "6"}, {"extra": 1}):
        path.write_text(json.dumps({**told, **change}))
        with pytest.raises(DiffencError, match="does not hold"):
            Projector.from_pretrained(tmp_path)


def test_a_csv_of_tables_in_utf_16_is_refused_in_a_sentence(tmp_path):
    mmvp_vlm(tmp_path)
    path = tmp_path / "Questions.csv"
    path.write_bytes(path.read_text(encoding="utf-8").encode("utf-16"))
    with pytest.raises(DiffencError, match=r"Questions\.csv is not in UTF-8 but in UTF-16"):
        load_mmvp_vlm(tmp_path)


def test_a_dataset_of_many_rows_in_a_small_parquet_file_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"id": pyarrow.repeat(7, 1_000_001)})
    pq.write_table(table, path)
    assert path.stat().st_size < 100_000
    with pytest.raises(DiffencError, match="1,000,001 rows"):
        read_parquet([path], (Column("id"),), (), "a.parquet")
    wrong = pyarrow.table({"id": [[1], [2]]})
    pq.write_table(wrong, path)
    table = read_parquet([path], (Column("id"),), (), "a.parquet")
    assert len(table.problems) == 2


def test_measured_figures_that_are_none_are_refused(tmp_path):
    path = tmp_path / "m.json"
    assert read_measured(path) is None
    path.write_text('{"figures": {"a": 1.5}, "examples": []}')
    assert read_measured(path) == Measured({"a": 1.5})
    for text in ('{"figures": {"a": NaN}}', '{"figures": {"a": "1"}}', '{"figures": [1]}', "{"):
        path.write_text(text)
        with pytest.raises(DiffencError, match="Remove it to measure again"):
            read_measured(path)


def test_weights_that_are_no_numbers_are_refused_everywhere(tmp_path):
    from safetensors.torch import load_file, save_file

    for kind, made in ((Projector, Projector(6, 4)), (ImplicitCaptioner, ImplicitCaptioner(6, 4))):
        folder = tmp_path / kind.__name__
        made.save_pretrained(folder)
        path = next(folder.glob("*.safetensors"))
        whole = load_file(path)
        name = next(iter(whole))
        for value in (torch.full_like(whole[name], torch.nan), whole[name].long()):
            save_file({**whole, name: value}, path)
            with pytest.raises(DiffencError, match=r"NaN or infinity|floats|another model's"):
                kind.from_pretrained(folder)


def test_tables_written_with_quotes_are_read(tmp_path):
    write_csv(tmp_path / "a.csv", [{"a": 'x, "y"\nz'}])
    assert DatasetFiles(tmp_path).names == ["a.csv"]
