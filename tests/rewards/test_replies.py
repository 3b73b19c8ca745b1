"""What the runner believes of a worker: replies to what it asked, of the right fields, types, sizes, and no others."""

import json

import pytest

from rewards.protocol import HEADER, pack
from rewards.replies import (
    MAX_FRAME,
    MAX_TEXT,
    BrokenWorker,
    Done,
    LoadedFunction,
    Refused,
    ReplyReader,
    Result,
    one_line,
    read_load_reply,
    read_run_reply,
)

RESULT = {"nonce": "n", "op": "result", "index": 1, "value": 0.5, "kind": None, "message": None}
LOADED = {
    "nonce": "n",
    "op": "loaded",
    "style": "batch",
    "calls": None,
    "columns": ["answer"],
    "replacing": [],
    **dict.fromkeys(("is_async", "takes_completion_ids", "needs_completion_ids", "takes_group"), False),
}


def run_reply(**changes):
    return read_run_reply(json.dumps(RESULT | changes).encode(), "n", 2)


def load_reply(**changes):
    return read_load_reply(json.dumps(LOADED | changes).encode(), "n", ["answer", "level"])


def test_replies_are_read():
    assert run_reply() == Result(1, 0.5, None)
    assert run_reply(value=None) == Result(1, None, None)
    assert run_reply(value=None, kind="exception", message="no") == Result(1, None, ("exception", "no"))
    assert run_reply(value=-1e6) == Result(1, -1e6, None)
    assert load_reply() == LoadedFunction("batch", False, None, ("answer",), (), False, False, False)
    done = {"nonce": "n", "op": "done", "kind": "wrong_length", "message": "two for three"}
    assert read_run_reply(json.dumps(done).encode(), "n", 2) == Done(("wrong_length", "two for three"))
    refused = json.dumps({"nonce": "n", "op": "refused", "error": "no such file"}).encode()
    assert read_load_reply(refused, "n", []) == Refused("no such file")


@pytest.mark.parametrize("value", [1e200, -1000001.0])
def test_number_that_is_too_large_is_a_failure_and_no_reward(value):
    result = run_reply(value=value)
    assert isinstance(result, Result)
    assert result.value is None
    assert result.failure is not None
    assert result.failure[0] == "out_of_range"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nonce": "m"}, "something else than it was asked"),
        ({"op": "loaded"}, "'loaded' where a function was run"),
        ({"op": ["result"]}, "no message"),
        ({"op": "done"}, "with the fields"),
        ({"extra": 1}, "with the fields"),
        ({"index": 2}, "sample 2 of 2"),
        ({"index": -1}, "sample -1 of 2"),
        ({"index": True}, "field index is True"),
        ({"index": 1.0}, "field index is 1.0"),
        ({"value": 1}, "field value is 1"),
        ({"value": True}, "field value is True"),
        ({"value": "0.5"}, "field value is '0.5'"),
        ({"value": [0.5]}, "field value"),
        ({"value": float("nan")}, "NaN is no number"),
        ({"value": float("-inf")}, "-Infinity is no number"),
        ({"value": 0.5, "kind": "exception", "message": "no"}, "with the failure"),
        ({"kind": "none", "message": "no"}, "failure of the kind 'none'"),
        ({"kind": "exception"}, "failure of the kind 'exception'"),
        ({"kind": None, "message": "no"}, "failure of the kind None"),
        ({"kind": 3, "message": "no"}, "field kind is 3"),
    ],
)
def test_what_is_no_reply_to_a_task_is_refused(changes, words):
    with pytest.raises(BrokenWorker, match=words):
        run_reply(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"op": "result"}, "'result' where a function was to be loaded"),
        ({"style": "magic"}, "style 'magic'"),
        ({"is_async": 1}, "field is_async is 1"),
        ({"takes_group": None}, "field takes_group is None"),
        ({"calls": "never"}, "the way to be called 'never'"),
        ({"columns": ["gold"]}, "columns that are not the data set's"),
        ({"replacing": ["gold"]}, "columns that are not the data set's"),
        ({"columns": ["answer", "answer"]}, "columns that are not"),
        ({"columns": [["answer"]]}, "columns that are not"),
        ({"columns": {"answer": 1}}, "field columns"),
    ],
)
def test_what_is_no_reply_to_a_load_is_refused(changes, words):
    with pytest.raises(BrokenWorker, match=words):
        load_reply(**changes)


@pytest.mark.parametrize(
    "frame",
    [b"", b"\xff", b"3", b"null", b"[" * MAX_FRAME, b'{"a":' * 100_000, b"9" * MAX_FRAME, b'{"value": 1e999}', b"{}"],
)
def test_frame_that_is_no_message_is_refused_whatever_is_in_it(frame):
    with pytest.raises(BrokenWorker):
        read_run_reply(frame, "n", 2)
    with pytest.raises(BrokenWorker):
        read_run_reply(json.dumps(RESULT).replace("0.5", "1e999").encode(), "n", 2)


def test_frames_come_in_pieces_and_none_may_be_longer_than_the_limit():
    data, reader, frames = pack({"a": 1}) + pack({"b": 2}) + HEADER.pack(MAX_FRAME), ReplyReader(), []
    for byte in data:
        reader.feed(bytes([byte]))
        frames += [json.loads(frame) for frame in reader.frames()]
    assert frames == [{"a": 1}, {"b": 2}]
    reader = ReplyReader()
    reader.feed(HEADER.pack(MAX_FRAME + 1))
    with pytest.raises(BrokenWorker, match=f"a message of {MAX_FRAME + 1} bytes, over the limit of {MAX_FRAME}"):
        list(reader.frames())


def test_texts_are_shown_on_one_line_and_say_what_was_cut():
    assert one_line("plain text") == "plain text"
    assert one_line("a\nb\x1b[2J\ud800") == r"a\nb\x1b[2J\ud800"
    for text in ("x" * 50_000, "\N{GRINNING FACE}" * 5000, "\x00" * 5000):
        cut = one_line(text)
        assert len(cut.encode()) <= MAX_TEXT
        kept = cut.partition("...")[0]
        num_kept = len(kept.encode("ascii", "ignore")) // 4 if text[0] == "\x00" else len(kept)
        assert cut.endswith(f"... ({len(text) - num_kept} more characters were cut)")
