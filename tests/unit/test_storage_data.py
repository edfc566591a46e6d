"""Archives, lines and tensors: hostile files raise one error, and take bounded memory."""

import io
import json
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from diffenc.errors import BackboneError, ConfigError, OutputError
from diffenc.evals.files import DatasetFiles
from diffenc.storage.archives import list_archive, read_member
from diffenc.storage.lines import parse_csv, parse_json_lines
from diffenc.storage.reading import decode
from diffenc.storage.tensors import (
    misfits,
    read_metadata,
    read_pickled,
    read_tensors,
    tensor_names,
    write_tensors,
)


def write_zip(path, entries, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name twice
        with zipfile.ZipFile(path, "w", **options) as archive:
            for name, content in entries:
                archive.writestr(name, content)
    return path


class TestArchives:
    def test_names_and_contents(self, tmp_path):
        inner = write_zip(tmp_path / "inner.zip", [("x.txt", b"x")]).read_bytes()
        entries = [("b/ä.txt", b"1"), ("b/", b""), ("a.txt", b""), ("inner.zip", inner)]
        path = write_zip(tmp_path / "a.zip", entries, compression=zipfile.ZIP_DEFLATED)
        assert list_archive(path, most=9) == ["b/ä.txt", "a.txt", "inner.zip"]
        assert [read_member(path, name) for name in ("b/ä.txt", "a.txt")] == [b"1", b""]
        assert read_member(path, "inner.zip") == inner

    @pytest.mark.parametrize(
        "name", ["../up.txt", "a/../../b", "/etc/x", "C:\\x", "\\\\share\\x", "a\\..\\..\\b"]
    )
    def test_names_that_lead_out_are_refused(self, tmp_path, name):
        path = write_zip(tmp_path / "a.zip", [("fine.txt", b"1"), (name, b"2")])
        with pytest.raises(ConfigError, match="leads out of the archive"):
            list_archive(path, most=9)

    def test_a_name_twice_is_refused(self, tmp_path):
        path = write_zip(tmp_path / "a.zip", [("a.txt", b"1"), ("a.txt", b"2")])
        with pytest.raises(ConfigError, match=r"'a\.txt' twice"):
            list_archive(path, most=9)

    def test_encrypted_archives_are_refused(self, tmp_path):
        path = write_zip(tmp_path / "a.zip", [("a.txt", b"1")])
        content = bytearray(path.read_bytes())
        content[content.index(b"PK\x01\x02") + 8] |= 1
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="is encrypted"):
            list_archive(path, most=9)

    @pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_compressions_without_a_bound_are_refused(self, tmp_path, method):
        path = write_zip(tmp_path / "a.zip", [("a.txt", b"1")], compression=method)
        with pytest.raises(ConfigError, match="compression that is not read"):
            list_archive(path, most=9)

    def test_more_files_than_asked_for_are_refused(self, tmp_path):
        path = write_zip(tmp_path / "a.zip", [(f"{k}.txt", b"") for k in range(11)])
        with pytest.raises(ConfigError, match="11 files; more than 10"):
            list_archive(path, most=10)

    def test_a_file_that_unpacks_to_too_much_is_refused(self, tmp_path):
        zeros = bytes(3_000_000)
        path = write_zip(tmp_path / "a.zip", [("a.txt", zeros)], compression=zipfile.ZIP_DEFLATED)
        assert path.stat().st_size < 10_000
        with pytest.raises(ConfigError, match=r"a\.txt.*larger than 1,000,000 bytes"):
            read_member(path, "a.txt", most=1_000_000)
        assert read_member(path, "a.txt") == zeros

    def test_what_is_cut_off_or_wrong_inside_is_refused(self, tmp_path):
        path = write_zip(tmp_path / "a.zip", [("a.txt", b"some text")])
        whole = path.read_bytes()
        for cut in range(0, len(whole), 7):
            path.write_bytes(whole[:cut])
            with pytest.raises(ConfigError, match=r"no whole \.zip file"):
                list_archive(path, most=9)
        path.write_bytes(whole.replace(b"some text", b"same text"))
        assert list_archive(path, most=9) == ["a.txt"]
        with pytest.raises(ConfigError, match=r"cannot read a\.txt"):
            read_member(path, "a.txt")

    def test_an_archive_that_goes_is_told_when_it_is_read(self, tmp_path):
        path = write_zip(tmp_path / "a.zip", [("a.txt", b"1"), ("b.txt", b"2")])
        files = DatasetFiles(path)
        path.unlink()
        with pytest.raises(ConfigError, match="No such file"):
            files.reader("a.txt")()
        write_zip(path, [("b.txt", b"2")])
        with pytest.raises(ConfigError, match=r"cannot read a\.txt"):
            files.reader("a.txt")()

    def test_large_archives_are_read(self, tmp_path):
        with (
            zipfile.ZipFile(tmp_path / "a.zip", "w") as archive,
            archive.open("a.txt", "w", force_zip64=True) as member,
        ):
            member.write(b"text")
        assert (
            read_member(tmp_path / "a.zip", list_archive(tmp_path / "a.zip", most=1)[0]) == b"text"
        )


class TestPicturesOfTables:
    def write(self, folder, contents):
        for name, content in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return DatasetFiles(folder)

    def test_a_name_that_different_pictures_have_is_refused(self, tmp_path):
        files = self.write(tmp_path, {"one/1.png": b"red", "two/1.png": b"blue"})
        with pytest.raises(ConfigError, match=r"1\.png may be one/1\.png or two/1\.png"):
            files.picture("1.png")
        assert files.picture("two/1.png") == "two/1.png"

    def test_copies_and_other_forms_of_a_picture_are_no_obstacle(self, tmp_path):
        files = self.write(tmp_path, {"a/1.png": b"red", "b/1.png": b"red", "b/1.jpg": b"lossy"})
        assert files.picture("1") == "a/1.png"


class TestLines:
    def test_only_line_feeds_end_lines(self):
        texts = ["a\u2028b", "c\u0085d", "e\x1cf", "ü"]
        rows = [json.dumps({"t": text}, ensure_ascii=False) for text in texts]
        for end in ("\n", "\r\n", "\n\n"):
            objects, broken = parse_json_lines(end.join(rows) + end, where="x")
            assert [value["t"] for _, value in objects] == texts
            assert broken == []

    def test_broken_lines_are_told_by_number_and_the_others_kept(self):
        lines = ['{"a": 1}', "{", "", "[1]", '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": 3}']
        objects, broken = parse_json_lines("\n".join(lines), where="x.jsonl")
        assert objects == [(1, {"a": 1}), (7, {"a": 3})]
        assert [number for number, _ in broken] == [2, 4, 5, 6]
        assert "x.jsonl, line 6" in broken[-1][1]
        assert "'a' twice" in broken[-1][1]
        assert parse_json_lines("", where="x") == parse_json_lines("\n \n", where="x") == ([], [])

    def test_a_long_line_is_read(self):
        text = json.dumps({"a": "x" * 10_000_000})
        assert len(parse_json_lines(text, where="x")[0][0][1]["a"]) == 10_000_000

    def test_csv_keeps_what_is_quoted(self):
        text = 'a,b\r\n"x, ""y""","two\nlines\u2028here"\r\n\r\n1,\r\n'
        rows = [cells for _, cells in parse_csv(text, where="x")]
        assert rows == [["a", "b"], ['x, "y"', "two\nlines\u2028here"], ["1", ""]]

    @pytest.mark.parametrize("text", ['a,b\n"open,1\n', "a\n" + "x" * 200_000, 'a\n"x"y\n'])
    def test_broken_csv_is_refused_with_its_line(self, text):
        with pytest.raises(BackboneError, match=r"x\.csv, line \d+ is no CSV"):
            parse_csv(text, where="x.csv", error=BackboneError)

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
    def test_other_encodings_are_refused_in_a_sentence(self, encoding):
        with pytest.raises(
            ConfigError, match=r"^x is not in UTF-8 but in UTF-16.*save it in UTF-8"
        ):
            decode("id,text\n1,ü\n".encode(encoding), where="x")

    def test_a_byte_order_mark_counts_for_nothing(self):
        assert decode("id".encode("utf-8-sig"), where="x") == "id"


class TestTensors:
    def test_what_is_written_is_read(self, tmp_path):
        whole = torch.arange(6.0).reshape(2, 3)
        state = {"a": whole, "b": whole, "c": whole.T, "d": whole[0], "e": torch.tensor(3)}
        write_tensors(tmp_path / "a.safetensors", state, metadata={"k": "v"})
        found = read_tensors(tmp_path / "a.safetensors", finite=True)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)
        some = read_tensors(tmp_path / "a.safetensors", only=lambda name: name in "ab")
        assert some.keys() == {"a", "b"}
        assert sorted(tensor_names(tmp_path / "a.safetensors")) == list("abcde")
        assert read_metadata(tmp_path / "a.safetensors") == {"k": "v"}

    @pytest.mark.parametrize(
        "dtype",
        [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn],
        ids=str,
    )
    def test_numbers_that_are_none_are_refused_in_every_type(self, tmp_path, dtype):
        values = torch.tensor([1.0, float("nan"), 2.0]).to(dtype)
        save_file({"fine": torch.zeros(2), "bad": values}, tmp_path / "a.safetensors")
        torch.save({"bad": values}, tmp_path / "a.bin")
        for read, name in ((read_tensors, "a.safetensors"), (read_pickled, "a.bin")):
            with pytest.raises(BackboneError, match="bad holds NaN or infinity"):
                read(tmp_path / name, finite=True, error=BackboneError)
            assert read(tmp_path / name)["bad"].dtype == dtype

    def test_pickles_with_more_than_weights_are_refused(self, tmp_path):
        path = tmp_path / "a.bin"
        for content in ([1, 2], {"a": 3}, {"a": [torch.zeros(1)]}, torch.zeros(2), {"a": print}):
            torch.save(content, path)
            with pytest.raises(ConfigError):
                read_pickled(path)
        for content in (b"", b"\x80\x02}q", b"PK\x03\x04", bytes(100)):
            path.write_bytes(content)
            with pytest.raises(ConfigError, match="cannot read"):
                read_pickled(path)
        with pytest.raises(ConfigError, match="no such file"):
            read_pickled(tmp_path / "none.bin")

    def test_a_pickle_that_is_compressed_is_refused(self, tmp_path):
        buffer = io.BytesIO()
        torch.save({"a": torch.zeros(1000)}, buffer)
        with zipfile.ZipFile(buffer) as plain:
            entries = [(each.filename, plain.read(each)) for each in plain.infolist()]
        write_zip(tmp_path / "a.bin", entries, compression=zipfile.ZIP_DEFLATED)
        with pytest.raises(ConfigError, match="compresses nothing"):
            read_pickled(tmp_path / "a.bin")

    def test_misfits_are_names_shapes_and_kinds(self):
        own = {"a": torch.zeros(2), "b": torch.zeros(3)}
        assert misfits({"a": torch.ones(2).half(), "b": torch.ones(3)}, own) == []
        assert misfits({"a": torch.zeros(2)}, own) == ["b"]
        assert misfits({**own, "c": torch.zeros(1)}, own) == ["c"]
        assert misfits({**own, "b": torch.zeros(4)}, own) == ["b"]
        for dtype in (torch.int64, torch.bool, torch.complex64):
            assert misfits({**own, "a": torch.zeros(2, dtype=dtype)}, own) == ["a"]

    def test_a_failed_write_leaves_what_was_there(self, tmp_path):
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
        with pytest.raises(OutputError, match="cannot write"):
            write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1).to_sparse()})
        assert torch.equal(read_tensors(tmp_path / "a.safetensors")["a"], torch.ones(1))
        assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
