"""Files are read with checks, and written whole or not at all."""

import json
import os
import random
import threading

import pytest
import torch

from diffenc.errors import BackboneError, ConfigError, DiffencError, OutputError
from diffenc.storage.names import inside, is_file, is_folder, printable
from diffenc.storage.reading import (
    decode,
    parse_json,
    parse_toml,
    read_bytes,
    read_json,
    read_text,
    read_toml,
    text_lines,
)
from diffenc.storage.tensors import read_tensors, write_tensors
from diffenc.storage.writing import (
    begin_folder,
    locked,
    write_json,
    write_text,
    writing,
)

HOSTILE_JSON = {
    "nothing": "",
    "cut off": '{"a": [1, 2',
    "deep lists": "[" * 100_000,
    "deep objects": '{"a":' * 5_000 + "1" + "}" * 5_000,
    "deep and whole": "[" * 400 + "]" * 400,
    "long number": "1" * 10_000,
    "wide number": "[123456789012345678901234567890]",
    "NaN": '{"a": NaN}',
    "infinity": '{"a": -Infinity}',
    "overflow": '{"a": 1e999}',
    "half a pair": '{"a": "\\ud800"}',
    "half a pair as a key": '{"\\udfff": 1}',
    "another kind": "[1]",
    "a number": "3",
    "null": "null",
    "a null byte": '{"a": \0}',
}


@pytest.mark.parametrize("text", HOSTILE_JSON.values(), ids=HOSTILE_JSON.keys())
def test_hostile_json_is_answered_by_the_error_asked_for(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BackboneError, match=r"config\.json"):
        read_json(path, error=BackboneError)


@pytest.mark.long
def test_random_bytes_raise_nothing_else(tmp_path):
    rng = random.Random(0)
    whole = json.dumps({"a": [1, 2.5, "text", None, True, {"b": "ü\u2028"}]}).encode()
    path = tmp_path / "config.json"
    refused = 0
    for _ in range(2_000):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content[: rng.randint(1, len(content))])
        try:
            read_json(path)
        except DiffencError as error:
            str(error).encode()  # a message that every terminal takes
            refused += 1
    assert refused > 1_000


def test_json_keeps_what_it_says():
    text = '{"a": [1, -2.5e3, "ü\u2028", null, true], "b": {"c": 18446744073709551615}}'
    assert parse_json(text, where="here") == {
        "a": [1, -2500.0, "ü\u2028", None, True],
        "b": {"c": 2**64 - 1},
    }


def test_infinity_is_read_where_it_is_allowed():
    value = parse_json('{"a": -Infinity}', where="here", finite=False)
    assert value == {"a": float("-inf")}


HOSTILE_TOML = {
    "nan": "a = nan",
    "infinity": "a = inf",
    "overflow": "a = 1e999",
    "deep and whole": "a = " + "[" * 200 + "]" * 200,
    "deep": "a = " + "[" * 100_000,
    "wide number": "a = 123456789012345678901234567890",
    "cut off": "a = [",
    "twice": "a = 1\na = 2",
}


@pytest.mark.parametrize("text", HOSTILE_TOML.values(), ids=HOSTILE_TOML.keys())
def test_hostile_toml_is_answered_by_a_config_error(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.toml"):
        read_toml(path)


def test_toml_keeps_what_it_says():
    assert parse_toml("a = 1\n[b]\nc = 2.5\n", where="here") == {"a": 1, "b": {"c": 2.5}}


@pytest.mark.parametrize("name", ["\0", "a" * 5_000, "\ud800", "missing", "."], ids=ascii)
def test_names_that_no_file_has_are_refused(tmp_path, name):
    path = str(tmp_path / name)
    assert not is_file(path)
    assert is_folder(path) is (name == ".")
    with pytest.raises(ConfigError, match="cannot read") as caught:
        read_bytes(path)
    str(caught.value).encode()
    if name != "missing":
        with pytest.raises(OutputError):
            write_text(path, "text")


def test_a_pipe_without_a_writer_does_not_stop_the_program(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert read_bytes(tmp_path / "pipe") == b""


def test_size_is_bounded_before_a_file_is_read(tmp_path):
    (tmp_path / "large").write_bytes(b"x" * 11)
    assert len(read_bytes(tmp_path / "large", most=11)) == 11
    with pytest.raises(ConfigError, match="larger than 10 bytes"):
        read_bytes(tmp_path / "large", most=10)
    with pytest.raises(ConfigError, match="larger than"):
        read_bytes("/dev/zero", most=10)


def test_text_is_utf8_with_or_without_a_mark(tmp_path):
    (tmp_path / "marked").write_bytes("ü".encode("utf-8-sig"))
    assert read_text(tmp_path / "marked") == "ü"
    with pytest.raises(ConfigError, match="UTF-8"):
        decode("ü".encode("latin-1"), where="here")


def test_lines_end_in_line_feeds_alone():
    assert text_lines("a\u2028b\r\nc\x85d\n") == ["a\u2028b", "c\x85d"]
    assert text_lines("a\n\nb") == ["a", "", "b"]


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    path = tmp_path / "out.json"
    write_json(path, {"a": 1})
    for value in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises(OutputError, match=r"out\.json"):
            write_json(path, value)
    with pytest.raises(OutputError, match=r"out\.json"):
        write_text(path, "\ud800")

    def interrupted() -> None:
        with writing(path) as partial:
            partial.write_text("half", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert read_json(path) == {"a": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["out.json"]


def test_two_threads_write_into_one_folder(tmp_path):
    def write(number: int) -> None:
        for _ in range(50):
            write_text(tmp_path / f"{number % 2}.txt", str(number % 2) * 1_000)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.txt", "1.txt"]
    assert read_text(tmp_path / "1.txt") == "1" * 1_000


def test_tensors_come_back(tmp_path):
    values = torch.arange(6.0)
    tensors = {"a": values.reshape(2, 3).T, "b": values}  # not contiguous, and sharing memory
    write_tensors(tmp_path / "t.safetensors", tensors, metadata={"made": "here"})
    back = read_tensors(tmp_path / "t.safetensors", finite=True)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_broken_tensors_are_answered_by_the_error_asked_for(tmp_path):
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.tensor([1.0, float("nan")])})
    assert read_tensors(path)["a"].isnan().any()
    with pytest.raises(BackboneError, match="NaN"):
        read_tensors(path, error=BackboneError, finite=True)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(BackboneError, match=r"t\.safetensors"):
        read_tensors(path, error=BackboneError)


@pytest.mark.parametrize("name", ["../a", "/a", "a/../b", "", ".", "a//b", "..\\a", "C:a", "\0"])
def test_names_in_files_stay_within_their_folder(tmp_path, name):
    with pytest.raises(BackboneError, match="stay within"):
        inside(tmp_path, name, error=BackboneError)


def test_a_name_below_the_folder_is_its_path(tmp_path):
    assert inside(tmp_path, "a/b.c") == tmp_path / "a" / "b.c"


def test_a_locked_folder_is_refused_to_others(tmp_path):
    with (
        locked(tmp_path, purpose="building this index"),
        pytest.raises(OutputError, match="building this index"),
        locked(tmp_path, purpose="building this index"),
    ):
        pass
    with locked(tmp_path, purpose="building this index"):
        pass


def test_a_folder_that_is_begun_lacks_its_marker(tmp_path):
    folder = begin_folder(tmp_path / "a" / "b", "config.json")
    write_json(folder / "config.json", {})
    begin_folder(folder, "config.json")
    assert not (folder / "config.json").exists()


def test_messages_show_any_value_in_one_line():
    assert printable("a\nb\ud800") == "a\\nb\\ud800"
    assert len(printable("x" * 10_000)) < 300
