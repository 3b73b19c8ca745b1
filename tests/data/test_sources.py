"""Kinds of files, several files, slices, and what `datasets` saved."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from rl.config.load import load_config
from rl.data import table_files
from rl.data.prompts import load_prompts
from rl.data.sources import load_rows
from rl.data.tokenizer import load_tokenizer

COLUMNS = {"prompt": "prompt", "answer": "answer"}
ROWS = [{"prompt": f"{n}+7=", "answer": f"00{n + 7}"} for n in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ROWS in every kind of file."""
    path = tmp_path_factory.mktemp("files")
    (path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (path / "list.json").write_text(" \n" + json.dumps(ROWS, indent=1))
    (path / "field.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    for name, mark in (("q.csv", ","), ("q.tsv", "\t"), ("semicolons.csv", ";")):
        (path / name).write_text("\n".join(mark.join(row) for row in (("prompt", "answer"), *map(dict.values, ROWS))))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path / "q.parquet")
    data = datasets.Dataset.from_list(ROWS)
    data.with_format("numpy").save_to_disk(str(path / "saved"))
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(str(path / "saved_splits"))
    return path


def read(source, columns=COLUMNS, **args):
    return load_rows(str(source), args, columns, 0)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("q.jsonl", {}),
        ("lines.json", {}),
        ("list.json", {}),
        ("field.json", {"field": "data"}),
        ("q.csv", {}),
        ("q.tsv", {}),
        ("semicolons.csv", {"delimiter": ";"}),
        ("saved", {}),
        ("saved_splits", {"split": "train"}),
        ("saved/data-00000-of-00001.arrow", {}),
    ],
)
def test_every_kind_of_file_gives_the_same_rows_and_takes_slices(folder, tmp_path, name, args):
    args = args | ({"cache_dir": str(tmp_path)} if name.endswith(".arrow") else {})
    assert read(folder / name, **args) == ROWS
    for part, rows in {"[:3]": ROWS[:3], "[-2:]": ROWS[-2:], "[20%:50%]": ROWS[2:5]}.items():
        assert read(f"{folder / name}{part}", **args) == rows


def test_a_slice_of_a_split_is_that_of_datasets(folder):
    assert read(folder / "saved_splits", split="train[:20%]") == ROWS[:2]
    assert read(f"{folder / 'q.jsonl'}[:200]") == ROWS
    for part, message in (
        ("[5:5]", "must hold a row, got none of 10"),
        ("[a:b]", r"a slice must look like \[:100\]"),
        ("[:300%]", r"a slice must look like"),
    ):
        with pytest.raises(ValueError, match=message):
            read(f"{folder / 'q.jsonl'}{part}")


def test_a_cell_of_a_csv_file_may_be_as_long_as_a_line_of_json(tmp_path, monkeypatch):
    (tmp_path / "q.csv").write_text("prompt,answer\n" + "q" * 200_000 + ",1\n")
    (row,) = read(tmp_path / "q.csv")
    assert len(row["prompt"]) == 200_000
    monkeypatch.setattr(table_files, "MAX_CELL_CHARACTERS", 150_000)
    with pytest.raises(ValueError, match=r"q\.csv:2 must be a line of CSV: field larger than field limit \(150000\)"):
        read(tmp_path / "q.csv")


def test_a_delimiter_that_is_not_named_is_told(folder, tmp_path):
    with pytest.raises(ValueError, match=r"only column is 'prompt;answer': set data\.args\.delimiter=';' where"):
        read(folder / "semicolons.csv")
    (tmp_path / "q.csv").write_text("prompt|answer\na, b|1\n")
    with pytest.raises(ValueError, match=r"q\.csv:2 must have 1 cells.*set data\.args\.delimiter='\|' where"):
        read(tmp_path / "q.csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl", gzip.compress(b"{}", mtime=0), "text, as its name says, got a gzip file; unpack it"),
        ("q.json", b"PAR1", "got a parquet file; name it x.parquet"),
        (
            "q.jsonl",
            '{"prompt": "a"}\n'.encode("utf-16"),
            "in UTF-8, got what begins as UTF-16 does.*write it as UTF-8",
        ),
        ("q.json", "[]".encode("utf-16-be"), "got what begins as UTF-16 does"),
        ("q.csv", "prompt\na\n".encode("utf-16"), r"begins as UTF-16 does.*set data\.args\.encoding=utf-16"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_told(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name, {"prompt": "prompt"})
    if name.endswith(".csv"):
        assert read(tmp_path / name, {"prompt": "prompt"}, encoding="utf-16") == [{"prompt": "a"}]


def test_lines_of_text_are_rows(tmp_path):
    (tmp_path / "q.txt").write_text("a?\nb?\n")
    columns = {"prompt": "text", "answer": None}
    assert read(tmp_path / "q.txt", columns, cache_dir=str(tmp_path)) == [{"prompt": "a?"}, {"prompt": "b?"}]


def test_a_pattern_is_its_files_in_order_and_errors_name_the_file_and_its_row(tmp_path):
    for name, rows in (("b.csv", "prompt,answer\nc?,3\nd?,4\n"), ("a.csv", "prompt,answer,level\na?,1,x\n")):
        (tmp_path / name).write_text(rows)
    (tmp_path / "c.jsonl").write_text('{"prompt": "e?", "answer": "5"}\n{"prompt": 7, "answer": "5"}\n')
    rows = [
        {"prompt": p, "answer": a, "level": x} for p, a, x in (("a?", "1", "x"), ("c?", "3", None), ("d?", "4", None))
    ]
    assert read(tmp_path / "*.csv") == rows
    assert [row["prompt"] for row in read(f"{tmp_path / '*.csv'}[:1]")] == ["a?", "c?"]
    with pytest.raises(ValueError, match=r"c\.jsonl' row 1: the prompt must be text .* got 7; .*from, 'prompt'"):
        load_prompts(load_config(None, [f"data.source={tmp_path}/*.jsonl"]), load_tokenizer("byte"))
    (tmp_path / "b.csv").write_text("prompt,answer\nc?,3\nd?,\n")
    with pytest.raises(ValueError, match=r"data source '.*b\.csv' row 1: column 'answer' must have a value, got null"):
        read(tmp_path / "*.csv")
    with pytest.raises(ValueError, match=r"must match an existing file, got none"):
        read(tmp_path / "*.parquet")


def test_cells_of_csv_are_text_as_it_stands(tmp_path):
    path = tmp_path / "q.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,answer,note\r\n"a, ""b""\nc",NA,\r\nd,007,None\r\n\r\n')
    assert read(path) == [
        {"prompt": 'a, "b"\nc', "answer": "NA", "note": None},
        {"prompt": "d", "answer": "007", "note": "None"},
    ]


@pytest.mark.parametrize(
    ("name", "text", "args", "message"),
    [
        ("q.csv", "prompt,answer\na,1\nb,2,3\n", {}, r"q\.csv:3 must have 2 cells, .*got 3: \['b', '2', '3'\]"),
        ("q.csv", "prompt,prompt\na,1\n", {}, r"q\.csv:1 must name each column once"),
        ("q.csv", 'prompt,answer\n"a,1\n', {}, r"q\.csv:2 must be a line of CSV"),
        ("q.csv", "prompt\na\n", {"delimiter": "ab"}, r"data\.args\.delimiter must be one character .* got 'ab'"),
        ("q.csv", "prompt\na\n", {"encoding": "nope"}, r"must be a CSV file that can be read, .*data\.args\.encoding"),
        ("q.csv", "prompt\na\n", {"split": "train"}, r"must hold only \['delimiter'.*q\.csv\[:10%\] is a part of"),
        ("q.json", "[1]", {}, r"q\.json row 0 must be a JSON object, got 1"),
        ("q.json", "[{", {}, r"q\.json must be a JSON list of objects, or lines of JSON"),
        ("q.json", '{"a": 1}', {"field": "b"}, r"data\.args\.field must name a list .*got 'b' of \['a'\]"),
        ("q.json", '[{"a": 1, "a": 2}]', {}, r"key 'a' is given twice"),
        ("q.json", "[" + '{"a":' * 120 + "1" + "}" * 120 + "]", {}, r"q\.json row 0 must be at most 100 .*got 120"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_with_its_line(tmp_path, name, text, args, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name, **args)


def test_a_file_that_is_missing_is_never_asked_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", None)
    for source in ("q.csv", "user/q.json", "q.tsv[:3]", "q.arrow", "Q.JSONL"):
        with pytest.raises(ValueError, match="which does not exist"):
            read(source)
    (tmp_path / "other").write_text("prompt,answer\na,1\n")
    for source in ("q.jsonl.gz", "user/q.xlsx", "other"):
        with pytest.raises(ValueError, match=rf"got '{source}', a file of another kind; write it as one of these"):
            read(source)
    for name, mark in (("q.csv", ","), ("Q.CSV", ","), ("Q.TSV", "\t")):
        (tmp_path / name).write_text(f"prompt{mark}answer\na{mark}007\n")
        assert read(name) == [{"prompt": "a", "answer": "007"}]


def test_what_save_to_disk_wrote_takes_no_other_arguments(folder, tmp_path):
    with pytest.raises(ValueError, match=r"must name one split .*\['test', 'train'\]"):
        read(folder / "saved_splits")
    with pytest.raises(ValueError, match=r"must name a split .*got 'tset'; there are \['test', 'train'\]"):
        read(folder / "saved_splits", split="tset")
    with pytest.raises(ValueError, match=r"must hold split alone .*data\.args\.name=null"):
        read(folder / "saved", name="x")
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must be what save_to_disk wrote, got .*; write it again"):
        read(tmp_path)
