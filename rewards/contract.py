"""The contract of a reward function, and the source of its arguments.

In: a `RewardSpec` and the names of the dataset columns. Out: a `BoundReward`, which knows the style of the function and
builds its arguments. Not here: running it (`rewards.worker`), and isolating it (`rewards.runner`).

Four signatures are taken unchanged and told apart by their parameter names:

    batch     fn(prompts, completions, **columns) -> list[float | None]               TRL, Tunix
    sample    fn(prompt, completion, answer, info, state, ...) -> float | None         verifiers, a Rubric's up to 0.3
    verl      compute_score(data_source, solution_str, ground_truth, extra_info)       verl
    openrlhf  reward_func(queries, prompts, labels), lists of one                      OpenRLHF

The second and third may return a dict, whose "score" is the reward. The last returns a dict with "rewards". A class of
verifiers 0.4's tasks is taken as well (`rewards.verifiers_task`). Each may be `async`.

Beside columns of the data set a function gets what it names of `INJECTED`: the token ids, the completions of the same
prompt, why a completion ended, the step, a seed. A column of such a name wins.
"""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from rewards.extras import import_library
from rewards.importing import _Function, import_function
from rewards.text import completion_text, whole_texts
from rewards.verifiers_task import TaskReward, is_task

Style = Literal["batch", "sample", "verl", "openrlhf"]
# How a function may be called: for one completion at a time, one whole group, or the whole batch.
Calls = Literal["elementwise", "needs_group", "whole_batch"]

_MAX_WEIGHT = 1e30  # weighted sums of rewards stay finite, in float32 too

# For functions that spell them out. Of these, `step`, `rewards_timeout_seconds` and `is_trial` are the same for all
# samples of a batch.
_OF_RUN = ("group", "truncated", "finish_reason", "step", "seed", "rewards_timeout_seconds", "is_trial")
ENVIRONMENTS = "environments"  # TRL's name for the instances; such functions run in `rewards.environment_rewards`
LogExtra = Callable[[str, Any], None]  # `log_extra` as a function sees it
EXTRACTED = "extracted"  # its column for the answer that a function reads in a completion, of which maj@k is counted
# Objects that TRL 1.16 hands to every function (`GRPOTrainer._calculate_rewards`).
TRL_OBJECTS = ("trainer_state", "log_metric", "log_extra")
# What a function gets by name, by its style. A column of the data set with such a name wins, and so do kwargs over
# `_OF_RUN`.
INJECTED: dict[Style, tuple[str, ...]] = {
    "batch": ("prompts", "completions", "completion_ids", *_OF_RUN),
    "sample": ("prompt", "completion", "completion_ids", "info", "task", *_OF_RUN),
    "verl": ("data_source", "extra_info", *_OF_RUN),
    "openrlhf": ("labels",),
}
# The same, where a column does not win: each is an object of the style's own.
FIXED: dict[Style, tuple[str, ...]] = {
    "batch": TRL_OBJECTS,
    "sample": ("state", *TRL_OBJECTS),
    "verl": ("solution_str", *TRL_OBJECTS),
    "openrlhf": ("queries", "prompts"),
}
# What verl 0.9 adds to the column `extra_info` for a completion of one turn (`NaiveRewardManager.run_single`).
_VERL_INFO = {"num_turns": 2, "rollout_reward_scores": {}}
# Of `INJECTED`, what a column usually replaces on purpose.
_DEFAULTS = ("info", "task", "data_source", "extra_info", "labels")


@dataclasses.dataclass(frozen=True)
class RewardSpec:
    """One reward function of a run.

    name: unique, the name in metrics and messages. function: `module:function` or `path/to/file.py:function`.
    weight: factor in the weighted sum; 0 means metric only. kwargs: JSON constants handed to the function.
    calls: how it may be called, which wins over the function's own mark; None: the mark decides.
    pickled: for a function that is given as an object, its bytes, see `rewards.objects`; `function` is then for
      messages only.
    """

    name: str
    function: str
    weight: float
    kwargs: Mapping[str, Any]
    calls: Calls | None = None
    pickled: bytes | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True)
class BoundReward:
    """A reward function whose every required argument has a source."""

    function: Callable[..., Any]
    style: Style
    is_async: bool
    calls: Calls | None  # None: a batch function without a mark
    parameters: frozenset[str]  # names the function spells out
    takes_any: bool  # whether it has **kwargs
    columns: tuple[str, ...]  # dataset columns the function reads, in dataset order
    replacing: tuple[str, ...]  # of these, those it gets in place of an injected value
    takes_completion_ids: bool
    needs_completion_ids: bool  # whether it cannot be called without them
    takes_group: bool  # whether it gets the completions of the same prompt by the name `group`
    tries_rows: bool  # whether the start calls it for its first rows, see `rewards.settings`
    kwargs: Mapping[str, Any]
    retries_itself: bool = False  # see the mark of that name

    def accepts(self, name: str) -> bool:
        """Whether the function may be given an argument of this name."""
        return name in self.parameters or self.takes_any

    def batch_arguments(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
        completion_ids: Sequence[Sequence[int]] | None,
        of_run: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments of one call of a batch function; every list has one entry per completion.

        of_run: further values by the names of `INJECTED` and `TRL_OBJECTS`. They go to a function that spells them out,
          and TRL's objects, as in TRL, to one with **kwargs.
        """
        offered = {"prompts": list(prompts), "completions": list(completions)}
        if completion_ids is not None:
            offered["completion_ids"] = list(completion_ids)
        offered |= self._spelled_out(of_run)
        offered |= {name: list(columns[name]) for name in self.columns}
        return self._accepted(offered)

    def sample_arguments(
        self,
        prompt: Any,
        completion: Any,
        row: Mapping[str, Any],
        completion_ids: Sequence[int] | None,
        of_run: Mapping[str, Any] | None = None,
        texts: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments of one call of a function that judges a single completion; `row` maps column names to
        values.

        texts: prompt, and prompt with completion, as the policy read them; None: not known. For OpenRLHF's functions.
        """
        columns = {name: row[name] for name in self.columns}
        if self.style == "openrlhf":
            asked, query = texts or whole_texts(prompt, completion)
            source = _label_column(row)
            offered = {"labels": ["" if source is None else row[source]]}
            offered |= {name: [value] for name, value in columns.items()}
            return self._accepted(offered | {"queries": [query], "prompts": [asked]}, any_name=False)
        if self.style == "verl":
            about = {} if row.get("extra_info") is None else row["extra_info"]
            own = {
                "data_source": row.get("data_source", ""),
                "solution_str": completion_text(completion),
                "extra_info": {**about, **_VERL_INFO} if isinstance(about, Mapping) else about,
            }
            source = _ground_truth_column(row)
            if source is not None:
                value = row[source]
                own["ground_truth"] = value["ground_truth"] if source == "reward_model" else value
            # As verl does it, a function with **kwargs gets these four, and no other column.
            kept = self._accepted(self._spelled_out(of_run) | columns | own, any_name=False)
            return own | kept if self.takes_any else kept
        drawn = {"prompt": prompt, "completion": completion}
        if completion_ids is not None:
            drawn["completion_ids"] = completion_ids
        defaults = {"info": {}, "task": "default"}
        offered = defaults | drawn | self._spelled_out(of_run) | columns
        if self.accepts("state"):
            offered["state"] = {"answer": ""} | defaults | columns | drawn
        return self._accepted(offered)

    def _spelled_out(self, values: Mapping[str, Any] | None) -> dict[str, Any]:
        any_of = TRL_OBJECTS if self.takes_any and self.style == "batch" else ()
        return {name: value for name, value in (values or {}).items() if name in self.parameters or name in any_of}

    def _accepted(self, offered: dict[str, Any], any_name: bool = True) -> dict[str, Any]:
        kept = {
            name: value for name, value in offered.items() if name in self.parameters or (any_name and self.takes_any)
        }
        return kept | dict(self.kwargs)


def elementwise(function: _Function) -> _Function:
    """Mark a batch function that judges each completion by itself, as a decorator.

    The runner then calls it for one sample at a time: the work is spread over the workers, and the time limit holds
    per sample. Batch functions without a mark are tried at the start (see `rewards.runner`); `function.elementwise =
    False` says that a function needs the whole batch, or keeps state from call to call.
    """
    function.elementwise = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def needs_group(function: _Function) -> _Function:
    """Mark a batch function that compares the completions of one prompt with each other, as a decorator.

    The runner calls it for one whole group at a time, as soon as the group is whole, and never for less.
    """
    function.needs_group = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def checked_by(check: Callable[[Mapping[str, Any]], None]) -> Callable[[_Function], _Function]:
    """Mark a function whose kwargs `check` looks at when it is loaded, as a decorator. A ValueError of `check` refuses
    the start.
    """

    def mark(function: _Function) -> _Function:
        function.check_kwargs = check  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return mark


def retries_itself(function: _Function) -> _Function:
    """Mark a function that asks again itself after errors of the network, as a decorator, so that a call of it is not
    made again. It says how often it asked again with `log_metric("retries", number)`, whose sum is then counted as
    retries and is no metric.
    """
    function.retries_itself = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def load_function(spec: RewardSpec) -> Callable[..., Any]:
    """Import the function that `spec.function` names, or load the one that the spec holds.

    A `.py` path is run as a file with its folder first on `sys.path`, as `python file.py` would; anything else is
    imported as a module. `sys.path` and `sys.modules` of the calling process change, so call it in a reward worker.

    Raises ValueError when the text has no `:name`, the file or module does not import, the attribute is missing or not
    callable, or a library that it is marked to need is missing.
    """
    label = f"reward {spec.name!r}"
    if spec.pickled is not None:
        from rewards.objects import from_bytes  # what it imports is not needed by other functions

        function = from_bytes(spec.pickled, label)
    else:
        function = import_function(spec.function, label)
    import_library(function, label)
    return function


def bind(
    function: Callable[..., Any],
    available_columns: Sequence[str],
    kwargs: Mapping[str, Any],
    name: str | None = None,
    calls: Calls | None = None,
    has_environments: bool = False,
) -> BoundReward:
    """Recognise the style of a reward function and check that something provides each of its required arguments.

    `kwargs` win over a column of the same name, and a column wins over what is injected under its name (`INJECTED`).
    `name` is used in messages only. `calls`: how it may be called, where that is not left to the function's own mark.
    `has_environments`: whether it is called beside the environment of an episode.

    Raises ValueError naming the function, the argument, what is available, and the way out.
    """
    label = f"reward {name or getattr(function, '__name__', type(function).__name__)!r}"
    if is_task(function):
        function = TaskReward(function, available_columns, kwargs, label)
    parameters = _signature(function, label)
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    if positional:
        raise ValueError(
            f"{label}: arguments are given by name, but {positional[0]!r} is positional only; drop the '/'"
        )
    if inspect.isclass(function):
        way_out = "name an instance of it, or a function"
        raise ValueError(f"{label}: it is a class, and a call of it gives no reward; {way_out}")
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if "trace" in named and "trace" not in {*available_columns, *kwargs}:
        raise ValueError(
            f"{label}: it judges a 'trace', as @vf.reward methods of verifiers' tasks do (from 0.4 on); name the class "
            "of the task, as in my_tasks.py:MyTask, or let it take prompt and completion, and columns such as answer"
        )
    style = _style(named, takes_any, label)
    alone = {*FIXED[style], *getattr(function, "settings_of_recipe", ())}
    columns = [column for column in available_columns if column not in alone]
    _check_kwargs(kwargs, named, takes_any, style, label)
    if check := getattr(function, "check_kwargs", None):
        try:
            check(kwargs)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error

    provided = {*INJECTED[style], *FIXED[style], *columns, *kwargs, *([ENVIRONMENTS] if has_environments else [])}
    if style == "verl" and _ground_truth_column(columns) is not None:
        provided.add("ground_truth")
    for parameter in named.values():
        if parameter.default is parameter.empty and parameter.name not in provided:
            if parameter.name == ENVIRONMENTS:
                raise ValueError(
                    f"{label}: it asks for {ENVIRONMENTS}, the instances that play episodes, and there are none: set "
                    "rollout.environment; with it, the file that rewards.functions names must define the function "
                    "itself, as in my_rewards.py:function"
                )
            raise ValueError(_nothing_provides(parameter.name, style, columns, label))

    read = {*named} | ({*columns} if takes_any and style in ("batch", "sample") else set())
    if style == "sample" and ("state" in named or takes_any):
        read = {*columns}  # the state holds the whole row
    if style == "verl":
        read |= {"data_source", "extra_info", _ground_truth_column(columns)}
    if style == "openrlhf":
        read |= {_label_column(columns)}
    ids, has_ids = named.get("completion_ids"), "completion_ids" in INJECTED[style]
    is_drawn = has_ids and "completion_ids" not in columns  # and not a column's
    takes_group = "group" in INJECTED[style] and "group" in named and "group" not in {*columns, *kwargs}
    return BoundReward(
        function=function,
        style=style,
        is_async=inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__),
        calls=_calls(function, style, calls, label, takes_group),
        parameters=frozenset(named),
        takes_any=takes_any,
        columns=tuple(column for column in columns if column in read),
        replacing=tuple(
            column
            for column in columns
            if column in INJECTED[style]
            and column not in (*_DEFAULTS, *kwargs)
            and (column in named or (takes_any and style in ("batch", "sample") and column not in _OF_RUN))
        ),
        takes_completion_ids=has_ids and (takes_any or ids is not None) and (is_drawn or style == "sample"),
        needs_completion_ids=is_drawn and ids is not None and ids.default is ids.empty,
        takes_group=takes_group,
        tries_rows=getattr(function, "tries_rows", False) is True,
        kwargs=dict(kwargs),
        retries_itself=getattr(function, "retries_itself", False) is True,
    )


def _calls(
    function: Callable[..., Any], style: Style, said: Calls | None, label: str, takes_group: bool
) -> Calls | None:
    """How the function may be called, from the recipe or its mark; None where neither says."""
    alone, group = (getattr(function, name, None) for name in ("elementwise", "needs_group"))
    if said is None and group is True:
        if alone is True:
            raise ValueError(
                f"{label}: it is marked elementwise and needs_group; it can be one of them, drop the other"
            )
        said = "needs_group"
    if said is None and isinstance(alone, bool):
        said = "elementwise" if alone else "whole_batch"
    if takes_group and said == "elementwise":
        raise ValueError(
            f"{label}: it takes 'group', all completions of a prompt, so it does not judge each by itself, as "
            "elementwise says; drop one of them"
        )
    if takes_group and said is None:
        said = "needs_group"
    if style == "batch" or (takes_group and said == "needs_group"):
        return said
    if said in ("needs_group", "whole_batch"):
        raise ValueError(
            f"{label}: it takes one completion a call ({style} function) and cannot be called for several at once, as "
            f"{'needs_group' if said == 'needs_group' else 'elementwise: false'} says; let it take prompts and "
            "completions, or drop that"
        )
    return "elementwise"


def check_specs(specs: Sequence[RewardSpec]) -> None:
    """Raise ValueError for an empty list, a name used twice, or a weight that is no number or larger than 1e30."""
    if not specs:
        raise ValueError("rewards.functions must name at least one reward function, got none")
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"reward names must differ, got {name!r} {names.count(name)} times; give each function a `name`"
            )
    for spec in specs:
        if isinstance(spec.weight, bool) or not -_MAX_WEIGHT <= spec.weight <= _MAX_WEIGHT:
            rule = f"a finite number between -{_MAX_WEIGHT:g} and {_MAX_WEIGHT:g}"
            raise ValueError(f"reward {spec.name!r}: weight must be {rule}, got {spec.weight!r}")


def _signature(function: Callable[..., Any], label: str) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{label}: its parameter names cannot be read ({error}); wrap it in a Python function"
        ) from error


def _style(named: Collection[str], takes_any: bool, label: str) -> Style:
    if "queries" in named:
        return "openrlhf"
    one = sorted({"prompt", "completion"} & {*named})
    many = sorted({"prompts", "completions"} & {*named})
    if one and many:
        raise ValueError(
            f"{label}: {one[0]!r} belongs to a per-sample function and {many[0]!r} to a batch function; use one of them"
        )
    if "solution_str" in named:
        return "verl"
    if one or (not many and {"state", "info", "task"} & {*named}):
        return "sample"
    if many or takes_any or {"completion_ids", ENVIRONMENTS} & {*named}:
        return "batch"
    raise ValueError(
        f"{label}: the parameters ({', '.join(named)}) name neither prompts/completions (batch), prompt/completion "
        "(per sample) nor solution_str (verl) nor queries (OpenRLHF); add one of them"
    )


def _check_kwargs(kwargs: Mapping[str, Any], named: Collection[str], takes_any: bool, style: Style, label: str) -> None:
    for key in kwargs:
        if key in {*INJECTED[style], *FIXED[style]} and key not in _OF_RUN:
            raise ValueError(f"{label}: kwargs must not hold {key!r}, which comes from the rollout")
        if key not in named and not takes_any:
            near = difflib.get_close_matches(key, named, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; its parameters are {', '.join(named)}"
            raise ValueError(f"{label}: kwargs holds {key!r}, which the function does not take{hint}")


def _ground_truth_column(columns: Collection[str]) -> str | None:
    """verl's ground truth: a column of its own, Tandem's `answer`, or the field of verl's `reward_model` column."""
    return next((name for name in ("ground_truth", "answer", "reward_model") if name in columns), None)


def _label_column(columns: Collection[str]) -> str | None:
    """The column of OpenRLHF's labels: of that name, of the singular, or Tandem's `answer`."""
    return next((name for name in ("labels", "label", "answer", "ground_truth") if name in columns), None)


def _nothing_provides(argument: str, style: Style, columns: Sequence[str], label: str) -> str:
    injected = [*FIXED[style], *INJECTED[style]]
    near = difflib.get_close_matches(argument, [*columns, *injected], n=1)
    hint = f"did you mean {'the column ' if near[0] in columns else ''}{near[0]!r}? " if near else ""
    return (
        f"{label}: nothing provides the argument {argument!r} ({style} function); available are "
        f"{', '.join(injected)} and the dataset columns ({', '.join(columns) or 'none'}). {hint}"
        f"Map a dataset column to that name (data.columns), add it to the reward's kwargs, or give it a default"
    )


def column_notes(columns: Sequence[str], functions: Sequence[tuple[str, Style, Collection[str]]]) -> list[str]:
    """A line for each column of the data set that a function gets in place of what is injected under its name, and for
    each that it cannot get.

    functions: of each its name, its style, and its `BoundReward.replacing`.
    """
    lines = []
    for column in columns:
        rename = f"data.columns.data_{column}={column}"
        winners = [name for name, _, replacing in functions if column in replacing]
        losers = [name for name, style, _ in functions if column in FIXED[style]]
        if winners:
            risk = ""
            if column in ("completion", "completions", "completion_ids"):
                risk = " it judges the data set and not the policy, whatever is drawn;"
            lines.append(
                f"reward {_names(winners)} gets the data set's column {column!r} in place of the run's own value of "
                f"that name:{risk} data.columns hands the column over under another name, for example {rename}"
            )
        if losers:
            lines.append(
                f"the data set's column {column!r} does not reach reward {_names(losers)}: under that name it "
                f"gets an object of the run; data.columns hands it over under another name, for example {rename}"
            )
    return lines


def _names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
