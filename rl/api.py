"""Training from a notebook or a script: `rl.train(...)` and `rl.load(RUN)`, which return a `Run`.

In: the configuration of a recipe as keywords, with objects in place of names of functions and files. Out: a run folder
like that of `grpo train`, and what the commands do with one. The configuration carries objects under a name
(`rl.config.objects`), so everything below this module works as for a command.
"""

import datetime
import decimal
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rewards import objects as reward_objects
from rl.config.load import Config, load_config
from rl.config.objects import GivenFunction, Objects, given, object_text
from rl.data.prompt_rows import Prompt
from rl.data.tasks import Row
from rl.devices import hosts
from rl.devices.programs import use_compilation_cache
from rl.files.json_file import shown
from rl.files.stores import is_remote
from rl.grpo_trainer import train as train_by
from rl.rollout.evaluation import EvalResult
from rl.run.metrics import read_metrics
from rl.run_folder.folder import check_trust, load_run_config, read_run
from rl.run_folder.remote_steps import local_report, local_source
from rl.state.origin import tokenizer_from_config
from rl.tools.checkpoints.export import export
from rl.tools.evaluate import evaluate_source
from rl.tools.samples.sample import sample_rows
from rl.tools.samples.sample_prompts import to_sample_rows
from rl.tools.trained import resolve_model

if TYPE_CHECKING:
    import pandas

_PLAIN = (type(None), bool, int, float, str, bytes, decimal.Decimal, datetime.date, datetime.datetime)
_ROWS_KEYS = {"source": "rows", "eval_source": "eval_rows"}  # of the section data: the names of rows given there


class Run:
    """A run folder, with the objects that its configuration names.

    Methods that read weights read the newest whole checkpoint, and free them afterwards.

    Attributes:
      path: the folder, a `pathlib.Path`; or its URL, text.
      config: the configuration that started the run.
    """

    def __init__(self, path: str | os.PathLike, objects: Objects, overrides: Sequence[str], trust: bool):
        self.path = path if is_remote(path) else pathlib.Path(path)
        self.config = read_run(local_source(path))[0]
        self._objects, self._overrides, self._trust = objects, tuple(overrides), trust

    def __repr__(self) -> str:
        return f"Run({os.fspath(self.path)!r})"

    @property
    def metrics(self) -> "pandas.DataFrame":
        """metrics.jsonl as a table, with a row for each step and a column for each metric."""
        import pandas

        lines = read_metrics(local_report(self.path, metrics_only=True))
        return pandas.DataFrame(lines or {"step": []}).set_index("step")

    def evaluate(self) -> EvalResult:
        """Greedy accuracy on the held-out rows, and in `sets` the numbers of each set of `eval.sets`.

        Raises:
          ValueError: there are no held-out rows, or reward functions or rows were objects and were not given again.
        """
        with given(self._objects):
            _check_one_process(self.config, "run.evaluate")
            return evaluate_source(self.path, self._overrides, trust=self._trust)[0]

    def sample(
        self, prompts: str | Sequence[Prompt], n: int = 1, seed: int | None = None, **sampling: Any
    ) -> "pandas.DataFrame":
        """Draws completions.

        Args:
          prompts: texts, or chats as lists of messages; or a single text.
          n: the number of completions of each prompt. seed: None: the run's seed.
          sampling: keys of the section `sampling` that differ, such as temperature=0.

        Returns:
          A table with a row for each completion; its columns are the fields of `grpo sample`.

        Raises:
          ValueError: there are no prompts, one is neither text nor messages, or a key is wrong.
        """
        import pandas

        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not prompts:
            raise ValueError('run.sample needs at least one prompt, got none; for example run.sample(["2+2="])')
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n, the completions of a prompt, must be a whole number >= 1, got {n!r}")
        overrides = [*self._overrides, *_overrides({"sampling": sampling} if sampling else {})]
        source = resolve_model(self.path, overrides, trust=self._trust)
        use_compilation_cache(source.config)
        rows = [(f"prompt {place}", {"prompt": prompt}) for place, prompt in enumerate(prompts)]
        data, limit = source.config.data, source.config.sampling.max_completion_length
        samples = to_sample_rows(rows, data, tokenizer_from_config(source.config), n, limit)
        return pandas.DataFrame(sorted(sample_rows(source, samples, seed), key=_place))

    def export(self, out: str | os.PathLike, step: int | None = None, **options: Any) -> pathlib.Path:
        """Writes the weights as a folder that transformers, TRL and vLLM open, and returns the folder. `options`: see
        `rl.tools.checkpoints.export.export`.
        """
        out = pathlib.Path(out)
        export(os.fspath(self.path), out, step, trust=self._trust, **options)
        return out


def train(
    recipe: str | os.PathLike | None = None,
    /,
    *,
    model: str | os.PathLike | Mapping[str, Any] | None = None,
    data: Any = None,
    rewards: Sequence[Any] | Mapping[str, Any] | None = None,
    output_dir: str | os.PathLike | None = None,
    overrides: Sequence[str] = (),
    trust: bool = False,
    **sections: Any,
) -> Run:
    """Trains, or resumes the run in `output_dir`. An interrupt finishes the step, saves and returns.

    Args:
      recipe: a YAML recipe or a run folder, which the keywords override; None: the defaults.
      model: the value of model.source (a folder or a hub id), or the section `model` as a mapping.
      data: rows as a list of dicts or a `datasets.Dataset`, or the value of data.source, or the section `data` as a
        mapping, whose `source`, `eval_source` and sources in `sources` may be rows.
      rewards: a list of functions, of names, or of entries of rewards.functions as mappings (whose `function` may be a
        function); or the section `rewards` as a mapping.
      output_dir: the run folder.
      overrides: `dotted.key=value` texts, as on the command line; they win.
      trust: whether to run code that a run folder names and that is not shown to be yours (docs/security.md).
      sections: the other sections of a recipe as mappings, such as grpo={"steps": 100}, and its other keys, such as
        seed=1.

    Raises:
      ValueError: anything is wrong, before heavy work starts; see `rl.grpo_trainer.train`.
    """
    layer, objects = _read_objects(model, data, rewards)
    if output_dir is not None:
        layer["output_dir"] = os.fspath(output_dir)
    if recipe is not None and "source" in layer.get("model", {}):
        named = load_run_config(recipe, overrides).model.source
        if named is not None:
            raise ValueError(
                f"model must be left out with {os.fspath(recipe)!r}, which has model.source {named!r}, got "
                f"{layer['model']['source']!r}; to replace it say overrides=['model.source=...']"
            )
    texts = [*_overrides(layer), *_overrides(sections), *overrides]
    config = load_config(None, texts) if recipe is None else load_run_config(recipe, texts)
    _check_one_process(config, "rl.train")
    with given(objects):
        if recipe is not None:
            check_trust(recipe, config, texts, trust=trust)
        use_compilation_cache(config)
        train_by(config, trust=trust)
    assert config.output_dir is not None
    return Run(config.output_dir, objects, (), trust)


def load(
    run: str | os.PathLike,
    *,
    data: Any = None,
    rewards: Sequence[Any] | Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    trust: bool = False,
) -> Run:
    """Opens an earlier run.

    Args:
      run: its folder or URL.
      data, rewards: as for `train`. If they were objects, methods that use them (`run.evaluate`) need them again.
      overrides: `dotted.key=value` texts for the run's methods.
      trust: as for `train`.

    Raises:
      ValueError: `run` is no run folder.
    """
    layer, objects = _read_objects(None, data, rewards)
    return Run(run, objects, [*_overrides(layer), *overrides], trust)


def _check_one_process(config: Config, what: str) -> None:
    """ValueError in a run of several processes, because an object of one process is not in the others."""
    if hosts.named(config.distributed) or hosts.num_processes() > 1 or hosts.is_in_a_cluster(config.distributed):
        raise ValueError(
            f"{what} must run in one process, for functions and rows that are objects are not the same ones in others, "
            "got one of several; put them in files and start `grpo train RECIPE` in each process, or set "
            "distributed={'auto': False} where this one is to train alone"
        )


def _read_objects(model: Any, data: Any, rewards: Any) -> tuple[dict[str, Any], Objects]:
    """The keywords as sections of a configuration, with texts in place of objects, and the objects by these texts."""
    layer: dict[str, Any] = {}
    functions: dict[str, GivenFunction] = {}
    rows: dict[str, list[Row]] = {}
    if model is not None:
        layer["model"] = _section(model, "source")
    if data is not None:
        section = _section(data, "source")
        for key, name in _ROWS_KEYS.items():
            if section.get(key) is not None and not isinstance(section[key], str):
                rows[object_text(name)] = _plain_rows(section[key], f"data.{key}")
                section[key] = object_text(name)
        entries = section.get("sources")
        if isinstance(entries, Sequence) and not isinstance(entries, str):
            section["sources"] = [_source_entry(entry, place, rows) for place, entry in enumerate(entries)]
        layer["data"] = section
    if rewards is not None:
        section = _section(rewards, "functions")
        if "functions" in section:
            entries = section["functions"]
            if isinstance(entries, (str, Mapping)) or not isinstance(entries, Sequence):
                raise ValueError(f"rewards must be a list of functions, got {shown(entries)}; write rewards=[FUNCTION]")
            section["functions"] = [_entry(entry, place, functions) for place, entry in enumerate(entries)]
        layer["rewards"] = section
    return layer, Objects(functions, rows)


def _section(value: Any, key: str) -> dict[str, Any]:
    """A section of the configuration: `value` if it is a mapping, else {key: value}."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    return dict(value) if isinstance(value, Mapping) and not _is_data_set(value) else {key: value}


def _source_entry(given_entry: Any, place: int, rows: dict[str, list[Row]]) -> Any:
    """An entry of data.sources. Rows in it are added to `rows`, and replaced by the text that stands for them."""
    entry = _section(given_entry, "source")
    if entry.get("source") is not None and not isinstance(entry["source"], str):
        text = object_text(f"rows of source {place}")
        rows[text] = _plain_rows(entry["source"], f"data.sources.{place}.source")
        entry["source"] = text
    return entry


def _is_data_set(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "datasets"


def _entry(given_entry: Any, place: int, functions: dict[str, GivenFunction]) -> dict[str, Any]:
    """An entry of rewards.functions. A function in it is added to `functions`, and replaced by the text that stands for
    it.
    """
    entry = _section(given_entry, "function")
    function = entry.get("function")
    if isinstance(function, str):
        return entry
    if not callable(function) or isinstance(function, type):
        raise ValueError(
            f"rewards[{place}] must be a function, the name of one like 'my_rewards.py:polite', or a mapping with "
            f"'function', got {shown(given_entry)}"
        )
    name = entry.setdefault("name", _name_of(function))
    label = f"reward {name!r}"
    text = object_text(str(name))
    identity = reward_objects.identity(function, label)
    functions[text] = GivenFunction(reward_objects.to_bytes(function, label), identity)
    return {**entry, "function": text}


def _name_of(function: Callable[..., Any]) -> str:
    inner = getattr(function, "func", function)  # of functools.partial
    return getattr(inner, "__name__", type(function).__name__).strip("<>")


def _plain_rows(rows: Any, key: str) -> list[Row]:
    """A copy of the rows with plain values. ValueError names the row and column of any other value."""
    if _is_data_set(rows):
        import datasets

        if isinstance(rows, (datasets.IterableDataset, datasets.IterableDatasetDict)):
            raise ValueError(
                f"{key} must be rows that can be read again from any place, got a {type(rows).__name__}, which a run "
                "that goes on would have to read from its beginning; name what it reads, as in "
                "data={'source': 'big.parquet', 'streaming': True}"
            )
        if not isinstance(rows, datasets.Dataset):
            raise ValueError(
                f"{key} must be one split, whole, got a {type(rows).__name__}; take one, as in data['train']"
            )
        rows = rows.to_list()
    if isinstance(rows, Mapping) or not isinstance(rows, Sequence) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(
            f"{key} must be rows, each a dict with 'prompt', or a datasets.Dataset, got {shown(rows)}; of a table of "
            "pandas datasets.Dataset.from_pandas(table)"
        )
    return [
        {name: _plain(value, f"{key} row {index}: column {name!r}") for name, value in row.items()}
        for index, row in enumerate(rows)
    ]


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, where) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist(), where)
    raise ValueError(
        f"{where} must hold numbers, text, dates, lists or dicts with keys of text, got {shown(value)} of type "
        f"{type(value).__name__}; convert it, or leave that column out"
    )


def _overrides(sections: Mapping[str, Any]) -> list[str]:
    """Sections and keys as overrides of the command line, with values in JSON, which is YAML too."""
    texts = []
    for name, value in sections.items():
        try:
            texts.append(f"{name}={json.dumps(value, ensure_ascii=False, allow_nan=False)}")
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{name} must hold plain values, as a recipe does, got {shown(value)}: {error}; convert numbers with "
                "int() or float(), paths with str()"
            ) from error
    return texts


def _place(record: Mapping[str, Any]) -> tuple[int, int]:
    return record["prompt_index"], record["sample_index"]
