"""Data: each bad row is named, batches are addressed by step, held-out rows never train, order comes from the seed."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from cookbook import generated
from cookbook.config import DataConfig
from cookbook.data import StreamedData, SupervisedData, load_supervised, prepare
from cookbook.errors import UsageError
from cookbook.row_report import RowReport
from core.datum import ModelInput

START, STOP = 256, 257


class ByteRenderer:
    """START role newline content STOP newline, in bytes; the assistant's content and STOP are trained."""

    def decode(self, tokens: list[int]) -> str:
        names = {START: b"<|", STOP: b"|>"}
        return b"".join(names.get(token) or bytes([token]) for token in tokens).decode()

    def build_supervised_examples(
        self, messages: list[dict], train_on: str = "all", tools: list[dict] | None = None
    ) -> list[tuple[ModelInput, list[float]]]:
        tokens: list[int] = []
        weights: list[float] = []
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        for i, message in enumerate(messages):
            header = [START, *f"{message['role']}\n".encode()]
            content = [*message["content"].encode(), STOP]
            by_role = message["role"] == "assistant" and (train_on != "last" or i == last)
            trained = bool(message.get("train", message.get("weight", by_role))) if train_on == "flags" else by_role
            tokens += [*header, *content, 10]
            weights += [0.0] * len(header) + [float(trained)] * len(content) + [0.0]
        if not any(weights):
            raise ValueError("no trained tokens in this conversation")
        return [(ModelInput.from_ints(tokens), weights)]

    def build_completion_example(self, prompt: str, completion: str) -> tuple[ModelInput, list[float]]:
        before, after = list(prompt.encode()), [*completion.encode(), STOP]
        return ModelInput.from_ints(before + after), [0.0] * len(before) + [1.0] * len(after)

    def build_text_example(self, text: str) -> tuple[ModelInput, list[float]]:
        tokens = list(text.encode())
        return ModelInput.from_ints(tokens), [1.0] * len(tokens)


def chat(question: str, answer: str = "yes") -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_jsonl(path: Path, rows: list) -> Path:
    """Rows that are already text are written as they are."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def load(path: Path, batch_size: int = 4, max_length: int = 200, seed: int = 0, **config) -> SupervisedData:
    data = DataConfig(**{"name": "file", "path": str(path), "eval_rows": 0, **config})
    return load_supervised(data, ByteRenderer(), seed=seed, batch_size=batch_size, max_length=max_length)


def load_one(tmp_path: Path, row: object, **config) -> SupervisedData:
    return load(write_jsonl(tmp_path / "one.jsonl", [row]), batch_size=1, **config)


def text_of(data: SupervisedData, step: int = 0, trained: bool = False) -> str:
    """The first sequence of a batch, or only its trained tokens."""
    sequence = data.sequences(step)[0]
    pairs = zip(sequence.tokens, sequence.weights, strict=True)
    return ByteRenderer().decode([token for token, weight in pairs if weight or not trained])


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(UsageError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- one bad row: its reason, its line, what was seen there

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
BAD_ROWS = [
    ('{"messages": [', "broken JSON", "Expecting value at column 15"),
    ("[1, 2]", "not an object", 'a list; a row looks like {"messages": [...]}'),
    ({"question": "1+1?"}, "wrong columns", "has 'question'; expected messages"),
    ({"messages": []}, "no messages", "messages is empty"),
    ({"messages": "hi"}, "no messages", "messages is str, expected a list"),
    ({"messages": ["hi"]}, "not a message", 'messages[0] is str; a message looks like {"role": ..., "content": ...}'),
    ({"messages": [{"role": "user", "content": " "}, ASSISTANT]}, "empty turn", "messages[0] (user) has no content"),
    ({"messages": [USER, {"role": "assistant"}]}, "empty turn", "messages[1] (assistant) has no content"),
    (
        {"messages": [USER, {"role": "asistant", "content": "ho"}]},
        "unknown role",
        "messages[1] has role 'asistant' (did you mean assistant?)",
    ),
    (
        {"messages": [{"role": "human", "content": "hi"}, ASSISTANT]},
        "unknown role",
        "messages[0] has role 'human' (did you mean user?)",
    ),
    ({"messages": [USER, USER, ASSISTANT]}, "two user turns in a row", "messages[0] and messages[1]"),
    ({"messages": [USER, {"role": "system", "content": "be"}]}, "system message not first", "messages[1]"),
    ({"messages": [USER]}, "no assistant message", "only user"),
    (
        {"messages": [USER, {"role": "assistant", "content": [{"type": "image_url"}]}]},
        "content is not text",
        "messages[1] has a part of type 'image_url'",
    ),
    (
        {"messages": [USER, {**ASSISTANT, "tool_calls": [{"function": {"name": "add", "arguments": "{1"}}]}]},
        "broken tool call",
        "messages[1]: not JSON (Expecting property name enclosed in double quotes at column 2)",
    ),
    (
        {**chat("hi"), "tools": "[{"},
        "broken tools",
        "tools: not JSON (Expecting property name enclosed in double quotes",
    ),
    ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "not valid Unicode", "messages[0] holds half of a"),
]


@pytest.mark.parametrize(("row", "reason", "detail"), BAD_ROWS, ids=[f"{i}-{bad[1]}" for i, bad in enumerate(BAD_ROWS)])
def test_a_bad_row_is_rejected_with_its_reason_line_and_value(tmp_path, row, reason, detail):
    path = write_jsonl(tmp_path / "my.jsonl", [chat("a"), row, *(chat(f"q{i}") for i in range(30))])
    report = load(path).report
    assert (report.ok, report.rejected) == (31, 1)
    assert report.reasons[reason].first == ["my.jsonl:2"]
    assert report.reasons[reason].detail.startswith(detail)


def test_bytes_that_are_not_utf8_are_named_by_line_and_column(tmp_path):
    path = write_jsonl(tmp_path / "my.jsonl", [chat(f"q{i}") for i in range(30)])
    path.write_bytes(b'{"text": "\xe9"}\n' + path.read_bytes())
    reason = load(path).report.reasons["not UTF-8 text"]
    assert (reason.first, reason.detail) == (["my.jsonl:1"], "byte 0xe9 at column 11")


def test_the_table_counts_a_reason_and_names_its_first_three_lines(tmp_path):
    path = write_jsonl(tmp_path / "my.jsonl", [chat("a"), "", *["{"] * 5, *(chat(f"q{i}") for i in range(200))])
    reason = load(path).report.reasons["broken JSON"]
    assert (reason.count, reason.first) == (5, ["my.jsonl:3", "my.jsonl:4", "my.jsonl:5"])


def test_too_many_bad_rows_stop_the_run_with_the_numbers_and_the_worst_place(tmp_path):
    path = write_jsonl(tmp_path / "my.jsonl", [chat("a"), "{", {"messages": [USER, USER, ASSISTANT]}, "{", chat("b")])
    assert refusal(load, path) == (
        "my.jsonl: 3 of 5 rows unusable, 60% (above data.max_bad=0.05); most often: broken JSON (2 of them,"
        " first my.jsonl:2,"
        " Expecting property name enclosed in double quotes at column 2); `cook data check` lists them all"
    )
    assert load(path, batch_size=2, max_bad=0.6).num_rows == 2


def test_no_usable_row_is_refused_even_when_bad_rows_are_allowed(tmp_path):
    path = write_jsonl(tmp_path / "my.jsonl", [{"messages": [USER]}] * 2)
    assert refusal(load, path, max_bad=1.0) == (
        "my.jsonl: 2 of 2 rows unusable, 100%; most often: no assistant message (2 of them,"
        " first my.jsonl:1, only user);"
        " `cook data check` lists them all"
    )


def test_rows_without_trained_tokens_are_rejected(tmp_path):
    silent = {"messages": [USER, {**ASSISTANT, "train": False}]}
    message = refusal(load_one, tmp_path, silent, train_on="flags")
    assert "no trained tokens (1 of them, first one.jsonl:1" in message


def test_overlong_rows_are_dropped_and_counted_apart_from_bad_ones(tmp_path):
    path = write_jsonl(tmp_path / "my.jsonl", [chat("a"), chat("b" * 300), chat("c")])
    report = load(path, batch_size=2).report
    assert (report.ok, report.rejected, report.overlong) == (2, 0, 1)
    assert report.reasons["longer than max_length=200"].detail == "324 tokens"


def test_truncation_keeps_the_first_tokens_and_rejects_what_has_none_trained_left(tmp_path):
    rows = [chat("a", "b" * 300), *(chat(f"q{i}") for i in range(30)), chat("c" * 300)]
    data = load(write_jsonl(tmp_path / "my.jsonl", rows), batch_size=31, overlong="truncate")
    assert max(len(sequence.tokens) for sequence in data.sequences(0)) == 200
    assert data.report.reasons["cut to max_length=200"].first == ["my.jsonl:1"]
    assert data.report.reasons["no trained tokens"].detail == "none in the first 200 tokens"


def test_overlong_error_stops_at_the_first_row(tmp_path):
    path = write_jsonl(tmp_path / "my.jsonl", [chat("a"), chat("b" * 300)])
    assert refusal(load, path, overlong="error") == (
        "my.jsonl:2: 324 tokens, max_length=200 and data.overlong=error;"
        " raise max_length, or set data.overlong=drop or truncate"
    )


def test_all_rows_overlong_is_refused(tmp_path):
    assert refusal(load_one, tmp_path, chat("b" * 300)) == (
        "one.jsonl: all 1 rows are longer than max_length; raise max_length or set data.overlong=truncate"
    )


# ---- files that are no data


def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n \n")
    (tmp_path / "binary.jsonl").write_bytes(b"\x7fELF\0\0\0")
    (tmp_path / "gzip.jsonl").write_bytes(b"\x1f\x8b\x08")
    (tmp_path / "not.parquet").write_text("{}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").write_text("{}")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "cut.json").write_text('[{"text": "a"},\n {"text": "b"}\n')
    (tmp_path / "broken.json").write_text('[{"text": "a"},\n {"text": }]')
    expected = {
        "empty.jsonl": "empty.jsonl is empty (0 bytes); it should hold at least one row",
        "blank.jsonl": "blank.jsonl holds no rows",
        "binary.jsonl": "binary.jsonl is a binary file; expected UTF-8 text (.jsonl)",
        "gzip.jsonl": "gzip.jsonl is compressed; unpack it first",
        "not.parquet": "not.parquet is not a parquet file (it starts with b'{}', not b'PAR1')",
        "folder": "folder is a folder; data.path wants one file (in it: a.jsonl)",
        "notes.txt": "notes.txt: cannot tell the format; data.path wants a file ending in .jsonl, .ndjson, .json,"
        " .parquet, .csv, .tsv",
        "emty.jsonl": "emty.jsonl (did you mean empty.jsonl?); check data.path",
        "cut.json": "cut.json:3: broken JSON (Expecting ',' delimiter at column 1) in the row that starts at line 2;"
        " the rest of a JSON list cannot be read: fix it, or write an object per line (.jsonl)",
        "broken.json": "broken.json:2: broken JSON (Expecting value at column 11) in the row that starts at line 2;"
        " the rest of a JSON list cannot be read: fix it, or write an object per line (.jsonl)",
    }
    for name, message in expected.items():
        assert refusal(load, tmp_path / name).endswith(message), name


def test_fewer_rows_than_a_batch_is_refused_with_both_numbers(tmp_path):
    path = write_jsonl(tmp_path / "my.jsonl", [chat(f"q{i}") for i in range(10)])
    assert refusal(load, path, batch_size=32, eval_rows=5) == (
        "my.jsonl: 8 training rows (2 more are held out) are fewer than batch_size=32;"
        " lower batch_size, or bring more rows"
    )


def test_mistyped_values_are_refused_with_the_choices(tmp_path):
    path = write_jsonl(tmp_path / "my.jsonl", [chat("a")])
    assert refusal(load, path, train_on="lst") == (
        "data.train_on=lst: expected last, all, everything, flags (did you mean last?)"
    )
    assert refusal(load, path, overlong="trunc").startswith("data.overlong=trunc: expected drop, truncate, error")
    assert refusal(load, path, columns={"promt": "q"}).startswith(
        "data.columns.promt: no such column (did you mean prompt?); known: messages, "
    )
    assert refusal(load_supervised, DataConfig(name="file"), ByteRenderer(), seed=0, batch_size=1, max_length=9) == (
        "data=file wants a path: data.path=my.jsonl (or .json, .parquet, .csv)"
    )
    assert refusal(prepare, DataConfig(name="gsm_simbolic"), ByteRenderer(), 9).startswith(
        "data.name=gsm_simbolic: no generated set of that name (did you mean gsm_symbolic?)"
    )


# ---- formats

CHAT_TEXT = "<|user\nhi|>\n<|assistant\nho|>\n"
FORMAT_ROWS = [
    ({"messages": [USER, ASSISTANT]}, "messages", CHAT_TEXT),
    (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        "sharegpt -> messages",
        CHAT_TEXT,
    ),
    ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt/completion -> messages", CHAT_TEXT),
    ({"prompt": "hi", "completion": "ho"}, "prompt/completion -> raw text", "hiho|>"),
    (
        {"instruction": "add", "input": "1 2", "output": "3"},
        "instruction/output -> messages",
        "<|user\nadd\n1 2|>\n<|assistant\n3|>\n",
    ),
    ({"instruction": "hi", "input": "", "output": "ho"}, "instruction/output -> messages", CHAT_TEXT),
    ({"question": "hi", "answer": "ho"}, "question/answer -> messages", CHAT_TEXT),
    ({"question": "hi", "response": "ho"}, "question/response -> messages", CHAT_TEXT),
    ({"query": "hi", "response": "ho", "system": None}, "query/response -> messages", CHAT_TEXT),
    ({"text": "hiho"}, "text -> raw text", "hiho"),
    ({"prompt": "hi", "messages": [USER, ASSISTANT], "category": "x"}, "messages", CHAT_TEXT),
    (
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "h"}, {"text": "o"}]}]},
        "messages",
        CHAT_TEXT,
    ),
]


@pytest.mark.parametrize(("row", "detected", "text"), FORMAT_ROWS)
def test_a_format_is_detected_from_its_columns(tmp_path, row, detected, text):
    data = load_one(tmp_path, row)
    assert data.report.detected == [f"one.jsonl, detected: {detected}"]
    assert text_of(data) == text


def test_columns_named_by_the_user_win_over_those_present(tmp_path):
    row = {"q": "hi", "a": "ho", "messages": [USER, ASSISTANT]}
    data = load_one(tmp_path, row, columns={"question": "q", "answer": "a"})
    assert data.report.detected == ["one.jsonl, detected: question/answer -> messages"]
    message = refusal(load_one, tmp_path, row, columns={"prompt": "question"})
    assert "wrong columns (1 of them, first one.jsonl:1, no 'question' (data.columns.prompt); has 'q', 'a'" in message


def test_unknown_columns_are_refused_with_the_formats_and_the_way_out(tmp_path):
    message = refusal(load_one, tmp_path, {"frage": "hi", "antwort": "ho"})
    assert message.startswith("one.jsonl: columns 'frage', 'antwort' fit no known format (messages | conversations | ")
    assert message.endswith("name yours, e.g. data.columns.prompt=question data.columns.completion=answer")


def test_a_chat_completion_trains_the_completion_and_not_its_history(tmp_path):
    row = {"prompt": [USER, ASSISTANT, USER], "completion": [{"role": "assistant", "content": "new"}]}
    assert text_of(load_one(tmp_path, row), trained=True) == "new|>"


def test_flags_choose_the_trained_messages(tmp_path):
    row = {"messages": [USER, {**ASSISTANT, "weight": 0}, USER, {"role": "assistant", "content": "new", "train": True}]}
    assert text_of(load_one(tmp_path, row, train_on="flags"), trained=True) == "new|>"
    data = load_one(tmp_path, row)
    assert text_of(data, trained=True) == "new|>"
    assert "rows whose train/weight flags choose the trained replies: 1" in data.report.lines()
    data = load_one(tmp_path, row, train_on="all")
    assert text_of(data, trained=True) == "ho|>new|>"
    assert "IGNORED: the train/weight flags of 1 rows; leave data.train_on out to use them" in data.report.lines()


def test_flags_that_are_null_are_none(tmp_path):
    """As in files with a column for every key."""
    row = {"messages": [{**USER, "weight": None}, {**ASSISTANT, "weight": None}]}
    data = load_one(tmp_path, row)
    assert text_of(data, trained=True) == "ho|>" and data.report.flags_used == 0


def test_flags_within_a_chat_completion_leave_its_history_out(tmp_path):
    parts = [{**ASSISTANT, "weight": 0}, USER, {"role": "assistant", "content": "new"}]
    row = {"prompt": [USER, ASSISTANT, USER], "completion": parts}
    assert text_of(load_one(tmp_path, row), trained=True) == "new|>"


def test_a_row_that_can_be_mended_is_mended_and_counted(tmp_path):
    data = load_one(tmp_path, {"messages": [{"role": "system", "content": ""}, USER, ASSISTANT]})
    assert text_of(data) == CHAT_TEXT
    assert (data.report.fixed, list(data.report.reasons)) == (1, ["empty system message left out"])
    data = load_one(tmp_path, {"messages": [{"role": "developer", "content": "be"}, USER, ASSISTANT]})
    assert text_of(data).startswith("<|system\nbe|>")


class ToolRenderer(ByteRenderer):
    """Writes what it was given into the sequence."""

    def build_supervised_examples(self, messages, train_on="all", tools=None):
        return [self.build_text_example(json.dumps([messages, tools]))]


def test_tool_calls_reach_the_renderer_with_arguments_as_objects(tmp_path):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    answer = {"role": "tool", "content": "", "tool_call_id": "1", "name": None}
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, answer, ASSISTANT]
    path = write_jsonl(tmp_path / "t.jsonl", [{"messages": turns, "tools": '[{"name": "add"}]'}])
    config = DataConfig(name="file", path=str(path), eval_rows=0)
    data = load_supervised(config, ToolRenderer(), seed=0, batch_size=1, max_length=2000)
    messages, tools = json.loads(text_of(data))
    assert messages[1]["tool_calls"] == [{**call, "function": {"name": "add", "arguments": {"a": 1}}}]
    assert messages[2] == {"role": "tool", "content": "", "tool_call_id": "1"}
    assert tools == [{"name": "add"}]


# ---- file kinds


def test_json_jsonl_csv_and_parquet_give_the_same_sequences(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": f'q{i},\n"{i}" é', "answer": f"a{i}"} for i in range(20)]
    write_jsonl(tmp_path / "r.jsonl", rows)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=2))
    write_jsonl(tmp_path / "lines.json", rows)
    with (tmp_path / "r.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")

    names = ["r.jsonl", "list.json", "lines.json", "r.csv", "r.parquet"]
    batches = [load(tmp_path / name, batch_size=20).sequences(0) for name in names]
    texts = [[sequence.tokens for sequence in batch] for batch in batches]
    assert texts[0] == texts[1] == texts[2] == texts[3] == texts[4]
    labels = [{int("".join(filter(str.isdigit, s.label.split(".")[1]))) for s in batch} for batch in batches]
    assert labels[0] == labels[2] == set(range(1, 21))  # lines
    assert labels[1] == set(range(2, 80, 4))  # the lines where elements start
    assert labels[3] == set(range(2, 42, 2))  # a quoted cell spans lines
    assert labels[4] == set(range(20))


def test_a_csv_row_with_missing_fields_is_rejected_by_line(tmp_path):
    lines = ["question;answer", "a;b", "c", *(f"q{i};a{i}" for i in range(30))]
    (tmp_path / "r.csv").write_text("\n".join(lines))
    reason = load(tmp_path / "r.csv").report.reasons["wrong number of fields"]
    assert (reason.first, reason.detail) == (["r.csv:3"], "1, the header has 2")


def test_messages_in_a_csv_cell_are_read_as_json(tmp_path):
    with (tmp_path / "r.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps([USER, ASSISTANT])]])
    assert text_of(load(tmp_path / "r.csv", batch_size=1)) == CHAT_TEXT


# ---- order


def numbered(tmp_path: Path, count: int, name: str = "my.jsonl") -> Path:
    return write_jsonl(tmp_path / name, [chat(f"{name} {i}") for i in range(count)])


def test_an_epoch_holds_each_row_once_and_epochs_differ(tmp_path):
    data = load(numbered(tmp_path, 40), batch_size=4)
    assert (data.num_rows, data.epoch_steps) == (40, 10)
    epochs = [[label for step in range(e * 10, e * 10 + 10) for label in data.rows_of(step)] for e in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 40 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_an_epoch_has_full_batches_only_and_no_row_twice(tmp_path):
    data = load(numbered(tmp_path, 43), batch_size=4)
    labels = [label for step in range(data.epoch_steps or 0) for label in data.rows_of(step)]
    assert len(labels) == len(set(labels)) == 40


def test_a_step_has_the_same_batch_whatever_was_asked_before(tmp_path):
    path = numbered(tmp_path, 50)
    forward = [load(path, eval_rows=5).rows_of(step) for step in range(40)]
    data = load(path, eval_rows=5)
    assert [data.rows_of(step) for step in reversed(range(40))] == forward[::-1]
    assert forward != [load(path, eval_rows=5, seed=1).rows_of(step) for step in range(40)]


def test_a_batch_is_data_for_the_engine(tmp_path):
    datum = load_one(tmp_path, chat("hi", "ho")).batch(0)[0]
    tokens = [START, *b"user\nhi", STOP, 10, START, *b"assistant\nho", STOP, 10]
    assert datum.model_input.to_ints() == tokens[:-1]
    assert list(datum.loss_fn_inputs["target_tokens"]) == tokens[1:]
    assert sum(datum.loss_fn_inputs["weights"]) == 3  # h, o, STOP


def test_held_out_rows_are_never_trained_on(tmp_path):
    data = load(numbered(tmp_path, 100), eval_rows=10, batch_size=9)
    trained = {tuple(datum.model_input.to_ints()) for step in range(20) for datum in data.batch(step)}
    held_out = {tuple(datum.model_input.to_ints()) for datum in data.held_out}
    assert (len(held_out), len(trained)) == (10, 90)
    assert not held_out & trained


def test_held_out_rows_are_at_most_a_fifth(tmp_path):
    data = load(numbered(tmp_path, 20), eval_rows=100)
    assert (len(data.held_out), data.num_rows) == (4, 16)


def test_a_row_that_occurs_twice_is_not_held_out(tmp_path):
    rows = [chat(f"q{i // 2}") for i in range(18)] + [chat("single"), chat("alone")]
    data = load(write_jsonl(tmp_path / "my.jsonl", rows), eval_rows=4, batch_size=1)
    texts = {ByteRenderer().decode(datum.model_input.to_ints()).split("|>")[0] for datum in data.held_out}
    assert texts == {"<|user\nsingle", "<|user\nalone"}
    assert data.report.duplicate_prompts == 9


def test_limit_takes_the_first_usable_rows(tmp_path):
    path = write_jsonl(tmp_path / "my.jsonl", [chat("a"), "{", *(chat(f"q{i}") for i in range(50))])
    data = load(path, limit=20, batch_size=20)
    assert set(data.rows_of(0)) == {"my.jsonl:1", *(f"my.jsonl:{line}" for line in range(3, 22))}


# ---- mixtures


def mixture(sources: dict[str, float], **config) -> DataConfig:
    return DataConfig(**{"name": "mixture", "sources": sources, "eval_rows": 0, **config})


def test_a_mixture_holds_its_weights_and_uses_no_row_twice(tmp_path):
    a, b = numbered(tmp_path, 100, "a.jsonl"), numbered(tmp_path, 100, "b.jsonl")
    config = mixture({str(a): 3, str(b): 1})
    read, name = prepare(config, ByteRenderer(), 200)
    labels = [row[0].label for row in read(RowReport())]
    assert name == "mixture of a.jsonl, b.jsonl"
    assert Counter(label.split(":")[0] for label in labels) == {"a.jsonl": 100, "b.jsonl": 33}
    assert len(set(labels)) == 133
    for count in range(1, 133):  # at any point, not only at the end
        assert abs(sum(label.startswith("b") for label in labels[:count]) - count / 4) <= 1
    assert labels == [row[0].label for row in read(RowReport())]


def test_a_mixture_of_presets_and_files_reads_conf(tmp_path, monkeypatch):
    monkeypatch.setenv("COOK_CACHE", str(tmp_path))
    monkeypatch.setitem(generated.GENERATED, "gsm_symbolic", lambda size: [{"question": "q", "answer": f"{size}"}])
    path = numbered(tmp_path, 3, "a.jsonl")
    read, _ = prepare(mixture({"gsm_symbolic": 1, str(path): 1}), ByteRenderer(), 200)
    assert [row[0].label for row in read(RowReport())] == ["gsm_symbolic[0]", "a.jsonl:1"]


def test_mistakes_in_a_mixture_are_named(tmp_path):
    path = numbered(tmp_path, 3, "a.jsonl")

    def say(sources):
        return refusal(prepare, mixture(sources), ByteRenderer(), 200)

    assert say({"no_robot": 1}).startswith("data.sources.no_robot: no such file or preset (did you mean no_robots?)")
    assert say({str(path): 0.0}).endswith("=0: a weight is a positive number; to drop it, leave it out")
    assert say({}).startswith("data=mixture wants data.sources, e.g. ")


# ---- streams


def test_a_stream_equals_itself_after_skipping(tmp_path):
    path = numbered(tmp_path, 60)
    data = load(path, streaming=True, eval_rows=5)
    assert isinstance(data, StreamedData) and data.num_rows is None and data.epoch_steps is None
    forward = [data.rows_of(step) for step in range(40)]
    resumed = load(path, streaming=True, eval_rows=5)
    assert [resumed.rows_of(step) for step in (30, 31, 7, 8, 39, 38)] == [forward[s] for s in (30, 31, 7, 8, 39, 38)]


def test_a_stream_reads_each_row_once_per_pass_and_never_the_held_out_ones(tmp_path):
    data = load(numbered(tmp_path, 65), streaming=True, eval_rows=5)
    passes = [[label for step in range(p * 15, p * 15 + 15) for label in data.rows_of(step)] for p in range(2)]
    lines = [f"my.jsonl:{line}" for line in range(6, 66)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(lines)
    assert passes[0] != passes[1] and passes[0] != lines
    assert len(data.held_out) == 5


def test_a_stream_does_not_train_on_repeats_of_held_out_rows(tmp_path):
    rows = [chat("held"), *(chat(f"q{i}") for i in range(8)), chat("held")]
    data = load(write_jsonl(tmp_path / "my.jsonl", rows), streaming=True, eval_rows=1)
    assert sorted(data.rows_of(0) + data.rows_of(1)) == [f"my.jsonl:{line}" for line in range(2, 10)]


def test_a_stream_shorter_than_a_batch_is_refused(tmp_path):
    assert refusal(load, numbered(tmp_path, 8), streaming=True, eval_rows=5) == (
        "my.jsonl: the stream ends after 8 usable rows, fewer than data.eval_rows=5 and one batch of 4;"
        " set data.streaming=false"
    )


# ---- generated and hub sets


def test_generated_problems_are_all_different_and_come_from_the_cache_next_time(tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setenv("COOK_CACHE", str(tmp_path))
    rows = generated.generated_rows("gsm_symbolic", 300)
    assert len({row["question"] for row in rows}) == 300
    assert all("####" in str(row["answer"]) for row in rows)
    assert generated.generated_rows("gsm_symbolic", 50) == rows[:50]

    (cached,) = tmp_path.glob("generated/gsm_symbolic-300-*.jsonl")
    cached.write_text(cached.read_text().replace("carpenter", "cook"))
    assert "cook" in str(generated.generated_rows("gsm_symbolic", 300)[0]["question"])
    cached.write_text("torn")
    assert generated.generated_rows("gsm_symbolic", 300) == rows


def test_generated_rows_do_not_need_a_writable_cache(tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COOK_CACHE", str(tmp_path / "file"))
    assert len(generated.generated_rows("gsm_symbolic", 5)) == 5


def test_a_hub_set_without_network_is_one_line(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = DataConfig(name="no_robots", path="nobody/no-such-set")
    assert refusal(prepare, config, ByteRenderer(), 200) == (
        "hub data set nobody/no-such-set cannot be reached and is not in the cache (no network?);"
        " try again online, or use a local file: data=file data.path=my.jsonl"
    )


def test_reading_stops_where_the_reader_stops(tmp_path):
    read, _ = prepare(DataConfig(name="file", path=str(numbered(tmp_path, 5000))), ByteRenderer(), 200)
    report = RowReport()
    assert len(list(itertools.islice(read(report), 3))) == report.ok == 3
