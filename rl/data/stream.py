"""Training rows of a source that is too large for memory: `data.streaming`.

In: the configuration and a tokenizer. Out: a `PromptStream`, whose blocks are tokenized when they are reached, and
their order. The blocks of an epoch come in the order of the source. Inside a block the rows come in a random order,
which follows from (seed, epoch, block). So the place in the data is (epoch, block, offset in the block's order), and
nothing else: a resumed run reads the block under way again and goes on behind the last row that was taken.

A row has a number, block * `STRIDE` + its place among the block's rows that are trained on. A position is
(epoch * blocks + block) * `STRIDE` + offset.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from rl.config.load import Config
from rl.config.sections import DataSection
from rl.data.blocks import Blocks, open_blocks
from rl.data.held_out import EvalRows, is_held_out, load_eval_source, share_of, without_overlap
from rl.data.prompt_rows import PromptRow, question_key, tokenize, with_answers, with_examples
from rl.data.shuffle import permutation
from rl.data.sources import shape_rows
from rl.data.tokenizer import Tokenizer
from rl.files.json_file import shown

STRIDE = 1_000_000_000  # more than a block has rows
_KEPT = 2  # blocks in memory: a step may lie across the border of two
_KEY = "data.source"


class PromptStream:
    """The training rows of a source, by their numbers. All processes must ask for the same rows in the same order.

    Args:
      num_rows, num_blocks: of the source.
      read: block -> its training rows, how many rows it has, how many of their prompts were too long; what is said of
        it is added to the list.
      longest_prompt: the most tokens of a prompt. identity: of everything that decides the rows but the first block's.

    Attributes:
      counts: {block: (rows, prompts that were too long)} of the blocks that were read.
    """

    def __init__(
        self,
        num_rows: int,
        num_blocks: int,
        read: Callable[[int, list[str]], tuple[list[PromptRow], int, int]],
        longest_prompt: int,
        identity: str,
    ) -> None:
        self.num_rows, self.num_blocks, self.longest_prompt = num_rows, num_blocks, longest_prompt
        self.counts: dict[int, tuple[int, int]] = {}
        self._read, self._identity = read, identity
        self._kept: collections.OrderedDict[int, list[PromptRow]] = collections.OrderedDict()
        self._said: set[str] = set()
        self._messages: list[str] = []

    @property
    def num_positions(self) -> int:
        """By how much the position grows in an epoch."""
        return self.num_blocks * STRIDE

    def block(self, number: int) -> list[PromptRow]:
        """The training rows of a block, read and tokenized if it is not in memory."""
        if number not in self._kept:
            messages: list[str] = []
            rows, num_read, num_dropped = self._read(number, messages)
            self.counts[number] = num_read, num_dropped
            place = f"block {number + 1} of {self.num_blocks}"
            new = [f"{place}: {message}" for message in messages]
            self._messages += [message for message in new if message not in self._said]
            self._said |= {*new}  # once a run, not once an epoch
            self._kept[number] = [
                dataclasses.replace(row, index=number * STRIDE + index) for index, row in enumerate(rows)
            ]
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]

    def __getitem__(self, number: int) -> PromptRow:
        block, place = divmod(number, STRIDE)
        return self.block(block)[place]

    def __len__(self) -> int:
        """The number of rows of the source, of which some may be left out."""
        return self.num_rows

    def take_messages(self) -> list[str]:
        """What is new to say of blocks that were read."""
        messages, self._messages = self._messages, []
        return messages

    def fingerprint(self, of_first: str) -> dict[str, Any]:
        """Number and hash of what the rows come from. `of_first`: a hash of the rows of the first block."""
        return {"rows": self.num_rows, "hash": hashlib.sha256(f"{self._identity} {of_first}".encode()).hexdigest()}


class StreamOrder:
    """The order of the rows of a stream. It is the same for every size of a step.

    Args:
      stream: the rows. prompts_per_step: for the record of the run.
    """

    curriculum = None

    def __init__(self, stream: PromptStream, seed: int, prompts_per_step: int) -> None:
        self._stream, self._seed, self.prompts_per_step = stream, seed, prompts_per_step

    def laid_out_for(self, prompts_per_step: int) -> "StreamOrder":
        """The order of a run that began with steps of another size."""
        return StreamOrder(self._stream, self._seed, prompts_per_step)

    def epochs(self, position: int) -> float:
        """How often the rows were used up at a position."""
        turn, offset = divmod(position, STRIDE)
        size = len(self._stream.block(turn % self._stream.num_blocks)) if offset else 1
        return (turn + offset / max(size, 1)) / self._stream.num_blocks

    def take(self, position: int, count: int, taken: Sequence[int] = ()) -> tuple[list[int], int]:
        """The numbers of the next `count` rows, and the position after them.

        Args:
          position: where the rows before ended.
          taken: rows that are passed over, as are rows that this call has chosen.

        Returns:
          Fewer rows where no others are left, if `taken` holds some.

        Raises:
          ValueError: there are fewer rows than the first draw of a step takes.
        """
        stream = self._stream
        chosen: list[int] = []
        seen, first_turn = set(taken), position // STRIDE
        while len(chosen) < count:
            turn, offset = divmod(position, STRIDE)
            if turn > first_turn + stream.num_blocks:  # every row had its turn
                break
            epoch, block = divmod(turn, stream.num_blocks)
            size = len(stream.block(block))
            order = permutation(size, self._seed, epoch, block) if size else ()
            for place in range(offset, size):
                position += 1
                number = block * STRIDE + int(order[place])
                if number not in seen:
                    chosen.append(number)
                    seen.add(number)
                    if len(chosen) == count:
                        return chosen, position
            position = (turn + 1) * STRIDE
        if not taken:
            raise ValueError(
                f"grpo.prompts_per_step must be <= the number of training rows, got {count} for {len(chosen)} rows "
                "that are not left out; lower grpo.prompts_per_step or add data"
            )
        return chosen, position


def open_stream(config: Config, tokenizer: Tokenizer, messages: list[str]) -> tuple[PromptStream, EvalRows]:
    """The stream of the training rows, whose first block is read, and the held-out rows, with the questions of
    data.eval_source.

    With data.eval_share the held-out rows are those of the first block with a small hash; such questions of other
    blocks are left out of training. With data.eval_source no question of it is trained on.

    Args:
      messages: is added to.

    Raises:
      ValueError: as in `rl.data.prompts.load_prompts`, for what the start sees; or the source cannot be streamed.
    """
    data = config.data
    assert data.source is not None
    blocks = open_blocks(data.source, data.args, config.seed, data.block_size)
    held_out: list[PromptRow] = []
    asked: list[str] = []
    if data.eval_source is not None:
        held_out, asked_all = load_eval_source(config, tokenizer, messages)
        asked = [asked_all[row.index] for row in held_out]
    else:
        asked_all = []
    of_first: list[str] = []
    data = with_examples(data, _KEY)
    first = _TokenizedBlock.read(blocks, 0, data, tokenizer, of_first)
    if data.eval_share:
        chosen = share_of({*first.questions}, config.seed, data.eval_share, "data.eval_share")
        by_question: dict[str, PromptRow] = {}
        for row, question in zip(first.rows, first.questions, strict=True):
            if question in chosen:
                by_question.setdefault(question, row)
        held_out, asked = [*by_question.values()], [*by_question]
    never = {*asked_all}

    def read(number: int, said: list[str]) -> tuple[list[PromptRow], int, int]:
        block = first if number == 0 else _TokenizedBlock.read(blocks, number, data, tokenizer, said)
        said += of_first if number == 0 else ()
        pairs = [
            (row, question)
            for row, question in zip(block.rows, block.questions, strict=True)
            if question not in never and not is_held_out(question, config.seed, data.eval_share)
        ]
        if data.eval_source is not None and len(pairs) < len(block.rows):
            said.append(
                f"removed {len(block.rows) - len(pairs)} of {len(block.rows)} training rows whose question is held out "
                "in data.eval_source"
            )
        if number == 0 and not pairs:
            raise ValueError(
                f"the first block of data.source must hold a question that is not held out, got {len(block.rows)} "
                f"rows, all held out; raise data.block_size, {data.block_size}"
            )
        train, own = [row for row, _ in pairs], [question for _, question in pairs]
        train = without_overlap(train, held_out, own, asked, data.remove_overlap, said, may_be_empty=number > 0)
        if new := block.columns - first.columns:
            said.append(
                f"columns {shown(sorted(new))} are not in the first block, so reward functions do not get them; sort "
                "the rows so that the first block has every column"
            )
        return train, block.num_read, block.num_read - len(block.rows)

    identity = f"{blocks.content} {blocks.size} {tokenizer.content_hash()}"
    stream = PromptStream(blocks.num_rows, blocks.num_blocks, read, data.max_prompt_length, identity)
    stream.block(0)
    messages += stream.take_messages()
    return stream, EvalRows(held_out, asked_all)


@dataclasses.dataclass(frozen=True)
class _TokenizedBlock:
    """The rows of a block that fit, the question of each, the names of columns, and how many rows the block has."""

    rows: list[PromptRow]
    questions: list[str]
    columns: set[str]
    num_read: int

    @classmethod
    def read(
        cls, blocks: Blocks, number: int, data: DataSection, tokenizer: Tokenizer, said: list[str]
    ) -> "_TokenizedBlock":
        is_part = number > 0
        assert data.source is not None
        read = blocks.read(number)
        read = shape_rows(read, data.source, data.columns, data.prepare, data.remove_empty_answers, is_part)
        read = with_answers(read, data, _KEY, said)
        rows = tokenize(read, data, tokenizer, _KEY, said, may_be_empty=is_part)
        questions = [question_key(read.rows[row.index]["prompt"]) for row in rows]
        return cls(rows, questions, {name for row in rows for name in row.columns}, len(read.rows))
