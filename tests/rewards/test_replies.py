"""What the runner believes of a worker: replies to what it asked, of the right fields, types, sizes, and no others."""

import functools
import json
import math

import numpy as np
import pytest

from rewards.logged import MAX_LOGGED, CallLog, add_sums, means, read_logged, read_sums
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
RESULT |= {"logged": {}, "sums": {}, "seconds": 0.0, "retries": 0, "trace": ""}
LOADED = {
    "nonce": "n",
    "op": "loaded",
    "style": "batch",
    "calls": None,
    "columns": ["answer"],
    "replacing": [],
    **dict.fromkeys(("is_async", "takes_completion_ids", "needs_completion_ids", "takes_group", "tries_rows"), False),
}


def run_reply(**changes):
    return read_run_reply(json.dumps(RESULT | changes).encode(), "n", 2)


def load_reply(**changes):
    return read_load_reply(json.dumps(LOADED | changes).encode(), "n", ["answer", "level"])


def test_replies_are_read():
    assert run_reply() == Result(1, 0.5, None)
    assert run_reply(value=None) == Result(1, None, None)
    assert run_reply(value=None, kind="exception", message="no") == Result(1, None, ("exception", "no"))
    logged, sums = {"a": ["x", {"b": None}], "c": 2.5}, {"m": [1.5, 3]}
    assert run_reply(logged=logged, sums=sums) == Result(1, 0.5, None, logged, sums)
    assert run_reply(value=-1e6) == Result(1, -1e6, None)
    assert load_reply() == LoadedFunction("batch", False, None, ("answer",), (), False, False, False, False)
    assert run_reply(seconds=1.5, retries=2) == Result(1, 0.5, None, seconds=1.5, retries=2)
    done = {"nonce": "n", "op": "done", "kind": "wrong_length", "message": "two for three"}
    done |= {"seconds": 0.5, "retries": 1, "trace": "Traceback\n  in\x1b f"}
    read = Done(("wrong_length", "two for three"), 0.5, 1, "Traceback\n  in\\x1b f")
    assert read_run_reply(json.dumps(done).encode(), "n", 2) == read
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
        ({"seconds": -1.0}, "-1.0 seconds"),
        ({"seconds": 1}, "field seconds is 1"),
        ({"retries": 1 << 40}, "made again 1099511627776 times"),
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
        ({"logged": None}, "field logged is None"),
        ({"sums": [1.0, 1]}, "field sums is "),
        *(
            ({name: values}, "logged values that are none")
            for name, values in [
                ("logged", {"": 1}),
                ("logged", {"a\n": 1}),
                ("logged", {"a" * 101: 1}),
                ("logged", {"a": 1 << 63}),
                ("logged", {"a": "b" * MAX_LOGGED}),
                ("logged", {str(number): 0 for number in range(200)}),
                ("logged", {"a": functools.reduce(lambda inner, _: [inner], range(20))}),
                ("sums", {"a\x1b": [1.0, 1]}),
                ("sums", {"a": 1.0}),
                ("sums", {"a": [1, 1]}),
                ("sums", {"a": [1.0, 0]}),
                ("sums", {"a": [1.0, True]}),
                ("sums", {"a": [1e300, 1]}),
                ("sums", {"a": [1.0, 1, 1]}),
                ("sums", {str(number): [1.0, 1] for number in range(200)}),
            ]
        ),
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


class Hostile:
    def __str__(self):
        return "\ud800" * 100_000


ENDLESS: list = []
ENDLESS.append(ENDLESS)
ANYTHING = {
    "none": None,
    "number": np.float32(0.5),
    "nan": math.nan,
    "integer": 10**5000,
    "list": [1, (2, {"x": {3}})],
    "array": np.arange(3),
    "text\n": "line\nline",
    "long": "\x00" * 100_000,
    "object": Hostile(),
    "endless": ENDLESS,
    **{f"{number} \N{GRINNING FACE}" * 100: "x" for number in range(500)},
}


def test_whatever_a_function_logs_is_kept_within_the_bounds_that_the_runner_asks_for():
    log = CallLog(1)
    log.keep(ANYTHING)
    kept = log.of_sample(0)
    received = json.loads(json.dumps([kept, log.sums], allow_nan=False))
    assert read_logged(received[0]) == kept
    assert read_sums(received[1]) == log.sums == {"number": [0.5, 1]}
    assert (kept["none"], kept["number"], kept["nan"], kept["array"]) == (None, 0.5, None, [0, 1, 2])
    assert (kept["list"], kept["integer"]) == ([1, [2, {"x": "{3}"}]], "an integer of 16610 bits")
    assert kept["text\\n"] == "line\nline"
    assert kept["long"].endswith("more characters were cut)")
    assert kept["..."] == f"{len(ANYTHING) - len(kept) + 1} more were left out"
    short = CallLog(1)
    short.keep({str(number): "x" for number in range(150)})
    assert read_logged(short.of_sample(0)) is not None
    assert short.of_sample(0)["..."] == "50 more were left out"


def test_metrics_of_calls_are_averaged_over_their_values_and_bounded():
    log = CallLog(3)
    for value in (True, np.float64(3), math.nan, -math.inf):
        log.log_metric("share", value)
    sums = {"share": [1.0, 1], "other": [5.0, 2]}
    assert add_sums(sums, log.sums)
    assert means(sums) == {"share": 5 / 3, "other": 2.5}
    for number in range(200):
        log.log_metric(f"m{number}", number)
    assert read_sums(log.sums) is not None
    assert not add_sums(sums, log.sums)
    assert len(sums) == 100
    with pytest.raises(TypeError, match="log_metric takes a name and a number, got 'a' and 'b'"):
        log.log_metric("a", "b")
    with pytest.raises(TypeError, match="log_extra takes a column's name"):
        log.log_extra(3, [1])
    log.log_extra("x", [1, 2])
    assert log.problem() == "log_extra('x') got 2 values for 3 completions"
    log.log_extra("x", [3])
    assert (log.problem(), log.of_sample(2)) == (None, {"x": 3})
