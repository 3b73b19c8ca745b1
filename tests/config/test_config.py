"""Recipes, presets and overrides: how they are layered, what is refused, what makes another run."""

import dataclasses
import re
import typing

import pytest
import yaml

from rl.algorithms.advantages import check_modes
from rl.algorithms.from_config import loss_config
from rl.config.load import differences, dump_config, load_config, preset_values, program_keys, read_preset, require
from rl.config.ranges import RANGES
from rl.config.sections import Config, flatten, to_dict
from tests.helpers.places import ROOT

PRESETS = sorted(path.stem for path in (ROOT / "configs" / "presets").glob("*.yml"))


def write(folder, text, name="recipe.yml"):
    path = folder / name
    path.write_text(text)
    return path


# Layers


def test_without_a_recipe_every_value_is_that_of_base_yml():
    base = yaml.safe_load((ROOT / "configs" / "base.yml").read_text())
    base["optimizer"] |= {"lr": 1e-6, "eps": 1e-8}  # which YAML 1.1 reads as strings
    assert to_dict(load_config(None)) == base


def test_the_classes_hold_no_default_beside_base_yml():
    config = load_config(None)
    classes = [type(config)] + [type(section) for section in vars(config).values() if dataclasses.is_dataclass(section)]
    classes.append(type(config.model.arch))
    for section in classes:
        for field in dataclasses.fields(section):
            no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            assert no_default, f"{section.__name__}.{field.name}"


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_base_yml(tmp_path):
    path = write(tmp_path, "grpo: {steps: 7, group_size: 3}\noptimizer: {lr: 3e-5}\n")
    config = load_config(path, ["grpo.steps=9", "grpo.steps=11", "data.args.digits=2", "data.args.operation=add"])
    assert (config.grpo.steps, config.grpo.group_size, config.grpo.prompts_per_step) == (11, 3, 8)
    assert config.optimizer.lr == 3e-5
    assert config.data.args == {"digits": 2, "operation": "add"}


def test_a_recipe_inherits_from_the_file_beside_it(tmp_path):
    write(tmp_path, "grpo: {steps: 7, group_size: 3}\nsampling: {stop_strings: [a, b]}\n", "parent.yml")
    path = write(tmp_path, "inherit: parent.yml\ngrpo: {steps: 8}\nsampling: {stop_strings: [c]}\n")
    config = load_config(path)
    assert (config.grpo.steps, config.grpo.group_size) == (8, 3)
    assert config.sampling.stop_strings == ["c"]  # a list is replaced, not merged


def test_every_recipe_of_the_repository_is_read_as_yaml_1_1_reads_it():
    recipes = [path for name in ("examples", "benchmarks") for path in (ROOT / name).rglob("*.yml")]
    assert recipes
    for path in recipes:
        stated = flatten(yaml.safe_load(path.read_text()))
        read = flatten(to_dict(load_config(path)))
        for key, value in stated.items():
            is_number = isinstance(value, str) and isinstance(read.get(key), float)  # 1e-6, text in YAML 1.1
            if key not in ("inherit", "rewards.functions", "data.sources"):  # lists of entries with defaults
                assert (float(value) if is_number else value) == read[key], (path, key)


def test_a_recipe_cannot_inherit_from_itself_or_from_nothing(tmp_path):
    write(tmp_path, "inherit: b.yml\n", "a.yml")
    path = write(tmp_path, "inherit: a.yml\n", "b.yml")
    with pytest.raises(ValueError, match="inherits from itself"):
        load_config(path)
    with pytest.raises(ValueError, match=r"inherit must be the path of one recipe, got \['a.yml'\]"):
        load_config(write(tmp_path, "inherit: [a.yml]\n"))
    with pytest.raises(ValueError, match=r"'missing\.yml', which does not exist \(working directory "):
        load_config(write(tmp_path, "inherit: missing.yml\n"))


def test_a_packaged_recipe_is_found_by_its_bare_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("base.yml") == load_config(None)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_its_keys_and_explicit_ones_win(tmp_path, name):
    preset = read_preset(name)["grpo"]
    config = load_config(None, [f"grpo.preset={name}"])
    assert {key: getattr(config.grpo, key) for key in preset} == preset
    loss_config(config)  # refuses keys that contradict each other
    check_modes(config.grpo.scale_rewards, config.grpo.aggregation, config.grpo.advantage_estimator)
    other = load_config(write(tmp_path, "grpo: {epsilon: 0.123, beta: 0.5}\n"), [f"grpo.preset={name}"])
    assert (other.grpo.epsilon, other.grpo.beta) == (0.123, 0.5)
    rest = [key for key in preset if key not in ("epsilon", "beta")]
    assert {key: getattr(other.grpo, key) for key in rest} == {key: preset[key] for key in rest}


def test_a_preset_may_set_keys_of_other_sections(tmp_path):
    config = load_config(None, ["grpo.preset=dapo_full"])
    assert (config.rewards.overlong_buffer, config.rewards.overlong_factor) == (0.2, 1.0)
    values = preset_values(load_config(None, ["grpo.preset=dapo_full", "rewards.overlong_factor=0.5"]))
    assert (values["loss_type"], values["rewards.overlong_buffer"], values["rewards.overlong_factor"]) == (
        "dapo",
        0.2,
        0.5,
    )
    assert (moving := load_config(None, ["grpo.preset=tr_grpo"]).reference) == type(moving)(sync_every=64, ema=0.6)
    assert preset_values(load_config(None)) == {}


def test_every_preset_stands_in_the_documentation_with_its_paper():
    page = (ROOT / "docs" / "algorithms.md").read_text()
    for name in PRESETS:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        paper = re.search(r"arxiv\.org/abs/([\d.]+)", (ROOT / "configs" / "presets" / f"{name}.yml").read_text())
        assert paper is not None, name
        assert paper[1] in row, name


@pytest.mark.parametrize("parent", ["base.yml", "{packaged}"])
def test_a_preset_wins_over_base_yml_however_base_yml_is_named(tmp_path, parent):
    packaged = ROOT / "configs" / "base.yml"
    path = write(tmp_path, f"inherit: {parent.format(packaged=packaged)}\ngrpo: {{preset: dapo}}\n")
    assert load_config(path).grpo.loss_type == "dapo"
    assert load_config(str(packaged), ["grpo.preset=dapo"]).grpo.beta == 0.0


def test_an_unknown_preset_is_answered_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"grpo\.preset must be one of \['adaptive_entropy', .*'rloo', .*\], got 'ppo'"
    ):
        load_config(None, ["grpo.preset=ppo"])


def test_a_preset_can_be_taken_back_on_the_command_line(tmp_path):
    path = write(tmp_path, "grpo: {preset: dapo}\n")
    assert load_config(path, ["grpo.preset=null"]) == load_config(None)


# Values


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-6", "0.000001", "+1e-6"])
def test_numbers_in_scientific_notation_are_floats(text):
    assert load_config(None, [f"optimizer.lr={text}"]).optimizer.lr == 1e-6


def test_whole_numbers_are_taken_as_floats_but_not_the_other_way_round():
    assert load_config(None, ["optimizer.lr=1"]).optimizer.lr == 1.0
    with pytest.raises(ValueError, match=r"grpo\.steps: .*valid integer, got 1000\.0"):
        load_config(None, ["grpo.steps=1e3"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.steps=ten", r"grpo\.steps: .*valid integer, got 'ten'"),
        ("pure_nnx=1", r"pure_nnx: .*valid boolean, got 1"),
        ("grpo.advantage_estimator=ppo", r"grpo\.advantage_estimator: .*'grpo'.*, got 'ppo'"),
        ("model.dtype=float16", r"model\.dtype: .*'float32', 'bfloat16' or 'float64', got 'float16'"),
        ("optimizer.lr=.nan", r"optimizer\.lr must be a finite number, got nan"),
        ("grpo.delta=.inf", r"grpo\.delta must be a finite number, got inf"),
        ("mesh.rules.vocab=tensor", r"mesh\.rules\.vocab: .*valid array, got 'tensor'"),
        ("rewards.functions=x:y", r"rewards\.functions: .*valid array, got 'x:y'"),
        ("rewards.functions=[{weight: 1.0}]", r"rewards\.functions\.0\.function: "),
        (
            "rewards.functions=[{function: 'a:b', weigth: 2.0}]",
            r"unknown config key 'rewards\.functions\.0\.weigth'; an entry of rewards\.functions has \['function', ",
        ),
        (
            "optimizer.lr_groups=[{pattern: '*', scale: 2.0}]",
            r"unknown config key '.*groups\.0\.scale'; an entry of optimizer\.lr_groups has \['pattern', 'lr_scale'\]",
        ),
        ("optimizer.lr_groups=[{pattern: '*'}]", r"optimizer\.lr_groups\.0\.lr_scale: "),
        ("optimizer.name=adam", r"optimizer\.name: .*'adamw', 'adafactor', 'lion', 'muon' or 'sgd', got 'adam'"),
        ("optimizer.schedule=step", r"optimizer\.schedule: .*'wsd', got 'step'"),
        ("optimizer.moment_dtype=float16", r"optimizer\.moment_dtype: .*'float32' or 'bfloat16', got 'float16'"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_key_and_value(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, [override])


def numeric_keys():
    """{key, with * for the entries of a list or mapping: whether it is an int} of the typed classes."""

    def walk(section, prefix):
        for name, kind in typing.get_type_hints(section).items():
            kinds = [kind, *(part for part in typing.get_args(kind) if part is not type(None))]
            if dataclasses.is_dataclass(kind):
                yield from walk(kind, f"{prefix}{name}.")
                continue
            for part in kinds:
                if part in (int, float):
                    yield f"{prefix}{name}", part is int
                    break
                if typing.get_origin(part) in (list, dict):
                    entry = typing.get_args(part)[-1]
                    if dataclasses.is_dataclass(entry):
                        yield from walk(entry, f"{prefix}{name}.*.")
                    elif entry in (int, float):
                        yield f"{prefix}{name}.*", entry is int
                    break

    return dict(walk(Config, ""))


def override(key, value):
    """`value`, as YAML, for a key of `numeric_keys`."""
    if key.startswith("rewards.functions.*."):
        return f"rewards.functions=[{{function: 'a:b', {key.rpartition('.')[2]}: {value}}}]"
    if key.startswith("data.sources.*."):
        return f"data.sources=[{{source: a, {key.rpartition('.')[2]}: {value}}}]"
    if key.startswith("optimizer.lr_groups.*."):
        return f"optimizer.lr_groups=[{{pattern: '*', {key.rpartition('.')[2]}: {value}}}]"
    if key.startswith("eval.sets.*."):
        name = key.removeprefix("eval.sets.*.")
        return f"eval.sets={{fsdp: {{{name.removesuffix('.*')}: {f'[{value}]' if '*' in name else value}}}}}"
    if key in ("sampling.forbidden_ids.*", "sampling.eos_ids.*", "data.curriculum.band.*"):
        return f"{key.removesuffix('.*')}=[{value}]"
    if key.endswith(".*"):
        return f"{key.removesuffix('.*')}={{7: {value}}}" if "bias" in key else f"{key.removesuffix('.*')}.fsdp={value}"
    return f"{key}={value}"


def test_every_number_of_the_configuration_has_a_range():
    assert set(numeric_keys()) == set(RANGES)


@pytest.mark.parametrize(
    "value", [".nan", ".inf", "-.inf", "1e308", "1e-320", str(10**30), "1:30", "1_000", "0o17", "yes", "true", "[1]"]
)
def test_a_number_that_no_device_holds_and_what_is_none_are_refused_for_every_key_by_its_name(value):
    for key, is_int in numeric_keys().items():
        given = value if value != "1e308" or is_int else "3.1e38"  # which float64 alone holds
        name = re.escape(key).replace(r"\*", r"(\d+|fsdp)")
        with pytest.raises(ValueError, match=name):
            load_config(None, [override(key, given)])


def test_no_key_without_a_sign_takes_a_negative_number():
    signed = ("weight", "penalty", "logit_bias", "curriculum.band")
    for key, is_int in numeric_keys().items():
        if not any(word in key for word in signed) and not key.startswith("mesh."):
            with pytest.raises(ValueError, match=re.escape(key).replace(r"\*", r"(\d+|fsdp)")):
                load_config(None, [override(key, "-1" if is_int else "-1.0")])


@pytest.mark.parametrize("text", ["", "grpo: {}\n", "# only a comment\n"])
def test_a_recipe_may_state_nothing(tmp_path, text):
    assert load_config(write(tmp_path, text)) == load_config(None)


def test_yaml_anchors_and_merge_keys_work(tmp_path):
    text = "data:\n  args: &shared {digits: 2}\n  eval_args:\n    <<: *shared\n    operation: add\n"
    config = load_config(write(tmp_path, text))
    assert config.data.eval_args == {"digits": 2, "operation": "add"}


# Refusals


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("grpo.stesp", "grpo.steps"),
        ("optimiser.lr", "optimizer.lr"),
        ("forgetting", None),
        ("lr", "optimizer.lr"),
        ("tokeniser.source", "tokenizer.source"),
        ("sampling.group_size", "grpo.group_size"),
        ("model.arch.hidden_sizes", "model.arch.hidden_size"),
        ("data.source.path", "data.source"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_name(tmp_path, key, nearest):
    hint = f"; did you mean {nearest!r}\\?" if nearest else ""
    with pytest.raises(ValueError, match=rf"unknown config key '{key}'{hint} \(configs/base\.yml lists every key\)"):
        load_config(None, [f"{key}=1"])
    nested = "1"
    for part in reversed(key.split(".")):
        nested = f"{{{part}: {nested}}}"
    with pytest.raises(ValueError, match=f"unknown config key '{key}'"):
        load_config(write(tmp_path, nested))


@pytest.mark.parametrize("override", ["grpo.steps", "=3", "--steps"])
def test_an_override_without_a_key_or_a_value_is_refused(override):
    with pytest.raises(ValueError, match=r"an override must look like dotted\.key=value"):
        load_config(None, [override])


@pytest.mark.parametrize("override", ["grpo=5", "mesh.rules=null", "model.arch=[]"])
def test_a_section_must_be_a_mapping(override):
    with pytest.raises(ValueError, match=r"(grpo|mesh\.rules|model\.arch) must be a mapping of keys, got"):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grpo: {steps: 1\n", "is not valid YAML"),
        ("- a\n- b\n", "must hold a mapping of keys, got list"),
        ("grpo: {steps: 1, steps: 2}\n", r"recipe\.yml, line 1: key 'steps' is given twice"),
        ("seed: 1\ngrpo: {}\nseed: 2\n", r"recipe\.yml, line 3: key 'seed' is given twice"),
        ("grpo:\n", "grpo must be a mapping of keys, got None"),
        ("grpo: {stesp: {}}\n", "unknown config key 'grpo.stesp'; did you mean 'grpo.steps'"),
        ("grpo: {steps: {}}\n", "grpo.steps: Input should be a valid integer, got {}"),
        ("grop: {}\n", "unknown config key 'grop'"),
    ],
)
def test_a_malformed_recipe_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, text))
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_config(None, ["grpo.steps={"])


def test_a_missing_recipe_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.yml', which does not exist \(working directory "):
        load_config(tmp_path / "nowhere.yml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["grpo.group_size=1"], r"grpo\.group_size must be >= 2 for a group baseline, got 1"),
        (["grpo.steps=0"], r"grpo\.steps must be >= 1, got 0"),
        (["optimizer.lr=-1e-6"], r"optimizer\.lr must be >= 0, got -1e-06"),
        (["seed=-1"], r"seed must be >= 0, got -1"),
        (["seed=4294967296"], r"seed must be <= 4294967295, got 4294967296"),
        (
            ["grpo.prompts_per_step=6", "grpo.minibatches=4"],
            r"grpo\.minibatches must divide grpo\.prompts_per_step \(6\), got 4; these fit: \[1, 2, 3, 6\]",
        ),
        (["sampling.min_completion_length=129"], r"min_completion_length must be <= .*\(128\), got 129"),
        (["sampling.top_p=0"], r"sampling\.top_p must be in \(0, 1\], got 0"),
        (["sampling.min_p=1.0"], r"sampling\.min_p must be in \[0, 1\), got 1"),
        (["sampling.repetition_penalty=0"], r"sampling\.repetition_penalty must be > 0 \(1 is off\), got 0"),
        (["sampling.frequency_penalty=.inf"], r"sampling\.frequency_penalty must be a finite"),
        (["sampling.logit_bias={-5: 1.0}"], r"sampling\.logit_bias must hold token ids >= 0, got \[-5\]"),
        (["sampling.logit_bias={a: 1.0}"], r"sampling\.logit_bias\.a.* integer"),
        (["sampling.logit_bias={5: .nan}"], r"sampling\.logit_bias\.5 must be a finite"),
        (["sampling.logit_bias={1: 2, '1': 3}"], "line 1: key '1' is given twice"),
        (["sampling.logit_bias={1: 2, '01': 3}"], r"logit_bias must name each token id once, got \['1', '01'\]"),
        (["sampling.forbidden_ids=[3, -1]"], r"sampling\.forbidden_ids\.1 must be >= 0, got -1"),
        (["optimizer.b2=1.0"], r"optimizer\.b2 must be in \[0, 1\), got 1"),
        (["optimizer.muon_momentum=-0.1"], r"optimizer\.muon_momentum must be in \[0, 1\), got -0\.1"),
        (["optimizer.eps=0"], r"optimizer\.eps must be > 0, got 0"),
        (["optimizer.muon_rms=-1.0"], r"optimizer\.muon_rms must be > 0, got -1"),
        (["optimizer.weight_decay=-0.1"], r"optimizer\.weight_decay must be >= 0, got -0\.1"),
        (["optimizer.decay_updates=0"], r"optimizer\.decay_updates must be >= 1, got 0"),
        (["optimizer.adafactor_min_dim=0"], r"optimizer\.adafactor_min_dim must be >= 1, got 0"),
        (["optimizer.final_lr_ratio=1.5"], r"optimizer\.final_lr_ratio must be in \[0, 1\], got 1\.5"),
        (
            ["optimizer.lr_groups=[{pattern: '*', lr_scale: 1}, {pattern: '*', lr_scale: -2}]"],
            r"optimizer\.lr_groups\.1\.lr_scale must be >= 0, got -2",
        ),
        (["optimizer.schedule=wsd"], r"optimizer\.decay_updates must be set with optimizer\.schedule wsd, got null"),
        (
            ["optimizer.name=adafactor", "optimizer.moment_dtype=bfloat16"],
            r"moment_dtype must be null with optimizer\.name adafactor, which keeps no first moment .*'bfloat16'",
        ),
        (
            ["optimizer.name=sgd", "optimizer.moment_dtype=bfloat16"],
            r"moment_dtype must be null with optimizer\.name sgd, .*'bfloat16'; set optimizer\.sgd_momentum",
        ),
        (
            ["optimizer.name=sgd", "optimizer.offload=true"],
            r"optimizer\.offload must be false with optimizer\.name sgd and .*, which keep no moments, got true",
        ),
        (
            ["optimizer.name=lion", "optimizer.second_moment_dtype=float32"],
            r"second_moment_dtype must be null with optimizer\.name lion, .* got 'float32'; leave it out",
        ),
        (
            ["optimizer.second_moment_dtype=bfloat16"],
            r"optimizer\.b2 must be <= 0\.984 with optimizer\.second_moment_dtype bfloat16, got 0\.999.*lower b2",
        ),
        (["rewards.timeout_seconds=0"], r"rewards\.timeout_seconds must be > 0, got 0"),
        (
            ["grpo.old_logprobs=sampler", "grpo.sampler_is_correction=true"],
            r"sampler_is_correction must be false with grpo.old_logprobs=sampler",
        ),
        (
            ["rewards.functions=[{function: 'a:b', needs_group: true, elementwise: false}]"],
            r"'a:b' must not have both needs_group: true and elementwise: false",
        ),
        (["rewards.functions=[{function: 'a:b'}, {function: 'a:b'}]"], r"must have distinct names, .* set `name`"),
        (
            ["rewards.functions=[{function: 'a:b', name: c}]", "eval.reward=d"],
            r"eval\.reward must name one of rewards\.functions \['c'\], got 'd'",
        ),
        (
            ["data.assistant_prefill=x"],
            r"data\.chat must be true with data\.assistant_prefill, .*got false and 'x'; set",
        ),
        (["data.answer_from_messages=true"], r"data\.chat must be true with data\.answer_from_messages"),
        (["data.chat_template_kwargs={a: 1}"], r"data\.chat must be true with data\.chat_template_kwargs"),
        (
            ["data.chat=true", "data.chat_template_kwargs.messages=[]"],
            r"data\.chat_template_kwargs must not hold 'messages', which each prompt gives, got \[\]; leave it out",
        ),
        (["data.eval_source=x.jsonl", "data.eval_size=5"], r"data\.eval_size must be 0 when data\.eval_source is set"),
        (["checkpoint.keep=0"], r"checkpoint\.keep must be >= 1, got 0"),
        (
            ["distributed.num_processes=2", "distributed.process_id=2"],
            r"distributed\.process_id must be < distributed\.num_processes \(2\), got 2; .* from 0",
        ),
        (
            ["distributed.coordinator_address=foo"],
            r"coordinator_address must be host:port, .* got 'foo'; .* 10\.0\.0\.1:1",
        ),
        (["distributed.coordinator_address='::1:1234'"], r"coordinator_address must be host:port, .* got '::1:1234'"),
        (["distributed.coordinator_address='a:65536'"], r"coordinator_address must be host:port, .* got 'a:65536'"),
    ],
)
def test_ranges_and_contradictions_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, overrides)


def test_a_key_without_a_usable_default_must_be_set():
    assert require("runs/a", "output_dir", "runs/my_run") == "runs/a"
    for value in (None, "", []):
        with pytest.raises(ValueError, match=r"output_dir must be set, got .*; for example output_dir=runs/my_run"):
            require(value, "output_dir", "runs/my_run")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "grpo.steps=1:30",
            r"grpo\.steps: .*valid integer, got '1:30'; write plain digits, such as 1000, without quotes",
        ),
        ("grpo.steps=1_000", r"grpo\.steps: .*got '1_000'; write plain digits"),
        ("grpo.steps=0o17", r"grpo\.steps: .*got '0o17'; write plain digits"),
        ("grpo.steps=017", r"grpo\.steps: .*got '017'; write plain digits"),
        ("optimizer.lr=1_0.5", r"optimizer\.lr: .*got '1_0\.5'; write a plain number, such as 0\.5 or 1e-6"),
        ("pure_nnx=yes", r"pure_nnx: .*got 'yes'; write true or false, without quotes"),
        ("data.args={n: !!int '1:30'}", r"override .*, line 1: a value must be of a type that JSON has, got '1:30'"),
        ("data.args={n: !!python/name:os.system x}", r"line 1: a value must be of a type that JSON has"),
        ("data.args={1.5: x}", r"line 1: a key must be text or a whole number, got '1\.5'"),
        ('data.args={x: "\\ud800"}', r"data\.args\.x must be text in Unicode"),
        (f"data.args={{x: {'9' * 50}}}", r"data\.args\.x must be a number of at most 64 bits"),
        (f"data.args={{x: {'9' * 5000}}}", r"line 1: a number must have at most 100 digits, got 5000"),
        ("data.args=" + "[" * 2000, r"line 1: values must be nested at most 50 deep"),
        ("data.args" + ".a" * 2000 + "=1", r"an override must be nested at most 50 deep"),
        ('output_dir="a\\0b"', r"output_dir must be without NUL characters, got 'a\\x00b'"),
        ('tokenizer.chat_template="a\\0b"', r"tokenizer.chat_template must be without NUL characters, got 'a\\x00b'"),
        (
            "output_dir=runs/" + "a" * 300,
            r"output_dir must have at most 255 bytes between slashes .*; name a shorter path",
        ),
        ("data.source=" + "é" * 150 + ".jsonl", r"data\.source must have at most 255 bytes between slashes"),
        ("lora.adapter=" + "a/" * 3000, r"lora\.adapter must have at most .* 4095 in all"),
        (
            "output_dir=~nobody-at-all/x",
            r"output_dir must be below a home folder that exists, got .*; write the path in",
        ),
        (f"distributed.coordinator_address={'a/' * 2000}", r"got 'a/a/.*\(4002 characters\); for example"),
        ("x" * 100_000 + "=1", r"unknown config key 'xxx.*\(100002 characters\)"),
    ],
)
def test_text_that_yaml_1_2_does_not_take_for_a_number_and_values_beyond_every_bound_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, [override])


def test_scalars_are_those_of_yaml_1_2():
    config = load_config(
        None, ["data.args={a: 1:30, b: yes, c: 2024-01-01, d: 1e3, e: 0x1F, f: ~, g: 017, h: .5, i: <<}"]
    )
    expected = {
        "a": "1:30",
        "b": "yes",
        "c": "2024-01-01",
        "d": 1e3,
        "e": 31,
        "f": None,
        "g": "017",
        "h": 0.5,
        "i": "<<",
    }
    assert config.data.args == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {args: &a {x: *a}}", r"recipe\.yml, line 1: the alias \*a must not stand within what it stands for"),
        ("a: &a {x: 1}\nb: &a {y: 1}", r"line 2: the anchor &a is given twice"),
        ("a: *b", r"line 1: the alias \*b must stand for an anchor above it"),
        ("\n".join("- " * depth + "x" for depth in (60,)), r"line 1: values must be nested at most 50 deep"),
        (
            "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)),
            r"line \d+: there must be at most 500,000 values, aliases counted in full",
        ),
        ("a: 1\n--- \nb: 1", r"line 2: there must be one document, got a second one"),
        ('a: "\\UFFFFFFFF"', r"is not valid YAML"),
        ("a: \x07", r"is not valid YAML: character 4: special characters"),
        ("<<: 3\n", r"line 1: the merge key << must stand before a mapping"),
        ("#" * 4_000_001, r"recipe\.yml must have at most 4,000,000 characters, got 4,000,001"),
        ("inherit: " + "a" * 300 + ".yml", r"recipe\.yml: inherit must have at most 255 bytes"),
        ("1: 2", "unknown config key '1'"),
    ],
)
def test_a_recipe_that_is_a_trap_is_refused_with_file_and_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, text))


def test_a_recipe_that_cannot_be_read_or_inherits_without_end_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a config must have at most 255 bytes between slashes"):
        load_config("a" * 300)
    for number in range(60):
        write(tmp_path, f"inherit: r{number + 1}.yml\n", f"r{number}.yml")
    with pytest.raises(ValueError, match=r"config files must inherit over at most 50 others"):
        load_config(tmp_path / "r0.yml")


def test_a_token_id_is_one_key_however_a_layer_writes_it(tmp_path):
    path = write(tmp_path, "sampling: {logit_bias: {1: 2, 5: 1}}\n")
    assert load_config(path, ["sampling.logit_bias.1=3"]).sampling.logit_bias == {1: 3.0, 5: 1.0}


def test_a_home_folder_is_meant_where_a_run_folder_begins_with_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/someone")
    assert load_config(None, ["output_dir=~/runs/a"]).output_dir == "/home/of/someone/runs/a"


# Round trip and identity of a run


def test_the_name_of_a_reward_function_alone_is_an_entry(tmp_path):
    recipe = write(tmp_path, "rewards: {functions: [a:b, {function: 'c.py:d', weight: 2.0}]}\n")
    entries = "rewards.functions=[{function: 'a:b'}, {function: 'c.py:d', weight: 2.0}]"
    assert load_config(recipe) == load_config(None, [entries])
    with pytest.raises(ValueError, match=r"rewards\.functions\.0: .* got 1"):
        load_config(None, ["rewards.functions=[1]"])


def test_a_dumped_configuration_reads_back_equal(tmp_path):
    overrides = [
        "grpo.preset=gspo",
        "grpo.beta=0.1",
        "optimizer.lr=2.5e-7",
        'sampling.stop_strings=["1e5", "\\n", "null", "0x1", "caf\\u00e9: #", ".5", "yes"]',
        "data.args={name: '1e-6', list: [1, 2.5, null, true], nested: {a: '007'}}",
        'data.args.texts=["+.5", 017, 0o17, 1:30, 2024-01-01, "<<", "=", "\\0\\x85\\u2028", "5.", "0x1"]',
        "data.columns.answer=null",
        "rewards.functions=[{function: 'a:b', weight: 0.0, kwargs: {limit: 3}}]",
        "sampling.eos_ids=[1, 2]",
        "sampling.logit_bias={7: -100, 12: 2.5}",
        "model.arch.vocab_size=77",
    ]
    config = load_config(None, overrides)
    assert config.data.args["name"] == "1e-6"
    path = write(tmp_path, dump_config(config), "config.yml")
    assert load_config(path) == config
    assert load_config(path, ["grpo.steps=3"]).grpo == dataclasses.replace(config.grpo, steps=3)


def test_two_runs_are_the_same_when_only_what_changes_no_step_differs():
    old = load_config(None, ["output_dir=a"])
    new = load_config(
        None,
        [
            "output_dir=b",
            "pure_nnx=false",
            "grpo.steps=500",
            "checkpoint.every=3",
            "eval.every=0",
            "mesh.data=2",
            "mesh.rules.embed=[]",
            "logging.samples_per_step=9",
            "grpo.max_tokens_per_microbatch=77",
        ],
    )
    assert differences(old, old) == {}
    assert differences(old, new) == {}


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimizer.lr=2e-6", "optimizer.lr"),
        ("seed=1", "seed"),
        ("data.args.digits=3", "data.args"),
        ("data.eval_size=3", "data.eval_size"),
        ("grpo.beta=0.1", "grpo.beta"),
        ("grpo.epochs=2", "grpo.epochs"),
        ("rewards.functions=[{function: 'a:b'}]", "rewards.functions"),
        ("sampling.temperature=0.5", "sampling.temperature"),
        ("model.dtype=bfloat16", "model.dtype"),
        ("model.arch.num_layers=3", "model.arch.num_layers"),
    ],
)
def test_what_decides_a_step_makes_another_run(override, key):
    old, new = load_config(None), load_config(None, [override])
    assert list(differences(old, new)) == [key]
    assert differences(old, new)[key] != differences(new, old)[key]


def test_the_number_of_steps_belongs_to_the_run_where_the_learning_rate_falls_towards_the_last():
    for schedule, expected in (("constant", {}), ("linear", {"grpo.steps": (100, 200)})):
        old = load_config(None, [f"optimizer.schedule={schedule}"])
        assert differences(old, load_config(None, [f"optimizer.schedule={schedule}", "grpo.steps=200"])) == expected


def test_who_computes_together_changes_no_program():
    keys = ["coordinator_address=10.0.0.1:1234", "num_processes=2", "process_id=1", "heartbeat_timeout_seconds=30"]
    named = load_config(None, [f"distributed.{key}" for key in keys])
    assert program_keys(named) == program_keys(load_config(None))
    assert program_keys(load_config(None, ["seed=1"])) != program_keys(load_config(None))


def test_a_config_cannot_be_changed_in_place():
    config = load_config(None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.grpo.steps = 3


def test_a_number_on_the_command_line_names_an_entry_of_a_list(tmp_path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("rewards: {functions: [{function: 'a.py:f', kwargs: {x: {y: 1, z: 2}}}, 'b.py:g']}\n")
    first, second = load_config(
        recipe, ["rewards.functions.0.kwargs.x.y=3", "rewards.functions.1.weight=2"]
    ).rewards.functions
    assert (first.function, first.kwargs) == ("a.py:f", {"x": {"y": 3, "z": 2}})
    assert (second.function, second.weight) == ("b.py:g", 2.0)
    for override, message in (
        ("rewards.functions.2.weight=2", r"rewards\.functions\.2 must be the number of an entry .* which has 2; give"),
        ("rewards.functions.first.weight=2", r"functions\.first must be the number of an entry"),
        ("data.sources.0.weight=2", r"data\.sources\.0 must be the number of an entry .* which has 0"),
        ("rewards.functions.0.wieght=2", r"unknown config key 'rewards\.functions\.0\.wieght'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(recipe, [override])
