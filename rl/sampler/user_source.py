"""Completions from a user's source, such as a server: `sampling.source: path/to/file.py:make_source`.

In: the `UserSource` that `make_source(config, tokenizer, **sampling.source_args)` returns. Out: a `CompletionSource`
that checks each of its completions. Only token ids, log-probs and finish reasons are taken from the source; the other
fields of a completion stay empty. The contract, with an example, is in docs/samplers.md. Not here: what the trainer
does with a token whose log-prob is not known (`rl.algorithms.loss_types.sampler_ratio`).
"""

import contextlib
import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import jax
import numpy as np

from rewards.importing import USER_ERRORS, import_function
from rl.config.load import Config
from rl.data.tokenizer import Tokenizer
from rl.files.json_file import shown
from rl.models.config import ModelConfig
from rl.sampler.contract import Completion, DrawPrograms, Request, check_requests, refuse_slot_rules, refuse_turns
from rl.sampler.decoding import request_key
from rl.sampler.token_draw import SamplingParams

FINISH_REASONS = ("eos", "stop", "length")


class Drawn(NamedTuple):
    """A completion as a source gives it.

    Attributes:
      token_ids: at least one, at most `request.limit - len(request.continues)`; those of `request.continues` are not
        among them. An EOS that ends it is included, and nothing follows it.
      logprobs: of each token, in nats, under the distribution from which it was drawn; None where it is not known.
      finish_reason: "eos", "stop" (a stop string) or "length".
      stop_reason: the stop string, where it is known.
    """

    token_ids: Sequence[int] | np.ndarray
    logprobs: Sequence[float | None] | np.ndarray
    finish_reason: str
    stop_reason: str | None = None


class UserSource(Protocol):
    """What `make_source` returns."""

    def stream(
        self,
        params: Any,
        prompts: Sequence[Sequence[int] | np.ndarray],
        requests: Sequence[Request],
        sampling: SamplingParams,
        key: jax.Array,
    ) -> Iterable[tuple[int, Drawn]]:
        """Draws the requests; gives (its place in `requests`, what was drawn) of each, in any order.

        Args:
          params: the policy's weights as they are now. They are the same from one call to the next until `release`;
            after it they are others, and the memory of these is gone, so none may be kept.
          prompts: token ids; `request.prompt` is a place among them. What is drawn follows the prompt and then
            `request.continues`, which is empty in a run of one turn.
          sampling: how to draw: lengths, EOS ids, stop strings, temperature and the other rules. 0 is greedy.
          key: of the step. `request_seeds` makes a seed of it for each request. A run is repeated by a resumed one only
            where all randomness follows from these.
        """
        ...

    def release(self) -> None:
        """The weights are about to change: whoever was sent them is sent new ones with the next call."""
        ...

    def close(self) -> None:
        """Ends what the source has running."""
        ...


class CheckedSource:
    """A `CompletionSource` that lets a `UserSource` draw, and checks its completions.

    The source is made when it is first checked or drawn from, so `grpo compile` starts none.

    Raises:
      ValueError: the file does not import, or the run has several processes, each of which would get other completions.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, model_config: ModelConfig) -> None:
        name = config.sampling.source
        assert name is not None
        self._config, self._tokenizer, self._model_config = config, tokenizer, model_config
        self._label = f"sampling.source {name}"
        self._source: UserSource | None = None
        if jax.process_count() > 1:
            raise ValueError(
                f"sampling.source must be null in a run of several processes, which would each be given other "
                f"completions, got {name!r} with {jax.process_count()} processes; leave it out, or run one process"
            )

    def expect(self, prompts: Sequence[Sequence[int] | np.ndarray], num_prompts: int = 0, num_samples: int = 0) -> None:
        """Nothing is planned here."""

    def expect_length(self, prompt_length: int, num_prompts: int = 0, num_samples: int = 0) -> None:
        """Nothing is planned here."""

    def check(self, num_prompts: int, num_samples: int, sampling: SamplingParams) -> None:
        """Makes the source, so that one which cannot be made ends the start. ValueError as `make` raises it."""
        self._made()

    def programs(self, params: Any, num_prompts: int, num_samples: int, sampling: SamplingParams) -> DrawPrograms:
        """None: the policy draws nothing."""
        return DrawPrograms([], 0, 0)

    def warm_up(self, params: Any, num_prompts: int, num_samples: int, sampling: SamplingParams) -> None:
        """Nothing is compiled here."""

    def stream(
        self,
        params: Any,
        prompts: Sequence[Sequence[int] | np.ndarray],
        requests: Sequence[Request],
        sampling: SamplingParams,
        key: jax.Array,
    ) -> Iterator[tuple[int, Completion]]:
        """Has the requests drawn and yields (its place in `requests`, completion) of each as it comes.

        Raises:
          ValueError: as `check_requests` does; `sampling.top_logprobs`, which no source gives; while drawing, a
            completion that breaks the contract.
        """
        refuse_slot_rules(self._label, sampling)
        check_requests(self._model_config, self._tokenizer.decode, prompts, requests, sampling)
        if sampling.top_logprobs:
            raise ValueError(
                f"sampling.top_logprobs must be 0 with {self._label}, which gives the log-probs of its tokens alone, "
                f"got {sampling.top_logprobs}"
            )
        return self._stream(params, prompts, requests, sampling, key)

    def check_turns(self, num_prompts: int, num_samples: int, longest: int) -> NoReturn:
        """ValueError: here a completion has one turn."""
        refuse_turns("a source of your own")

    def warm_up_turns(
        self, params: Any, num_prompts: int, num_samples: int, sampling: SamplingParams, longest: int
    ) -> NoReturn:
        """ValueError as in `check_turns`."""
        refuse_turns("a source of your own")

    def open(
        self, params: Any, sampling: SamplingParams, key: Any, num_prompts: int, num_samples: int, longest: int
    ) -> NoReturn:
        """ValueError as in `check_turns`."""
        refuse_turns("a source of your own")

    def prompt_logprobs(
        self, params: Any, prompts: Sequence[Sequence[int] | np.ndarray], temperature: float, chunk_size: int | None
    ) -> list[np.ndarray]:
        """ValueError: a source has no log-probs of prompts."""
        raise ValueError(f"log-probs of prompts cannot be had with {self._label}; set sampling.source=null")

    def release(self) -> None:
        """See `UserSource.release`."""
        if self._source is not None:
            self._source.release()

    def close(self) -> None:
        """Closes the source, if it was made."""
        source, self._source = self._source, None
        if source is not None:
            source.close()

    def _made(self) -> UserSource:
        if self._source is None:
            self._source = make(self._config, self._tokenizer)
        return self._source

    def _stream(
        self,
        params: Any,
        prompts: Sequence[Sequence[int] | np.ndarray],
        requests: Sequence[Request],
        sampling: SamplingParams,
        key: jax.Array,
    ) -> Iterator[tuple[int, Completion]]:
        source, left = self._made(), set(range(len(requests)))
        with self._users_code("stream"):
            stream = source.stream(params, prompts, requests, sampling, key)
        if not isinstance(stream, Iterable):
            raise ValueError(f"{self._label}: stream must yield what it draws, got {shown(stream)}")
        drawn = iter(stream)
        while True:
            with self._users_code("stream"):
                item = next(drawn, None)
            if item is None:
                break
            if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Drawn)):
                raise ValueError(
                    f"{self._label}: stream must give (place in requests, rl.sampler.user_source.Drawn), got a "
                    f"{type(item).__name__}"
                )
            place, one = item
            is_place = isinstance(place, int | np.integer) and place in range(len(requests))
            if not is_place or isinstance(place, bool) or place not in left:
                raise ValueError(
                    f"{self._label}: stream must give each of {len(requests)} requests once, by its place from 0, got "
                    f"place {shown(place)}{' again' if is_place else ''}"
                )
            left.remove(place)
            yield int(place), self._completion(place, one, requests[place], sampling)
        if left:
            raise ValueError(
                f"{self._label}: stream must give each of {len(requests)} requests once, got nothing for {len(left)} "
                f"of them, the first at place {min(left)}"
            )

    @contextlib.contextmanager
    def _users_code(self, what: str) -> Iterator[None]:
        """For a call of the user's code. The guard that finds numbers moved by mistake is for the toolkit's own."""
        with jax.transfer_guard("allow"), _named(f"{self._label}: {what}", "a run goes on from its newest checkpoint"):
            yield

    def _completion(self, place: int, drawn: Drawn, request: Request, sampling: SamplingParams) -> Completion:
        """What was drawn as a completion; ValueError where it breaks the contract."""

        def refuse(rule: str, got: Any) -> ValueError:
            return ValueError(f"{self._label}: {rule}, got {got} for the request at place {place}")

        vocab_size = self._model_config.vocab_size
        try:
            token_ids = np.asarray(drawn.token_ids)
        except ValueError as error:  # what numpy raises for lists of unequal length
            raise refuse("token_ids must be a sequence of token ids", shown(drawn.token_ids)) from error
        if token_ids.ndim != 1 or (token_ids.size and token_ids.dtype.kind not in "iu"):
            raise refuse("token_ids must be a sequence of token ids", drawn.token_ids)
        limit = request.limit - len(request.continues)
        if not 1 <= token_ids.size <= limit:
            rule = "request.limit" + (" less those of request.continues" if request.continues else "")
            raise refuse(f"token_ids must be 1 to {limit} tokens ({rule})", token_ids.size)
        if token_ids.min() < 0 or token_ids.max() >= vocab_size:
            found = token_ids[(token_ids < 0) | (token_ids >= vocab_size)][0]
            raise refuse(f"token ids must be in [0, {vocab_size}), the model's vocabulary", found)
        if drawn.finish_reason not in FINISH_REASONS:
            raise refuse(f"finish_reason must be one of {list(FINISH_REASONS)}", repr(drawn.finish_reason))
        if drawn.finish_reason == "stop" and not sampling.stop_strings:
            raise refuse("finish_reason must be 'eos' or 'length' without sampling.stop_strings", "'stop'")
        is_eos = np.isin(token_ids, sampling.eos_ids)
        is_ended = drawn.finish_reason == "eos"
        if is_eos[:-1].any() or bool(is_eos[-1]) != is_ended:
            raise refuse(
                f"an EOS token (sampling.eos_ids {list(sampling.eos_ids)}) must come last, and that where the "
                "finish_reason is 'eos'",
                f"{token_ids[-8:].tolist()} at the end, with {drawn.finish_reason!r}",
            )
        if not isinstance(drawn.logprobs, Iterable):
            raise refuse("logprobs must have one entry for each token, or None in its place", shown(drawn.logprobs))
        logprobs = list(drawn.logprobs)
        if len(logprobs) != token_ids.size:
            raise refuse(f"logprobs must have one entry for each of {token_ids.size} tokens", len(logprobs))
        for value in logprobs:
            is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            if value is not None and not (is_number and -math.inf < value <= 0):
                raise refuse("logprobs must be finite and <= 0, or None where they are not known", repr(value))
        return Completion(
            request.prompt_index,
            request.sample_index,
            token_ids.astype(np.int32),
            np.array([math.nan if value is None else value for value in logprobs], np.float64),
            None,
            drawn.finish_reason,
            int(token_ids[-1]) if is_ended else drawn.stop_reason,
            np.zeros((token_ids.size, 0), np.int32),
            np.zeros((token_ids.size, 0)),
        )


def make(config: Config, tokenizer: Tokenizer) -> UserSource:
    """The source that `sampling.source` names.

    Raises:
      ValueError: the file does not import, the function does not take `sampling.source_args`, or what it returns is no
        `UserSource`.
    """
    name, arguments = config.sampling.source, config.sampling.source_args
    assert name is not None
    label = f"sampling.source {name}"
    function: Callable[..., Any] = import_function(name, "sampling.source")
    try:
        inspect.signature(function).bind(config, tokenizer, **arguments)
    except TypeError as error:
        raise ValueError(
            f"{label} must take (config, tokenizer) and the arguments in sampling.source_args, got "
            f"{sorted(arguments)}: {error}"
        ) from error
    with _named(label, "nothing has been written"):
        source = function(config, tokenizer, **arguments)
    missing = [method for method in ("stream", "release", "close") if not callable(getattr(source, method, None))]
    if missing:
        raise ValueError(
            f"{label} must return an object with the methods stream, release and close, got a "
            f"{type(source).__name__} without {', '.join(missing)}"
        )
    return source


@contextlib.contextmanager
def _named(label: str, state: str) -> Iterator[None]:
    """An error of the user's code as a ValueError that names the source, with the last line of the user's file."""
    try:
        yield
    except USER_ERRORS as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        raise ValueError(
            f"{label} must not raise, got {type(error).__name__}: {error}{place}; --traceback shows all of it; {state}"
        ) from error


def request_seeds(key: jax.Array, requests: Sequence[Request]) -> list[int]:
    """A seed in [0, 2**32) for each request: another for each (key, prompt index, sample index), and for the
    rest of a completion that it continues.
    """

    def bits(fields: Any) -> jax.Array:
        *of_request, num_before = fields
        return jax.random.bits(jax.random.fold_in(request_key(key, *of_request), num_before))

    columns = (
        np.array([request.prompt_index for request in requests], np.int32),
        np.array([request.sample_index for request in requests], np.int32),
        np.array([request.seed or 0 for request in requests], np.uint32),
        np.array([request.seed is not None for request in requests], bool),
        np.array([len(request.continues) for request in requests], np.uint32),
    )
    return np.asarray(jax.vmap(bits)(columns)).tolist()
