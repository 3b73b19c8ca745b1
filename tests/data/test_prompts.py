"""Rows, columns, prompts, the train/held-out split, the order of steps, and pairs for supervised fine-tuning."""

import itertools
import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from rl.config.load import load_config
from rl.data import parquet_pages, sources
from rl.data.order import Order
from rl.data.prompt_rows import question_key
from rl.data.prompts import check_enough_rows, fingerprint, load_pairs, load_prompts
from rl.data.sources import load_rows, open_source
from rl.data.tokenizer import Tokenizer, load_tokenizer

COLUMNS = {"prompt": "prompt", "answer": "answer"}
ARITHMETIC = ("data.source=arithmetic", "data.args.operation=add", "data.args.digits=1")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("byte")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config_for(source, *overrides):
    return load_config(None, [f"data.source={source}", *overrides])


def questions(rows):
    return {question_key(row.prompt) for row in rows}


# Sources and columns


def test_jsonl_and_parquet_and_datasets_give_the_same_rows(tmp_path):
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1), "level": n % 3, "tags": ["a", str(n)]} for n in range(7)]
    folder = tmp_path / "set"
    folder.mkdir()
    jsonl = write_jsonl(folder / "train.jsonl", rows)
    parquet = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    assert load_rows(jsonl, {}, COLUMNS, 0) == rows
    assert load_rows(str(parquet), {}, COLUMNS, 0) == rows
    args = {"split": "train", "cache_dir": str(tmp_path / "cache")}
    assert load_rows(str(folder), args, COLUMNS, 0) == rows
    assert load_rows(str(folder), {"cache_dir": args["cache_dir"]}, COLUMNS, 0) == rows  # its only split
    write_jsonl(folder / "test.jsonl", rows[:2])
    with pytest.raises(ValueError, match=r"data\.args\.split must name one split .*\['test', 'train'\]"):
        load_rows(str(folder), {"cache_dir": args["cache_dir"]}, COLUMNS, 0)
    with pytest.raises(ValueError, match=r"cannot load.*tset"):
        load_rows(str(folder), {**args, "split": "tset"}, COLUMNS, 0)
    with pytest.raises(ValueError, match=r"as a whole, got IterableDataset"):
        load_rows(str(folder), {**args, "streaming": True}, COLUMNS, 0)


def test_parts_of_a_source_are_disjoint_and_complete(tmp_path):
    rows = [{"prompt": "x" * (5 * n % 17), "answer": n} for n in range(23)]
    path = tmp_path / "x.jsonl"
    path.write_text("\n" + "\n\n".join(json.dumps(row) for row in rows))
    parquet = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet, row_group_size=5)
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", rows)
    data_set = {"split": "train", "cache_dir": str(tmp_path / "cache")}
    for source, args in ((str(path), {}), (str(parquet), {}), (str(tmp_path / "set"), data_set)):
        opened = open_source(source, args, 0)
        for count in (1, 2, 7, 100):
            borders = [opened.size * i // count for i in range(count + 1)]
            parts = [opened.read(start, end) for start, end in itertools.pairwise(borders)]
            assert [row for part in parts for row in part] == rows
            assert len(parts[0]) < 23 // count + 3


def test_columns_are_renamed_and_the_others_pass_through(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "a?", "gold": 3, "level": 1}, {"question": "b?", "gold": 4}])
    rows = load_rows(path, {}, {"prompt": "question", "answer": "gold"}, 0)
    assert rows == [{"prompt": "a?", "answer": 3, "level": 1}, {"prompt": "b?", "answer": 4, "level": None}]
    assert load_rows(path, {}, {"prompt": "question", "answer": None}, 0)[1] == {
        "prompt": "b?",
        "gold": 4,
        "level": None,
    }


def test_missing_column_names_the_existing_and_the_nearest(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "a?", "answers": 3}])
    with pytest.raises(
        ValueError, match=r"data\.columns\.prompt .*got 'prompt'; the columns are \['answers', 'question'\]"
    ):
        load_rows(path, {}, COLUMNS, 0)
    with pytest.raises(ValueError, match=r"did you mean 'answers'\?; data\.columns\.answer=null"):
        load_rows(path, {}, {"prompt": "question", "answer": "answer"}, 0)
    with pytest.raises(ValueError, match=r"data\.columns must map prompt"):
        load_rows(path, {}, {"prompt": None}, 0)


def test_row_without_a_mapped_value_is_named(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "answer": "1"}, {"prompt": "b"}])
    with pytest.raises(ValueError, match=r"row 1: column 'answer' must have a value"):
        load_rows(path, {}, COLUMNS, 0)


@pytest.mark.parametrize("bad", ["{broken", "[1, 2]", '"text"', "\xff\xfe"])
def test_malformed_jsonl_line_is_named_with_its_number(tmp_path, bad):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": "1"}\n\n' + bad.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:3 must be one JSON object"):
        load_rows(str(path), {}, COLUMNS, 0)


@pytest.mark.parametrize("bad", ['{"prompt": "a", "prompt": "b"}', '{"prompt": "a", "more": {"x": 1, "x": 1}}'])
def test_jsonl_row_with_a_key_given_twice_is_named_with_the_key(tmp_path, bad):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n' + bad + "\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:2 must be .*: key '(prompt|x)' is given twice"):
        load_rows(str(path), {}, COLUMNS, 0)


def test_empty_data_set_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="at least one row, got an empty data set"):
        load_rows(str(tmp_path / "x.jsonl"), {}, COLUMNS, 0)


@pytest.mark.parametrize("source", ["missing.jsonl", "missing.parquet"])
def test_missing_file_is_refused(source):
    for args in ({}, {"digits": 2}):  # those of the source that the file takes the place of
        with pytest.raises(ValueError, match=rf"got '{source}', which does not exist"):
            load_rows(source, args, COLUMNS, 0)


@pytest.mark.parametrize("source", ["./no/such/folder", "nobody/no-such-data-set"])
def test_source_that_is_nowhere_is_refused(source):
    with pytest.raises(ValueError, match=r"data source must be x\.jsonl, .*reasoning_gym:TASK, got"):
        load_rows(source, {}, COLUMNS, 0)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_pages_of_ordinary_parquet_files_are_found(tmp_path, version, compression):
    path = tmp_path / "x.parquet"
    rows = [{"prompt": f"question {i % 7} " * 20, "answer": str(i), "tags": ["a", None] * (i % 3)} for i in range(500)]
    table = pyarrow.Table.from_pylist(rows)
    options = {"data_page_version": version, "compression": compression, "data_page_size": 1000, "row_group_size": 200}
    pyarrow.parquet.write_table(table, path, **options, write_batch_size=50, write_page_checksum=True)
    assert load_rows(str(path), {}, {"prompt": "prompt"}, 0) == rows
    metadata = pyarrow.parquet.read_metadata(path)
    column = metadata.row_group(1).column(0)
    first = column.dictionary_page_offset or column.data_page_offset
    with path.open("rb") as file:
        headers = parquet_pages._check_column(file, first, first + column.total_compressed_size, "")
        # The metadata counts the headers as well.
        assert 0 <= column.total_uncompressed_size - headers < 0.2 * column.total_uncompressed_size + 500


def page_sizes(path):
    """Where the header of the first page says how large it is: (place of the number, place behind it)."""
    column = pyarrow.parquet.read_metadata(path).row_group(0).column(0)
    place = column.data_page_offset + 3  # the page's type, then the header of the next field
    data = path.read_bytes()
    end = place
    while data[end] >= 128:
        end += 1
    return place, end + 1


def test_a_parquet_page_that_decompresses_to_too_much_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    table = pyarrow.Table.from_pylist([{"prompt": "x" * 100_000_000}])
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)
    assert path.stat().st_size < 100_000
    start, end = page_sizes(path)
    assert end - start == 4
    data = bytearray(path.read_bytes())
    data[start:end] = b"\xfe\xff\xff\x7f"  # what a header says counts, whatever the metadata says: 2^27 - 1
    (tmp_path / "lies.parquet").write_bytes(data)
    monkeypatch.setattr(parquet_pages, "MAX_PAGE_BYTES", 120_000_000)
    assert len(load_rows(str(path), {}, {"prompt": "prompt"}, 0)) == 1
    message = (
        r"lies\.parquet: column 'prompt' of row group 0 must have pages of at most 120000000 .* got 134217727; write"
    )
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / "lies.parquet"), {}, {"prompt": "prompt"}, 0)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path), {"split": "train"}, {"prompt": "prompt"}, 0)
    data[start - 3 : end] = b"\xff" * (end - start + 3)
    (tmp_path / "lies.parquet").write_bytes(data)
    with pytest.raises(ValueError, match="must have a page header at byte 4, and it cannot be read"):
        load_rows(str(tmp_path / "lies.parquet"), {}, {"prompt": "prompt"}, 0)
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)
    with pytest.raises(
        ValueError, match="row group 0 must decompress to what fits in memory, got 100000010 bytes of 10"
    ):
        load_rows(str(path), {}, {"prompt": "prompt"}, 0)


def test_rows_of_json_have_a_largest_size(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a"}\n' + '{"prompt": "' + "b" * 100 + '"}\n')
    assert len(load_rows(str(path), {}, {"prompt": "prompt"}, 0)) == 2
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 50)
    for read in (lambda: load_rows(str(path), {}, {"prompt": "prompt"}, 0), lambda: sources.read_jsonl(path)):
        with pytest.raises(ValueError, match=r"x\.jsonl must hold rows of at most 50 bytes, .* begins at byte 16"):
            read()
    assert sources._read_jsonl_part(path, 60, 70) == []  # inside of the long line


def test_file_that_is_not_parquet_is_refused(tmp_path):
    (tmp_path / "x.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match="must be a parquet file"):
        load_rows(str(tmp_path / "x.parquet"), {}, COLUMNS, 0)


def test_arguments_that_a_file_has_no_use_for_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "answer": "1"}])
    with pytest.raises(ValueError, match=r"data\.args must be empty .*data\.args\.split=null"):
        load_rows(path, {"split": "train"}, COLUMNS, 0)
    assert load_rows(path, {"split": None}, COLUMNS, 0) == [{"prompt": "a", "answer": "1"}]


# Prompts


def test_source_must_be_set(tokenizer):
    with pytest.raises(ValueError, match=r"data\.source must be set"):
        load_prompts(load_config(None), tokenizer)


def test_prompt_rows_carry_ids_columns_and_position(tokenizer, tmp_path):
    path = write_jsonl(
        tmp_path / "x.jsonl", [{"prompt": "a?", "answer": "1", "level": 2}, {"prompt": "b?", "answer": "2", "level": 3}]
    )
    data = load_prompts(config_for(path), tokenizer)
    assert [row.prompt for row in data.train] == ["a?", "b?"]
    assert [row.columns for row in data.train] == [{"answer": "1", "level": 2}, {"answer": "2", "level": 3}]
    assert [row.index for row in data.train] == [0, 1]
    assert data.train[1].prompt_ids.dtype == np.int32
    assert data.train[1].prompt_ids.tolist() == [1, 3 + ord("b"), 3 + ord("?")]
    assert (data.held_out, data.num_dropped, data.messages) == ([], 0, [])


def test_system_prompt_goes_in_front_of_raw_text(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "1+1=", "answer": "2"}])
    row = load_prompts(config_for(path, "data.system_prompt='Add. '"), tokenizer).train[0]
    assert row.prompt == "Add. 1+1="
    assert tokenizer.decode(row.prompt_ids) == "Add. 1+1="


def test_chat_prompts_go_through_the_template(tokenizer, tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "1+1=", "answer": "2"}, {"prompt": turns, "answer": "3"}])
    plain, talk = load_prompts(config_for(path, "data.chat=true"), tokenizer).train
    assert plain.prompt == [{"role": "user", "content": "1+1="}]
    assert talk.prompt == turns
    assert (
        tokenizer.decode(talk.prompt_ids, skip_special_tokens=False)
        == "<bos>user: a\nassistant: b\nuser: c\nassistant: "
    )
    plain, talk = load_prompts(config_for(path, "data.chat=true", "data.system_prompt=Add."), tokenizer).train
    assert plain.prompt == [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1="}]
    assert talk.prompt == [{"role": "system", "content": "Add."}, *turns]
    begun = [{"role": "assistant", "content": "<think>\n"}]
    config = config_for(path, "data.chat=true", 'data.assistant_prefill="<think>\\n"')
    plain, talk = load_prompts(config, tokenizer).train
    assert talk.prompt == turns + begun
    assert tokenizer.decode(plain.prompt_ids) == "user: 1+1=\nassistant: <think>\n"
    assert question_key(plain.prompt) == "1+1="


@pytest.mark.parametrize("form", ["jsonl", "parquet", "datasets"])
def test_a_messages_column_of_several_turns_is_the_prompt(tokenizer, tmp_path, form):
    """Also where the last turn is the beginning of the answer, and where messages have fields of others."""
    calls = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}]
    chats = [[*calls, {"role": "user", "content": "c"}], [{"role": "user", "content": "d"}, calls[1]]]
    rows = [{"messages": chat, "answer": "1"} for chat in chats]
    (tmp_path / "set").mkdir()
    source, overrides = write_jsonl(tmp_path / "set" / "train.jsonl", rows), []
    if form == "parquet":
        source = str(tmp_path / "train.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    if form == "datasets":
        source = str(tmp_path / "set")
        overrides = [f"data.args={{split: train, cache_dir: {tmp_path / 'cache'}}}"]
    config = config_for(source, "data.columns.prompt=messages", "data.chat=true", *overrides)
    train = load_prompts(config, tokenizer).train
    assert [row.prompt for row in train] == chats
    rendered = ["user: a\nassistant: b\nuser: c\nassistant: ", "user: d\nassistant: b"]
    assert [tokenizer.decode(row.prompt_ids) for row in train] == rendered
    if form == "jsonl":
        with pytest.raises(ValueError, match=r"'messages'\]; data\.columns\.prompt=messages takes conversations"):
            load_prompts(config_for(source, "data.chat=true"), tokenizer)


@pytest.mark.parametrize(
    ("prompt", "overrides", "message"),
    [
        ([{"role": "user", "content": "a"}], [], r"row 0: data\.chat must be true"),
        ("", [], r"row 0: the prompt must be text or a list of messages"),
        (7, [], r"row 0: the prompt must be text or a list of messages .*got 7"),
        ([], ["data.chat=true"], r"the prompt must be text or a list of messages"),
        ([{"role": "user"}], ["data.chat=true"], r"must be text or a list of messages .*the content None in message 0"),
        (
            [{"role": "user", "content": "a"}, {"from": "human", "value": "b"}],
            ["data.chat=true"],
            r"row 0: .*got the role None in message 1, \{'from': 'human'.*data\.columns\.prompt names",
        ),
        (["a"], ["data.chat=true"], r"row 0: .*got 'a' as message 0"),
        ([{"role": "assistant", "content": "a"}], ["data.chat=true"], r"row 0: .*must hold a message before that of"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            ["data.chat=true", "data.assistant_prefill=c"],
            r"row 0: data\.assistant_prefill must be null .*got 'c' and \{'role': .*'b'\}; set data",
        ),
        (
            [{"role": "system", "content": "x"}, {"role": "user", "content": "a"}],
            ["data.chat=true", "data.system_prompt=y"],
            r"data\.system_prompt must be null",
        ),
    ],
)
def test_prompt_of_a_wrong_form_is_refused(tokenizer, tmp_path, prompt, overrides, message):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": prompt, "answer": "1"}])
    with pytest.raises(ValueError, match=message):
        load_prompts(config_for(path, *overrides), tokenizer)


def test_chat_needs_a_template(tmp_path):
    core = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    bare = Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=core))
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "answer": "1"}])
    with pytest.raises(ValueError, match=r"tokenizer\.chat_template"):
        load_prompts(config_for(path, "data.chat=true"), bare)


def test_long_prompts_are_dropped_counted_and_never_cut(tokenizer, tmp_path):
    rows = [{"prompt": "x" * n, "answer": "1"} for n in (3, 9, 10, 4)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    data = load_prompts(config_for(path, "data.max_prompt_length=10"), tokenizer)
    assert [row.prompt for row in data.train] == ["xxx", "xxxxxxxxx", "xxxx"]  # nine letters and the BOS are ten tokens
    assert [row.index for row in data.train] == [0, 1, 3]
    assert data.num_dropped == 1
    assert data.messages == ["dropped 1 of 4 prompts of data.source longer than data.max_prompt_length=10 tokens"]


def test_dropping_every_prompt_is_an_error(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "x" * n, "answer": "1"} for n in (20, 12)])
    with pytest.raises(ValueError, match=r"got 10; the shortest of 2 has 13 tokens"):
        load_prompts(config_for(path, "data.max_prompt_length=10"), tokenizer)


# The split


def test_train_and_held_out_questions_are_disjoint_and_complete(tokenizer):
    data = load_prompts(load_config(None, [*ARITHMETIC, "data.eval_size=30"]), tokenizer)
    assert (len(data.train), len(data.held_out)) == (70, 30)
    assert not questions(data.train) & questions(data.held_out)
    assert len(questions(data.train) | questions(data.held_out)) == 100


def test_reworded_case_and_spacing_is_the_same_question(tokenizer, tmp_path):
    rows = [
        {"prompt": text, "answer": str(n)}
        for n in range(20)
        for text in (f"What is {n}?", f" what  IS\n{n}? ", f"What is {n}?")
    ]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    data = load_prompts(config_for(path, "data.eval_size=8"), tokenizer)
    assert not questions(data.train) & questions(data.held_out)
    assert len(data.held_out) == len(questions(data.held_out)) == 8  # one row per question
    assert len(data.train) == 3 * 12  # training keeps its duplicates
    assert all(row.prompt.startswith("What") for row in data.held_out)  # the first row of each


def test_split_depends_on_the_seed_and_not_on_the_order_of_rows(tokenizer, tmp_path):
    rows = [{"prompt": f"{n}?", "answer": "1"} for n in range(50)]
    forward = write_jsonl(tmp_path / "forward.jsonl", rows)
    backward = write_jsonl(tmp_path / "backward.jsonl", rows[::-1])
    held_out = [
        questions(load_prompts(config_for(path, "data.eval_size=10", f"seed={seed}"), tokenizer).held_out)
        for path, seed in ((forward, 0), (backward, 0), (forward, 1))
    ]
    assert held_out[0] == held_out[1] != held_out[2]


def test_split_compares_questions_without_the_system_prompt_and_chat_form(tokenizer):
    overrides = [*ARITHMETIC, "data.eval_size=20"]
    raw = load_prompts(load_config(None, overrides), tokenizer)
    chat = load_prompts(load_config(None, [*overrides, "data.chat=true", "data.system_prompt=Add."]), tokenizer)
    prefixed = load_prompts(load_config(None, [*overrides, "data.system_prompt='Add. '"]), tokenizer)
    assert [row.index for row in raw.held_out] == [row.index for row in chat.held_out]
    assert [row.index for row in raw.held_out] == [row.index for row in prefixed.held_out]


def test_part_of_a_source_never_trains_on_what_the_whole_holds_out(tokenizer):
    whole = load_prompts(load_config(None, [*ARITHMETIC, "data.eval_size=25"]), tokenizer)
    part = load_prompts(load_config(None, [*ARITHMETIC, "data.args.size=60", "data.eval_size=25"]), tokenizer)
    assert len(part.train) == 35
    assert questions(part.train) & questions(whole.train)
    assert not questions(part.train) & questions(whole.held_out)


def test_questions_of_a_given_eval_source_leave_the_training_rows(tokenizer, tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [{"prompt": f"Q {n}", "answer": "1"} for n in range(10)])
    evaluation = write_jsonl(
        tmp_path / "eval.jsonl",
        [{"prompt": text, "answer": "1"} for text in ("q  3", "Q 7", "Q 7", "Q 99", "Q 5" + " " * 40)],
    )
    config = config_for(train, f"data.eval_source={evaluation}", "data.max_prompt_length=20")
    data = load_prompts(config, tokenizer)
    assert [row.prompt for row in data.held_out] == ["q  3", "Q 7", "Q 7", "Q 99"]  # as given, but for the long one
    assert [row.prompt for row in data.train] == [f"Q {n}" for n in (0, 1, 2, 4, 6, 8, 9)]
    assert data.num_dropped == 1
    assert data.messages[0] == "dropped 1 of 5 prompts of data.eval_source longer than data.max_prompt_length=20 tokens"
    assert data.messages[1].startswith("removed 3 of 10 training rows")


def test_chat_messages_and_plain_text_are_the_same_question(tokenizer, tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [{"prompt": "A b?", "answer": "1"}, {"prompt": "c?", "answer": "1"}])
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "a  B?"}]
    evaluation = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": messages, "answer": "1"}])
    data = load_prompts(config_for(train, f"data.eval_source={evaluation}", "data.chat=true"), tokenizer)
    assert [row.index for row in data.train] == [1]


def test_a_share_of_questions_is_held_out_by_their_text_and_the_seed_alone(tokenizer, tmp_path):
    rows = [{"prompt": f"{n} ?", "answer": "1"} for n in range(200)]
    whole = load_prompts(config_for(write_jsonl(tmp_path / "a.jsonl", rows), "data.eval_share=0.25"), tokenizer)
    held_out = questions(whole.held_out)
    assert 30 < len(held_out) < 70
    assert not held_out & questions(whole.train)
    assert len(whole.train) + len(whole.held_out) == 200
    fewer = write_jsonl(tmp_path / "b.jsonl", [*rows[150:], {"prompt": "new?", "answer": "1"}, *rows[90:20:-1]])
    part = load_prompts(config_for(fewer, "data.eval_share=0.25"), tokenizer)
    assert questions(part.held_out) - {"new?"} == held_out & {f"{n} ?" for n in (*range(21, 91), *range(150, 200))}
    more = load_prompts(config_for(fewer, "data.eval_share=0.5"), tokenizer)
    assert questions(part.held_out) < questions(more.held_out)
    other = load_prompts(config_for(fewer, "data.eval_share=0.25", "seed=1"), tokenizer)
    assert questions(other.held_out) != questions(part.held_out)
    for share, found in (("1e-9", "none; raise it"), ("0.999999", "all of them; lower it")):
        with pytest.raises(ValueError, match=rf"data\.eval_share must hold out some of 200 .* holds out {found}"):
            load_prompts(config_for(tmp_path / "a.jsonl", f"data.eval_share={share}"), tokenizer)


def test_holding_out_everything_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"data\.eval_size must be < 100, .* got 100"):
        load_prompts(load_config(None, [*ARITHMETIC, "data.eval_size=100"]), tokenizer)
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "answer": "1"}])
    with pytest.raises(ValueError, match=r"that data\.eval_source does not"):
        load_prompts(config_for(path, f"data.eval_source={path}"), tokenizer)


# The order of steps


def step_indices(num_rows, seed, step, prompts_per_step):
    """The rows of a step of a run without mixture, curriculum and refills."""
    return np.asarray(Order([num_rows], seed, prompts_per_step).step(step))


@pytest.mark.parametrize(
    ("num_rows", "prompts_per_step"),
    [(1, 1), (5, 5), (7, 5), (7, 6), (8, 5), (12, 8), (13, 4), (29, 14), (30, 8), (31, 1)],
)
def test_steps_use_every_row_once_an_epoch_and_never_twice_in_a_step(num_rows, prompts_per_step):
    num_steps = 6 * num_rows  # prompts_per_step * 6 whole epochs
    steps = [step_indices(num_rows, 3, step, prompts_per_step) for step in range(num_steps)]
    assert all(len(set(indices.tolist())) == prompts_per_step for indices in steps)
    epochs = np.concatenate(steps).reshape(-1, num_rows)
    assert (np.sort(epochs, axis=1) == np.arange(num_rows)).all()


def test_each_epoch_and_each_seed_has_its_own_order():
    epochs = [step_indices(40, 0, step, 40).tolist() for step in range(5)]
    assert len({tuple(order) for order in epochs}) == 5
    assert step_indices(40, 1, 0, 40).tolist() != epochs[0]
    assert step_indices(40, 0, 0, 40).tolist() == epochs[0]


def test_order_is_pinned():
    # Spelled out: a run resumed under another version of numpy or of this code must go on with the same rows.
    assert [step_indices(10, 0, step, 4).tolist() for step in (0, 2, 1000)] == [
        [0, 8, 9, 3],
        [6, 4, 3, 7],
        [6, 1, 4, 8],
    ]


def test_every_row_can_come_first():
    firsts = {int(step_indices(6, seed, 0, 1)[0]) for seed in range(100)}
    assert firsts == set(range(6))


def test_more_prompts_than_rows_is_refused():
    with pytest.raises(ValueError, match=r"grpo\.prompts_per_step must be <= .*got 5 for 4 rows"):
        step_indices(4, 0, 0, 5)
    with pytest.raises(ValueError, match=r"sft\.batch_size must be <= "):
        check_enough_rows(4, 5, key="sft.batch_size")
    check_enough_rows(5, 5)


# Pairs


def test_pairs_end_with_eos_and_keep_held_out_questions_out(tokenizer):
    config = load_config(None, [*ARITHMETIC, "data.eval_size=30"])
    pairs = load_pairs(config, tokenizer)
    held_out = {row.prompt for row in load_prompts(config, tokenizer).held_out}
    assert len(pairs.rows) == 70
    assert (pairs.num_dropped, pairs.messages) == (0, [])
    for row in pairs.rows:
        prompt, completion = tokenizer.decode(row.prompt_ids), tokenizer.decode(row.completion_ids)
        assert prompt not in held_out
        assert completion == str(eval(prompt[:-1]))
        assert row.completion_ids[-1] == 2
        assert row.completion_ids.tolist().count(2) == 1
        assert row.prompt_ids.dtype == row.completion_ids.dtype == np.int32


def test_completion_column_and_whole_numbers(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "answer": 12, "solution": "because"}])
    assert tokenizer.decode(load_pairs(config_for(path), tokenizer).rows[0].completion_ids) == "12"
    other = load_pairs(config_for(path, "sft.completion_column=solution"), tokenizer)
    assert tokenizer.decode(other.rows[0].completion_ids) == "because"
    with pytest.raises(ValueError, match=r"sft\.completion_column .*got 'solutions'.*did you mean 'solution'"):
        load_pairs(config_for(path, "sft.completion_column=solutions"), tokenizer)


@pytest.mark.parametrize("answer", [1.5, True, ["a"]])
def test_completion_that_is_not_text_is_refused(tokenizer, tmp_path, answer):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "answer": answer}])
    with pytest.raises(ValueError, match=r"row 0: sft\.completion_column 'answer' must hold text or whole numbers"):
        load_pairs(config_for(path), tokenizer)


def test_long_completions_are_dropped_and_counted(tokenizer, tmp_path):
    rows = [{"prompt": "p", "answer": "1" * n} for n in (2, 3, 4)] + [{"prompt": "p" * 40, "answer": "1"}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    pairs = load_pairs(config_for(path, "sft.max_completion_length=4", "data.max_prompt_length=20"), tokenizer)
    assert [len(row.completion_ids) for row in pairs.rows] == [3, 4]
    assert pairs.num_dropped == 2
    assert "dropped 1 of 3 completions longer than sft.max_completion_length=4 tokens" in pairs.messages
    with pytest.raises(ValueError, match=r"got 2; the shortest has 3 tokens with EOS"):
        load_pairs(config_for(path, "sft.max_completion_length=2", "data.max_prompt_length=20"), tokenizer)


def test_chat_completion_follows_the_rendered_prompt(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "hi", "answer": "yes"}])
    row = load_pairs(config_for(path, "data.chat=true"), tokenizer).rows[0]
    assert (
        tokenizer.decode([*row.prompt_ids, *row.completion_ids], skip_special_tokens=False)
        == "<bos>user: hi\nassistant: yes<eos>"
    )
    begun = load_pairs(config_for(path, "data.chat=true", "data.assistant_prefill='oh '"), tokenizer).rows[0]
    assert tokenizer.decode(begun.prompt_ids) == "user: hi\nassistant: oh "
    assert begun.completion_ids.tolist() == row.completion_ids.tolist()


def test_whole_conversations_are_a_prompt_and_its_answer(tokenizer, tmp_path):
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": turns}])
    overrides = ("data.chat=true", "data.columns={prompt: messages, answer: null}", "data.answer_from_messages=true")
    row = load_prompts(config_for(path, *overrides), tokenizer).train[0]
    assert (row.prompt, row.columns) == (turns[:3], {"answer": "d"})
    pair = load_pairs(config_for(path, *overrides), tokenizer).rows[0]
    text = tokenizer.decode([*pair.prompt_ids, *pair.completion_ids], skip_special_tokens=False)
    assert text == "<bos>user: a\nassistant: b\nuser: c\nassistant: d<eos>"
    for rows, message in (
        ([{"messages": turns[:3]}], r"row 0: .* ends with one of the assistant .*got \['user', 'assistant', 'user'\]"),
        ([{"messages": [*turns, turns[-1]]}], r"row 0: .*ends with one of the assistant after one of the user"),
        (
            [{"messages": turns}, {"messages": "a"}],
            r"row 1: .*must be a list of messages .*got 'a'; set data\.answer_f",
        ),
        ([{"messages": turns, "answer": "5"}], r"row 0: .*no column answer, got '5'; set data\.columns\.answer=null"),
    ):
        path = write_jsonl(tmp_path / "x.jsonl", rows)
        with pytest.raises(ValueError, match=message):
            load_prompts(config_for(path, *overrides), tokenizer)
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": turns}])
    with pytest.raises(ValueError, match=r"row 0: 'answer' must go on from the beginning .*'d', and starts with it"):
        load_pairs(config_for(path, *overrides, "data.assistant_prefill=d"), tokenizer)


def test_completion_gets_no_space_that_the_text_does_not_have(tmp_path):
    words = ["</s>", "\u2581", "a", "b", "=", "\u2581a", "ab"]
    merges = [("\u2581", "a"), ("a", "b")]
    core = tokenizers.Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    spaced = Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>"))
    assert spaced.encode("a") == [5]  # text that stands alone gets a space in front
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "b=", "answer": "a"}, {"prompt": "=a", "answer": "b"}])
    border, inside = load_pairs(config_for(path), spaced).rows
    assert border.prompt_ids.tolist() + border.completion_ids.tolist() == [1, 3, 4, 2, 0]
    # The border of =a|b falls inside the token ab: the prompt keeps its own ids.
    assert inside.prompt_ids.tolist() == spaced.encode("=a")
    assert inside.completion_ids.tolist() == [*spaced.encode("b"), 0]


def test_pairs_need_an_eos(tmp_path):
    core = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    bare = Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=core))
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "answer": "1"}])
    with pytest.raises(ValueError, match="must have an EOS token"):
        load_pairs(config_for(path), bare)


def test_fingerprint_changes_with_any_row_and_with_their_order(tmp_path):
    def of(lines):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in lines))
        config = load_config(None, [f"data.source={path}"])
        return fingerprint(load_prompts(config, load_tokenizer("byte")).train)

    rows = [("1+1=", "2"), ("1+2=", "3")]
    assert of(rows) == of(rows)
    assert of(rows)["rows"] == 2
    others = [rows[::-1], rows[:1], [("1+1=", "2"), ("1+3=", "3")], [("1+1=", "2"), ("1+2=", "4")]]
    assert len({of(lines)["hash"] for lines in [rows, *others]}) == 5
