"""Problems out of a file: json, jsonl and csv by Python's own readers, parquet through ``datasets``.

Python's readers keep every value as the file says it. Those of ``datasets`` 5.2 make 7 of the text "007", a time of the
text "2020-01-01", other digits of an integer above 2^64, and drop what a line of csv has beyond its header.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import math
import tempfile
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from fastdiv.training.config import UserError
from fastdiv.training.problems import Problem, Prompt

#: Endings of the files that can be read.
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
_COLUMNS = ["prompt", "answer"]
_FEW = 20  # characters of a bad value that a message shows


class FileTask:
    """Rows of ``prompt`` and ``answer``; reward 1 for the same text or decimal number, else 0.

    A prompt is a text, or a list of messages ``{"role": ..., "content": ...}``: TRL's standard and conversational
    formats. Other columns are left alone.

    Arguments:
        path: a file whose name ends in one of :data:`SUFFIXES`.

    Raises:
        UserError: a file or a row that is none; the message names file and line, or file and row.
    """

    def __init__(self, path: Path) -> None:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"data.task: cannot read {path}: {error.strerror}") from error
        #: sha256 of the file: a resumed run has to see the same.
        self.fingerprint = hashlib.sha256(data).hexdigest()
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            rows = _parquet(path)
        else:
            text = _decode(path, data)
            rows = _csv(path, text) if suffix == ".csv" else _json(path, text, whole=suffix == ".json")
        self._problems = [_problem(where, row) for where, row in rows]
        if not self._problems:
            raise UserError(f"data.task: {path} holds no problem")

    def __len__(self) -> int:
        return len(self._problems)

    def problem(self, index: int) -> Problem:
        return self._problems[index]

    def reward(self, completion: str, problem: Problem) -> float:
        given, wanted = completion.strip(), problem.answer.strip()
        if given == wanted:
            return 1.0
        try:
            return float(Decimal(given) == Decimal(wanted))
        except InvalidOperation:
            return 0.0


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"data.task: {path}:{line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error


def _json(path: Path, text: str, *, whole: bool) -> Iterator[tuple[str, Any]]:
    """Where each row stands, and the row. A ``.json`` file may also be an array of rows, or hold a row per line."""
    if whole:
        try:
            value = _loads(text)
        except ValueError:
            pass
        else:
            for number, row in enumerate(value if isinstance(value, list) else [value], 1):
                yield f"{path}, row {number}", row
            return
    # Not splitlines: U+2028 and its like are ordinary characters of a JSON text.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", _loads(line)
        except ValueError as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise UserError(f"data.task: {path}:{number}: not JSON ({reason})") from error


def _loads(text: str) -> Any:
    try:
        return json.loads(text, parse_float=Decimal)  # 1.10 stays 1.10
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _csv(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Where each row ends, and the row; every value is a text."""
    limit = csv.field_size_limit(len(text) + 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"data.task: {where}: the row has more or fewer values than the header has names")
            yield where, row
    except csv.Error as error:
        raise UserError(f"data.task: {path}:{reader.line_num}: not CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"data.task: {path} needs datasets ({error}): pip install 'fastdiv[train]'") from error
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it says an error before it raises it
    options = {"data_files": glob.escape(str(path)), "split": "train", "columns": _COLUMNS}
    try:
        with tempfile.TemporaryDirectory() as cache:  # streaming copies no data, yet locks a file there
            rows = list(datasets.load_dataset("parquet", streaming=True, cache_dir=cache, **options))
    except Exception as error:  # pyarrow's and datasets' have no common class
        expected = "parquet with columns prompt and answer"
        raise UserError(f"data.task: {path}: cannot be read as {expected} ({' '.join(str(error).split())})") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


def _problem(where: str, row: Any) -> Problem:
    if not isinstance(row, dict) or not all(column in row for column in _COLUMNS):
        raise UserError(f"data.task: {where}: expected an object with 'prompt' and 'answer', got {_short(row)}")
    answer = row["answer"]
    number = isinstance(answer, int | float | Decimal) and math.isfinite(answer)
    # To Python a bool is an int.
    if isinstance(answer, bool) or (not number and not isinstance(answer, str)):
        raise UserError(f"data.task: {where}: answer must be a text or a number, got {_short(answer)}")
    problem = Problem(_prompt(where, row["prompt"]), str(answer), row, where)
    _check_text(where, "answer", problem.answer)
    return problem


def _prompt(where: str, prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        if not prompt:
            raise UserError(f"data.task: {where}: prompt is empty")
        _check_text(where, "prompt", prompt)
        return prompt
    if not isinstance(prompt, list) or not prompt:
        expected = "a text or a list of messages with 'role' and 'content'"
        raise UserError(f"data.task: {where}: prompt must be {expected}, got {_short(prompt)}")
    messages = []
    for number, message in enumerate(prompt, 1):
        given = message if isinstance(message, dict) else {}
        if not all(isinstance(given.get(key), str) for key in ("role", "content")):
            expected = "an object with texts 'role' and 'content'"
            raise UserError(f"data.task: {where}: prompt: message {number} must be {expected}, got {_short(message)}")
        # Parquet gives every message the fields of all.
        messages.append({key: value for key, value in given.items() if value is not None})
        for value in (given["role"], given["content"]):
            _check_text(where, f"prompt: message {number}", value)
    return messages


def _check_text(where: str, what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"data.task: {where}: {what} has half of a surrogate pair, {text[error.start]!r}") from error


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 3 * _FEW else text[: 3 * _FEW] + "..."
