"""The console of a run: plain lines, the live display on a terminal, tables of groups."""

import fcntl
import io
import math
import os
import pathlib
import pty
import re
import signal
import struct
import sys
import termios
import threading
import time

import pytest

from rl.config.load import load_config
from rl.run.console import (
    Console,
    format_bar,
    format_count,
    format_evaluations,
    format_phases,
    format_seconds,
    sparkline,
)
from rl.run.interrupt import StopRequest
from rl.run.log import RunLog
from rl.run.step_values import Group, Member
from rl.run.visible import shortened, visible

STEP = {
    "step": 9,
    "reward/mean": 0.5,
    "kl": 0.0123,
    "completion_length/mean": 12.34,
    "tokens_per_second/rollout": 12345.6,
}


def test_a_log_gets_one_plain_line_per_step():
    stream = io.StringIO()
    with Console(100, stream) as console:
        console.step_line(STEP)
        console.step_line({"step": 10, "eval/accuracy": 0.875, "kl": None, "loss": math.nan})
    first, second = stream.getvalue().splitlines()
    assert first == "step   9/100  reward 0.500  kl 0.0123  length 12.3  rollout 12k tok/s  left ?"
    assert second.startswith("step  10/100  eval 87.5%  loss nan  left ")


def test_messages_keep_brackets_and_long_lines():
    stream = io.StringIO()
    with Console(1, stream) as console:
        console.message("[bold] :smile: " + "x" * 300)
        console.warning("2 of 8 samples timed out [exact]")
        console.table("grpo.preset dapo sets", {"grpo.epsilon_high": 0.28, "grpo.beta": 0.0})
    assert stream.getvalue().splitlines() == [
        "[bold] :smile: " + "x" * 300,
        "warning: 2 of 8 samples timed out [exact]",
        "grpo.preset dapo sets",
        "  grpo.epsilon_high  0.28",
        "  grpo.beta          0.0",
    ]


def test_a_reader_that_has_left_ends_a_run_unless_it_was_asked_to_stop(capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, Console(2, stream) as console:
        for _ in range(2):
            with pytest.raises(BrokenPipeError):
                console.message("hello")
        console.stopping("SIGINT: finishing this step")
        console.step_line({"step": 2})
    assert capsys.readouterr().err.count("standard output takes nothing any more (Broken pipe)") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_run_goes_on_when_its_output_is_full_and_says_it_once(capsys, monkeypatch, is_terminal):
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(stream, "isatty", lambda: is_terminal, raising=False)
        with Console(2, stream) as console:
            console.table("grpo train", {"run folder": "runs/a"})
            for step in (1, 2):
                console.step_line({"step": step})
            console.warning("loss is high")
    error = capsys.readouterr().err
    assert error.count("warning: standard output takes nothing any more (No space left on device)") == 1
    assert len(error.splitlines()) == 1


class Screen:
    """A terminal of some columns: what its rows show, with all that scrolled out of it. Knows the codes that are used,
    and fails on any other.
    """

    def __init__(self, width):
        self.width, self.rows, self.row, self.column = width, [""], 0, 0

    def feed(self, text):
        while text:
            if text.startswith("\x1b["):
                end = next(i for i, char in enumerate(text[2:], 2) if char.isalpha())
                self._control(text[2:end], text[end])
                text = text[end + 1 :]
            else:
                self._put(text[0])
                text = text[1:]

    def _control(self, number, letter):
        if letter == "A":
            self.row = max(self.row - int(number), 0)
        elif letter == "J":
            assert number == "0"
            self.rows[self.row] = self.rows[self.row][: self.column]
            del self.rows[self.row + 1 :]
        else:
            assert letter == "m", (number, letter)

    def _put(self, char):
        if char == "\r":
            self.column = 0
        elif char == "\n":
            self.row += 1
            if self.row == len(self.rows):
                self.rows.append("")
        else:
            assert char.isprintable(), repr(char)
            if self.column == self.width:
                self._put("\n")
                self.column = 0
            row = self.rows[self.row].ljust(self.column)
            self.rows[self.row] = row[: self.column] + char + row[self.column + 1 :]
            self.column += 1

    def narrow(self, width):
        """Wraps rows anew, as most terminals do; the cursor stays behind the last character."""
        self.width = width
        self.rows = [row[i : i + width] for row in self.rows for i in range(0, max(len(row), 1), width)]
        self.row, self.column = len(self.rows) - 1, len(self.rows[-1])

    @property
    def text(self):
        return [row.rstrip() for row in self.rows]


class Pty:
    """A pseudo-terminal: `stream` to write to, `screen` to look at."""

    def __init__(self, width, height=30):
        self._master, slave = pty.openpty()
        self.stream, self.screen = os.fdopen(slave, "w"), Screen(width)
        self.output = ""
        self.resize(width, height)

    def resize(self, width, height=30):
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        width = width or 80  # nobody has said it
        if width < self.screen.width:
            self.screen.narrow(width)
        self.screen.width = width

    def look(self):
        """The rows of the screen after all that was written; the last rows are the display."""
        self.stream.write("\x1e")  # marks the end of what is there to read
        self.stream.flush()
        read = b""
        while not read.endswith(b"\x1e"):
            read += os.read(self._master, 65536)
        text = read[:-1].decode()
        self.output += text
        self.screen.feed(text)
        return self.screen.text

    def close(self):
        self.stream.close()
        os.close(self._master)


@pytest.fixture
def terminal(monkeypatch):
    """Makes a pseudo-terminal of some size. No test depends on the ticking of the display, so it does not tick."""
    for name in ("COLUMNS", "LINES", "XTERM_VERSION", "TMUX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("rl.run.live_lines._SECONDS_BETWEEN_DRAWINGS", 1e6)
    made = []

    def make(*size):
        made.append(Pty(*size))
        return made[-1]

    yield make
    for each in made:
        each.close()


FULL = {
    **STEP,
    "loss": 0.5,
    "seconds/step": 10.0,
    "seconds/rollout": 6.1,
    "seconds/train": 3.0,
    "seconds/other": 0.05,
}


def test_a_terminal_has_three_lines_at_its_bottom_and_all_else_above_them(terminal):
    pseudo = terminal(100)
    with Console(10, pseudo.stream) as console:
        console.table("grpo train", {"run folder": "runs/a"})
        console.begin_steps(0)
        console.step_line({**FULL, "step": 1})
        console.step_line({**FULL, "step": 2, "reward/mean": 0.75, "eval/accuracy": 0.875})
        console.warning("loss is high")
        *above, first, second, third = pseudo.look()
        assert above == [
            *("grpo train", "  run folder  runs/a"),
            "step  2/10  eval 87.5%  reward 0.750  loss 0.5000  kl 0.0123  length 12.3  rollout 12k tok/s",
            "warning: loss is high",
        ]
        assert re.match(r"step  2/10  \[####-{16}\]  left \w+  [\d.e-]+ s a step$", first)
        assert second == "reward 0.750  \u2581\u2588  loss 0.5000  kl 0.0123  length 12.3  eval 87.5% at step 2"
        assert third == "rollout 12k tok/s  rollout 61% train 30%"
    assert pseudo.look()[-1] == ""  # what follows begins on a line of its own
    assert "\x1b[?25l" not in pseudo.output  # the cursor is never hidden: a kill leaves nothing to mend


@pytest.mark.parametrize("width", [0, 1])
def test_a_terminal_without_a_size_or_of_one_column_ends_no_run(terminal, width):
    pseudo = terminal(width or 80)
    pseudo.resize(width, 0)
    with Console(10, pseudo.stream) as console:
        console.step_line({**FULL, "step": 1})
        console.show_group(1, GROUP)
        console.step_line({**FULL, "step": 2})
    assert "step" in "".join(pseudo.look())


@pytest.mark.parametrize("width", [12, 40, 61])
def test_a_narrow_terminal_shows_what_fits_and_keeps_its_history(terminal, width):
    pseudo = terminal(width)
    with Console(10, pseudo.stream) as console:
        for step in range(1, 4):
            console.message(f"note {step}")
            console.step_line({**FULL, "step": step})
        rows = pseudo.look()
    assert [row for row in rows if row.startswith("note")] == ["note 1", "note 2", "note 3"]
    assert len(rows) == 6
    assert max(map(len, rows)) < width


def test_a_terminal_keeps_the_line_of_every_tenth_of_a_run_without_evaluations(terminal):
    pseudo = terminal(100)
    with Console(30, pseudo.stream) as console:
        for step in range(1, 31):
            console.step_line({"step": step, "loss": step / 10})
        rows = pseudo.look()
    kept = [f"step {step:2}/30  loss {step / 10:.4f}" for step in range(3, 31, 3)]
    assert [row for row in rows if row.startswith("step") and "[" not in row] == kept


def test_a_terminal_that_gets_narrower_keeps_history_and_one_display(terminal):
    pseudo = terminal(100)
    with Console(10, pseudo.stream) as console:
        console.message("history " * 9)
        console.step_line({**FULL, "step": 1})
        console.step_line({**FULL, "step": 2})
        pseudo.look()
        pseudo.resize(30)
        console.step_line({**FULL, "step": 3})
        rows = pseudo.look()
        assert "".join(f"{row:30}" for row in rows[:3]).split() == ["history"] * 9
        assert [row for row in rows if row.startswith("step")] == [rows[3]]
        pseudo.resize(200)
        console.step_line({**FULL, "step": 4})
        assert [row for row in pseudo.look() if row.startswith("step")] == [pseudo.look()[3]]
    low = terminal(80, 5)
    with Console(10, low.stream) as console:
        console.step_line({**FULL, "step": 1})
        assert len(low.look()) == 1  # of few rows, one line


def test_what_others_print_and_what_a_signal_says_goes_above_the_display(terminal, monkeypatch):
    pseudo = terminal(90)
    monkeypatch.setattr(sys, "stdout", pseudo.stream)
    with Console(10) as console, StopRequest(console.stopping) as stop:
        console.begin_steps(0)
        print("wandb: hello")
        threads = [threading.Thread(target=sys.stdout.write, args=(f"from thread {i}\n",)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        *above, last = pseudo.look()
    assert last.startswith("step  0/10  [--------------------]  left ?  now start ")
    assert above[0] == "wandb: hello"
    assert above[-1] == "SIGINT: finishing this step, then saving (Ctrl-C again to stop at once)"
    assert sorted(above[1:-1]) == [f"from thread {i}" for i in range(4)]
    assert sys.stdout is pseudo.stream


def test_what_a_signal_says_amid_a_print_comes_after_it():
    class Interrupted(io.StringIO):
        def write(self, text):
            if "first" in text and self.getvalue() == "":
                console.stopping("SIGINT")
            return super().write(text)

    stream = Interrupted()
    with Console(10, stream) as console:
        console.message("first")
        console.message("second")
    assert stream.getvalue().splitlines() == ["first", "SIGINT", "second"]


def test_threads_that_print_at_one_time_lose_nothing_and_keep_lines_whole():
    class Slow(io.StringIO):
        def write(self, text):
            time.sleep(1e-5)  # lets another thread come in
            return super().write(text)

    stream = Slow()
    texts = [[f"{thread} {i}" for i in range(40)] for thread in range(4)]
    with Console(10, stream) as console:
        threads = [threading.Thread(target=lambda own=own: [console.message(text) for text in own]) for own in texts]
        for thread in threads:
            thread.start()
        for i in range(40):
            console.message(f"main {i}")
        for thread in threads:
            thread.join()
        console.message("last")
    *lines, last = stream.getvalue().splitlines()
    assert last == "last"
    assert sorted(lines) == sorted([*(text for own in texts for text in own), *(f"main {i}" for i in range(40))])


GROUP = Group(
    [{"role": "user", "content": "1+1="}],
    "2",
    ["right", "short"],
    [
        Member("two\n\x1b[2J\u202e", 4, [0.0, None], 0.0, -0.7, "eos"),
        Member("x" * 500 + " 2", 9, [1.0, 0.5], 1.25, 0.7, "length"),
        Member("?", 1, [None, None], None, 0.0, "eos"),
    ],
)


def test_a_group_is_a_table_with_its_best_completion_first_and_nothing_that_a_terminal_obeys():
    stream = io.StringIO()
    with Console(10, stream) as console:
        console.show_group(10, GROUP)
    output = stream.getvalue()
    title, header, _, best, *rest = output.splitlines()
    assert title == "step 10, a prompt with its group: user: 1+1=  answer: 2"
    assert header.split() == ["reward", "right", "short", "advantage", "tokens", "end", "completion"]
    assert best.split()[:6] == ["1.25", "1", "0.5", "0.7", "9", "length"]
    assert " ... " in "".join(rest)
    assert next(line for line in rest if "two" in line).split()[:7] == [
        *("0", "0", "-", "-0.7", "4", "eos", r"two\n\x1b[2J\u202e")
    ]
    assert rest[-1].split() == ["-", "-", "-", "0", "1", "eos", "?"]
    assert "\x1b" not in output
    assert max(map(len, output.splitlines())) <= 120


def test_of_a_large_group_the_best_and_the_worst_are_shown():
    stream = io.StringIO()
    members = [Member(f"answer {i}", 1, [i], float(i), 0.0, "eos") for i in range(20)]
    with Console(10, stream) as console:
        console.show_group(1, GROUP._replace(names=["right"], members=members))
    rows = [" ".join(line.split()) for line in stream.getvalue().splitlines()[3:]]
    best, worst = (19, 18, 17, 16), (3, 2, 1, 0)
    assert rows == [
        *(f"{i} 0 1 eos answer {i}" for i in best),
        "(12 between these)",
        *(f"{i} 0 1 eos answer {i}" for i in worst),
    ]


def test_a_stream_that_cannot_take_all_characters_gets_escapes_and_plain_rules():
    with io.TextIOWrapper(io.BytesIO(), encoding="latin-1", write_through=True) as stream:
        with Console(10, stream) as console:
            console.show_group(1, GROUP._replace(members=[Member("\u4e2d\xe9", 2, [1.0, 0.0], 1.0, 0.0, "eos")]))
        title, _, rule, row = stream.buffer.getvalue().decode("latin-1").splitlines()
    assert title.startswith("step 1")
    assert set(rule) <= set("-+ ")
    assert row.split()[-1] == "\\u4e2d\xe9"


@pytest.mark.parametrize("is_told", [True, False])
def test_a_run_that_was_stopped_and_goes_on_draws_below_what_the_shell_wrote(terminal, monkeypatch, is_told):
    pseudo = terminal(100)
    before = signal.getsignal(signal.SIGCONT)
    with Console(10, pseudo.stream) as console:
        console.step_line({**FULL, "step": 1})
        pseudo.stream.write("\n$ fg\n")  # by the shell
        monkeypatch.setattr("rl.run.live_lines._SECONDS_BETWEEN_DRAWINGS", 0)  # since the last one, too long a time
        monkeypatch.setattr("rl.run.live_lines._DRAWINGS_MISSED", 1e9 if is_told else 0)
        if is_told:
            os.kill(os.getpid(), signal.SIGCONT)
        monkeypatch.setattr("rl.run.live_lines._SECONDS_BETWEEN_DRAWINGS", 1e6 if is_told else 0)
        console.step_line({**FULL, "step": 2})
        rows = pseudo.look()
        monkeypatch.setattr("rl.run.live_lines._SECONDS_BETWEEN_DRAWINGS", 1e6)
    assert [row for row in rows if row.startswith(("step", "$"))] == [rows[0], "$ fg", rows[-3]]
    assert signal.getsignal(signal.SIGCONT) is before


@pytest.mark.parametrize("width", [20, 30, 70])
def test_a_group_fits_a_terminal_and_shows_its_completions(terminal, width):
    pseudo = terminal(width)
    with Console(10, pseudo.stream) as console:
        console.step_line(FULL)
        console.show_group(10, GROUP)
        rows = pseudo.look()
    assert rows[0].startswith("step 10, a prompt"[:width])
    assert [row[:4] for row in rows].count("step") == 2  # the table's and the display's
    assert [row.strip() for row in rows].count("?") == 1  # of the last member, on a line of its own
    assert any(row.startswith("reward 1.25") for row in rows)
    assert max(map(len, rows)) <= width


def test_the_last_word_of_a_run_stands_below_its_live_display(terminal, monkeypatch):
    pseudo = terminal(200)
    monkeypatch.setattr("rl.devices.hosts.console_stream", lambda: pseudo.stream)
    with RunLog(load_config(None, ["grpo.steps=9"])) as log:
        log.begin_steps(0)
        log.step_line({**FULL, "step": 9})
        log.ended(9, pathlib.Path("runs/a"), "eat")
        rows = pseudo.look()
    assert rows[-2:] == ["done: runs/a has all 9 steps; next: eat", ""]
    assert pseudo.look() == rows  # nothing is drawn below


def test_a_quiet_console_says_warnings_and_last_words_alone(terminal):
    pseudo = terminal(100)
    with Console(10, pseudo.stream, is_quiet=True) as console:
        console.table("grpo train", {"run folder": "runs/a"})
        console.begin_steps(0)
        console.message("resumed")
        console.step_line(FULL)
        console.show_group(10, GROUP)
        console.warning("loss is high")
        console.stopping("SIGINT: finishing this step")
        console.last_word("saved step 9")
        assert pseudo.look() == ["warning: loss is high", "SIGINT: finishing this step", "saved step 9", ""]


def test_a_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    pseudo = terminal(200)
    with Console(100, pseudo.stream) as console:
        console.begin_steps(0)
        console.step_line(STEP)
        line, end = pseudo.look()
    assert line.startswith("step   9/100  reward 0.500  kl 0.0123  length 12.3  rollout 12k tok/s  left ")
    assert end == ""


def test_named_evaluations_are_told_apart():
    metrics = {"step": 3, "eval/accuracy": 0.5, "eval/accuracy_low": 0.1, "eval/hard/avg_at_4": 0.25, "kl": 0.1}
    assert format_evaluations(metrics) == ["eval 50.0%", "eval hard avg@4 25.0%"]
    assert format_evaluations({f"eval/{i}/accuracy": 0.1 * i for i in range(9)})[-1] == "eval 3 30.0%"
    assert format_evaluations({"eval/accuracy": None, "eval/hard/accuracy": math.nan}) == []


def test_small_texts_are_as_short_as_they_can_be():
    assert sparkline([0.0, 1.0, math.nan, 0.5]) == "\u2581\u2588 \u2585"
    assert sparkline([0.0, 1.0, 0.5, 0.5], has_blocks=False) == "_@++"
    assert sparkline([3.0, 3.0]) == "\u2585\u2585"
    phases = {"seconds/step": 10.0, "seconds/train": 3.0, "seconds/rollout": 6.1, "seconds/other": 0.05}
    assert format_phases(phases) == ["rollout 61% train 30%"]
    assert format_phases({"step": 1}) == []
    assert shortened("0123456789abcdef", 13) == "0123 ... cdef"
    assert visible("a\tb\u200b\x9b\ue000") == r"a\tb\u200b\x9b\ue000"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m"), (100800, "1d04h")]
)
def test_seconds_are_written_for_people(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0"), (949.6, "950"), (1234, "1.2k"), (34100, "34k"), (5.6e6, "5.6M")])
def test_counts_are_written_for_people(count, text):
    assert format_count(count) == text


def test_a_bar_shows_the_share_done():
    assert [format_bar(share, 4) for share in (0, 0.5, 1, 1.2)] == ["[----]", "[##--]", "[####]", "[####]"]
