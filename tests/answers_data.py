"""Models that answer in known ways, and tiny datasets of texts in the layouts of real ones."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from diffenc.errors import ConfigError
from diffenc.evals.choices.blink import TASKS
from evals_data import encoded, write_csv, write_jsonl


class Says:
    """Answers by a function of (pictures, question, prompt), and remembers what it was asked."""

    def __init__(self, says, name="model", *, dies_after=None, **description):
        self.name, self.description = name, description
        self.says, self.dies_after = says, dies_after
        self.asked = []

    def answer(self, images, questions, prompts=None):
        assert len(images) == len(questions)
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            raise KeyboardInterrupt
        given = prompts or [None] * len(questions)
        rows = list(zip(images, questions, given, strict=True))
        self.asked += rows
        return [self.says(*row) for row in rows]


def check_all_is_told_before_anything_is_asked(evaluate, *parts):
    """`evaluate(model)` refuses its data in one message that holds these parts."""
    model = Says(lambda *_: "a")
    with pytest.raises(ConfigError) as caught:
        evaluate(model)
    for part in parts:
        assert part in str(caught.value)
    assert model.asked == []


def shade(number):
    """A picture of one tone, which survives JPEG."""
    return Image.new("RGB", (24, 16), (number % 250, 90, 200 - number % 200))


def write_picture(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(shade(number), path.suffix[1:].lower()))


COCO = {
    42: ["A man rides a horse.", "a person on a horse"],
    7: ["Two dogs in the snow", "dogs play"],
    391895: ["A red bus on a street"],
}


def coco(folder):
    """`captions_val2014.json` and its pictures; the annotation file and the folder of pictures."""
    content = {
        "info": {},
        "images": [{"id": k, "file_name": f"COCO_val2014_{k:012d}.jpg"} for k in COCO],
        "annotations": [
            {"image_id": k, "id": 10 * k + n, "caption": text}
            for n in range(2)
            for k, texts in COCO.items()
            for text in texts[n : n + 1]
        ],
    }
    path = folder / "annotations/captions_val2014.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    for k in COCO:
        write_picture(folder / f"val2014/COCO_val2014_{k:012d}.jpg", k)
    return path, folder


def karpathy(folder):
    """`dataset_coco.json` with one image per part, the first two in different folders."""
    rows = []
    parts = ("test", "test", "restval")
    for (k, texts), part in zip(COCO.items(), parts, strict=True):
        place = "train2014" if k == 7 else "val2014"
        name = f"COCO_{place}_{k:012d}.jpg"
        sentences = [{"raw": text, "tokens": text.lower().split()} for text in texts]
        rows.append({"filepath": place, "filename": name, "cocoid": k, "imgid": len(rows)})
        rows[-1] |= {"split": part, "sentences": sentences}
        write_picture(folder / place / name, k)
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps({"images": rows, "dataset": "coco"}))
    return path, folder


def mmvp(folder, *, index="lndex", count=8):
    """Pairs of questions with opposite answers; odd ones are (a)."""
    rows = []
    for number in range(1, count + 1):
        rows.append(
            {
                index: number,
                "Question": f"Is the door of house {(number + 1) // 2} open, or closed?",
                "Options": "(a) Open (b) Closed",
                "Correct Answer": "(a)" if number % 2 else "(b)",
            }
        )
        write_picture(folder / f"MMVP Images/{number}.jpg", number)
    write_csv(folder / "Questions.csv", rows)
    return folder


def llava_bench(folder):
    """Three questions on two pictures."""
    questions = [
        {"question_id": 0, "image": "001.jpg", "text": "What is it?", "category": "conv"},
        {"question_id": 1, "image": "001.jpg", "text": "Describe it.", "category": "detail"},
        {"question_id": 2, "image": "002.jpg", "text": "Why is it?", "category": "complex"},
    ]
    write_jsonl(folder / "questions.jsonl", questions)
    captions = [{"image": "001.jpg", "caption": "a hill"}]
    captions.append({"image": "002.jpg", "caption": ["a lake", "with a boat"]})
    write_jsonl(folder / "context.jsonl", captions)
    answers = [{"question_id": k, "text": f"reference {k}", "metadata": {}} for k in range(3)]
    write_jsonl(folder / "answers_gpt4.jsonl", answers)
    for number in (1, 2):
        write_picture(folder / f"images/{number:03d}.jpg", number)
    return folder


BLINK_SOME = ("Counting", "Jigsaw", "Multi-view_Reasoning")


def blink_rows(task, count=3, *, picture=shade, **changes):
    """Questions with one picture more than the task before; the right one is (A), (B), (A)..."""
    pictures = 1 + BLINK_SOME.index(task) if task in BLINK_SOME else 1
    options = ["3", "4", "5", "6"] if task == "Counting" else ["the first", "the second"]
    rows = []
    for k in range(count):
        row = {
            "idx": f"val_{task}_{k + 1}",
            "question": f"Which one? ({task})",
            "sub_task": task,
            "choices": options,
            "answer": f"({'AB'[k % 2]})",
            "prompt": f"Which one, exactly?\n(A) {options[0]}\n(B) {options[1]}",
            "explanation": "",
            **changes,
        }
        for n in range(1, 5):
            row[f"image_{n}"] = picture(20 * k + n) if n <= pictures else None
        rows.append(row)
    return rows


def encoded_cell(number):
    """A picture as parquet files of the Hub hold it."""
    return {"bytes": encoded(shade(number), "png"), "path": None}


def write_blink(folder, tasks=TASKS, split="val", **options):
    """`<Task>/val-00000-of-00001.parquet` for each task."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for task in tasks:
        path = folder / task / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pyarrow.Table.from_pylist(blink_rows(task, picture=encoded_cell, **options))
        parquet.write_table(table, path, row_group_size=2)
    return folder


@contextmanager
def judge_service():
    """A service that replies what the test wants, and keeps what it was sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            service.looks.append((self.path, dict(self.headers)))
            self.reply(*service.look)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            service.requests.append((self.path, dict(self.headers), body))
            self.reply(*service.replies.pop(0))

        def reply(self, status, content):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    service = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.requests, service.replies = [], []
    service.looks, service.look = [], (200, b"{}")
    service.url = f"http://127.0.0.1:{service.server_address[1]}/v1/"
    thread = threading.Thread(target=service.serve_forever, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        service.shutdown()
        service.server_close()
        thread.join()


def completion(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}).encode()
