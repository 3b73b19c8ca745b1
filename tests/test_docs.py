"""The documentation: pages written from code are current, every block and command line works, the site builds."""

import argparse
import ast
import importlib
import logging
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ElementTree

import jax
import numpy as np
import pytest
import yaml

from rl.algorithms.advantages import compute_advantages
from rl.algorithms.from_config import loss_config
from rl.algorithms.loss_types import KL_ESTIMATORS, LOSS_TYPES, Sequences
from rl.cli import COMMANDS
from rl.config.load import load_config
from rl.config.page import PEER_PAGES, base_keys, configuration_page, with_peer_table
from rl.config.peer_keys import PEER_KEYS
from rl.config.sections import FREE_FORM, flatten, to_dict
from rl.data.tokenizer import load_tokenizer
from rl.sampler.contract import Request
from rl.sampler.token_draw import SamplingParams
from rl.sampler.user_source import Drawn
from rl.tools.api_page import page as api_page
from tests.helpers.pages import blocks, commands, read, texts
from tests.helpers.places import ROOT

DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md") if path.name != "LOG.md")
OTHERS = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("examples/**/*.md")),
]
KEYS = {*flatten(to_dict(load_config(None)))}
# Which test runs the Python blocks of a page.
RUN_BY = {
    "README.md": "tests/test_docs.py",
    "docs/algorithms.md": "tests/algorithms/test_from_config.py",
    "docs/data.md": "tests/data/test_data_docs.py",
    "docs/environments.md": "tests/rewards/test_environments_page.py",
    "docs/evaluation.md": "tests/rollout/test_eval_sets.py",
    "docs/index.md": "tests/test_docs.py",
    "docs/models.md": "tests/test_docs.py",
    "docs/notebook.md": "tests/test_docs.py",
    "docs/rewards.md": "tests/rewards/test_page.py",
    "docs/samplers.md": "tests/test_docs.py",
    "docs/serving.md": "tests/serving/test_serve.py",
    "docs/trackers.md": "tests/run/test_trackers.py",
}
BY_HAND = {"docs/data.md", "docs/environments.md", "docs/notebook.md", "docs/rewards.md"}  # `make test-long` alone
MOST_RUN = 15  # blocks in `make test`
# What begins with the name of a section and is no key: files, and a field of a sampler's argument.
NO_KEYS = ("model.safetensors", "rewards.log", "rewards.log.1", "sampling.greedy")
SIGNATURES, OF_PEERS = "docs/api.md", {f"docs/{name}" for name in (*PEER_PAGES.values(), "from-maxtext.md")}


class ParsedError(Exception):
    """A command line was parsed."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory that has the recipe of the start page."""
    monkeypatch.chdir(tmp_path)
    for name in ("my_recipe.yml", "recipe.yml"):
        (tmp_path / name).write_text(texts("docs/index.md", "yaml")[0])
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def test_the_site_builds_strictly(tmp_path, caplog, monkeypatch):
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config as load_site

    monkeypatch.chdir(ROOT)
    site = load_site(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path))
    assert [*site.plugins] == ["material/search"]
    with caplog.at_level(logging.WARNING, "mkdocs"):
        build(site)  # raises where a page, a link or an anchor is missing
    assert not [record.getMessage() for record in caplog.records if record.name.startswith("mkdocs")]
    pages = {path.parent.name for path in tmp_path.glob("*/index.html")}
    assert pages == {pathlib.Path(name).stem for name in DOCS} - {"index"} | {"LOG"}
    for page in tmp_path.rglob("*.html"):  # nothing is asked of other servers
        assert not re.findall(r"<(?:script|link rel=.stylesheet.|img)[^>]*(?:src|href)=.?https?:", page.read_text())


def test_the_page_of_every_key_is_current():
    assert read("docs/configuration.md") == configuration_page(), "python -m rl.config.page"
    named = {key.name: key for key in base_keys(read("configs/base.yml"))}
    assert named.keys() >= KEYS
    defaults = flatten(to_dict(load_config(None)))
    for name in KEYS - {*FREE_FORM}:
        written = yaml.safe_load(named[name].default)
        assert written == defaults[name] or float(written) == defaults[name], name  # YAML 1.1 takes 1e-6 for a text


def test_the_page_of_the_api_is_current():
    assert read(SIGNATURES) == api_page(), "python -m rl.tools.api_page > docs/api.md"
    for text in texts(SIGNATURES, "python"):
        ast.parse(text)


@pytest.mark.parametrize("peer", PEER_PAGES)
def test_the_table_of_a_peers_keys_is_current(peer):
    text = read(f"docs/{PEER_PAGES[peer]}")
    assert text == with_peer_table(text, peer), "python -m rl.config.page"


def test_the_page_of_maxtext_has_every_key_of_the_table():
    rows = [line for line in read("docs/from-maxtext.md").splitlines() if line.startswith("| flag")]
    for key in (row for row in PEER_KEYS if row.peer == "MaxText"):
        (row,) = [row for row in rows if f"`{key.key}`" in row.split("|")[2]]
        assert f"`{key.ours}`" in row.split("|")[3] or key.ours in ("sampling.max_completion_length",), key


@pytest.mark.parametrize("peer", ["TRL", "verl", "MaxText", "Tunix"])
def test_a_recipe_of_a_peer_is_translated_line_by_line(peer, folder):
    page = f"docs/{PEER_PAGES.get(peer, 'from-maxtext.md')}"
    theirs, ours = (block.text for block in blocks(page))
    assert blocks(page)[1].language == "yaml"
    if blocks(page)[0].language == "python":
        calls = [node for node in ast.walk(ast.parse(theirs)) if isinstance(node, ast.Call)]
        configs = [call for call in calls if ast.unparse(call.func).endswith("Config")]
        keys = [keyword.arg for call in configs for keyword in call.keywords]
    else:
        keys = re.findall(r"^ *([\w.]+)=", theirs, re.MULTILINE)
    table = {row.key: row for row in PEER_KEYS if row.peer == peer}
    assert len(keys) > 10
    recipe = flatten(yaml.safe_load(ours))
    for key in keys:
        mine = [name for name in table[key].ours.split(", ") if name]
        assert all(any(given == name or given.startswith(f"{name}.") for given in recipe) for name in mine), key
        if mine:
            assert key.rpartition(".")[2] in ours, key  # the line says what it came from
    (folder / "translated.yml").write_text(ours)
    config = load_config(folder / "translated.yml")
    assert config.output_dir is not None


@pytest.mark.parametrize("page", [*DOCS, *OTHERS])
def test_every_yaml_block_loads(page, folder):
    for block in blocks(page):
        if block.language == "yaml":
            assert isinstance(yaml.safe_load(block.text), dict)
            (folder / "block.yml").write_text(block.text)
            load_config(folder / "block.yml")


@pytest.mark.parametrize("page", [page for page in [*DOCS, *OTHERS] if commands(page)])
def test_every_command_line_parses_and_its_configuration_is_right(page, folder, monkeypatch):
    for name in ("parse_args", "parse_intermixed_args"):
        real = getattr(argparse.ArgumentParser, name)

        def parse(self, *arguments, real=real, **named):
            real(self, *arguments, **named)
            raise ParsedError

        monkeypatch.setattr(argparse.ArgumentParser, name, parse)
    for command in commands(page):
        check_command(command, page)


def check_command(command: list[str], page: str) -> None:
    name, *arguments = command
    assert name in COMMANDS, (page, command)
    recipes = [word for word in arguments if word.endswith((".yml", ".yaml")) and not word.startswith("runs/")]
    overrides = [word for word in arguments if re.match(r"[a-z_]\w*(\.\w+)*=", word)]
    if name in ("train", "sft"):
        flags = [word for word in arguments if word.startswith("-")]
        assert {*flags} <= {"--check", "--trust", "--branch"}, (page, command)
        branch = arguments.index("--branch") + 1 if flags == ["--branch"] else None
        plain = [word for place, word in enumerate(arguments) if word not in flags and place != branch]
        assert plain[0] not in overrides, (page, command)
        assert [*plain[1:]] == overrides, (page, command)
    elif name == "launch":
        check_command(arguments[arguments.index("--") + 1 :], page)
    if name not in ("train", "sft"):
        try:
            importlib.import_module(COMMANDS[name].module).main(arguments)
        except ParsedError:
            pass
        except SystemExit as error:
            raise AssertionError(f"{page}: {command}") from error
    for recipe in recipes or (["my_recipe.yml"] if overrides else []):
        is_of_own_model = any(word.startswith("model.weights=") for word in overrides)
        load_config(recipe, [*overrides, *(["model.source=my_model.py:build"] if is_of_own_model else [])])


def test_every_python_block_is_python_and_a_test_runs_it_few_of_them_in_every_run_of_the_tests():
    assert sum(len(texts(page, "python")) for page in RUN_BY if page not in BY_HAND) <= MOST_RUN
    assert all("@pytest.mark.long\ndef test_" in read(RUN_BY[page]) for page in BY_HAND)
    for page in [*DOCS, *OTHERS]:
        found = texts(page, "python")
        for text in found:
            ast.parse(text)
        if found and page not in {SIGNATURES, *OF_PEERS}:
            assert pathlib.Path(page).name in read(RUN_BY[page]), page


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_reward_of_the_first_page_is_one(page):
    code: dict = {}
    exec(texts(page, "python")[-1], code)
    assert code["polite"](["?", "?"], ["please 4", "4"], answer=["4", "4"]) == [1.0, 0.0]


def test_the_skeleton_of_a_model_has_the_methods_that_the_page_names():
    from flax import nnx

    code: dict = {"nnx": nnx}
    (text,) = texts("docs/models.md", "python")
    exec(text, code)
    assert issubclass(code["Model"], nnx.Module)
    assert {"__call__", "unembed"} <= {*vars(code["Model"])}
    assert code["build"].__code__.co_varnames == ("vocab_size", "rngs")


def formulas() -> dict[str, str]:
    """{name: what stands behind its =} of the formulas on the page on algorithms."""
    (text,) = re.findall(r"## Formulas\n(.*?)\n## ", read("docs/algorithms.md"), re.DOTALL)
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()]
    return {row[0].strip("`| "): row[1].split("`")[1] for row in rows if len(row) >= 2 and row[1].startswith("`")}


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_the_formula_of_a_loss_is_what_is_computed(name):
    """The term of one token (or one completion) before it is summed, on both sides of every bound."""
    config = loss_config(load_config(None, [f"grpo.loss_type={name}", "grpo.epsilon_high=0.3"]))
    random = np.random.default_rng(0)
    for advantage in (-1.5, 0.7):
        new, old = -random.uniform(0.05, 3, 24), -random.uniform(0.05, 3, 24)
        if name in ("vespo", "gmpo", "luspo"):
            new, old = new[:3], old[:3]
        mask = np.ones((1, len(new)), bool)
        level = config.importance_sampling_level
        log_ratio = new - old
        ratio = np.exp(log_ratio)[None]
        sequences = Sequences(
            *(jax.numpy.asarray(array[None]) for array in (new, old, old, log_ratio)),
            jax.numpy.asarray(ratio),
            jax.numpy.full((1, 1), advantage),
            jax.numpy.asarray(mask),
            jax.numpy.full((1, 1), float(len(new))),
            None,
        )
        assert level == "token"
        term = np.asarray(LOSS_TYPES[name].policy_term(sequences, config)[0])
        names = {
            "A": advantage,
            "p": np.exp(new),
            "mu": np.exp(old),
            "r": ratio[0],
            "log_p": new,
            "low": config.epsilon,
            "high": config.upper_epsilon,
            "T": len(new),
            "tau": config.sapo_temperature_pos if advantage > 0 else config.sapo_temperature_neg,
            "k": config.vespo_k_pos if advantage >= 0 else config.vespo_k_neg,
            "lam": config.vespo_lambda_pos if advantage >= 0 else config.vespo_lambda_neg,
            "clip": np.clip,
            "min": np.minimum,
            "max": np.maximum,
            "exp": np.exp,
            "log": np.log,
            "sum": np.sum,
            "prod": np.prod,
            "abs": np.abs,
            "where": np.where,
            "sign": np.sign,
            "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        }
        wanted = eval(formulas()[name], names)
        assert np.broadcast_to(wanted, term.shape) == pytest.approx(term, rel=2e-5, abs=1e-6)


def test_the_formulas_of_kl_and_advantages_are_what_is_computed():
    found = formulas()
    settings = {
        "grpo, group": "group",
        "grpo, batch": "batch",
        "grpo, none": "none",
        "rloo": "none",
        "maxrl": "none",
        "reinforce++": "batch",
        "reinforce++_baseline": "batch",
    }
    assert found.keys() == {*settings, *LOSS_TYPES, *KL_ESTIMATORS}
    q = np.linspace(-2, 1, 7)
    for name, function in KL_ESTIMATORS.items():
        wanted = eval(found[name], {"ref": np.exp(q), "p": 1.0, "log": np.log})
        assert wanted == pytest.approx(np.asarray(function(jax.numpy.asarray(q))), rel=1e-5, abs=1e-6)
    rewards = np.array([[0.0], [1.0], [1.0], [3.0], [2.0], [0.5], [1.5], [0.0]])
    groups = rewards.reshape(2, 4)
    spread = {"std": lambda x: np.std(x, ddof=1), "mean": np.mean, "sum": np.sum, "len": len}
    centred = (groups - groups.mean(axis=1, keepdims=True)).ravel()
    for name, scale in settings.items():
        estimator = name.partition(",")[0]
        got = compute_advantages(rewards, None, 4, scale, "sum_then_normalize", estimator).advantages_B.reshape(2, 4)
        for group, advantages in zip(groups, got, strict=True):
            names = {**spread, "R": group, "batch": rewards.ravel(), "centred": centred}
            assert eval(found[name], names) == pytest.approx(advantages, rel=1e-6)


def test_the_server_of_the_page_on_samplers_sends_weights_once_and_asks_for_each_request():
    sent, asked = [], []

    def ask(url, prompt, limit, temperature, seed):
        asked.append((url, prompt, limit, temperature, seed))
        return Drawn([5, 0], [-1.0, -2.0], "eos")

    code: dict = {"send": lambda url, params: sent.append((url, params)), "ask": ask}
    (text,) = texts("docs/samplers.md", "python")
    exec(text, code)
    source = code["make_source"](None, load_tokenizer("byte"), url="http://there")
    requests = [Request(0, 3, 0, 8), Request(1, 4, 0, 8, continues=(9,))]
    sampling, key = SamplingParams(8, temperature=0.5), jax.random.key(0)
    for _ in range(2):
        drawn = dict(source.stream("weights", [[1, 2], [3]], requests, sampling, key))
        assert [drawn[place].token_ids for place in range(2)] == [[5, 0], [5, 0]]
    assert sent == [("http://there", "weights")]
    assert [each[1:4] for each in asked] == [([1, 2], 8, 0.5), ([3, 9], 7, 0.5)] * 2
    assert asked[:2] == asked[2:]
    assert asked[0][4] != asked[1][4]
    source.release()
    assert len([*source.stream("new", [[1]], requests[:1], sampling, key)]) == 1
    assert sent[1:] == [("http://there", "new")]
    source.close()


@pytest.mark.long
def test_the_block_of_the_page_on_notebooks_runs(tmp_path):
    """`tests/test_api.py` holds each of its calls in `make test`."""
    (block,) = texts("docs/notebook.md", "python")
    small = {
        '"Qwen/Qwen2.5-0.5B-Instruct"': repr({"arch": {"hidden_size": 32, "num_layers": 1}}),
        '"eval_size": 200': '"eval_size": 2, "max_prompt_length": 16',
        'grpo={"steps": 100}': 'grpo={"steps": 1, "prompts_per_step": 2}, sampling={"max_completion_length": 8}',
    }
    for was, now in small.items():
        assert block.count(was) == 1
        block = block.replace(was, now)
    rows = "rows = [{'prompt': f'{n}+1=', 'answer': str(n + 1)} for n in range(8)]\n"
    (tmp_path / "page.py").write_text(f"if __name__ == '__main__':\n{textwrap.indent(rows + block, '    ')}")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "my_model" / "model.safetensors").exists()


@pytest.mark.parametrize("page", [*DOCS, *OTHERS])
def test_links_lead_somewhere(page):
    """In a checkout; the strict build looks at those of the site."""
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", read(page)):
        if not link.startswith(("http://", "https://")):
            assert ((ROOT / page).parent / link).exists(), link
            inside = (ROOT / page).parent.joinpath(link).resolve().is_relative_to(ROOT / "docs")
            assert inside or not page.startswith("docs/"), f"{page}: {link} is no page of the site"


@pytest.mark.parametrize("page", [page for page in DOCS if page not in OF_PEERS])
def test_every_key_that_a_page_names_exists(page):
    """Keys of peers are compared with their table."""
    sections = {key.partition(".")[0] for key in KEYS if "." in key}
    known = {*KEYS, *(key.rpartition(".")[0] for key in KEYS), *NO_KEYS}
    known |= {f"rewards.{path.stem}" for path in (ROOT / "rewards").glob("*.py")}
    for name in re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)[`=:]", read(page)):
        if name.partition(".")[0] in sections and not re.search(r"\.(py|md|jsonl?|yml)$", name):
            inside = any(name.startswith(f"{key}.") for key in [*FREE_FORM, "rewards.functions"])
            assert name in known or inside, name


def test_the_figure_is_readable_in_light_and_dark():
    text = (ROOT / "docs" / "dataflow.svg").read_text()
    root = ElementTree.fromstring(text)
    assert root.find("{http://www.w3.org/2000/svg}title") is not None
    light, _, dark = text.partition("prefers-color-scheme: dark")
    for scheme in (light, dark):
        fills = dict(re.findall(r"\.(\w+) \{ fill: (#[0-9a-f]{6})", scheme))
        for letters in ("name", "note"):
            for ground in ("back", "box", "state"):
                assert contrast(fills[letters], fills[ground]) >= 4.5, (letters, ground)


def contrast(first: str, second: str) -> float:
    """The contrast ratio of two colours, https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
