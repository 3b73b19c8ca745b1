"""The requests to a sampler, and its completions.

In: a `Request` for each completion: its prompt, its randomness, its limit in tokens. Out: a `Completion` for each
request. `CompletionSource` is the protocol of everything that draws completions; its users need nothing else. Not here:
how completions are drawn.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np

from rl.devices.programs import Program
from rl.models.config import ModelConfig
from rl.sampler.slot_rules import DrawRules
from rl.sampler.token_draw import SamplingParams, check_vocabulary

PREFILL, DECODE = "prefill", "decode"  # names of programs, for people


@dataclasses.dataclass(frozen=True)
class Completion:
    """One completion of one prompt.

    prompt_index, sample_index: the numbers of the completion. With the key and the position they are all its
      randomness.
    token_ids: int32, those after `Request.continues`, up to and including the EOS, or the token that completes a stop
      string.
    sampler_logprobs: per token, under the distribution it was drawn from (penalties, truncation); 0 when greedy.
    policy_logprobs: per token, under softmax(logits / temperature); at temperature 1 when greedy. None from a source of
      the user's, whose sampler_logprobs are NaN where it does not know them.
    finish_reason: "eos", "stop" (a stop string) or "length".
    stop_reason: the EOS id, the stop string, or None.
    top_ids, top_logprobs: [tokens, N], the N most likely tokens of the plain softmax, best first; N may be 0.
    kept_words: uint32 [tokens, X], which ids could be drawn at each token, in the form of `rl.models.drawn_from`; None
      where it is not reported.
    trained: bool per token, whether the policy drew it; None: it drew all of them. The others (what an environment or a
    tool put between) are only read: they are in no loss, length or denominator, and their log-probs may be anything.
    further: more sequences of the same episode, each behind a prompt of its own. Samplers draw none.
    """

    prompt_index: int
    sample_index: int
    token_ids: np.ndarray
    sampler_logprobs: np.ndarray
    policy_logprobs: np.ndarray | None
    finish_reason: str
    stop_reason: int | str | None
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    kept_words: np.ndarray | None = None
    trained: np.ndarray | None = None
    further: "tuple[FurtherSequence, ...]" = dataclasses.field(default=(), kw_only=True)

    @property
    def num_trained(self) -> int:
        """The number of tokens that the policy drew, further sequences included: the completion's length wherever it is
        measured.
        """
        own = len(self.token_ids) if self.trained is None else int(np.sum(self.trained))
        return own + sum(sequence.completion.num_trained for sequence in self.further)


class FurtherSequence(NamedTuple):
    """A further sequence of an episode.

    Attributes:
      prompt_ids: int32, at least one token.
      completion: what follows the prompt; its numbers are those of the episode.
    """

    prompt_ids: np.ndarray
    completion: Completion


@dataclasses.dataclass(frozen=True)
class Request:
    """One completion to draw, or the rest of one.

    Attributes:
      prompt: its place in the caller's list.
      prompt_index, sample_index, seed: its randomness, with the key of the call and the position of each token.
      limit: tokens that it may have at most, those of `continues` included.
      continues: tokens of the completion that are there already, after the prompt, whether the policy drew them or an
        environment put them there. Positions, lengths, penalties and stop strings go on from them, so that the rest of
        a completion is what it would have been in one go. A stop string or an EOS among them ends nothing.
      rules: how it is drawn, in place of the call's rules; None: by those. See `rl.sampler.slot_rules`.
      num_given: of `continues`, how many tokens at its start belong to the prompt in all but the place of their keys
        and values: they are no part of the completion, and move neither its randomness, nor its penalties, nor its
        stop strings. Only `rl.sampler.slot_session.SlotSession.follow` makes such requests.
    """

    prompt: int
    prompt_index: int
    sample_index: int
    limit: int
    seed: int | None = None
    continues: tuple[int, ...] = ()
    rules: DrawRules | None = None
    num_given: int = 0

    @property
    def begun(self) -> tuple[int, ...]:
        """The tokens of the completion that are there already."""
        return self.continues[self.num_given :]


def requests_for(prompt_indices: Sequence[int], num_samples: int, limit: int) -> list[Request]:
    """`num_samples` requests for each prompt in turn. prompt_indices: the number of each prompt in its randomness."""
    return [
        Request(place, int(index), sample, limit)
        for place, index in enumerate(prompt_indices)
        for sample in range(num_samples)
    ]


def with_continued(
    prompts: Sequence[Sequence[int] | np.ndarray], requests: Sequence[Request]
) -> tuple[list[Sequence[int] | np.ndarray], list[Request]]:
    """The prompts, and behind them each that requests continue with what they continue; and the requests, which name
    those then. Requests that continue the same tokens of the same prompt share one.
    """
    longer, renamed = list(prompts), []
    places: dict[tuple[int, tuple[int, ...]], int] = {}
    for request in requests:
        if request.continues:
            begun = request.prompt, request.continues
            if begun not in places:
                places[begun] = len(longer)
                longer.append(np.concatenate([prompts[request.prompt], request.continues]).astype(np.int32))
            request = dataclasses.replace(request, prompt=places[begun])
        renamed.append(request)
    return longer, renamed


class DrawProgram(NamedTuple):
    """A compiled program of drawing.

    Attributes:
      name: PREFILL or DECODE. key: the source's name for it.
      make: the program and its abstract arguments.
      num_steps: the most tokens of each row that one call draws; 0 in a prefill.
      is_largest: False where a larger shape of the program is there as well.
    """

    name: str
    key: str
    make: Callable[[], tuple[Program, tuple[Any, ...]]]
    num_steps: int
    is_largest: bool = True


class DrawPrograms(NamedTuple):
    """The programs and the memory of calls of one size.

    Attributes:
      programs: whose first argument is the weights they read.
      cache_bytes: of keys, values and states at their largest, on the device that holds most of them.
      bytes_per_position: of one cache position on that device; 0 where it is not known.
      bytes_per_row: of the states of one row on that device, for a model that has some.
    """

    programs: list[DrawProgram]
    cache_bytes: int
    bytes_per_position: int
    bytes_per_row: int = 0


class DrawSession(Protocol):
    """A call that stays open: requests go in at any time, and a completion may have several turns.

    A turn that has ended waits for `go_on` or `finish`. Meanwhile others are drawn. All turns of a completion have one
    prompt, one random stream and one number.
    """

    def submit(self, prompts: Sequence[Sequence[int] | np.ndarray], requests: Sequence[Request], /) -> Sequence[int]:
        """Takes in requests for further prompts, which they name by their place in `prompts`; returns a number for
        each. A completion that continues tokens goes on behind them, as after turns that were drawn here.

        Raises:
          ValueError: as in `CompletionSource.stream`; `longest` bounds what is continued.
        """
        ...

    def go_on(self, number: int, token_ids: Sequence[int], limit: int) -> None:
        """Has another turn drawn of a completion. token_ids: what is put behind its last turn. limit: tokens that it
        may have then at most, all turns and what was between them included. `min_completion_length` tokens are counted
        in each turn.
        """
        ...

    def finish(self, number: int) -> None:
        """Says that the turn that ended was the completion's last one."""
        ...

    def poll(self) -> list[tuple[int, Completion]]:
        """Draws for a while. Returns (number, completion) of each turn that ended, with the tokens of the turn; empty
        where nothing is to be drawn.
        """
        ...

    @property
    def num_left(self) -> int:
        """The completions that are not finished."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether `poll` would draw: not all completions wait for `go_on` or `finish`."""
        ...


class CompletionSource(Protocol):
    """Anything that draws completions: a sampler on the policy's own mesh, or a user's source.

    `expect`, `expect_length`, `check`, `programs` and `warm_up` take the size of a call: the number of its prompts, and
    of completions for each.
    """

    def expect(self, prompts: Sequence[Sequence[int] | np.ndarray], num_prompts: int = 0, num_samples: int = 0) -> None:
        """Plans shapes for prompts like these, and for calls of up to so many prompts and samples of each."""
        ...

    def expect_length(self, prompt_length: int, num_prompts: int = 0, num_samples: int = 0) -> None:
        """Plans shapes for any prompts of up to so many tokens."""
        ...

    def check(self, num_prompts: int, num_samples: int, sampling: SamplingParams) -> None:
        """ValueError where a call of this size with expected prompts cannot be, nor what `sampling` asks for, such as
        `reports_kept`; nothing is compiled or drawn.
        """
        ...

    def programs(self, params: Any, num_prompts: int, num_samples: int, sampling: SamplingParams) -> DrawPrograms:
        """The programs and the memory of a call of this size, for `grpo compile`. Nothing runs. params: may be
        abstract.
        """
        ...

    def warm_up(self, params: Any, num_prompts: int, num_samples: int, sampling: SamplingParams) -> None:
        """Compiles what calls of this size can need, in the background where it can."""
        ...

    def stream(
        self,
        params: Any,
        prompts: Sequence[Sequence[int] | np.ndarray],
        requests: Sequence[Request],
        sampling: SamplingParams,
        key: Any,
    ) -> Iterator[tuple[int, Completion]]:
        """Draws the requests and yields (its place in `requests`, completion) of each as it ends.

        Args:
          params: the weights to draw with, as the policy has them now.
          prompts: token ids; requests name them by their place.
          key: a PRNG key; with prompt index, sample index and position it is all the randomness of a token.

        Raises:
          ValueError: what cannot be drawn, see `check_requests`; before anything is.
        """
        ...

    def check_turns(self, num_prompts: int, num_samples: int, longest: int) -> None:
        """ValueError where a session of this size cannot be opened, see `open`; nothing is compiled or drawn."""
        ...

    def warm_up_turns(
        self, params: Any, num_prompts: int, num_samples: int, sampling: SamplingParams, longest: int
    ) -> None:
        """Compiles what sessions of this size can need, as `warm_up` does for calls."""
        ...

    def open(
        self, params: Any, sampling: SamplingParams, key: Any, num_prompts: int, num_samples: int, longest: int
    ) -> DrawSession:
        """A session for completions of several turns, whose prompts `expect_length` has planned.

        Args:
          num_prompts, num_samples: its size at most. longest: tokens of a completion, with what is put between turns.

        Raises:
          ValueError: the source cannot draw turns, or the session does not fit the memory.
        """
        ...

    def prompt_logprobs(
        self, params: Any, prompts: Sequence[Sequence[int] | np.ndarray], temperature: float, chunk_size: int | None
    ) -> list[np.ndarray]:
        """Log-probs of prompt tokens under the weights that completions are drawn with, see
        `rl.sampler.prompt_logprobs`. ValueError where the source has none.
        """
        ...

    def release(self) -> None:
        """Drops data that calls with the same weights share. To be called before the weights change."""
        ...

    def close(self) -> None:
        """Ends what the source has running; what is being compiled already comes to its end first."""
        ...


def refuse_turns(what: str) -> NoReturn:
    """The error of a source that draws single turns only."""
    raise ValueError(
        f"rollout.tools and rollout.environment must be empty with {what}, which draws single turns; use a model of "
        "the toolkit's own decoder"
    )


def check_requests(
    config: ModelConfig,
    decode_text: Callable[[Sequence[int]], str] | None,
    prompts: Sequence[Sequence[int] | np.ndarray],
    requests: Sequence[Request],
    sampling: SamplingParams,
) -> None:
    """ValueError for what no sampler can draw, see `CompletionSource.stream`."""
    if sampling.stop_strings and decode_text is None:
        raise ValueError(
            f"sampling.stop_strings needs a tokenizer to see text, got {sampling.stop_strings} without decode_text"
        )
    if any(i >= config.vocab_size for i in sampling.eos_ids):
        raise ValueError(
            f"sampling.eos_ids must be below the vocabulary size {config.vocab_size}, got {sampling.eos_ids}"
        )
    check_vocabulary(sampling, config.vocab_size)
    # The device holds indices as int32 and seeds as uint32.
    ends = {"prompt": len(prompts), "prompt_index": 2**31, "sample_index": 2**31, "seed": 2**32}
    for number, request in enumerate(requests):
        for name, end in ends.items():
            value = getattr(request, name)
            if value is not None and not 0 <= value < end:
                raise ValueError(f"requests[{number}].{name} must be in [0, {end}), got {value}")
        own = sampling if request.rules is None else _applied(number, request.rules, sampling, config.vocab_size)
        if own.stop_strings and decode_text is None:
            raise ValueError(
                f"requests[{number}].rules.stop_strings must be empty without decode_text, which shows text"
            )
        least = max(own.min_completion_length, 1)
        if not least <= request.limit <= sampling.max_completion_length:
            of = "sampling" if request.rules is None else "rules"
            low = f"{of}.min_completion_length ({least})" if own.min_completion_length else "1"
            raise ValueError(
                f"requests[{number}].limit must be between {low} and sampling.max_completion_length "
                f"({sampling.max_completion_length}), got {request.limit}"
            )
        begun = request.continues
        if len(begun) >= request.limit:
            raise ValueError(
                f"requests[{number}].continues must have fewer tokens than its limit ({request.limit}), got "
                f"{len(begun)}; there is nothing left to draw"
            )
        if begun and not 0 <= min(begun) <= max(begun) < config.vocab_size:
            raise ValueError(
                f"requests[{number}].continues must have token ids in [0, {config.vocab_size}), got {min(begun)} to "
                f"{max(begun)}"
            )
    limits = dict.fromkeys(range(len(prompts)), 0)
    for request in requests:
        limits[request.prompt] = max(limits[request.prompt], request.limit)
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{number}] must have at least one token, got none")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(
                f"prompts[{number}] must have token ids in [0, {config.vocab_size}), got {min(prompt)} to "
                f"{max(prompt)}; the tokenizer and the model do not fit"
            )
        if len(prompt) + limits[number] > config.max_position_embeddings:
            raise ValueError(
                f"prompts[{number}] with its completion (sampling.max_completion_length) must fit in the model's "
                f"{config.max_position_embeddings} positions, got {len(prompt)} + {limits[number]}; shorten one of them"
            )


def refuse_slot_rules(what: str, sampling: SamplingParams) -> None:
    """ValueError of a source that draws all requests of a call by the same rules."""
    if sampling.is_by_slot:
        raise ValueError(
            f"sampling must be SamplingParams with {what}, which draws a call by one set of rules, got rules by slot"
        )


def _applied(number: int, rules: DrawRules, sampling: SamplingParams, vocab_size: int) -> SamplingParams:
    """The parameters by which a request is drawn. ValueError, which names the request, for rules that cannot be."""
    if not sampling.is_by_slot:
        raise ValueError(
            f"requests[{number}].rules must be None where a call or a session draws by one set of rules, got {rules}; "
            "give it SlotSampling.of(sampling), which needs the slot sampler"
        )
    try:
        applied = rules.applied_to(sampling)
        check_vocabulary(applied, vocab_size)
    except ValueError as error:
        raise ValueError(str(error).replace("sampling.", f"requests[{number}].rules.", 1)) from None
    return applied
