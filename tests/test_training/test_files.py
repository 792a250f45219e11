from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from fastdiv.cli import main
from fastdiv.training.config import DataConfig, UserError
from fastdiv.training.data import encode_prompt, load_task
from fastdiv.training.models import load_policy
from fastdiv.training.problems import Problem

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1="}]
ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": 'a, "b"\nc', "answer": "007"}, {"prompt": "é", "answer": "x"}]


def write(folder, name, rows):
    path = folder / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        frame = pytest.importorskip("pandas").DataFrame(rows)
        frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)
    return path


def load(path):
    task = load_task(DataConfig(task=str(path)), seed=0)
    return [task.problem(i) for i in range(len(task))]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.parquet", "d[1]*.parquet"])
def test_every_format_gives_the_same_problems(tmp_path, name):
    rows = [row | {"other": 3} for row in ROWS]
    path = write(tmp_path, name, rows)
    assert [(p.question, p.answer) for p in load(path)] == [(r["prompt"], r["answer"]) for r in ROWS]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.parquet"])
def test_chat_messages(tmp_path, name):
    found = load(write(tmp_path, name, [{"prompt": CHAT, "answer": "2"}]))
    assert found[0].question == CHAT


def test_a_json_file_may_hold_a_row_per_line(tmp_path):
    lines = write(tmp_path, "d.jsonl", ROWS).read_text(encoding="utf-8")
    (tmp_path / "d.json").write_text(lines, encoding="utf-8")
    assert [p.answer for p in load(tmp_path / "d.json")] == ["2", "007", "x"]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x1c", "\x0b"])
def test_a_line_separator_of_unicode_does_not_end_a_line(tmp_path, character):
    text = f"a{character}b"
    path = tmp_path / "d.jsonl"
    raw = json.dumps({"prompt": text, "answer": "1"}, ensure_ascii=ord(character) < 32)
    path.write_text(raw + "\r\n", encoding="utf-8")
    assert load(path)[0].question == text


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("2", "2"),
        ("1.10", "1.10"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("0.1234567890123456789", "0.1234567890123456789"),
        ('"007"', "007"),
        ('"2020-01-01"', "2020-01-01"),
        ('"1e3"', "1e3"),
        ('""', ""),
    ],
)
def test_an_answer_keeps_its_digits(tmp_path, written, text):
    path = tmp_path / "d.jsonl"
    path.write_text(f'{{"prompt": "2020-01-01", "answer": {written}}}\n')
    problem = load(path)[0]
    assert (problem.question, problem.answer) == ("2020-01-01", text)


def test_csv_values_are_texts(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("answer,prompt\n007,NA\n2020-01-01,12345678901234567890123\n,null\n")
    assert [(p.question, p.answer) for p in load(path)] == [
        ("NA", "007"),
        ("12345678901234567890123", "2020-01-01"),
        ("null", ""),
    ]


BAD = [
    ({"prompt": None, "answer": "2"}, "prompt must be a text or a list of messages .*, got null"),
    ({"prompt": 7, "answer": "2"}, "prompt must be .*, got 7"),
    ({"prompt": [], "answer": "2"}, r"prompt must be .*, got \[\]"),
    ({"prompt": "", "answer": "2"}, "prompt is empty"),
    (
        {"prompt": ["hi"], "answer": "2"},
        "prompt: message 1 must be an object with texts 'role' and 'content', got 'hi'",
    ),
    ({"prompt": [CHAT[0], {"role": "user"}], "answer": "2"}, "prompt: message 2 must be"),
    ({"prompt": [{"role": "user", "content": None}], "answer": "2"}, "prompt: message 1 must be"),
    ({"prompt": "x", "answer": None}, "answer must be a text or a number, got null"),
    ({"prompt": "x", "answer": ["2"]}, r"answer must be .*, got \['2'\]"),
    ({"prompt": "x", "answer": {"a": 1}}, "answer must be"),
    ({"prompt": "x", "answer": True}, "answer must be .*, got True"),
    ({"prompt": "x", "answer": float("nan")}, "answer must be .*, got nan"),
    ({"prompt": "x"}, "expected an object with 'prompt' and 'answer'"),
    ([1, 2], r"expected an object with 'prompt' and 'answer', got \[1, 2\]"),
    ({"prompt": "x\ud800", "answer": "2"}, "prompt has half of a surrogate pair"),
    ({"prompt": [{"role": "user", "content": "\udfff"}], "answer": "2"}, "prompt: message 1 has half of a surrogate"),
    ({"prompt": "x", "answer": "\ud800"}, "answer has half of a surrogate pair"),
]


@pytest.mark.parametrize(("row", "words"), BAD)
def test_a_bad_row_is_named_by_its_line(tmp_path, row, words):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=f"d.jsonl:3: {words}") as caught:
        load(path)
    str(caught.value).encode()
    assert "\n" not in str(caught.value)
    path = tmp_path / "d.json"
    path.write_text(json.dumps([ROWS[0], row]))
    with pytest.raises(UserError, match=f"d.json, row 2: {words}"):
        load(path)


def test_parquet_that_datasets_wrote_keeps_its_types(tmp_path):
    datasets, parquet = pytest.importorskip("datasets"), pytest.importorskip("pyarrow.parquet")
    features = datasets.Features({"prompt": datasets.Json(), "answer": datasets.Value("int64")})
    row = features.encode_example({"prompt": CHAT, "answer": 2})
    assert isinstance(row["prompt"], str)
    path = tmp_path / "d.parquet"
    parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist([row], features.arrow_schema), path)
    assert [(p.question, p.answer) for p in load(path)] == [(CHAT, "2")]


def test_a_bad_row_of_parquet_is_named(tmp_path):
    path = write(tmp_path, "d.parquet", [ROWS[0], {"prompt": None, "answer": "2"}])
    with pytest.raises(UserError, match=r"d\.parquet, row 2: prompt must be .*null"):
        load(path)


DAMAGED = {
    "latin.jsonl": '{"prompt": "a", "answer": "1"}\n{"prompt": "é", "answer": "1"}\n'.encode("latin-1"),
    "utf16.jsonl": '{"prompt": "é", "answer": "1"}\n'.encode("utf-16"),
    "utf16.json": '[{"prompt": "é", "answer": "1"}]'.encode("utf-16"),
    "latin.csv": "prompt,answer\né,1\n".encode("latin-1"),
    "text.jsonl": b"not json\n",
    "deep.jsonl": b"[" * 100_000 + b"\n",
    "cut.json": b'[{"prompt": "a", "answer": "1"},',
    "empty.jsonl": b"\n",
    "empty.csv": b"",
    "header.csv": b"prompt,answer\n",
    "other.csv": b"question,answer\na,1\n",
    "long.csv": b"prompt,answer\na,1,2\n",
    "longer.csv": b"prompt,answer\na,1\na,1,2\n",
    "short.csv": b"prompt,answer\na\n",
    "quote.csv": b'prompt,answer\na,"1\n',
    "cut.parquet": b"PAR1abc",
    "surrogate.jsonl": b'{"prompt": "\\ud800", "answer": "1"}\n',
    "null.jsonl": b'{"prompt": null, "answer": "1"}\n',
    "nothing.jsonl": b'{"prompt": "", "answer": "1"}\n',
    "data.txt": b"1+1=2\n",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_bad_file_is_one_line_and_leaves_nothing(capfd, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(DAMAGED[name])
    assert main(["train", "--model", "tiny", "--output", str(tmp_path / "run"), "--data.task", str(path)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("fastdiv train: error: data") and err.count("\n") == 1, err
    assert name in err
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


def test_datasets_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    path = tmp_path / "d.parquet"
    path.touch()
    with pytest.raises(UserError, match=r"needs datasets .*pip install 'fastdiv\[train\]'"):
        load(path)


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not (loop.last and m.role == 'assistant') %}"
    "{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_chat_messages_go_through_the_chat_template():
    tokenizer = load_policy("tiny", device="cpu").tokenizer
    tokenizer.chat_template = TEMPLATE

    def text(prompt, **settings):
        return tokenizer.decode(encode_prompt(DataConfig(**settings), Problem(prompt, "", {}), tokenizer))

    asked = "<system>be brief\n<user>1+1=\n<assistant>"
    assert text(CHAT) == asked
    assert text(CHAT[1:], chat=True, system="be brief") == asked
    assert text(CHAT, chat=True, system="be long") == asked
    assert text("1+1=", chat=True, system="be brief") == asked
    assert text([*CHAT, {"role": "assistant", "content": "It is"}]).endswith("<assistant>It is")


def test_what_a_chat_template_cannot_take_is_refused():
    problem = Problem(CHAT, "", {}, "d.jsonl:4")
    bare = SimpleNamespace(chat_template=None)
    with pytest.raises(UserError, match=r"no chat template; d\.jsonl:4 has chat messages"):
        encode_prompt(DataConfig(), problem, bare)
    with pytest.raises(UserError, match=r"data\.template is for prompts that are texts; d\.jsonl:4"):
        encode_prompt(DataConfig(template="Q: {question}"), problem, bare)
    tokenizer = load_policy("tiny", device="cpu").tokenizer
    tokenizer.chat_template = "{{ raise_exception('no system message, please') }}"
    with pytest.raises(UserError, match=r"d\.jsonl:4: the chat template refuses .*no system message, please"):
        encode_prompt(DataConfig(), problem, tokenizer)
