"""Texts: prompts of text or of token ids, and what is drawn behind them.

In: a `TextBody`. Out: the answer as an object, or as a stream of events. With `echo` the prompt comes first; with
`logprobs` too, its tokens have the log-probs that the weights give them, and a token that is the likeliest has the very
number of the best in `top_logprobs`.
"""

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from rl.data.tokenizer import Tokenizer
from rl.sampler.contract import Completion
from rl.serving.answers import FINISH_REASONS, TokenNames, text_logprobs, usage
from rl.serving.bodies import ApiError, TextBody
from rl.serving.calls import Calls, FinishedCall
from rl.serving.chat import DONE, since, stop_of, to_event
from rl.serving.engine import Drawn, Ended, PromptScore
from rl.serving.text import TextOffsets, TextStream, text_of

DEFAULT_LIMIT = 16  # of OpenAI's API
LONG_TEXT = 20_000  # characters that are tokenized beside the event loop


@dataclasses.dataclass(frozen=True)
class PreparedText:
    """A request whose prompts are token ids. texts: what is echoed, where `echo` asks for it."""

    body: TextBody
    key: str
    prompts: list[list[int]]
    texts: list[str]
    limit: int


class Texts:
    """Answers requests for texts; arguments as of `rl.serving.chat.Chats`."""

    def __init__(self, calls: Calls, tokenizer: Tokenizer, model: str, notify: Callable[[FinishedCall], None]) -> None:
        self._calls, self._tokenizer, self._model, self._notify = calls, tokenizer, model, notify
        self._names = {ids_as_text: TokenNames(tokenizer, ids_as_text) for ids_as_text in (False, True)}

    async def encode(self, text: str, adds_special: bool) -> list[int]:
        """The token ids of a text. ApiError where it has none."""
        if len(text) <= LONG_TEXT:
            ids = self._tokenizer.encode(text, add_bos=adds_special)
        else:
            ids = await asyncio.to_thread(self._tokenizer.encode, text, adds_special)
        return ids

    async def prepare(self, body: TextBody, key: str) -> PreparedText:
        """The prompts of a request. ApiError for what cannot be drawn."""
        prompts, texts = [], []
        for prompt in body.prompts:
            ids = await self.encode(prompt, body.adds_special) if isinstance(prompt, str) else prompt
            if not ids:
                raise ApiError(400, "a prompt must have at least one token, got an empty text", param="prompt")
            prompts.append(ids)
            if body.echoes:
                self._calls.check(ids, body.options.rules, max(body.options.limit or 1, 1), None)
                texts.append(prompt if isinstance(prompt, str) else self._text(body, ids))
        limit = DEFAULT_LIMIT if body.options.limit is None else body.options.limit
        if body.options.limit is None:
            limit = min(limit, self._calls.engine.limits.max_tokens)
        return PreparedText(body, key, prompts, texts, limit)

    async def answer(self, asked: PreparedText) -> dict[str, Any]:
        """The whole answer: for each prompt its choices, one after the other."""
        options, ends, scores = asked.body.options, {}, {}
        jobs = self._jobs(asked, streams=False) if asked.limit else []
        score_jobs = self._score_jobs(asked)
        if jobs or score_jobs:
            async with self._calls.running([*score_jobs, *jobs]) as running:
                async for job, news in running.news():
                    (scores if isinstance(news, PromptScore) else ends)[job] = news
        ordered: list[Ended] = [ends[job] for job in jobs]
        names, choices = self._names[options.ids_as_text], []
        for index in range(len(asked.prompts) * options.num_choices):
            place = index // options.num_choices
            completion = ordered[index].completion if ordered else None
            score = scores[score_jobs[place]] if score_jobs else None
            choices.append(self._choice(asked, names, index, place, completion, score))
        self._tell(asked, ordered, [choice["text"] for choice in choices])
        return {**self._head(), "choices": choices, "usage": _usage(asked, ordered)}

    async def stream(self, asked: PreparedText) -> AsyncIterator[bytes]:
        """The answer as events: what is certain, the reason of each end, usage, and [DONE]."""
        options, head = asked.body.options, self._head()
        usage_field = {"usage": None} if options.includes_usage else {}
        names = self._names[options.ids_as_text]
        jobs, score_jobs = self._jobs(asked, streams=True), self._score_jobs(asked)
        index_of = {job: index for index, job in enumerate(jobs)}
        ends: dict[Any, Ended] = {}
        starts = [len(text) for text in asked.texts for _ in range(options.num_choices)] or [0] * len(jobs)
        offsets = [TextOffsets(self._tokenizer, options.keeps_special, start) for start in starts]
        streams = [
            TextStream(self._tokenizer, options.rules.stop_strings, options.keeps_stop, options.keeps_special)
            for _ in jobs
        ]
        begun: set[int] = set()

        def event(index: int, text: str, finish_reason: str | None = None, **more: Any) -> bytes:
            choice = {"index": index, "text": text, "finish_reason": finish_reason, "logprobs": None, **more}
            if options.returns_ids and index not in begun:
                choice["prompt_token_ids"] = asked.prompts[index // options.num_choices]
            begun.add(index)
            return to_event({**head, **usage_field, "choices": [choice]})

        def details(index: int, drawn: Drawn) -> dict[str, Any]:
            more: dict[str, Any] = {}
            if options.num_top is not None:
                columns = drawn.token_ids, drawn.logprobs, drawn.top_ids, drawn.top_logprobs
                more["logprobs"] = text_logprobs(names, *columns, options.num_top, offsets[index].push(drawn.token_ids))
            if options.returns_ids:
                more["token_ids"] = drawn.token_ids.tolist()
            return more

        async with self._calls.running([*score_jobs, *jobs]) as running:
            if asked.body.echoes and not score_jobs:
                for index in range(len(jobs)):
                    yield event(index, asked.texts[index // options.num_choices])
            async for job, news in running.news():
                if isinstance(news, PromptScore):
                    place = score_jobs.index(job)
                    for index in range(place * options.num_choices, (place + 1) * options.num_choices):
                        logprobs = self._prompt_logprobs(asked, names, place, news)
                        yield event(index, asked.texts[place], logprobs=logprobs)
                    continue
                index = index_of[job]
                if isinstance(news, Drawn):
                    text, more = streams[index].push(news.token_ids), details(index, news)
                    if text or more:
                        yield event(index, text, **more)
                    continue
                ends[job], completion = news, news.completion
                rest = since(completion, job.num_told)
                text = streams[index].finish(rest.token_ids, stop_of(completion))
                reason = {"stop_reason": stop_of(completion)}
                yield event(index, text, FINISH_REASONS[completion.finish_reason], **reason, **details(index, rest))
        ordered = [ends[job] for job in jobs]
        if options.includes_usage:
            yield to_event({**head, "choices": [], "usage": _usage(asked, ordered)})
        self._tell(asked, ordered, [self._drawn_text(asked, end.completion) for end in ordered])
        yield DONE

    def _jobs(self, asked: PreparedText, streams: bool) -> list[Any]:
        options = asked.body.options
        return self._calls.jobs(asked.prompts, options.rules, asked.limit, options.num_choices, options.seed, streams)

    def _score_jobs(self, asked: PreparedText) -> list[Any]:
        options = asked.body.options
        if not asked.body.echoes or options.num_top is None:
            return []
        # One number of them, so that one program serves all requests.
        num_top = max(self._calls.engine.sampling.top_logprobs, 1)
        return self._calls.score_jobs(asked.prompts, options.rules.temperature, num_top)

    def _choice(
        self,
        asked: PreparedText,
        names: TokenNames,
        index: int,
        place: int,
        completion: Completion | None,
        score: PromptScore | None,
    ) -> dict[str, Any]:
        options, text = asked.body.options, asked.texts[place] if asked.body.echoes else ""
        choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": "length", "stop_reason": None}
        offsets, parts = TextOffsets(self._tokenizer, options.keeps_special, len(text)), []
        if score is not None:
            parts.append(self._prompt_logprobs(asked, names, place, score))
        if completion is not None:
            text += self._drawn_text(asked, completion)
            choice["finish_reason"] = FINISH_REASONS[completion.finish_reason]
            choice["stop_reason"] = stop_of(completion)
            if options.num_top is not None:
                drawn = since(completion, 0)
                columns = drawn.token_ids, drawn.logprobs, drawn.top_ids, drawn.top_logprobs
                parts.append(text_logprobs(names, *columns, options.num_top, offsets.push(drawn.token_ids)))
        if parts:
            choice["logprobs"] = {name: [value for part in parts for value in part[name]] for name in parts[0]}
        if options.returns_ids:
            choice["prompt_token_ids"] = asked.prompts[place]
            choice["token_ids"] = [] if completion is None else completion.token_ids.tolist()
        return {**choice, "text": text}

    def _prompt_logprobs(
        self, asked: PreparedText, names: TokenNames, place: int, score: PromptScore
    ) -> dict[str, Any]:
        logprobs, *tops = ([None, *column] for column in (score.logprobs, score.top_ids, score.top_logprobs))
        num_top = asked.body.options.num_top
        assert num_top is not None
        offsets = self._prompt_offsets(asked, place)
        return text_logprobs(names, asked.prompts[place], logprobs, tops[0], tops[1], num_top, offsets)

    def _prompt_offsets(self, asked: PreparedText, place: int) -> list[int]:
        """Where the tokens of a prompt begin in the text that is echoed: of ids their text, else what was sent, which
        may hold special tokens, but not those that were put before it.
        """
        ids, prompt = asked.prompts[place], asked.body.prompts[place]
        if not isinstance(prompt, str):
            return TextOffsets(self._tokenizer, asked.body.options.keeps_special).push(ids)
        added = self._tokenizer.num_added(prompt, ids) if asked.body.adds_special else 0
        return [0] * added + TextOffsets(self._tokenizer, keeps_special=True).push(ids[added:])

    def _drawn_text(self, asked: PreparedText, completion: Completion) -> str:
        options = asked.body.options
        ids = completion.token_ids.tolist()
        return text_of(self._tokenizer, ids, stop_of(completion), options.keeps_stop, options.keeps_special)

    def _text(self, body: TextBody, token_ids: Sequence[int]) -> str:
        return text_of(self._tokenizer, token_ids, keeps_special=body.options.keeps_special)

    def _tell(self, asked: PreparedText, ends: Sequence[Ended], texts: Sequence[str]) -> None:
        prompts = [prompt for prompt in asked.prompts for _ in range(asked.body.options.num_choices)]
        completions = [end.completion for end in ends]
        if completions:  # else log-probs of prompts were asked for, and nothing was drawn
            self._notify(FinishedCall(asked.key, [], [], prompts, completions, texts))

    def _head(self) -> dict[str, Any]:
        return {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self._model,
            "system_fingerprint": None,
        }


def _usage(asked: PreparedText, ends: Sequence[Ended]) -> dict[str, Any]:
    num_drawn = sum(len(end.completion.token_ids) for end in ends)
    num_reused = sum(end.num_reused for end in ends[:: asked.body.options.num_choices])
    return usage(sum(map(len, asked.prompts)), num_drawn, num_reused)
