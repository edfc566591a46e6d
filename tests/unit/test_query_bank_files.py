import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffenc import CrossAttnScorer, QueryBank, load_backbone
from diffenc.errors import BackboneError, ConfigError, NonFiniteError, PromptError, ShapeError
from marks import wrong_type

SHARDS = [f"queries-{index:05d}.safetensors" for index in range(4)]


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 80, 3), np.uint8))


@pytest.fixture(scope="module")
def backbone(tiny_sd_folder):
    return load_backbone(tiny_sd_folder)


def scorer_of(backbone, **options):
    options = {"size": (32, 64), "timesteps": (200, 700), "layers": "up_blocks.1", **options}
    return CrossAttnScorer.from_pretrained(backbone, preset="paper", mode="shared-query", **options)


@pytest.fixture(scope="module")
def built(backbone, tmp_path_factory):
    """Five images and a reference, two images a shard, built once for all tests."""
    folder = tmp_path_factory.mktemp("built") / "bank"
    scorer = scorer_of(backbone, calibration="gray", batch_size=4)
    scorer.build_index([picture(k) for k in range(5)], folder, names=list("abcde"), shard_bytes=1)
    assert [path.name for path in sorted(folder.glob("*.safetensors"))] == SHARDS
    return folder


@pytest.fixture
def bank(built, tmp_path):
    shutil.copytree(built, tmp_path / "bank")
    return tmp_path / "bank"


def contents_of(folder):
    return json.loads((folder / "bank.json").read_text())


def change(folder, **values):
    (folder / "bank.json").write_text(json.dumps({**contents_of(folder), **values}))


def refused(folder, backbone, match):
    """Refused when it is opened, before any value is read."""
    with pytest.raises(BackboneError, match=match):
        QueryBank.load(folder, backbone=backbone)


def rewrite(path, tensors=None, **header):
    """Write a shard again, with its header but for what changes."""
    with safe_open(path, "pt") as opened:
        told = {**json.loads(opened.metadata()["shard"]), **header}
    save_file(tensors or load_file(path), path, metadata={"shard": json.dumps(told)})


class TestContents:
    def test_a_bank_that_was_left_alone_opens(self, bank, backbone):
        opened = QueryBank.load(bank, backbone=backbone)
        assert (opened.names, opened.skipped) == (tuple("abcde"), ())
        assert opened.scores("red").shape == (5, 1)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("bank", "x"),
            ("bank", None),
            ("backbone", 3),
            ("config", []),
            ("layers", "up_blocks.1"),
            ("layers", []),
            ("layers", [1]),
            ("shapes", [[8]]),
            ("shapes", [[8, "4"]]),
            ("shapes", [[0, 4]] * 3),
            ("size", 64),
            ("size", [64.0, 64]),
            ("size", [True, 64]),
            ("dtype", "float64"),
            ("dtype", ["float16"]),
            ("names", "abcde"),
            ("names", {"a": 1}),
            ("names", []),
            ("names", ["a", "b", "c", "d", 5]),
            ("names", ["a", "b", "c", "d", None]),
            ("skipped", ["f"]),
            ("skipped", [["f", 1]]),
            ("references", True),
            ("references", -1),
            ("references", 1.0),
            ("weights", {}),
            ("weights", {"dtype": "float32", "digest": "0" * 32}),
            ("weights", {"dtype": "float32", "digest": "0" * 32, "norms": ["1"]}),
            ("weights", {"dtype": "float32", "digest": "0" * 32, "norms": "1"}),
            ("shards", {}),
            ("shards", []),
            ("shards", [{"file": SHARDS[0]}]),
        ],
        ids=str,
    )
    def test_every_field_is_of_its_type(self, bank, backbone, field, value):
        change(bank, **{field: value})
        refused(bank, backbone, f"no table of contents of a query bank: {field} must be")

    @pytest.mark.parametrize("field", ["bank", "config", "names", "shapes", "shards", "weights"])
    def test_no_field_may_be_missing(self, bank, backbone, field):
        contents = contents_of(bank)
        del contents[field]
        (bank / "bank.json").write_text(json.dumps(contents))
        refused(bank, backbone, f"it lacks '{field}'")

    @pytest.mark.parametrize(
        "text", ["", "[]", "{", "null", "[" * 9000, '{"format": 2, "norms": NaN}', "\ud800"]
    )
    def test_what_is_no_json_is_refused(self, bank, backbone, text):
        (bank / "bank.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        refused(bank, backbone, "bank.json")

    @pytest.mark.parametrize(
        "edit",
        [
            {"names": list("baced")},
            {"skipped": [["f", "it is empty"]]},
            {"config": {"timesteps": [200, 701]}},
            {"config": {"reference_texts": ["a circle"]}},
        ],
        ids=str,
    )
    def test_an_edited_table_of_contents_is_refused(self, bank, backbone, edit):
        config = {**contents_of(bank)["config"], **edit.get("config", {})}
        change(bank, **{**edit, "config": config})
        refused(bank, backbone, "it was changed after it was written")

    def test_nan_among_the_norms_is_refused(self, bank, backbone):
        mark = contents_of(bank)["weights"]
        change(bank, weights={**mark, "dtype": "float16", "norms": [float("nan")] * 4})
        refused(bank, backbone, "no finite number")

    def test_banks_of_the_first_format_are_to_be_built_again(self, bank, backbone):
        change(bank, format=1)
        refused(bank, backbone, "has format 1, this version reads 2; build the bank again")

    @pytest.mark.parametrize(
        ("key", "value", "match"),
        [
            ("timesteps", [200], "have 6"),
            ("draws", 2, "have 24"),
            ("calibration", None, "has 0 references, not 1"),
            ("calibration", "neutral", "has 8 references, not 1"),
            ("mode", "exact", "mode 'exact'"),
            ("size", [64, 32], r"brings them to \(64, 32\)"),
            ("layers", ["mid_block"], "whose layers are others"),
            ("layers", ["nowhere"], "another model"),
            ("timesteps", ["200"], "its config is not allowed"),
            ("lse_lambda", "x", "its config is not allowed"),
            ("unknown", 1, "its config is not allowed"),
        ],
    )
    def test_the_config_fits_the_rest(self, bank, backbone, key, value, match):
        change(bank, config={**contents_of(bank)["config"], key: value})
        refused(bank, backbone, match)

    def test_names_and_rows_agree(self, bank, backbone):
        for names in (list("abcd"), list("abcdef")):
            change(bank, names=names)
            refused(bank, backbone, "its shards have 12 rows")
        change(bank, names=list("abcda"))
        refused(bank, backbone, "a name stands there twice")

    def test_size_and_shapes_are_the_models(self, bank, backbone):
        shapes = contents_of(bank)["shapes"]
        change(bank, size=[64, 64])
        refused(bank, backbone, "whose layers are others")
        change(bank, size=[32, 64], shapes=[[cells, 3] for cells, _ in shapes])
        refused(bank, backbone, r"queries-00000.*its tensor layer\.0 is")

    def test_other_text_encoders_are_other_weights(self, bank, tiny_sd_folder):
        other = load_backbone(tiny_sd_folder)
        next(other.text_encoder.parameters()).mul_(1.01)
        refused(bank, other, "built with other weights")
        QueryBank.load(bank, backbone=load_backbone(tiny_sd_folder, dtype=torch.bfloat16))


class TestShards:
    def test_an_image_without_rows_is_missed(self, bank, backbone):
        """Its rows were cut out, and all later ones moved up."""
        tensors = load_file(bank / SHARDS[1])
        rewrite(bank / SHARDS[1], {name: rows[2:].clone() for name, rows in tensors.items()})
        refused(bank, backbone, r"queries-00001.*its tensor layer\.0 is \[2, ")
        shards = contents_of(bank)["shards"]
        shards[1]["rows"] -= 2
        for shard in shards[2:]:
            shard["first"] -= 2
        change(bank, shards=shards)
        refused(bank, backbone, "its shards have 10 rows, and 5 images")

    def test_two_shards_that_changed_places(self, bank, backbone):
        (bank / SHARDS[0]).rename(bank / "aside")
        (bank / SHARDS[1]).rename(bank / SHARDS[0])
        (bank / "aside").rename(bank / SHARDS[1])
        refused(bank, backbone, "queries-00000.*it holds 4 rows from row 4 on")

    def test_shards_in_another_order_in_the_table(self, bank, backbone):
        shards = contents_of(bank)["shards"]
        change(bank, shards=[shards[1], shards[0], *shards[2:]])
        refused(bank, backbone, "shard 0 is queries-00001.safetensors from row 4 on")

    def test_a_shard_twice(self, bank, backbone):
        shutil.copyfile(bank / SHARDS[0], bank / SHARDS[1])
        refused(bank, backbone, "queries-00001.*it holds 4 rows from row 0 on")
        shards = contents_of(bank)["shards"]
        change(bank, shards=[shards[0], shards[0], *shards[2:]])
        refused(bank, backbone, "shard 1 is queries-00000")

    def test_a_shard_of_another_bank(self, bank, backbone, tmp_path):
        scorer = scorer_of(backbone, calibration="gray", batch_size=4)
        images = [picture(k) for k in (0, 1, 2, 9, 4)]
        scorer.build_index(images, tmp_path / "other", names=list("abcde"), shard_bytes=1)
        shutil.copyfile(tmp_path / "other" / SHARDS[0], bank / SHARDS[0])
        refused(bank, backbone, "queries-00000.*it belongs to another bank")

    def test_a_shard_that_says_nothing_of_itself(self, bank, backbone):
        save_file(load_file(bank / SHARDS[2]), bank / SHARDS[2])
        refused(bank, backbone, "queries-00002.*it does not say which bank it belongs to")
        save_file(load_file(bank / SHARDS[2]), bank / SHARDS[2], metadata={"shard": "[" * 2000})
        refused(bank, backbone, "queries-00002.*it does not say which bank it belongs to")

    def test_a_shard_that_was_cut_off(self, bank, backbone):
        content = (bank / SHARDS[3]).read_bytes()
        for length in (0, 7, 100, len(content) - 1):
            (bank / SHARDS[3]).write_bytes(content[:length])
            refused(bank, backbone, "cannot read .*queries-00003")

    def test_a_shard_that_is_missing(self, bank, backbone):
        (bank / SHARDS[1]).unlink()
        refused(bank, backbone, "cannot read .*queries-00001")

    def test_other_tensors_in_a_shard(self, bank, backbone):
        tensors = load_file(bank / SHARDS[0])
        whole = dict(tensors)
        rewrite(bank / SHARDS[0], {**tensors, "more": torch.zeros(2)})
        refused(bank, backbone, "queries-00000.*it holds the tensors")
        rewrite(bank / SHARDS[0], {f"x{name}": rows for name, rows in whole.items()})
        refused(bank, backbone, "queries-00000.*it holds the tensors")
        rewrite(bank / SHARDS[0], {name: rows.float() for name, rows in whole.items()})
        refused(bank, backbone, "of F32, and the bank wants")
        turned = {name: rows.transpose(1, 2).contiguous() for name, rows in whole.items()}
        rewrite(bank / SHARDS[0], turned)
        refused(bank, backbone, "queries-00000.*and the bank wants")

    def test_a_foreign_shard_beside(self, bank, backbone):
        shutil.copyfile(bank / SHARDS[0], bank / "queries-00004.safetensors")
        refused(bank, backbone, r"holds queries-00004\.safetensors, which its bank\.json does not")
        (bank / "queries-00004.safetensors").rename(bank / "notes.txt")
        QueryBank.load(bank, backbone=backbone)

    @pytest.mark.parametrize(
        "file", ["../bank.json", "/etc/passwd", "", ".", "a/../../b", "C:x", "queries\0"]
    )
    def test_names_of_files_stay_in_the_folder(self, bank, backbone, file):
        shards = contents_of(bank)["shards"]
        change(bank, shards=[{**shards[0], "file": file}, *shards[1:]])
        refused(bank, backbone, "shard 0 is ")

    def test_links_out_of_the_folder_are_refused(self, bank, backbone, tmp_path):
        (bank / SHARDS[0]).rename(tmp_path / "elsewhere")
        (bank / SHARDS[0]).symlink_to(tmp_path / "elsewhere")
        refused(bank, backbone, "leads out of the bank's folder")

    def test_a_folder_that_is_a_link_is_followed(self, bank, backbone, tmp_path):
        (tmp_path / "link").symlink_to(bank)
        assert len(QueryBank.load(tmp_path / "link", backbone=backbone)) == 5


class TestValues:
    """What headers cannot tell is found while values are read."""

    def opened_then(self, bank, backbone, match, edit, **header):
        tensors = {name: rows.clone() for name, rows in load_file(bank / SHARDS[1]).items()}
        edit(tensors["layer.1"])
        rewrite(bank / SHARDS[1], tensors, **header)
        opened = QueryBank.load(bank, backbone=backbone)
        with pytest.raises(BackboneError, match=match):
            opened.search("red")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_values_that_are_no_numbers(self, bank, backbone, value):
        def edit(rows):
            rows[1, 0, 0] = value

        self.opened_then(bank, backbone, "queries-00001.*it holds NaN or infinity", edit)

    def test_a_bit_that_flipped(self, bank, backbone):
        def edit(rows):
            rows.view(torch.int16)[3, 0, 0] ^= 1

        self.opened_then(bank, backbone, "its values are not those that were written", edit)

    def test_rows_that_changed_places(self, bank, backbone):
        def edit(rows):
            rows.copy_(rows.flip(0))

        self.opened_then(bank, backbone, "its values are not those that were written", edit)

    def test_files_that_are_exchanged_after_the_bank_was_opened(self, bank, backbone):
        opened = QueryBank.load(bank, backbone=backbone)
        shutil.copyfile(bank / SHARDS[0], bank / SHARDS[1])
        with pytest.raises(BackboneError, match="it holds 4 rows from row 0 on"):
            opened.scores("red")

    def test_a_model_whose_type_does_not_hold_the_queries(self, backbone, tiny_sd_folder, tmp_path):
        other = load_backbone(tiny_sd_folder)
        for block in other.unet.up_blocks[1].attentions:
            block.transformer_blocks[0].attn2.to_q.weight.mul_(1e7)
        scorer_of(other).build_index([picture(0)], tmp_path, dtype=torch.float32)
        bank = QueryBank.load(tmp_path, backbone=other)
        bank.backbone = load_backbone(tiny_sd_folder, dtype=torch.float16)
        with pytest.raises(NonFiniteError, match=r"do not fit into torch\.float16"):
            bank.scores("red")


class TestSearch:
    def test_of_equal_scores_the_first_image_comes_first(self, backbone, tmp_path):
        images = [picture(1), picture(0), picture(1), picture(0)]
        bank = scorer_of(backbone).build_index(images, tmp_path, dtype=torch.float32)
        (found,) = bank.search("red", top=4)
        assert found[0].score == found[1].score
        assert [each.index for each in found] in ([0, 2, 1, 3], [1, 3, 0, 2])

    @pytest.mark.parametrize("top", [0, -1, True, *map(wrong_type, [1.5, "2", None])])
    def test_top_is_a_positive_int(self, bank, backbone, top):
        with pytest.raises(
            ConfigError, match=f"top must be (1 or more|an int), got {re.escape(repr(top))}"
        ):
            QueryBank.load(bank, backbone=backbone).search("red", top=top)

    @pytest.mark.parametrize(
        "texts",
        [[], "\ud800", ["\udfff"], *map(wrong_type, [3, None, ["red", 1], b"red"])],
        ids=ascii,
    )
    def test_texts_are_texts(self, bank, backbone, texts):
        with pytest.raises(PromptError):
            QueryBank.load(bank, backbone=backbone).search(texts)

    def test_any_sequence_of_texts_will_do(self, bank, backbone):
        opened = QueryBank.load(bank, backbone=backbone)
        assert torch.equal(opened.scores(("a", "b")), opened.scores(["a", "b"]))

    def test_a_bank_of_nothing_is_not_built(self, backbone, tmp_path):
        with pytest.raises(ShapeError, match="got no images"):
            scorer_of(backbone).build_index([], tmp_path / "bank")
        assert not (tmp_path / "bank").exists()
