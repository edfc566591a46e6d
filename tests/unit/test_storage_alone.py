"""Files are read and written in one place: nothing else calls what parses or opens them."""

import ast
from pathlib import Path

import diffenc

SOURCE = Path(diffenc.__file__).parent

CALLS = {
    *("json.load", "json.loads", "tomllib.load", "tomllib.loads", "csv.reader", "csv.DictReader"),
    *("zipfile.ZipFile", "torch.load", "safe_open", "load_file", "save_file", "pickle.load"),
}
METHODS = {"read_text", "read_bytes", "write_text", "write_bytes", "splitlines"}

REASONS = {
    "models/": "checkpoints of other people have checks of their own",
    "scoring/bank_": "a bank is written part by part",
    "scoring/query_bank.py": "a bank is read part by part",
    "evals/llava_bench/judge.py": "the first line of a reply is no file",
    "cli/app.py": "the lines of a message are no file",
    "cli/signals.py": "a standard stream that is closed is opened anew, on no file",
    "viz/figure.py": "the paragraphs of a caption are no file",
    "mllm/training/miniature.py": "the first line of a docstring is no file",
}


def foreign_calls(tree: ast.AST) -> list[str]:
    """Names of the calls in a module that belong into `diffenc.storage`."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Attribute):
            owner = function.value.id if isinstance(function.value, ast.Name) else ""
            if function.attr in METHODS or f"{owner}.{function.attr}" in CALLS:
                found.append(function.attr)
        elif isinstance(function, ast.Name) and function.id in {*CALLS, "open"}:
            found.append(function.id)
    return found


def test_only_storage_opens_and_parses_files():
    wrong = []
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        if name.startswith(("storage/", *REASONS)):
            continue
        calls = foreign_calls(ast.parse(path.read_text(encoding="utf-8")))
        wrong += [f"{name}: {call}" for call in calls]
    assert not wrong, f"use diffenc.storage: {wrong}"


def test_the_check_knows_such_calls():
    text = "json.loads(x)\nPath(p).read_text()\nwith open(p) as f: pass\nread_text(p)\nzip(a)\n"
    assert sorted(foreign_calls(ast.parse(text))) == ["loads", "open", "read_text"]


def test_messages_on_writing_come_from_storage_alone():
    own = ("storage/", "models/", "scoring/bank_", "mllm/training/token_cache.py", "cli/signals.py")
    wrong = [
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if not path.relative_to(SOURCE).as_posix().startswith(own)
        and "cannot write" in path.read_text(encoding="utf-8")
    ]
    assert not wrong


def test_names_are_looked_for_where_no_name_is_too_long():
    """`Path.exists` and its kin raise OSError for names that no file can have."""
    methods = {"exists", "is_file", "is_dir", "expanduser"}
    wrong = [
        f"{name}: {node.func.attr}"
        for path in sorted(SOURCE.rglob("*.py"))
        if not (name := path.relative_to(SOURCE).as_posix()).startswith("storage/")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in methods
    ]
    assert not wrong, f"use diffenc.storage.names: {wrong}"
