"""Functions that prepare rows, filters, overlaps with held-out rows, and mixtures with their order."""

import collections
import json

import numpy as np
import pytest

from rl.config.load import load_config
from rl.config.user_files import prepare_hashes
from rl.data.order import Order, draws_per_epoch, order_of
from rl.data.overlap import find_overlaps
from rl.data.prompts import load_pairs, load_prompts
from rl.data.tokenizer import load_tokenizer
from rl.run_folder.trust import TO_EVALUATE, TO_REPLAY, TO_SAMPLE, TO_TRAIN, code_of

PREPARE = """
def tidy(row):
    if row["level"] == 0:
        return None
    if row["level"] == 2:
        return [{"prompt": row["q"] + s, "answer": row["a"]} for s in "!?"]
    return {"prompt": row["q"], "answer": row["a"]}

def broken(row):
    return {"prompt": row["question"]}

def odd(row):
    return "text"

def strange(row):
    return {"prompt": {1, 2}}

def nothing(row):
    return None

def leaves(row):
    raise SystemExit(0)

def deep(row):
    lists = []
    for _ in range(500):
        lists = [lists]
    return {"prompt": "x", "lists": lists}
"""


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("byte")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(tokenizer, *overrides):
    return load_prompts(load_config(None, overrides), tokenizer)


# Preparing and filters


@pytest.fixture
def raw(tmp_path):
    (tmp_path / "prepare.py").write_text(PREPARE)
    return write(tmp_path / "q.jsonl", [{"q": f"q{n}", "a": str(n), "level": n % 3} for n in range(7)])


def test_a_function_makes_a_row_rows_or_none_of_each_row(tokenizer, tmp_path, raw):
    data = load(tokenizer, f"data.source={raw}", f"data.prepare={tmp_path}/prepare.py:tidy")
    assert [row.prompt for row in data.train] == ["q1", "q2!", "q2?", "q4", "q5!", "q5?"]
    assert [row.columns for row in data.train][:2] == [{"answer": "1"}, {"answer": "2"}]
    assert [row.where.rpartition(" ")[2] for row in data.train] == ["1", "2", "2", "4", "5", "5"]  # of the file


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", r"prepare\.py:broken failed on '.*q\.jsonl' row 0: KeyError: 'question'; the row is"),
        ("odd", r"prepare\.py:odd must return a dict of columns, a list of them or None, got 'text' for .* row 0"),
        ("strange", r"must return values of JSON, which reward functions get, got"),
        ("nothing", r"must leave a row, got none of 7"),
        ("leaves", r"prepare\.py:leaves failed on '.*q\.jsonl' row 0: SystemExit: 0; the row is"),
        ("deep", r"prepare\.py:deep must return rows at most 100 lists and objects deep, got 502 for .* row 0"),
        ("tdy", r"data\.prepare: .* has no attribute 'tdy'; did you mean 'tidy'"),
    ],
)
def test_a_function_that_fails_is_named_with_the_row(tokenizer, tmp_path, raw, name, message):
    with pytest.raises(ValueError, match=message):
        load(tokenizer, f"data.source={raw}", f"data.prepare={tmp_path}/prepare.py:{name}")


def test_the_file_of_a_function_is_code_of_the_run_and_part_of_its_identity(tmp_path, raw):
    name = f"{tmp_path}/prepare.py:tidy"
    config = load_config(None, [f'data.sources=[{{source: {raw}, prepare: "{name}"}}]'])
    (code,) = code_of(config)
    assert (code.key, code.name, code.file) == ("data.sources.0.prepare", name, tmp_path / "prepare.py")
    assert [code.kind in kinds for kinds in (TO_TRAIN, TO_EVALUATE, TO_REPLAY, TO_SAMPLE)] == [True, True, True, False]
    before = prepare_hashes(config)
    (tmp_path / "prepare.py").write_text(PREPARE + "\n")
    assert before.keys() == prepare_hashes(config).keys() == {"file of data.sources.0.prepare"}
    assert before != prepare_hashes(config)
    with pytest.raises(ValueError, match=r"data\.prepare must be path/to/file\.py:function, got 'module:function'"):
        load_config(None, ["data.prepare=module:function"])


def test_filters_leave_rows_out_and_count_them(tokenizer, tmp_path):
    answers = ["1", " ", None, "2", "3", "4"]
    prompts = ["a?", "b?", "c?", "A ?", "a?", " A? "]
    path = write(tmp_path / "x.jsonl", [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)])
    data = load(tokenizer, f"data.source={path}", "data.remove_empty_answers=true", "data.remove_duplicates=true")
    assert [(row.prompt, row.where[-5:]) for row in data.train] == [("a?", "row 0"), ("A ?", "row 3")]
    example = f"data.source '{path}' row 4 is that of data.source '{path}' row 0"
    assert data.messages == [
        "removed 2 of 6 rows of data.source without an answer",
        f"removed 2 of 4 rows of data.source whose question a row before them has: {example}",
    ]
    assert data.num_rows == 2
    with pytest.raises(ValueError, match=r"row 2: column 'answer' must have a value, got null"):
        load(tokenizer, f"data.source={path}")


LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def test_thirteen_words_in_a_row_are_an_overlap_unless_they_are_a_phrase_of_the_task():
    train = [
        f"Say: {LONG}!",
        "One two three four five six seven eight nine ten eleven twelve",
        LONG.replace("seven", "7"),
    ]
    (overlap,) = find_overlaps(train, ["x", f"({LONG.upper()}), again"])
    assert (overlap.train, overlap.held_out) == (0, 1)
    assert overlap.passage == LONG.rpartition(" ")[0]
    assert len(find_overlaps([f"{LONG} {n}" for n in range(10)], [LONG])) == 10
    assert find_overlaps([f"{LONG} {n}" for n in range(11)], [LONG]) == []


def test_overlaps_with_held_out_rows_are_named_or_removed(tokenizer, tmp_path):
    train = write(
        tmp_path / "t.jsonl",
        [{"prompt": f"{LONG} {n}", "answer": "1"} for n in "ab"] + [{"prompt": "c", "answer": "1"}],
    )
    held_out = write(tmp_path / "e.jsonl", [{"prompt": f"{LONG} z", "answer": "1"}])
    overrides = [f"data.source={train}", f"data.eval_source={held_out}"]
    named = load(tokenizer, *overrides)
    assert len(named.train) == 3
    (message,) = named.messages
    assert message.startswith(
        f"kept 2 of 3 training rows that share 13 words in a row with a held-out row, such as data.source '{train}' "
        f"row 0 with data.eval_source '{held_out}' row 0: 'one two three"
    )
    assert message.endswith("data.remove_overlap=true leaves them out")
    assert [row.prompt for row in load(tokenizer, *overrides, "data.remove_overlap=true").train] == ["c"]


# Mixtures


def sources(tmp_path, *entries, sizes=(30, 12)):
    paths = [
        write(tmp_path / f"{name}.jsonl", [{"q": f"{name}{n}", "answer": str(n)} for n in range(size)])
        for name, size in zip("ab", sizes, strict=False)
    ]
    texts = [
        f"{{source: {path}, name: {name}, {entry}}}" for path, name, entry in zip(paths, "ab", entries, strict=True)
    ]
    return [f"data.sources=[{', '.join(texts)}]", "data.columns={prompt: q}"]


def test_sources_of_a_mixture_have_columns_prompts_and_held_out_rows_of_their_own(tokenizer, tmp_path):
    data = load(
        tokenizer,
        *sources(tmp_path, "eval_size: 5, system_prompt: 'Hi '", "columns: {prompt: q, gold: answer}"),
    )
    assert list(data.sizes) == [25, 12]
    assert [row.source for row in data.train] == [0] * 25 + [1] * 12
    assert {row.prompt[:4] for row in data.train[:25]} == {"Hi a"}
    assert {row.columns["data_source"] for row in data.held_out} == {"a"}
    assert len(data.held_out) == 5
    assert data.train[25].columns == {"gold": "0", "data_source": "b"}
    assert data.train[25].where == f"data.sources 'b' '{tmp_path}/b.jsonl' row 0"


def test_sources_share_the_share_of_held_out_questions_or_have_their_own(tokenizer, tmp_path):
    data = load(tokenizer, *sources(tmp_path, "", "eval_share: 0"), "data.eval_share=0.3")
    assert {row.source for row in data.held_out} == {0}
    alone = load(tokenizer, f"data.source={tmp_path}/a.jsonl", "data.columns={prompt: q}", "data.eval_share=0.3")
    assert [row.prompt for row in alone.held_out] == [row.prompt for row in data.held_out]
    with pytest.raises(
        ValueError, match=r"data\.sources\.0: rows are held out by eval_size or by eval_share, got 2 and"
    ):
        load(tokenizer, *sources(tmp_path, "eval_size: 2", ""), "data.eval_share=0.3")
    with pytest.raises(ValueError, match=r"data\.sources\.1\.eval_share must hold out some of 12 .*got 1e-09"):
        load(tokenizer, *sources(tmp_path, "", "eval_share: 1e-9"))


def test_sources_without_shares_are_one_list_in_the_order_of_one_source(tokenizer, tmp_path):
    config = load_config(None, sources(tmp_path, "", ""))
    data = load_prompts(config, tokenizer)
    assert order_of(config.data, data, 3, 8).take(5, 20) == Order([42], 3, 8).take(5, 20)


@pytest.mark.parametrize(
    ("entries", "more", "draws"),
    [
        (("weight: 3", "weight: 1"), [], [32, 10]),
        (("count: 7", "count: 90"), [], [7, 90]),
        (("", ""), ["data.mixture_temperature=1"], [30, 12]),
        (("", ""), ["data.mixture_temperature=1e6"], [21, 21]),
        (("", ""), ["data.mixture_temperature=1e-3"], [42, 1]),
    ],
)
def test_an_epoch_has_the_draws_that_weights_counts_or_a_temperature_give(tmp_path, entries, more, draws):
    config = load_config(None, [*sources(tmp_path, *entries), *more])
    assert draws_per_epoch(config.data, [30, 12]) == draws


@pytest.mark.parametrize(
    ("sizes", "draws", "prompts"), [((30, 12), (32, 10), 8), ((16, 5, 100), (40, 3, 90), 8), ((9, 200), (10, 50), 4)]
)
def test_the_order_of_a_mixture_is_even_and_no_step_has_a_row_twice(sizes, draws, prompts):
    order = Order(sizes, 3, prompts, draws)
    length = sum(draws)
    assert order.epoch_length == length
    borders = np.cumsum(sizes)
    rows = np.concatenate([order.step(step) for step in range(12 * length // prompts)])
    for step in range(len(rows) // prompts):
        assert len(set(rows[step * prompts :][:prompts])) == prompts
    for epoch in range(10):  # exact shares in each epoch, and nearly so in each part of it
        of_source = np.searchsorted(borders, rows[epoch * length :][:length], side="right")
        assert np.bincount(of_source, minlength=len(sizes)).tolist() == list(draws)
        for k, count in enumerate(draws):
            assert abs((of_source[: length // 2] == k).sum() - count / 2) <= 2 + len(sizes)
    for k, size in enumerate(sizes):  # all rows of a source are drawn equally often, up to one
        counts = collections.Counter(int(row) for row in rows if np.searchsorted(borders, row, side="right") == k)
        assert len(counts) == min(size, sum(counts.values()))
        assert max(counts.values()) - min(counts.values()) <= 1
    assert not np.array_equal(rows[:length], rows[length : 2 * length])
    # A position alone says how the order goes on, whatever was asked before.
    fresh = Order(sizes, 3, prompts, draws)
    assert fresh.take(5 * prompts, 3)[0] == order.step(5)[:3]
    assert Order(sizes, 4, prompts, draws).step(0) != order.step(0)
    chosen, position = fresh.take(0, 3, taken=order.step(0)[:2])
    assert (chosen[0], position >= 5) == (order.step(0)[2], True)


@pytest.mark.parametrize("draws", [None, (40, 20)])
def test_steps_of_another_size_go_on_in_the_order_that_the_run_began_with(draws):
    begun = Order((40, 20), 3, 8, draws)
    _, position = begun.take(0, 24)
    goes_on, rows = Order((40, 20), 3, 6, draws).laid_out_for(8), []
    while position < 60:
        chosen, position = goes_on.take(position, 6)
        assert len(set(chosen)) == 6
        rows += chosen
    assert rows == begun.take(24, 36)[0]
    assert sorted([*begun.take(0, 24)[0], *rows]) == list(range(60))  # the epoch under way has each row once


def test_the_order_of_a_mixture_is_pinned():
    # Spelled out: a run resumed under another version of numpy or of this code must go on with the same rows.
    order = Order((10, 5), 0, 4, (6, 6))
    assert [order.step(step) for step in (0, 1, 1000)] == [
        [4, 12, 7, 13],
        [11, 8, 14, 6],
        [2, 12, 13, 9],
    ]


def test_shares_that_contradict_each_other_or_the_rows_are_refused(tokenizer, tmp_path):
    for entries, more, message in (
        (("weight: 1", ""), [], r"in one way, .*got \{'weight': 1\} for 2 sources"),
        (("weight: 1", "count: 2"), [], r"got \{'weight': 1, 'count': 1\}"),
        (("weight: 1", "weight: 1"), ["data.mixture_temperature=2"], r"or data\.mixture_temperature, got"),
        (("", ""), ["data.source=arithmetic"], r"data\.source must be left out with data\.sources, got 'arithmetic'"),
        (("", ""), ["data.eval_size=3"], r"data\.eval_size must be left out .*its own eval_size"),
        (("", "system_promt: x"), [], r"system_promt'?; an entry of data\.sources has \['source', 'name'"),
        (("", "weight: 0"), [], r"data\.sources\.1\.weight must be > 0, got 0"),
        (("", "assistant_prefill: x"), [], r"data\.chat must be true with data\.sources\.1\.assistant_prefill"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(None, [*sources(tmp_path, *entries), *more])
    with pytest.raises(ValueError, match=r"mixture_temperature must be null without data\.sources"):
        load_config(None, ["data.mixture_temperature=2"])
    with pytest.raises(ValueError, match=r"distinct names, got \['x', 'x'\]; set `name`"):
        load_config(None, ["data.sources=[x, x]"])
    with pytest.raises(ValueError, match=r"must not have the name 'reward'"):
        load_config(None, ["data.sources=[x, reward]"])
    config = load_config(None, sources(tmp_path, "weight: 1", "weight: 9", sizes=(30, 6)))
    with pytest.raises(ValueError, match=r"'b' must hold at least 8 rows to train on, .*got 6; lower its share"):
        order_of(config.data, load_prompts(config, tokenizer), 0, 8)
    with pytest.raises(ValueError, match=r"data\.sources\.1\.eval_size must be < 6, the number of distinct questions"):
        load(tokenizer, *sources(tmp_path, "", "eval_size: 6", sizes=(30, 6)))


def test_pairs_of_a_mixture_know_their_sources(tokenizer, tmp_path):
    config = load_config(None, [*sources(tmp_path, "weight: 1", "weight: 1"), "sft.max_completion_length=2"])
    pairs = load_pairs(config, tokenizer)  # answers of two digits and EOS are too long
    assert list(pairs.sizes) == [10, 10]
    assert sorted(order_of(config.data, pairs, 0, 4).take(0, 20)[0]) == list(range(20))


# Examples, template variables and conversations

SHOTS = "few_shot: [{prompt: '1+1=', answer: 2}, {prompt: '2+2=', answer: '4'}]"


@pytest.fixture
def sums(tmp_path):
    rows = [{"prompt": f"{n}+{n}=", "answer": str(2 * n), "q": f"{n}?", "level": 1} for n in range(6)]
    (tmp_path / "prepare.py").write_text(PREPARE)
    return write(tmp_path / "sums.jsonl", rows)


def test_examples_stand_in_front_of_every_question_as_text_or_as_messages(tokenizer, sums):
    text = load(tokenizer, f"data={{source: {sums}, {SHOTS}, system_prompt: 'Add. '}}", "data.eval_size=1")
    assert {row.prompt for row in [*text.train, *text.held_out]} == {
        f"Add. 1+1=2\n\n2+2=4\n\n{n}+{n}=" for n in (0, 3, 4, 5)
    }
    assert "removed 2 of 6 rows of data.source that are examples of few_shot" in text.messages
    tight = load(tokenizer, f"data={{source: {sums}, {SHOTS}, few_shot_separator: '; '}}")
    assert tight.train[0].prompt == "1+1=2; 2+2=4; 0+0="
    chat = load(tokenizer, f"data={{source: {sums}, {SHOTS}, chat: true, system_prompt: Add., assistant_prefill: ' '}}")
    roles, contents = zip(*((message["role"], message["content"]) for message in chat.train[0].prompt), strict=True)
    assert roles == ("system", "user", "assistant", "user", "assistant", "user", "assistant")
    assert contents == ("Add.", "1+1=", "2", "2+2=", "4", "0+0=", " ")
    assert tokenizer.decode(chat.train[0].prompt_ids).endswith("assistant: 4\nuser: 0+0=\nassistant:  ")


def test_examples_of_a_file_are_read_as_the_source_is(tokenizer, sums, tmp_path):
    own = f"columns: {{prompt: q, answer: answer}}, few_shot: '{sums}[:2]'"
    data = load(tokenizer, f"data={{source: {sums}, {own}}}")
    assert [row.prompt for row in data.train] == [f"0?0\n\n1?2\n\n{n}?" for n in range(2, 6)]
    chats = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(3)
    ]
    path = write(tmp_path / "chats.jsonl", chats)
    data = load(
        tokenizer,
        f"data={{source: {path}, columns: {{prompt: messages, answer: null}}, chat: true}}",
        f"data={{answer_from_messages: true, few_shot: '{path}[2:]'}}",
    )
    assert [[message["content"] for message in row.prompt] for row in data.train] == [
        ["2?", "2!", f"{n}?"] for n in (0, 1)
    ]
    assert [row.columns["answer"] for row in data.train] == ["0!", "1!"]
    streamed = load(tokenizer, f"data={{source: {sums}, {own}, streaming: true, block_size: 20}}")
    assert [row.prompt for row in streamed.train] == [f"0?0\n\n1?2\n\n{n}?" for n in range(2, 6)]


def test_each_source_has_its_own_examples_and_template_variables(tokenizer, sums, tmp_path):
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{{ mode }}>"
    (tmp_path / "chat.jinja").write_text(template)
    own = load_tokenizer("byte", tmp_path / "chat.jinja", {"mode": "slow"})
    entries = [
        f"{{source: {sums}, name: a, {SHOTS}, chat_template_kwargs: {{mode: fast, typo: 1}}}}",
        f"{{source: '{sums}[1:3]', name: b}}",
        f"{{source: '{sums}[3:4]', name: c, few_shot: []}}",
    ]
    overrides = [
        f"data={{sources: [{', '.join(entries)}], chat: true, chat_template_kwargs: {{mode: slow}}}}",
        "data.few_shot=[{prompt: 'x', answer: 'y'}]",
    ]
    config = load_config(None, overrides)
    data = load_prompts(config, own)
    texts = [own.decode(row.prompt_ids) for row in data.train]
    assert texts[0] == "u:1+1=;a:2;u:2+2=;a:4;u:0+0=;fast>"
    assert [text for text, row in zip(texts, data.train, strict=True) if row.source == 1] == [
        f"u:x;a:y;u:{n}+{n}=;slow>" for n in (1, 2)
    ]
    assert texts[-1] == "u:3+3=;slow>"
    (message,) = [message for message in data.messages if "template" in message]
    assert message.startswith("data.sources 'a': data.chat_template_kwargs:")
    assert "never reads typo" in message
    pairs = load_pairs(config, own)
    assert [own.decode(row.prompt_ids) for row in pairs.rows] == texts
    assert [own.decode(row.completion_ids) for row in pairs.rows][:2] == ["0", "6"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("few_shot: [{prompt: 'a'}]", r"few_shot row 0 must have the columns prompt and answer, got \['prompt'\]"),
        ("few_shot: [{prompt: 'a', answer: 1}, {prompt: b, answer: ' '}]", r"row 1: column 'answer' must .*' '"),
        ("few_shot: [{prompt: [], answer: 1}]", r"few_shot row 0: the prompt must be text or a list of messages"),
        ("few_shot: missing.csv", r"data source must be a \.csv file, got 'missing\.csv'"),
        ("few_shot: 'SUMS'", r"must hold a row that is none of the examples of data\.few_shot, got none"),
        ("few_shot: 'ftp://a/b.jsonl'", r"data\.few_shot must"),
        ("few_shot: ''", r"data\.few_shot must be a name or path, got ''"),
        ("few_shot: 5", r"data\.few_shot"),
        (
            "chat: true, few_shot: [{prompt: [{role: system, content: a}, {role: user, content: b}], answer: 1}]",
            r"few_shot row 0: column 'prompt' must be messages without one of the system",
        ),
        (
            "sources: [{source: a.jsonl, chat_template_kwargs: {a: 1}}], source: null",
            r"data\.chat must be true with data\.sources\.0\.chat_template_kwargs",
        ),
        (
            "chat: true, sources: [{source: a.jsonl, chat_template_kwargs: {messages: 1}}], source: null",
            r"data\.sources\.0\.chat_template_kwargs must not hold 'messages'",
        ),
    ],
)  # fmt: skip
def test_examples_that_cannot_be_shown_are_refused_by_their_row(tokenizer, sums, override, message):
    with pytest.raises(ValueError, match=message):
        load(tokenizer, f"data.source={sums}", f"data={{{override.replace('SUMS', sums)}}}")
