"""Sources that are read block by block: their rows, their order, and what cannot be streamed."""

import json
import shutil

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from rl.config.load import load_config
from rl.data.blocks import open_blocks
from rl.data.order import order_of
from rl.data.prompts import load_pairs, load_prompts
from rl.data.sources import load_rows
from rl.data.stream import STRIDE
from rl.data.tokenizer import load_tokenizer
from rl.grpo_trainer import train
from rl.run.metrics import read_metrics, read_samples
from tests.helpers.metric_lines import steady
from tests.helpers.places import REWARDS

COLUMNS = {"prompt": "prompt", "answer": "answer"}
ROWS = [{"prompt": f"{n}+7=", "answer": f"00{n + 7}", "note": "a\nb" if n % 3 else None} for n in range(23)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("byte")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stream(tokenizer, source, *overrides):
    config = load_config(None, [f"data.source={source}", "data.streaming=true", "grpo.prompts_per_step=3", *overrides])
    data = load_prompts(config, tokenizer)
    return data, order_of(config.data, data, config.seed, config.grpo.prompts_per_step)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ROWS in every kind of file that can be streamed."""
    path = tmp_path_factory.mktemp("stream")
    write(path / "q.jsonl", ROWS)
    lines = (path / "q.jsonl").read_text().splitlines()
    (path / "q.jsonl").write_text("\n  \n".join(lines[:5]) + "\n" + "\n".join(lines[5:]))  # blank lines are no rows
    write(path / "lines.json", ROWS)
    for name, mark in (("q.csv", ","), ("q.tsv", "\t")):
        cells = [[f'"{cell}"' if cell else "" for cell in row.values()] for row in ROWS]
        (path / name).write_bytes(
            b"\xef\xbb\xbf" + "\r\n".join(mark.join(row) for row in [list(ROWS[0]), *cells]).encode()
        )
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, path / "q.parquet", row_group_size=4)
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path / "saved"))
    (path / "parts").mkdir()
    for number, (start, end) in enumerate(((0, 3), (3, 3), (3, 14), (14, 23))):
        write(path / "parts" / f"{number}.jsonl", ROWS[start:end])
    return path


KINDS = [
    "q.jsonl",
    "lines.json",
    "q.csv",
    "q.tsv",
    "q.parquet",
    "saved",
    "saved/data-00000-of-00001.arrow",
    "parts/*.jsonl",
]


@pytest.mark.parametrize("name", KINDS)
def test_blocks_of_every_kind_of_file_are_its_rows_with_their_places(folder, tmp_path, monkeypatch, name):
    monkeypatch.setattr("rl.data.blocks._STRIDE", 4)
    args = {"cache_dir": str(tmp_path)} if name.endswith(".arrow") else {}
    for source, rows in ((f"{folder / name}", ROWS), (f"{folder / name}[2:9]", ROWS[2:9])):
        if "*" in name and rows != ROWS:
            continue  # each file is cut by itself
        for size in (1, 5, 23, 100):
            blocks = open_blocks(source, args, 0, size)
            read = [blocks.read(number) for number in range(blocks.num_blocks)]
            assert [row for block in read for row in block.rows] == rows
            assert {len(block.rows) for block in read[:-1]} <= {size}
        places = [block.where(index) for block in read for index in range(len(block.rows))]
        if "*" not in name:
            assert places == [
                f"{str(folder / name)!r} row {n}" for n in range(ROWS.index(rows[0]), len(rows) + ROWS.index(rows[0]))
            ]
        else:
            assert (places[2][-14:], places[3][-14:]) == ("0.jsonl' row 2", "2.jsonl' row 0")


def test_another_file_has_another_hash(folder, tmp_path):
    hashes = {open_blocks(str(folder / name), {}, 0, 5).content for name in KINDS if "arrow" not in name}
    assert len(hashes) == len(KINDS) - 1
    path = write(tmp_path / "q.jsonl", ROWS)
    before = open_blocks(path, {}, 0, 5).content
    write(tmp_path / "q.jsonl", [{**ROWS[0], "answer": "008"}, *ROWS[1:]])
    assert open_blocks(path, {}, 0, 5).content != before


def test_an_epoch_has_each_row_once_block_after_block_and_each_epoch_another_order(tokenizer, folder):
    data, order = stream(tokenizer, folder / "q.jsonl", "data.block_size=10")
    assert [row.prompt for row in data.train] == [row["prompt"] for row in ROWS[:10]]
    numbers, position = order.take(0, 23)
    asked = [data.rows[number].prompt for number in numbers]
    places = [[row["prompt"] for row in ROWS].index(prompt) for prompt in asked]
    assert [sorted(places[a:b]) for a, b in ((0, 10), (10, 20), (20, 23))] == [
        [*range(10)],
        [*range(10, 20)],
        [20, 21, 22],
    ]
    assert places[:10] != sorted(places[:10])
    assert position == 2 * STRIDE + 3
    assert order.epochs(position) == 1
    following, _ = order.take(position, 23)
    assert sorted(following) == sorted(numbers) != following != numbers
    assert [order.epochs(place) for place in (0, 5, STRIDE, 2 * STRIDE, 3 * STRIDE + 10)] == pytest.approx(
        [0, 0.5 / 3, 1 / 3, 2 / 3, 4 / 3]
    )


def test_steps_of_any_size_go_on_at_a_position_and_none_has_a_row_twice(tokenizer, folder):
    _, order = stream(tokenizer, folder / "q.csv", "data.block_size=7", "seed=5")
    whole, _ = order.take(0, 23)
    _, fresh = stream(tokenizer, folder / "q.csv", "data.block_size=7", "seed=5")
    position, found = order.take(0, 5)[1], list(whole[:5])
    while len(found) < 23:
        rows, position = fresh.laid_out_for(4).take(position, min(4, 23 - len(found)))
        found += rows
    assert found == whole
    border, _ = order.take(order.take(0, 20)[1], 23)
    assert len(set(border)) == 23
    passed_over, _ = order.take(0, 3, taken=whole[:2])
    assert passed_over == whole[2:5]
    assert order.take(0, 9, taken=whole[:20])[0] == whole[20:]  # fewer where there are no others
    assert stream(tokenizer, folder / "q.csv", "data.block_size=7", "seed=6")[1].take(0, 3)[0] != whole[:3]


def test_no_more_than_two_blocks_and_the_first_are_in_memory(tokenizer, folder):
    data, order = stream(tokenizer, folder / "q.parquet", "data.block_size=3")
    assert data.stream is not None
    order.take(0, 23)
    assert len(data.stream._kept) == 2
    assert sorted(data.stream.counts) == list(range(8))


PREPARE = """
def twice(row):
    return [row, {**row, "prompt": row["prompt"] + "!"}] if row["answer"] != "0010" else None
"""


def test_filters_functions_and_held_out_rows_work_block_by_block(tokenizer, folder, tmp_path):
    (tmp_path / "prepare.py").write_text(PREPARE)
    held_out = write(tmp_path / "e.jsonl", [ROWS[4], ROWS[15]])
    data, order = stream(
        tokenizer,
        folder / "q.jsonl",
        *("data.block_size=10", f"data.prepare={tmp_path}/prepare.py:twice", "data.max_prompt_length=6"),
        f"data.eval_source={held_out}",
    )
    whole = load_prompts(
        load_config(
            None,
            [
                *(f"data.source={folder / 'q.jsonl'}", f"data.prepare={tmp_path}/prepare.py:twice"),
                *("data.max_prompt_length=6", f"data.eval_source={held_out}"),
            ],
        ),
        tokenizer,
    )
    numbers, _ = order.take(0, len(whole.train))
    assert sorted(data.rows[number].prompt for number in numbers) == sorted(row.prompt for row in whole.train)
    assert "15+7=" not in {row.prompt for row in whole.train} > {"9+7=!", "22+7="}
    assert data.stream is not None
    said = [*data.messages, *data.stream.take_messages()]
    assert "block 1 of 3: removed 2 of 18 training rows whose question is held out in data.eval_source" in said
    assert any(message.startswith("block 2 of 3: dropped 10 of 20 prompts") for message in said)


def test_a_share_of_a_stream_is_held_out_from_its_first_block_and_trained_on_in_none(tokenizer, folder):
    data, order = stream(tokenizer, folder / "q.tsv", "data.block_size=12", "data.eval_share=0.3")
    whole = load_prompts(load_config(None, [f"data.source={folder / 'q.tsv'}", "data.eval_share=0.3"]), tokenizer)
    never = {row.prompt for row in whole.held_out}
    assert {row.prompt for row in data.held_out} == never & {row["prompt"] for row in ROWS[:12]}
    asked = {data.rows[number].prompt for number in order.take(0, len(whole.train))[0]}
    assert asked == {row.prompt for row in whole.train}


def test_the_identity_of_a_stream_is_its_bytes_its_blocks_and_its_prompts(tokenizer, folder):
    def identity(*overrides):
        return stream(tokenizer, folder / "q.jsonl", *overrides)[0].fingerprint()

    assert identity() == identity()
    assert identity()["rows"] == 23
    others = [identity(f"data.{change}") for change in ("block_size=5", "system_prompt=x", "columns={gold: answer}")]
    assert len({entry["hash"] for entry in [identity(), *others]}) == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.sources=[a.jsonl]", "data.source=null"], r"data\.sources must be left out .*mix the sources into one"),
        (["data.eval_size=3"], r"data\.eval_size must be left out .*got 3; data\.eval_share or data\.eval_source"),
        (["data.remove_duplicates=true"], r"data\.remove_duplicates must be left out with data\.streaming"),
        (["data.curriculum.by=pass_rate"], r"data\.curriculum\.by must be left out .*so sort it"),
        (["data.block_size=2"], r"data\.block_size must be >= grpo\.prompts_per_step \(3\), got 2; raise it"),
        (["data.source=arithmetic"], r"data\.streaming must be false for questions made by a program.*'arithmetic'"),
    ],
)  # fmt: skip
def test_what_needs_all_rows_is_refused_by_name(tokenizer, folder, overrides, message):
    with pytest.raises(ValueError, match=message):
        stream(tokenizer, folder / "q.jsonl", *overrides)


def test_supervised_fine_tuning_and_one_json_value_are_not_streamed(tokenizer, folder, tmp_path):
    with pytest.raises(ValueError, match=r"data\.streaming must be false for supervised fine-tuning"):
        load_pairs(load_config(None, [f"data.source={folder / 'q.jsonl'}", "data.streaming=true"]), tokenizer)
    (tmp_path / "list.json").write_text(json.dumps(ROWS))
    with pytest.raises(ValueError, match=r"list\.json must hold a row a line for data\.streaming, got one JSON value"):
        stream(tokenizer, tmp_path / "list.json")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"must hold at least one row, got an empty data set"):
        stream(tokenizer, tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"nothing\.csv', which does not exist"):
        stream(tokenizer, tmp_path / "nothing.csv")


def test_what_is_wrong_in_a_later_block_is_named_with_its_place(tokenizer, tmp_path):
    path = tmp_path / "q.jsonl"
    write(path, ROWS)
    text = path.read_text().splitlines()
    path.write_text("\n".join([*text[:14], "{oops", *text[15:]]))
    _, order = stream(tokenizer, path, "data.block_size=10")
    with pytest.raises(ValueError, match=r"q\.jsonl:15 must be one JSON object, got b'\{oops"):
        order.take(0, 12)
    for row, message in (
        ({"prompt": "x"}, r"q\.jsonl' row 14: column 'answer' must have a value, got null"),
        ({"prompt": 7, "answer": "1"}, r"data\.source '.*q\.jsonl' row 14: the prompt must be text .*got 7"),
    ):
        write(path, [*ROWS[:14], row, *ROWS[15:]])
        _, order = stream(tokenizer, path, "data.block_size=10")
        with pytest.raises(ValueError, match=message):
            order.take(0, 12)
    csv = tmp_path / "q.csv"
    csv.write_text("prompt,answer\n" + "a,1\n" * 14 + "b\n")
    with pytest.raises(ValueError, match=r"q\.csv:16 must have 2 cells"):
        stream(tokenizer, csv, "data.block_size=10")  # counting its rows reads the whole file
    write(path, ROWS)
    _, order = stream(tokenizer, path, "data.block_size=10")
    write(path, ROWS[:15])
    with pytest.raises(ValueError, match=r"q\.jsonl must not change while a run reads it, got 5 rows where 10 were"):
        order.take(0, 12)


def test_a_block_without_a_row_to_train_on_is_passed_over_and_new_columns_are_told(tokenizer, tmp_path):
    rows = [{"prompt": f"{n}?", "answer": "1"} for n in range(9)]
    rows[3:6] = [{"prompt": "much too long", "answer": "1"}] * 3
    rows[7]["hint"] = "x"
    data, order = stream(tokenizer, write(tmp_path / "q.jsonl", rows), "data.block_size=3", "data.max_prompt_length=5")
    numbers, _ = order.take(0, 6)
    assert {data.rows[number].prompt for number in numbers} == {f"{n}?" for n in (0, 1, 2, 6, 7, 8)}
    assert data.stream is not None
    said = data.stream.take_messages()
    assert "block 2 of 3: dropped 3 of 3 prompts of data.source longer than data.max_prompt_length=5 tokens" in said
    assert any("block 3 of 3: columns ['hint'] are not in the first block" in message for message in said)
    with pytest.raises(ValueError, match=r"prompts_per_step must be <= .*got 7 for 6 rows that are not left out"):
        order.take(0, 7)
    assert data.stream.take_messages() == []  # said once, not in every epoch


def test_the_rows_are_those_of_a_source_in_memory(tokenizer, folder):
    data, order = stream(tokenizer, folder / "q.csv", "data.block_size=8")
    whole = load_prompts(load_config(None, [f"data.source={folder / 'q.csv'}"]), tokenizer)
    found = {data.rows[number].prompt: data.rows[number] for number in order.take(0, 23)[0]}
    for row in whole.train:
        own = found[row.prompt]
        assert (own.columns, own.where, own.prompt_ids.tolist()) == (row.columns, row.where, row.prompt_ids.tolist())
    assert load_rows(str(folder / "q.csv"), {}, COLUMNS, 0) == ROWS


# Whole runs

RECIPE = f"""
model:
  arch:
    {{family: qwen2, hidden_size: 16, intermediate_size: 32, num_layers: 1,
     num_heads: 2, num_kv_heads: 1, head_dim: 8}}
data: {{streaming: true, block_size: 5, max_prompt_length: 6}}
rewards: {{functions: [{{function: "{REWARDS}:digit_share", name: digits}}]}}
sampling: {{max_completion_length: 4, slots: 8}}
grpo: {{steps: 5, prompts_per_step: 3, group_size: 2, max_tokens_per_microbatch: 64}}
eval: {{every: 0}}
checkpoint: {{every: 1}}
logging: {{samples_per_step: 6}}
mesh: {{num_devices: 1}}
"""


@pytest.mark.slow
def test_a_run_on_a_stream_goes_on_as_one_that_never_stopped_in_either_flavour(folder, tmp_path, capsys):
    (tmp_path / "recipe.yml").write_text(RECIPE)
    source = shutil.copy(folder / "q.csv", tmp_path)

    def run(name, *overrides):
        overrides = [f"output_dir={tmp_path / name}", f"data.source={source}", *overrides]
        return train(load_config(tmp_path / "recipe.yml", overrides))

    def asked(path):
        found = {}
        for sample in read_samples(path):
            found.setdefault(sample["step"], {})[sample["prompt"]] = None
        return [[*found[step]] for step in sorted(found)]

    whole = run("whole")
    assert len({prompt for step in asked(whole) for prompt in step}) == 15  # of the first three blocks
    assert "23 rows in 5 blocks to train" in capsys.readouterr().out
    shutil.copytree(run("parts", "grpo.steps=2", "pure_nnx=false"), tmp_path / "other")
    parts = run("parts")
    lines = [[steady(line) for line in read_metrics(path)] for path in (whole, parts)]
    assert lines[0] == lines[1]
    assert read_samples(whole) == read_samples(parts)
    # Steps of another size take the next rows at their place.
    steps = asked(run("other", "grpo.steps=4", "grpo.prompts_per_step=4"))
    assert [len(step) for step in steps] == [3, 3, 4, 4]
    assert [prompt for step in steps for prompt in step] == [prompt for step in asked(whole) for prompt in step][:14]
    with open(source, "a") as file:
        file.write("\r\n99+7=,106,x")
    with pytest.raises(ValueError, match=r"the data of the run in .* was \{'rows': 23, .*it is now \{'rows': 24"):
        run("other", "grpo.steps=6", "grpo.prompts_per_step=4")
