"""`grpo doctor`: what it finds on a machine, in tokenizers and templates, in a step; and that nothing is written."""

import json
import re

import pytest

from rl.cli import main
from rl.config.load import load_config
from rl.data.prompts import load_prompts
from rl.data.tokenizer import load_tokenizer
from rl.tools.doctor import doctor, machine
from rl.tools.doctor.dry_step import DryStep
from rl.tools.doctor.machine import Requirement, problem_of, requirements
from rl.tools.doctor.tokens import eos_sets, token_findings
from rl.tools.programs import loop_programs
from tests.helpers.places import FILES

RECIPE = """
output_dir: {folder}/run
model:
  arch:
    {{family: llama, hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8}}
data: {{source: arithmetic, args: {{operation: add, digits: 1}}, max_prompt_length: 8}}
rewards: {{functions: [{{function: "rewards.number:exact_number_flexible", name: exact}}]}}
sampling: {{max_completion_length: 4, slots: 4}}
grpo: {{steps: 6, prompts_per_step: 4, group_size: 2, max_tokens_per_microbatch: 128}}
eval: {{every: 0}}
mesh: {{num_devices: 1}}
logging: {{compilation_cache: null}}
"""
CHAT = ("data.chat=true", "data.source=arithmetic", "data.args={operation: add, digits: 1}")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return str(path)


def degrees(text: str) -> dict[str, list[str]]:
    """{what was looked at: degrees of its lines}"""
    found: dict[str, list[str]] = {}
    for degree, what in re.findall(r"^(ok|note|change|wrong) +([\w ]+): ", text, re.MULTILINE):
        found.setdefault(what, []).append(degree)
    return found


def test_a_run_that_starts_and_fits_is_tried_to_the_end_and_leaves_nothing(tmp_path, recipe, capsys):
    assert main(["doctor", recipe]) == 0
    told = capsys.readouterr().out
    found = degrees(told)
    for what in ("devices", "versions", "disk of the run", "tokenizer", "EOS", "BOS", "start", "rewards", "memory"):
        assert found[what] == ["ok"], told
    assert found["sampler against trainer"] == ["ok"]
    assert found["dry step"] == ["ok", "change", "change"]  # what an untrained model does in its first step
    assert "sampling.max_completion_length" in told
    assert re.search(r"^the run would start and fit: 0 wrong, 2 to change, \d to note$", told, re.MULTILINE)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yml"]


def test_a_run_that_does_not_fit_is_wrong_with_the_keys_to_change_and_no_step_is_made(recipe, capsys, monkeypatch):
    monkeypatch.setattr(loop_programs, "device_memory", lambda mesh: 20_000)
    monkeypatch.setattr(doctor, "dry_step", None)
    assert main(["doctor", recipe]) == 1
    told = capsys.readouterr().out
    assert re.search(
        r"^wrong   memory: .* needs .* of the 19\.5 KiB of a device; .*max_tokens_per_microbatch", told, re.M
    )
    assert "note    dry step: not made" in told
    assert "the run would not start and fit: 1 wrong" in told


def test_a_run_that_would_not_start_is_wrong_once_with_the_words_of_the_start(tmp_path, recipe, capsys):
    assert main(["doctor", recipe, "model.source=./none", "output_dir=null"]) == 1
    told = capsys.readouterr().out
    assert (
        len(re.findall(r"^wrong +\w+: model\.source must be .*'\./none', which does not exist", told, re.MULTILINE))
        == 1
    )
    assert "0 wrong" not in told
    assert main(["doctor", recipe, "optimizer.warmup_updates=6"]) == 1
    assert "wrong   start: optimizer.warmup_updates must be below" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yml"]


def test_without_a_recipe_the_machine_is_looked_at(capsys, monkeypatch, tmp_path):
    assert main(["doctor"]) == 0
    found = degrees(capsys.readouterr().out)
    assert {"devices", "versions", "system", "disk of the run", "disk of downloads", "optional packages"} <= {*found}
    assert main(["doctor", "grpo.steps=1"]) == 2
    assert "needs a config file before overrides" in capsys.readouterr().err


def test_an_accelerator_that_jax_does_not_use_and_a_full_disk_are_named_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_ACCELERATORS", {str(tmp_path): ("a board", "cuda")})
    monkeypatch.setattr(machine, "_LITTLE_DISK", float("inf"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    hidden = {finding.what: finding for finding in machine.machine_findings(tmp_path / "runs" / "a")}
    assert hidden["devices"].change == "unset JAX_PLATFORMS"
    assert hidden["disk of the run"].degree == "change"
    assert str(tmp_path) in hidden["disk of the run"].value
    assert "output_dir" in hidden["disk of the run"].change
    assert "HF_HOME" in hidden["disk of downloads"].change
    monkeypatch.delenv("JAX_PLATFORMS")
    unseen = {finding.what: finding for finding in machine.machine_findings(tmp_path)}
    assert "pip install 'tandem-grpo[cuda]'" in unseen["devices"].change


@pytest.mark.parametrize(
    ("rules", "problem"),
    [(">=1", None), ("<1", "must be <1"), (">=1,<99", None), ("==1.*", None), ("!=99,>98", "must be"), ("~=1.2", None)],
)
def test_versions_are_held_against_the_rules_of_this_package(rules, problem, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.10.2")
    found = problem_of(Requirement("some", rules, ""))
    assert found is None if problem is None else problem in found


def test_packages_that_are_missing_are_named_with_their_extra():
    assert problem_of(Requirement("no-such-package", ">=1", "x")) == "no-such-package is missing"
    names = {needed.name: needed.extra for needed in requirements()}
    assert names["jax"] == ""
    assert names["starlette"] == "serve"


def findings_of(tokenizer, *overrides: str) -> dict[str, str]:
    """{what: its lines} of a tokenizer on a fresh model."""
    config = load_config(None, [*CHAT, f"model.arch.vocab_size={tokenizer.vocab_size}", *overrides])
    rows = load_prompts(config, tokenizer).train[:2]
    found: dict[str, str] = {}
    for finding in token_findings(config, tokenizer, rows):
        found[finding.what] = f"{found.get(finding.what, '')}{finding.line}\n"
    return found


def chat_tokenizer(template: str, **variables):
    """The tokenizer of bytes with a chat template."""
    tokenizer = load_tokenizer("byte", None, variables)
    tokenizer.backend.chat_template = template
    return tokenizer


HEADED = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}[assistant]{% endif %}"
PLAIN = "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}<eos>"
PLAIN += "{% endif %}{% endfor %}"


def test_a_template_without_a_generation_prompt_is_found_unless_its_answers_have_no_header():
    assert findings_of(chat_tokenizer(HEADED))["generation prompt"].startswith("change")
    assert "tokenizer.chat_template" in findings_of(chat_tokenizer(HEADED))["generation prompt"]
    for template in (HEADED + ASKS, PLAIN):
        found = findings_of(chat_tokenizer(template))
        assert found["generation prompt"].startswith("ok")
        assert found["end of a turn"] == "ok      end of a turn: [2 '<eos>'], which ends a completion\n"


def test_a_template_that_refuses_a_plain_question_is_noted():
    found = findings_of(chat_tokenizer(HEADED + "{{ raise_exception('no') }}"), "data.chat=false")
    assert "not used, data.chat is false" in found["chat template"]
    config = load_config(None, [*CHAT, "model.arch.vocab_size=259"])
    found = token_findings(config, chat_tokenizer(HEADED + "{{ raise_exception('no tools') }}"), [])
    assert [each.degree for each in found if each.what == "chat template"] == ["note"]


@pytest.mark.parametrize("name", ["gemma3", "llama3_2", "qwen2_5", "qwen3", "smollm2"])
def test_templates_of_published_models_have_a_generation_prompt(name):
    found = findings_of(chat_tokenizer((FILES / "chat_templates" / f"{name}.jinja").read_text()))
    assert found["generation prompt"].startswith("ok")
    assert ("thinking switch" in found) == (name == "qwen3")


def test_a_turn_that_ends_with_another_token_than_a_completion_wants_it_among_the_eos_ids():
    template = (HEADED + ASKS).replace("<eos>", "<pad>")
    found = findings_of(chat_tokenizer(template))["end of a turn"]
    assert found.startswith("change")
    assert "sampling.eos_ids=[0, 2]" in found
    assert findings_of(chat_tokenizer(template), "sampling.eos_ids=[0]")["end of a turn"].startswith("ok")


def test_a_beginning_that_stands_twice_is_found():
    assert findings_of(chat_tokenizer("<bos>" + HEADED + ASKS))["BOS"].startswith("ok")
    found = findings_of(chat_tokenizer("<bos><bos>" + HEADED + ASKS))["BOS"]
    assert "stands 2 times" in found
    assert found.startswith("change")


def test_a_thinking_switch_is_named_with_the_key_that_sets_it():
    template = HEADED + ASKS + "{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}"
    found = findings_of(chat_tokenizer(template))["thinking switch"]
    assert "data.chat_template_kwargs={enable_thinking: false}" in found
    tokenizer = chat_tokenizer(template, enable_thinking=False)
    found = findings_of(tokenizer, "data.chat_template_kwargs={enable_thinking: false}")["thinking switch"]
    assert found.startswith("ok")
    assert "thinking switch" not in findings_of(chat_tokenizer(HEADED + ASKS))


def test_eos_sets_of_model_generation_config_and_tokenizer_that_differ_are_listed(tmp_path):
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((FILES / "models" / "llama_tied" / name).read_text())
        settings["eos_token_id"] = 1 if name == "config.json" else [1, 5]
        settings |= {"vocab_size": 259} if name == "config.json" else {}
        (tmp_path / name).write_text(json.dumps(settings))
    tokenizer, source = load_tokenizer("byte"), (f"model.source={tmp_path}", "tokenizer.source=byte")
    config = load_config(None, source)
    assert eos_sets(config, tokenizer) == {"config.json": (1,), "generation_config.json": (1, 5), "tokenizer": (2,)}
    (found,) = [each for each in token_findings(config, tokenizer, []) if each.what == "EOS"]
    assert found.degree == "note"
    assert "the sets differ" in found.value
    assert "sampling.eos_ids=[1, 2, 5]" in found.change
    config = load_config(None, [*source, "sampling.eos_ids=[7]"])
    assert [each.degree for each in token_findings(config, tokenizer, []) if each.what == "EOS"] == ["note", "change"]


def test_a_step_shows_whether_sampler_and_trainer_agree_and_what_a_run_would_warn_of():
    config = load_config(None, ["model.dtype=float32"])
    metrics = {"skipped_updates": 0, "logprob_difference/mean": 1e-3, "logprob_difference/max": 0.1, "reward/mean": 0.5}
    step = DryStep(metrics, ["raise a.key"], 2.0, 2**30)
    found = doctor.step_findings(config, step)
    assert [(each.degree, each.what) for each in found] == [
        ("ok", "dry step"),
        ("change", "sampler against trainer"),
        ("change", "dry step"),
    ]
    assert "grpo.sampler_is_correction=true" in found[1].change
    rounded = doctor.step_findings(load_config(None, ["model.dtype=bfloat16"]), step)
    assert rounded[1].degree == "ok"
    skipped = step._replace(metrics=metrics | {"skipped_updates": 1})
    assert doctor.step_findings(config, skipped)[0].degree == "wrong"
