"""Ready-made rewards: each on right answers and on junk, its settings, and its row in the documentation's table."""

import re
import sys

import pytest

from rewards.contract import RewardSpec, bind, load_function
from rewards.gym import TASKS
from rewards.ifeval import INSTRUCTIONS
from rewards.objects import to_bytes
from rewards.runner import RewardRunner
from rl.config.load import load_config
from rl.data.reasoning_tasks import reasoning_gym_rows
from rl.run_folder.trust import READY_MADE
from tests.helpers.places import ROOT

JUNK = [
    "",
    " ",
    "junk",
    "I do not know.",
    "(((",
    "\x00",
    "9" * 500,
    "\\boxed{",
    "<answer></answer>",
    "</think>",
    "A" * 9999,
]


def score(function, completions, settings=None, ids=None, **row):
    """The rewards of completions of one data row, as a worker computes them."""
    spec = RewardSpec("r", f"rewards.{function}", 1.0, settings or {})
    bound = bind(load_function(spec), list(row), spec.kwargs)
    columns = {name: [value] * len(completions) for name, value in row.items()}
    prompts = ["p"] * len(completions)
    return bound.function(**bound.batch_arguments(prompts, completions, columns, ids))


def chat(text):
    return [{"role": "assistant", "content": text}]


POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
}

GYM_ROW = {"answer": "1", "metadata": {"source_dataset": "lcm"}}
NO_COMMA = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}

# function, kwargs, row, completions that get 1, completions that get 0 (in addition to JUNK)
JUDGED = {
    "number with units": (
        "number:exact_number_strict",
        {"units": ["dollars", "cm", "^\\circ"]},
        {"answer": "12 cm"},
        ["#### 12 dollars", r"\boxed{12\text{ cm}}", r"\boxed{12^\circ}", "12 Dollars", "12"],
        ["12 dollarsy", "12 m", "#### 13 dollars"],
    ),
    "units that hold a digit": (
        "number:exact_number_flexible",
        {"units": ["m^2"]},
        {"answer": 5},
        ["it is 5 m^2", "the area is 5m^2."],
        ["it is 5 m^3"],
    ),
    "strict choice": (
        "choice:multiple_choice",
        {},
        {"answer": "B"},
        [
            *("B", "b", "(B)", "B."),
            *("Answer: B", "the answer is (B).", "Answer: B) Paris", "**Answer:** B", "Answer:\nB"),
            *(r"\boxed{B}", r"\boxed{\text{(B)}}"),
            *("<answer>B</answer>", "The answer is B because 2 < 3.", "Answer: $B$"),
            *("<think>Answer: A</think> Answer: B", "Final answer: The answer is B", r"So the answer is \boxed{B}."),
            *("B) Paris", "(B) Paris", "**B. Paris**", "B. A good one", "Answer: B - Paris"),
            "Answer: B \N{EN DASH} Paris",
            *("Answer: B, because A or C would be too large.", "The answer is B, since it is not A."),
            *("Answer: B. Not C", "Answer: B. Wait, yes, B.", "Answer: B) Paris, because A and C are no towns."),
            *("The answer is option B.", "Answer: the option (B)", "The answer is therefore B.", "The answer is `B`."),
            "Final Answer: The final answer is B. I hope it is correct.",
        ],
        [
            *("A", "Answer: A", "Answer: A or B", "Answer: B or C"),
            *("(A)(B)", "Answer: A, B", r"\boxed{A}\boxed{B}", "Answer: B/C"),
            *("B is wrong", "Answer: A\nAnswer: B", r"Answer: A. \boxed{B}"),
            *("<think>Answer: B</think>", "Answer: Because", "Answer: B, C"),
            *("Answer: B A", "The answer is B and C", "Answer: (B) or (C)"),
            *("A) Rome B) Paris", "(B) Paris (C) Bonn", "B. C", "Answer: B - C", "Answer: option A or option B"),
            *("The answer is B, no wait, C", "Answer: B. Or maybe C", "Answer: B) Paris or C) Rome"),
            *("Answer: B. Actually, it is C.", "Answer: (B). No, (C)!", r"\boxed{B. Or C}"),
        ],
    ),
    "flexible choice, by position": (
        "choice:multiple_choice",
        {"method": "flexible"},
        {"answer": 2},
        ["I choose C", "A? No, (C)", "Answer: C", "C, I think. A good one."],
        ["I choose E", "C? No, D", "Answer: A or C", "I choose c", "I choose I."],
    ),
    "regex": (
        "format:regex_match",
        {"regex_pattern": r"The answer is (\-?[0-9\.\,]+)", "group_select": -1},
        {"answer": "4"},
        ["The answer is 4", "The answer is 3 no\nThe answer is 4"],
        ["The answer is four", "The answer is 4\nThe answer is 3"],
    ),
    "regex without case and marks": (
        "format:regex_match",
        {"regex_pattern": ".+", "ignore_case": True, "ignore_punctuation": True},
        {"answer": "Paris!"},
        ["paris", " PARIS. "],
        ["in Paris"],
    ),
    "thinking": (
        "format:think_format",
        {},
        {},
        ["<think>\na\n</think>\nb", "<think></think>"],
        ["a", " <think>a</think>", "<think><think>a</think>", "<think>a"],
    ),
    "tags": (
        "format:tag_format",
        {},
        {},
        ["<think>a</think><answer>b</answer>", "<think>\na\n</think>\n<answer>\nb\n</answer>\n"],
        [
            *("<think>a</think>", "<answer>b</answer><think>a</think>", "<think>a</think> x <answer>b</answer>"),
            *("<think>a</think><answer> </answer>", "<think>a</think><answer>b</answer>c"),
            "<think>a</think><answer>b</answer><answer>c</answer>",
            "<think>\u200b</think><answer>b</answer>",
            "<think>a</think><answer>\ufeff\u2060 \u3164</answer>",
        ],
    ),
    "tags on lines of their own": (
        "format:tag_format",
        {"newlines": True, "tags": ["a", "b"]},
        {},
        ["<a>\n1\n</a>\n<b>\n2\n</b>"],
        ["<a>1</a>\n<b>\n2\n</b>", "<a>\n1\n</a><b>\n2\n</b>", "<a>\n1\n</a>\n\n<b>\n2\n</b>"],
    ),
    "countdown": (
        "countdown:countdown",
        {},
        {"target": 24, "nums": [3, 8, 1]},
        [
            *("<answer>3 * 8 * 1</answer>", "<answer>(3*8)/1 = 24</answer>"),
            *(r"\boxed{3 \times 8 \div 1}", "8*3*1", "<think>1</think>8*3/1", "24 = 3*8*1", "$8*3*1 = 24$."),
            "3*8*1 = 24.0",
        ],
        [
            *("3*8", "3*8*1*1", "24", "24 = 24", "24 = 3*8 = 3*8*1", "<answer>25-1</answer>", "3*8+1"),
            *("25 = 3*8*1", "1=3*8*1", "3*8*1 = 25", "3*8*1 = x", "3*8*1 == 24", "3*8*1 = 24*1 = 24", "= 3*8*1"),
            *("3**8*1", "8*3//1", "3*8/(1-1)", "-" * 399 + "1", "__import__('os')"),
        ],
    ),
    "JSON schema": (
        "schema:json_schema",
        {"schema": POINT},
        {},
        ['{"x": 1}', '```json\n{"x": 1}\n```', 'So:\n```\n{"x": 1}\n```\nOK', '<think>{}</think>{"x": 2}'],
        [
            *('{"x": "1"}', "{}", '{"x": 1, "y": 2}', '{"x": NaN}', '{"x": 1, "x": 1}', '{"x": 1} {"x": 1}'),
            *("[" * 9999, '```\n{"x": 1}\n```\n```\n{"x": 1}\n```', '{"x": 1}</think>{}', "{'x': 1}"),
        ],
    ),
    "JSON schema of the row": (
        "schema:json_schema",
        {},
        {"schema": '{"$ref": "#/$defs/a", "$defs": {"a": {"const": 7}}}'},
        ["7", " 7\n"],
        ["8", '"7"', "7 7"],
    ),
    "ROUGE": (
        "similarity:rouge",
        {"rouge_type": "rouge2"},
        {"answer": "the cat sat on the mat"},
        ["The cat sat, on the mat!", "<think>A dog</think>the cat sat on the mat"],
        ["mat the on sat cat the", "the", "<think>the cat sat on the mat</think>"],
    ),
    "edit distance": (
        "similarity:edit_distance",
        {},
        {"answer": "\u00e9\u4e2d+2"},
        [" \u00e9\u4e2d+2\n", "<think>x</think>\u00e9\u4e2d+2"],
        ["wxyz"],
    ),
    "language": (
        "language:language",
        {"language": "de"},
        {},
        ["Heute scheint die Sonne, und wir gehen an den See.", "<think>Was?</think> Die Antwort ist nein."],
        ["The sun is shining today.", "Le soleil brille aujourd'hui.", "123 456", "!?"],
    ),
    "countdown with numbers to spare": (
        "countdown:countdown",
        {"all_numbers": False},
        {"target": "24", "nums": [3, 8, 1]},
        ["3*8"],
        ["3*8*1*1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", JUDGED)
def test_right_answers_get_1_and_junk_gets_0(case):
    function, kwargs, row, right, wrong = JUDGED[case]
    completions = [*right, *wrong, *JUNK]
    expected = [1.0] * len(right) + [0.0] * (len(wrong) + len(JUNK))
    for form in (str, chat):
        given = score(function, [form(text) for text in completions], kwargs, **row)
        assert dict(zip(completions, given, strict=True)) == dict(zip(completions, expected, strict=True))


@pytest.mark.parametrize(
    ("function", "row", "kwargs"),
    [
        ("choice:multiple_choice", {"answer": "Paris"}, {}),
        ("choice:multiple_choice", {"answer": 7}, {"letters": "ABCD"}),
        ("format:regex_match", {"answer": " "}, {"regex_pattern": "."}),
        ("similarity:rouge", {"answer": ""}, {}),
        ("similarity:edit_distance", {"answer": "\n"}, {}),
    ],
)
def test_a_row_without_an_answer_cannot_be_judged(function, row, kwargs):
    assert score(function, ["B", ""], kwargs, **row) == [None, None]
    assert score(function, ["B"], kwargs, **dict.fromkeys(row)) == [None]


def test_partial_scores_are_those_of_the_sources():
    texts = ["<think>a</think><answer>b</answer>", "<think>a</think>", "<think><think>", ""]
    assert score("format:tag_count", texts) == [1.0, 0.5, 0.0, 0.0]  # open-r1's four quarters
    row = {"target": 24, "nums": [3, 8, 1]}
    texts = ["3*8*1", "3+8+1", "3*8", "2**3", "junk"]
    assert score("countdown:countdown", texts, {"format_score": 0.1}, **row) == [1.0, 0.1, 0.1, 0.0, 0.0]  # TinyZero's
    ids = [[1, 2, 3, 4], [5, 5, 5, 5, 5], [1], []]  # the example of TRL's get_repetition_penalty_reward
    assert score("repetition:repetition_penalty", [""] * 4, {"ngram_size": 2}, ids) == [0.0, -0.75, 0.0, 0.0]
    texts = ["a b a b a b", "a b c d", "A b a B", ""]  # by words, as open-r1's
    penalties = score("repetition:repetition_penalty", texts, {"ngram_size": 2, "max_penalty": -0.5, "unit": "words"})
    assert penalties == pytest.approx([-0.3, 0.0, -0.5 / 3, 0.0])
    assert score("schema:json_schema", ['{"x": 1}', "{}", "{"], {"schema": POINT, "valid_json_score": 0.2}) == [
        1,
        0.2,
        0,
    ]
    row = {"answer": "kitten on mats"}
    distances = score("similarity:edit_distance", ["sitting on mats", "kitten"], **row)
    assert distances == pytest.approx([12 / 15, 6 / 14])
    assert score("similarity:edit_distance", ["kitten on"], {"unit": "words"}, **row) == pytest.approx([2 / 3])
    assert score("similarity:edit_distance", ["kitten"], {"distance": "indel"}, **row) == pytest.approx([2 * 6 / 20])
    row = {"answer": "the cat sat on the mat"}  # longest common subsequence: the cat the mat
    for measure, expected in (("precision", 4 / 5), ("recall", 4 / 6), ("fmeasure", 8 / 11)):
        assert score("similarity:rouge", ["the cat ate the mat"], {"measure": measure}, **row) == pytest.approx(
            [expected]
        )
    assert score("similarity:rouge", ["cats sit"], {"rouge_type": "rouge1", "use_stemmer": True}, **row)[0] > 0.2
    sure, unsure = score(
        "language:language", ["Die Sonne scheint.", "No."], {"language": "de", "measure": "confidence"}
    )
    assert 0 <= unsure < sure <= 1
    texts = ["<think>Le soleil brille.</think> The sun is shining.", "The sun.</think> Le soleil brille."]
    among = {"languages": ["en", "fr"], "part": "answer"}
    assert score("language:language", texts, among, language="FR") == [0.0, 1.0]


@pytest.mark.parametrize(
    ("function", "row", "kwargs", "words"),
    [
        ("number:exact_number_strict", {"answer": 1}, {"units": "cm"}, "units must be a list of different words.*'cm'"),
        ("choice:multiple_choice", {"answer": "A"}, {"letters": "AA"}, "letters must be different.*'AA'"),
        ("choice:multiple_choice", {"answer": "A"}, {"method": "lax"}, "method must be.*'lax'"),
        (
            "format:regex_match",
            {"answer": "A"},
            {"regex_pattern": "("},
            r"regular expression .*unterminated.*, got '\('",
        ),
        ("format:tag_format", {}, {"tags": ["a", "a"]}, "tags must be a list of different words such as .*'a', 'a'"),
        ("format:tag_count", {}, {"tags": "think"}, "tags must be a list.*'think'"),
        (
            "countdown:countdown",
            {"target": 1, "nums": [1]},
            {"format_score": 1},
            "format_score must be a number >= 0 and < 1, got 1",
        ),
        *(
            ("countdown:countdown", {"target": 1, "nums": nums}, {}, "nums must be a list of whole numbers")
            for nums in ([], [4.5, 6], [True, 6], ["x"], [None], "46", 7)
        ),
        *(
            ("countdown:countdown", {"target": target, "nums": [1]}, {}, "target must be a number in each row, got ")
            for target in (None, "x", True, "1/0", float("nan"))
        ),
        ("schema:json_schema", {}, {"schema": {"type": "thing"}}, "schema must be a JSON schema, got .*thing"),
        ("schema:json_schema", {"schema": "["}, {}, "schema must be a JSON schema"),
        (
            "schema:json_schema",
            {},
            {"schema": {"$ref": "http://x.test/a"}},
            r"\$refs must lead into the schema itself, got .*x.test",
        ),
        ("schema:json_schema", {}, {"schema": {}, "valid_json_score": 1.0}, "valid_json_score must be"),
        ("similarity:rouge", {"answer": "a"}, {"rouge_type": "rougeX"}, "rouge_type must be.*'rougeX'"),
        ("similarity:rouge", {"answer": "a"}, {"measure": "f1"}, "measure must be.*'f1'"),
        ("similarity:edit_distance", {"answer": "a"}, {"distance": "hamming"}, "distance must be.*'hamming'"),
        ("similarity:edit_distance", {"answer": "a"}, {"unit": "tokens"}, "unit must be.*'tokens'"),
        ("language:language", {}, {"language": "english"}, "ISO 639-1 codes.*'de'.*, got 'english'"),
        (
            "language:language",
            {},
            {"language": "en", "languages": ["de"]},
            "languages must be a list of different words such as .*'de'",
        ),
        ("language:language", {}, {"language": "en", "measure": "share"}, "measure must be.*'share'"),
        ("language:language", {}, {"language": "en", "part": "thought"}, "part must be.*'thought'"),
        ("ifeval:ifeval", {**NO_COMMA, "kwargs": []}, {}, "lists of the same length.*no_comma"),
        ("ifeval:ifeval", {**NO_COMMA, "kwargs": "{bad"}, {}, "column kwargs must be .*got '{bad': Expecting property"),
        ("ifeval:ifeval", {"instruction_id_list": ["a:b"], "kwargs": [{}]}, {}, "instructions of IFEval, got 'a:b'"),
        ("ifeval:ifeval", NO_COMMA, {"mode": "lax"}, "mode must be.*'lax'"),
        ("ifeval:ifeval", NO_COMMA, {"score": "mean"}, "score must be.*'mean'"),
        (
            "ifeval:ifeval",
            {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": None}]},
            {},
            "keywords of keywords:existence must be a list of texts, got None",
        ),
        (
            "ifeval:ifeval",
            {
                "instruction_id_list": ["detectable_format:number_bullet_lists"],
                "kwargs": [{"num_bullets": float("nan")}],
            },
            {},
            "num_bullets of detectable_format:number_bullet_lists must be a whole number >= 0, got nan",
        ),
        ("gym:reasoning_gym", {"answer": "1", "metadata": {}}, {}, "metadata must hold source_dataset"),
        ("gym:reasoning_gym", {"answer": "1", "metadata": {"source_dataset": "puzzle24"}}, {}, "task 'puzzle24'"),
        ("repetition:repetition_penalty", {}, {"ngram_size": 0}, "ngram_size must be a whole number >= 1, got 0"),
        ("repetition:repetition_penalty", {}, {"max_penalty": 1}, "max_penalty must be a number <= 0, got 1"),
        ("repetition:repetition_penalty", {}, {"unit": "lines"}, "unit must be.*'lines'"),
        ("repetition:repetition_penalty", {}, {}, "needs completion_ids"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_value(function, row, kwargs, words):
    with pytest.raises(ValueError, match=words):
        score(function, ["1"], kwargs, **row)


# Of each ready-made reward, kwargs that are wrong, and what is said of them.
REFUSED = [
    ("number:exact_number_strict", {"unit": ["cm"]}, "kwargs holds 'unit', .* did you mean 'units'?"),
    ("number:exact_number_strict", {"units": "cm"}, "units must be a list of different words .*, got 'cm'"),
    ("number:exact_number_flexible", {"units": [1]}, r"units must be a list of different words .*, got \[1\]"),
    ("number:exact_number_flexible", {"units": None}, "units must be .*, got None"),
    ("verify:math_verified", {"timeout": 5}, "'timeout', which is no setting of this reward; its settings are none"),
    ("choice:multiple_choice", {"letters": ["A", "B"]}, r"letters must be different capital letters .*\['A', 'B'\]"),
    ("choice:multiple_choice", {"method": True}, 'method must be "strict" or "flexible", got True'),
    ("choice:multiple_choice", {"answer": "A"}, "'answer', which is no setting .* letters, method"),
    ("format:regex_match", {"regex_pattern": "(a"}, r"regex_pattern must be a regular expression .*, got '\(a'"),
    ("format:regex_match", {"regex_pattern": "a", "group_select": 0.5}, "group_select must be a whole number, got 0.5"),
    ("format:regex_match", {"regex_pattern": "a", "ignore_case": "no"}, "ignore_case must be true or false, got 'no'"),
    ("format:regex_match", {"regex_pattern": "a", "ignore_punctuation": 1}, "ignore_punctuation must be true or false"),
    ("format:regex_match", {}, "nothing provides the argument 'regex_pattern'"),
    ("format:format_regex", {"pattern": "[a"}, "pattern must be a regular .*unterminated character set"),
    ("format:format_regex", {"pattern": ["a"]}, r"pattern must be a regular expression .*, got \['a'\]"),
    ("format:format_regex", {"pattern": "a", "full_match": None}, "full_match must be true or false, got None"),
    ("format:think_format", {"tags": ["a"]}, "'tags', which is no setting of this reward"),
    ("format:tag_format", {"tags": ["a b"]}, "tags must be a list of different words"),
    ("format:tag_format", {"newlines": "yes"}, "newlines must be true or false, got 'yes'"),
    ("format:tag_count", {"tags": []}, r"tags must be a list of different words such as .*, got \[\]"),
    ("ifeval:ifeval", {"mode": "lax"}, 'mode must be "strict" or "loose", got \'lax\''),
    ("ifeval:ifeval", {"score": 1}, 'score must be "all" or "share", got 1'),
    ("ifeval:ifeval", {"kwargs": [{}]}, "'kwargs', which is no setting of this reward; its settings are mode, score"),
    ("gym:reasoning_gym", {"partial": "false"}, "partial must be true or false, got 'false'"),
    ("countdown:countdown", {"format_score": "0.1"}, "format_score must be a number >= 0 and < 1, got '0.1'"),
    ("countdown:countdown", {"all_numbers": 0}, "all_numbers must be true or false, got 0"),
    ("code:unit_tests", {"memory": 9}, "'memory', which is no setting of this reward; did you mean 'memory_mb'"),
    ("code:input_output", {"score": "some"}, 'score must be "all" or "share", got \'some\''),
    ("schema:json_schema", {"schema": {"type": "thing"}}, "schema must be a JSON schema, got .*thing"),
    ("schema:json_schema", {"schema": "{}"}, "schema must be a JSON schema, as a mapping, got '{}'"),
    (
        "schema:json_schema",
        {"schema": {"$ref": "#/$defs/a"}},
        r"\$refs must lead into the schema itself, got '#/\$defs/a'",
    ),
    (
        "schema:json_schema",
        {"schema": {}, "valid_json_score": 1},
        "valid_json_score must be a number >= 0 and < 1, got 1",
    ),
    ("similarity:rouge", {"rouge_type": "rouge10"}, "rouge_type must be .*rougeLsum.*, got 'rouge10'"),
    ("similarity:rouge", {"measure": "f1"}, "measure must be .*, got 'f1'"),
    ("similarity:rouge", {"use_stemmer": "en"}, "use_stemmer must be true or false, got 'en'"),
    ("similarity:edit_distance", {"distance": "hamming"}, 'distance must be "levenshtein" or "indel", got \'hamming\''),
    ("similarity:edit_distance", {"unit": "tokens"}, "unit must be .*, got 'tokens'"),
    ("language:language", {"language": "english"}, "language must be one of the ISO 639-1 codes .*, got 'english'"),
    ("language:language", {"language": ["en"]}, r"language must be an ISO 639-1 code .*, got \['en'\]"),
    ("language:language", {"language": "en", "languages": ["de", "fr"]}, "languages must hold language .'en'"),
    ("language:language", {"languages": ["de", "xx"]}, "ISO 639-1 codes .*, got 'xx'"),
    ("language:language", {"measure": "share"}, "measure must be .*, got 'share'"),
    ("language:language", {"part": "thought"}, "part must be .*, got 'thought'"),
    ("length:length_penalty", {"limit": "9", "buffer": 2}, "limit must be a number > 0, got '9'"),
    ("length:length_penalty", {"limit": 9, "buffer": 0}, "buffer must be a number > 0, got 0"),
    ("length:length_penalty", {"limit": 6, "buffer": 7}, "buffer must be at most limit, got buffer=7 and limit=6"),
    ("length:length_penalty", {"limit": 6}, "nothing provides the argument 'buffer'"),
    ("length:length_penalty", {"limit": 6, "buffer": 2, "unit": "words"}, 'unit must be "tokens" or "characters"'),
    ("repetition:repetition_penalty", {"ngram_size": 2.5}, "ngram_size must be a whole number >= 1, got 2.5"),
    ("repetition:repetition_penalty", {"max_penalty": "-1"}, "max_penalty must be a number <= 0, got '-1'"),
    ("repetition:repetition_penalty", {"unit": "lines"}, 'unit must be "tokens" or "words", got \'lines\''),
]
# Every column that a ready-made reward may ask for.
COLUMNS = (
    *("answer", "target", "nums", "metadata", "instruction_id_list", "kwargs", "tests", "inputs", "outputs"),
    *("schema", "language"),
)


@pytest.mark.parametrize(("function", "kwargs", "words"), REFUSED)
def test_wrong_kwargs_are_refused_when_the_function_is_loaded(function, kwargs, words):
    loaded = load_function(RewardSpec("mine", f"rewards.{function}", 1.0, kwargs))
    with pytest.raises(ValueError, match=f"reward 'mine': .*{words}"):
        bind(loaded, COLUMNS, kwargs, "mine")


def test_every_setting_of_the_table_is_refused_where_it_is_wrong():
    page = (ROOT / "docs" / "ready-made-rewards.md").read_text()
    settings = {}
    for name, cell in re.findall(r"^\| `rewards\.(\w+:\w+)` \|.*\|([^|]*)\|[^|]*\|$", page, re.MULTILINE):
        settings[name] = set(re.findall(r"`(\w+)`", cell)) - {"unit_tests"}
    settings["code:input_output"] = settings["code:unit_tests"]
    tried = {name: {key for f, kwargs, _ in REFUSED if f == name for key in kwargs} for name in settings}
    shared = {"code:unit_tests", "code:input_output"}  # tests/rewards/test_code.py has theirs
    assert len(settings) == len(READY_MADE)
    for name in settings:
        assert tried[name], name
        assert name in shared or settings[name] <= tried[name], name


def test_a_column_named_like_a_setting_is_none_and_wrong_rows_are_refused_at_the_start():
    def start(function, rows, **kwargs):
        columns = sorted({name for row in rows for name in row})
        given = [(f"p{number}", row) for number, row in enumerate(rows)]
        spec = RewardSpec("mine", f"rewards.{function}", 1.0, kwargs)
        with RewardRunner([spec], columns, 1, 20.0, rows=given) as runner:
            drawn = ["4"] * len(rows), {name: [row.get(name) for row in rows] for name in columns}
            return [row[0] for row in runner.score([p for p, _ in given], *drawn, [[1]] * len(rows)).rewards]

    rows = [{"answer": "4", "units": "cm", "unit": "cm"}, {"answer": None, "units": None}]
    assert start("number:exact_number_strict", rows) == [1.0, None]
    assert start("length:length_penalty", rows, limit=4, buffer=2) == [0.0, 0.0]
    wrong = {"instruction_id_list": ["keywords:rhyme"], "kwargs": [{}]}
    for function, rows, words in (
        ("ifeval:ifeval", [NO_COMMA, wrong], "must name instructions of IFEval, got 'keywords:rhyme'"),
        ("countdown:countdown", [{"target": 4, "nums": [4]}, {"target": 4, "nums": []}], "nums must be a list"),
        ("schema:json_schema", [{"schema": "{}"}, {"schema": '{"type": 1}'}], "schema must be a JSON schema"),
    ):
        with pytest.raises(ValueError, match=f"reward 'mine' cannot judge 1 of the first 2 data rows: .*{words}.*mend"):
            start(function, rows)


# instruction: (arguments, completions that follow it, completions that do not)
FOLLOWED = {
    "keywords:existence": ({"keywords": ["cat", "c++"]}, ["Cats like C++."], ["cats", "cat c"]),
    "keywords:frequency": (
        {"keyword": "cat", "frequency": 2, "relation": "at least"},
        ["A cat, a Cat.", "concatenate cats"],
        ["cat"],
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["cat"]}, ["cats"], ["A Cat."]),
    "keywords:letter_frequency": (
        {"letter": "Q", "let_frequency": 2, "let_relation": "less than"},
        ["q"],
        ["Qq"],
    ),
    "language:response_language": ({"language": "de"}, ["Heute scheint die Sonne."], ["The sun is shining.", "123"]),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na *** b\n***"],
        ["a", "a *** *** b"],
    ),
    "length_constraints:number_words": ({"num_words": 3, "relation": "less than"}, ["one, two"], ["one two three"]),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "So"},
        ["One\n\nso, two", 'One\n\n"So" two'],
        ["So\n\ntwo", "One\n\nSo\n\nthree", "One\n\nSomeone"],
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, ["[a] and [b]"], ["[a]"]),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, ["Yes.\n\nP. S. No."], ["Yes."]),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, ["* a\n- b"], ["* a", "** a\n* b"]),
    "detectable_format:constrained_response": ({}, ["I think: My answer is no."], ["No."]),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, ["*a* and *b*"], ["*a*", "* *"]),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Part", "num_sections": 2},
        ["Part 1\na\nPart 2\nb"],
        ["Part 1", "part 1 part 2"],
    ),
    "detectable_format:json_format": ({}, ['{"a": 1}', "```json\n[1]\n```"], ["{a: 1}", "So: [1]", "[" * 9999]),
    "detectable_format:title": ({}, ["<<A poem>>\nOh"], ["A poem", "<< >>"]),
    "combination:two_responses": ({}, ["a\n******\nb"], ["a", "a******a", "a******b******c"]),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say it."}, ["say it. It."], ["It. Say it."]),
    "startend:end_checker": ({"end_phrase": "The end."}, ["So. The end.", '"the END."'], ["The end. So."]),
    "startend:quotation": ({}, ['"a"'], ["a", '"']),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["NASA, U.S.A. and me"],
        ["X-RAY-2 Nasa"],
    ),
    "change_case:english_capital": (
        {},
        ["THE SUN IS SHINING TODAY."],
        ["The sun is shining.", "DIE SONNE SCHEINT HEUTE."],
    ),
    "change_case:english_lowercase": ({}, ["the sun is shining today."], ["The sun is shining."]),
    "punctuation:no_comma": ({}, ["a; b"], ["a, b"]),
}


def test_every_instruction_of_ifeval_is_followed_or_not():
    assert set(FOLLOWED) == set(INSTRUCTIONS)
    for name, (arguments, right, wrong) in FOLLOWED.items():
        texts = [*right, *wrong, "", "<think>...</think> "]
        row = {"instruction_id_list": [name], "kwargs": [{"unused": None, **arguments}]}
        expected = [1.0] * len(right) + [0.0] * (len(texts) - len(right))
        assert score("ifeval:ifeval", texts, **row) == expected, name
        assert score("ifeval:ifeval", JUNK, **row).count(1.0) < len(JUNK), name  # none takes long


def test_instructions_are_joined_and_read_loosely_as_in_ifeval():
    row = {
        "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
        "kwargs": '[{}, {"num_words": null}]',
    }
    texts = ['"a"', '"a, b"', "a, b", 'Sure, here:\n*"a"*']
    assert score("ifeval:ifeval", texts, **row) == [1.0, 0.0, 0.0, 0.0]
    assert score("ifeval:ifeval", texts, {"score": "share"}, **row) == [1.0, 0.5, 0.0, 0.0]
    assert score("ifeval:ifeval", texts, {"mode": "loose"}, **row) == [1.0, 0.0, 0.0, 1.0]
    row["instruction_id_list"] = ["punctuation:no_comma", "length_constraints:number_sentences"]
    assert score("ifeval:ifeval", texts[:1], **row) == [None]  # it is not checked here


def judge_task(name, size):
    """What rewards.gym makes of a task: of its own answers, of junk, and of the answers of other rows."""
    rows = reasoning_gym_rows(name, {"seed": 5, "size": size})
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        columns = {"answer": row["answer"], "metadata": row["metadata"]}
        texts = [f"<think>x</think><answer>{row['answer']}</answer>", row["answer"], *JUNK]
        texts += [other["answer"]] if other["answer"] != row["answer"] else []
        own, bare, *others = score("gym:reasoning_gym", texts, **columns)
        if not row["answer"].strip():
            assert own is None
            continue
        assert own == 1.0, (name, row)
        assert bare == 1.0, (name, row)
        assert set(others) == {0.0}, (name, row, dict(zip(texts[2:], others, strict=True)))


@pytest.mark.parametrize("name", ["chain_sum", "word_sorting"])
def test_a_task_of_reasoning_gym_is_judged_by_its_scorer(name):
    judge_task(name, 2)


def test_a_task_of_reasoning_gym_gives_its_own_number_if_asked():
    row = {"answer": "12", "metadata": '{"source_dataset": "chain_sum"}'}
    assert score("gym:reasoning_gym", ["12", "12 12"], **row) == [1.0, 0.0]
    exact, with_text = score("gym:reasoning_gym", ["12", "12 or more"], {"partial": True}, **row)
    assert 0 < with_text < exact == 1
    assert score("gym:reasoning_gym", [""], answer=" ", metadata={"source_dataset": "chain_sum"}) == [None]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:loadtxt:UserWarning")  # by a scorer of a table that is empty
@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_listed_task_of_reasoning_gym_scores_its_own_answer_and_no_junk(name):
    judge_task(name, 12)


@pytest.mark.parametrize(
    ("function", "library", "row", "kwargs", "extra"),
    [
        ("schema:json_schema", "jsonschema", {"schema": {"title": "not read yet"}}, {}, "rewards"),
        ("similarity:rouge", "rouge_score.rouge_scorer", {"answer": "a"}, {"rouge_type": "rouge9"}, "rewards"),
        ("similarity:edit_distance", "rapidfuzz.distance", {"answer": "a"}, {}, "rewards"),
        ("language:language", "lingua", {}, {"language": "en", "languages": ["en", "sw"]}, "language"),
        ("gym:reasoning_gym", "reasoning_gym", GYM_ROW, {}, None),
    ],
)
def test_a_missing_library_is_told_with_the_extra_that_installs_it(monkeypatch, function, library, row, kwargs, extra):
    spec = RewardSpec("mine", f"rewards.{function}", 1.0, kwargs)
    bound = bind(load_function(spec), list(row), kwargs)
    monkeypatch.setitem(sys.modules, library, None)
    command = re.escape(f"pip install 'tandem-grpo[{extra}]'" if extra else "pip install 'reasoning-gym'")
    with pytest.raises(ValueError, match=f"reward 'mine': it needs the library {library}.*{command}"):
        load_function(spec)  # at the start of a run
    columns = {name: [value] for name, value in row.items()}
    with pytest.raises(ModuleNotFoundError, match=command):  # elsewhere
        bound.function(**bound.batch_arguments(["p"], ["1"], columns, None))


RECIPE = """
rewards:
  functions:
    - {function: "rewards.number:exact_number_strict", kwargs: {units: [dollars]}}
    - {function: "rewards.choice:multiple_choice", kwargs: {letters: "ABCD"}}
    - {function: "rewards.format:regex_match", kwargs: {regex_pattern: "([0-9]+)", group_select: -1}}
    - {function: "rewards.format:think_format"}
    - {function: "rewards.format:tag_format", kwargs: {tags: [a, b]}}
    - {function: "rewards.schema:json_schema", kwargs: {schema: {type: integer}}}
    - {function: "rewards.similarity:edit_distance", kwargs: {unit: words}}
    - {function: "rewards.ifeval:ifeval", kwargs: {score: share}}
    - {function: "rewards.countdown:countdown", kwargs: {format_score: 0.5}}
    - {function: "rewards.repetition:repetition_penalty", kwargs: {ngram_size: 1}}
    - {function: "rewards.length:length_penalty", kwargs: {limit: 4, buffer: 2}}
"""


def test_ready_made_rewards_run_from_yaml_and_as_objects_in_a_worker(tmp_path):
    (tmp_path / "recipe.yml").write_text(RECIPE)
    functions = load_config(tmp_path / "recipe.yml").rewards.functions
    specs = [RewardSpec(f.function, f.function, 1.0, f.kwargs) for f in functions]
    tag_count = load_function(RewardSpec("r", "rewards.format:tag_count", 1.0, {}))
    specs.append(RewardSpec("given", "the session's", 1.0, {"tags": ["a"]}, pickled=to_bytes(tag_count, "given")))
    row = {"answer": "4", "target": 4, "nums": [3, 1], **NO_COMMA}
    columns = {name: [value] * 2 for name, value in row.items()}
    with RewardRunner(specs, list(columns), 1, 20.0) as runner:
        result = runner.score(["p"] * 2, ["4", "<a>1</a>, 4, 4"], columns, [[1], [1, 2, 1]])
    assert not result.problems
    assert result.rewards == [
        [1.0, None, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0],
        [0.0, None, 1.0, 0.0, 0.0, 0.0, pytest.approx(1 / 3), 0.0, 0.0, pytest.approx(-1 / 3), -0.5, 1.0],
    ]


def test_every_ready_made_reward_is_elementwise_and_has_a_row_in_the_table():
    page = (ROOT / "docs" / "ready-made-rewards.md").read_text()
    documented = re.findall(r"^\| `rewards\.(\w+:\w+)`", page, re.MULTILINE)
    written = []
    for path in sorted((ROOT / "rewards").glob("*.py")):
        found = re.findall(r"^@elementwise\n(?:@.*\n)*def (\w+)", path.read_text(), re.MULTILINE)
        written += [f"{path.stem}:{name}" for name in found]
    assert sorted(documented) == sorted(written)
    assert sorted(READY_MADE) == sorted(f"rewards.{name}" for name in written)  # trusted in a run folder
    for name in documented:
        function = load_function(RewardSpec("r", f"rewards.{name}", 1.0, {}))
        assert function.elementwise, name
        assert function.__doc__, name
    assert {case[0] for case in JUDGED.values()} <= set(documented)
