"""Text and token ids: BOS and EOS rules, chat templates, the byte tokenizer, saving and loading."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

from rl.data.byte_tokenizer import ByteBackend
from rl.data.tokenizer import Tokenizer, load_tokenizer
from rl.files import untrusted
from tests.helpers.places import ROOT

ODD_TEXTS = (
    "47+38=",
    " two  spaces , a comma . don 't\n\ttabs\r\n",
    "caf\u00e9 \u65e5\u672c\u8a9e \U0001f600 \u0000 \x7f \u00ad",
    "literal <eos> and <pad> inside",
    "",
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
USER = [{"role": "user", "content": "hi"}]


def as_transformers(tokenizer: Tokenizer) -> transformers.PreTrainedTokenizerFast:
    backend = tokenizer.backend
    return backend.as_transformers() if isinstance(backend, ByteBackend) else backend


def word_tokenizer(
    single: str, template: str | None = None, prepend_scheme: str = "never", template_kwargs: dict | None = None
) -> Tokenizer:
    """Words a, b, c after a SentencePiece-like space mark; `single` is the post-processor's rule for one text."""
    words = ["<s>", "</s>", "<unk>", "\u2581", "a", "b", "c", "\u2581a", "\u2581b", "\u2581c"]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [("\u2581", "a"), ("\u2581", "b"), ("\u2581", "c")]
    core = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    core.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    backend = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )
    return Tokenizer(backend, template_kwargs=template_kwargs)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_byte_tokenizer_loses_nothing(text):
    tokenizer = load_tokenizer("byte")
    ids = tokenizer.encode(text, add_bos=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_byte_ids_are_bytes_after_three_special_tokens():
    tokenizer = load_tokenizer("byte")
    assert tokenizer.vocab_size == 259
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_ids) == (0, 1, (2,))
    every_character = "".join(map(chr, range(0x250))) + "\u65e5\U0001f600"
    assert tokenizer.encode(every_character) == [1, *(3 + byte for byte in every_character.encode())]


def test_any_bytes_decode_even_when_they_are_not_utf8():
    tokenizer = load_tokenizer("byte")
    assert tokenizer.decode([3 + 0xE6, 3 + ord("a")]) == "\ufffda"
    assert tokenizer.decode(np.array([1, 3 + ord("a"), 2], np.int32)) == "a"


def test_bytes_are_those_of_transformers_without_its_import():
    backend = ByteBackend()
    peer = backend.as_transformers()
    for name in ("special_tokens_map", "all_special_tokens", "pad_token", "bos_token", "eos_token", "chat_template"):
        assert getattr(backend, name) == getattr(peer, name), name
    assert ByteBackend().backend_tokenizer.to_str() == peer.backend_tokenizer.to_str()
    assert (backend.get_vocab(), backend.get_chat_template()) == (peer.get_vocab(), peer.get_chat_template())
    for text in (*ODD_TEXTS, "a<eos>b"):
        for is_on in (False, True):
            ids = backend.encode(text, add_special_tokens=is_on)
            assert ids == peer.encode(text, add_special_tokens=is_on)
            options = {"skip_special_tokens": is_on, "clean_up_tokenization_spaces": False}
            assert backend.decode(ids, **options) == peer.decode(ids, **options)
    code = "import sys; from rl.data.tokenizer import load_tokenizer as load; load('byte').encode('a')"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'transformers' not in sys.modules"], check=True, cwd=ROOT)


def test_saved_tokenizer_loads_as_an_ordinary_folder(tmp_path):
    tokenizer = load_tokenizer("byte")
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert '"PreTrainedTokenizerFast"' in (tmp_path / "tokenizer_config.json").read_text()
    assert (again.eos_ids, again.bos_id, again.pad_id, again.vocab_size) == ((2,), 1, 0, 259)
    for text in ODD_TEXTS:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        assert peer.encode(text) == ids
        assert again.decode(ids[1:], skip_special_tokens=False) == text
    assert again.encode_chat(USER) == tokenizer.encode_chat(USER)


def test_raw_text_follows_the_tokenizers_own_bos_rule():
    assert word_tokenizer("<s> $A").encode("ab") == [0, 4, 5]
    assert word_tokenizer("$A").encode("ab") == [4, 5]


def test_eos_that_the_tokenizer_appends_is_left_out():
    tokenizer = word_tokenizer("<s> $A </s>")
    assert tokenizer.backend.encode("ab") == [0, 4, 5, 1]
    assert tokenizer.encode("ab") == [0, 4, 5]
    assert word_tokenizer("$A </s>").encode("ab") == [4, 5]


def test_bos_is_never_doubled():
    with_bos = word_tokenizer("<s> $A", template="{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    without = word_tokenizer("<s> $A", template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    messages = [{"role": "user", "content": "ab"}]
    assert with_bos.encode_chat(messages) == [0, 4, 5]
    assert without.encode_chat(messages) == [4, 5]
    assert with_bos.encode("<s>ab") == [0, 4, 5]


def test_template_comes_from_a_file_and_asks_for_an_answer(tmp_path):
    path = tmp_path / "chatml.jinja"
    path.write_text(CHATML)
    tokenizer = load_tokenizer("byte", path)
    messages = [{"role": "system", "content": "Be brief."}, *USER]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render_chat(messages) == expected
    assert tokenizer.encode_chat(messages) == [3 + byte for byte in expected.encode()]
    assert messages == [{"role": "system", "content": "Be brief."}, *USER]


def test_encode_chat_equals_apply_chat_template():
    tokenizer = load_tokenizer("byte")
    peer = as_transformers(tokenizer).apply_chat_template(USER, add_generation_prompt=True, return_dict=True)
    assert tokenizer.encode_chat(USER) == list(peer["input_ids"])


def test_chat_without_a_template_names_the_setting():
    tokenizer = word_tokenizer("$A")
    assert not tokenizer.has_chat_template
    assert load_tokenizer("byte").has_chat_template
    with pytest.raises(ValueError, match=r"tokenizer\.chat_template"):
        tokenizer.encode_chat(USER)


def test_template_that_refuses_a_role_says_why():
    refusing = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    )
    tokenizer = word_tokenizer("$A", template=refusing)
    with pytest.raises(ValueError, match=r"'system', 'user'.*no system.*data\.system_prompt"):
        tokenizer.encode_chat([{"role": "system", "content": "x"}, *USER])


def test_a_template_that_fails_or_does_not_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted, "SECONDS", 0.3)
    path = tmp_path / "broken.jinja"
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}WRITE{% endfor %}{% endfor %}"
    for template, problem in (
        ("{% for m in %}", "TemplateSyntaxError in line 1: "),
        ("a\nb {{ 1/0 }}", "ZeroDivisionError in line 2: division by zero"),
        ("{{ messages + 3 }}", "TypeError in line 1: can only concatenate list"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError in line 1: "),
        (endless.replace("WRITE", ""), "it took more than 0.3 s of processor time"),
        (endless.replace("WRITE", "x" * 1000), "ValueError: its text is longer than 1000"),
    ):
        path.write_text(template)
        with pytest.raises(ValueError, match=r"chat_template '.*broken.jinja' must accept messages .*'user'") as caught:
            load_tokenizer("byte", path).encode_chat(USER)
        assert problem in str(caught.value)


def test_a_template_is_stopped_also_where_the_trainer_ignores_the_signals_that_do_it(tmp_path):
    path = tmp_path / "endless.jinja"
    path.write_text("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    # In a process of its own: a library may need them ignored where Python knows nothing of it, as jax's does.
    code = f"""
import signal
from rl.data.tokenizer import load_tokenizer
from rl.files import untrusted
from tests.helpers.places import ROOT
for number in (signal.SIGPROF, signal.SIGALRM):
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGPROF, signal.SIGALRM))
for name in ("SECONDS", "CLOCK_SECONDS"):
    before = getattr(untrusted, name)
    setattr(untrusted, name, 0.3)
    try:
        load_tokenizer("byte", {str(path)!r}).encode_chat({USER!r})
    except ValueError as error:
        print(error)
    setattr(untrusted, name, before)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    first, second = printed.splitlines()
    assert "took more than 0.3 s of processor time" in first, first
    assert "took more than 0.3 s" in second, second
    assert "processor" not in second, second


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit the memory of a process")
def test_a_template_that_asks_for_all_memory_is_refused(tmp_path):
    path = tmp_path / "large.jinja"
    path.write_text("{{ 'a' * 100000000000 }}")
    with pytest.raises(ValueError, match="MemoryError in line 1"):
        load_tokenizer("byte", path).encode_chat(USER)


def test_a_template_that_ignores_the_messages_is_refused():
    system = [{"role": "system", "content": "Be brief."}, *USER]
    last_only = "{{ messages[-1]['content'] }}"
    assert word_tokenizer("$A", template=last_only).render_chat(USER) == "hi"
    for template, messages, role in (("{{ bos_token }}", USER, "user"), (last_only, system, "system")):
        with pytest.raises(ValueError, match=f"got the same text for other words of the '{role}' message"):
            word_tokenizer("$A", template=template).render_chat(messages)


def test_a_tokenizer_renders_on_after_a_chat_that_was_refused():
    tokenizer = word_tokenizer(
        "$A", template="{{ 1 // (messages[0]['content']|length - 1) }}{{ messages[0]['content'] }}"
    )
    assert tokenizer.render_chat(USER) == "1hi"
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        tokenizer.render_chat([{"role": "user", "content": "a"}])
    assert tokenizer.render_chat(USER) == "1hi"


TEMPLATE_OF_MANY_PARTS = (
    "{%- for m in messages %}\n  {%- if loop.first %}{{ bos_token }}{% endif %}\n  {% if m.role == 'user' %}\n"
    "{{ m | tojson(indent=1) }} {{ m.content.strip() }}\n  {% continue %}\n  {% endif %}\n"
    "{% generation %}{{ m['content'] }}{% endgeneration %}\n{% endfor %}{{ strftime_now('%Y') }}"
    "{% if tools is none and not documents %} - {% endif %}{{ add_generation_prompt }}"
)


@pytest.mark.parametrize("template", [CHATML, TEMPLATE_OF_MANY_PARTS])
def test_chats_are_rendered_as_transformers_renders_them(template):
    tokenizer = word_tokenizer("$A", template=template)
    chat = [{"role": "system", "content": "b"}, {"role": "user", "content": " \u65e5\ud800 "}, *USER]
    peer = as_transformers(tokenizer).apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert tokenizer.render_chat(chat) == peer


def test_an_answer_that_has_begun_is_rendered_as_transformers_continues_it():
    chat = [*USER, {"role": "assistant", "content": "a"}, *USER, {"role": "assistant", "content": "b <c>"}]
    for tokenizer in (load_tokenizer("byte"), word_tokenizer("$A", template=CHATML)):
        peer = as_transformers(tokenizer).apply_chat_template(chat, continue_final_message=True, tokenize=False)
        assert tokenizer.render_chat(chat) == peer
        assert peer.endswith("b <c>")


THINKING = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if not date is defined %}{% set date = 'today' %}{% endif %}"
    "{{ date }}{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
)


def test_variables_of_the_template_reach_it_and_those_that_it_never_reads_are_named():
    given = {"enable_thinking": False, "date": "1 May", "level": [1, {"a": None}]}
    tokenizer = word_tokenizer("$A", template=THINKING, template_kwargs=given)
    peer = as_transformers(tokenizer).apply_chat_template(USER, add_generation_prompt=True, tokenize=False, **given)
    assert tokenizer.render_chat(USER) == peer == "hi1 May<think></think>"
    assert "never reads level, so what is set there changes nothing" in tokenizer.template_kwargs_problem()
    plain = word_tokenizer("$A", template=THINKING)
    assert (plain.render_chat(USER), plain.template_kwargs_problem()) == ("hitoday", None)
    assert plain.content_hash() != tokenizer.content_hash()
    broken = word_tokenizer("$A", template="{% for %}", template_kwargs=given)
    with pytest.raises(ValueError, match=r"must be a Jinja template, got TemplateSyntaxError"):
        broken.template_kwargs_problem()


DATED = "{% set date = date or strftime_now('%d %b %Y') %}{{ messages[0].content }}{{ date }}"


def test_a_template_that_writes_the_date_is_told_of_unless_the_date_is_given():
    now, given, plain = (
        word_tokenizer("$A", template=template, template_kwargs=kwargs)
        for template, kwargs in ((DATED, {}), (DATED, {"date": "1 May"}), (THINKING, {}))
    )
    texts = [tokenizer.render_chat(USER) for tokenizer in (now, given, plain)]
    assert texts[1:] == ["hi1 May", "hitoday"]
    assert "writes the date of the day into every prompt" in now.date_problem()
    assert (given.date_problem(), plain.date_problem()) == (None, None)


def test_decode_does_not_clean_up_spaces():
    # A word-level model, because newer transformers clean up nothing else.
    core = tokenizers.Tokenizer(models.WordLevel({"no": 0, ",": 1}, unk_token="no"))
    backend = transformers.PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=True)
    assert backend.decode([0, 1]) == "no,"
    assert Tokenizer(backend).decode([0, 1]) == "no ,"


def test_special_tokens_are_skipped_unless_asked_for():
    tokenizer = load_tokenizer("byte")
    ids = [*tokenizer.encode("ab"), 2]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<bos>ab<eos>"


def test_vocab_size_covers_every_id_when_ids_have_gaps():
    core = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 7}, unk_token="a"))
    tokenizer = Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>"))
    assert tokenizer.vocab_size == 8
    assert (tokenizer.eos_ids, tokenizer.bos_id, tokenizer.pad_id) == ((7,), None, None)


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(ValueError, match="valid Unicode"):
        load_tokenizer("byte").encode("a\ud800")


@pytest.mark.parametrize("source", ["./missing", "/missing/folder", "nobody/missing-model", "a/b/c"])
def test_source_that_is_nowhere_is_refused(source):
    with pytest.raises(ValueError, match=r"tokenizer\.source must be .*'byte', got"):
        load_tokenizer(source)


def test_folder_without_a_fast_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    word = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    for content, message in (
        ("{not json", "must be valid JSON"),
        ("[]", "must hold a JSON object, got list"),
        ("{}", r"must hold a tokenizer with a vocabulary \(model\.vocab\), got None"),
        ({"model": []}, "model must be an object"),
        ({"model": {"vocab": {}}}, r"model\.vocab\), got \{\}"),
        ({"model": {"vocab": {"a": "0"}}}, "must be whole numbers from 0 to 100001, got '0' for 'a'"),
        ({"model": {"vocab": {"a": 4_000_000_000}}}, "must be whole numbers from 0 to 100001, got 4000000000 for 'a'"),
        ({"model": word, "added_tokens": [1]}, "added_tokens must be a list of objects"),
        ({"model": word, "added_tokens": [{"id": 10**9, "content": "b"}]}, r"added_tokens\[0\]\.id must be a whole"),
        ({"model": word}, "must hold a tokenizer that transformers can read, got KeyError"),
        (
            {"model": {"vocab": ["a"], "type": "Unigram"}, "added_tokens": []},
            "that transformers can read, got Exception",
        ),
    ):
        (tmp_path / "tokenizer.json").write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(ValueError, match=message) as caught:
            load_tokenizer(tmp_path)
        assert str(tmp_path) in str(caught.value)


def test_the_files_beside_tokenizer_json_are_read_by_type(tmp_path):
    load_tokenizer("byte").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    good = json.loads(path.read_text())
    for content, message in (
        ([], "must hold a JSON object, got list"),
        (good | {"eos_token": 7}, "that transformers can read, got "),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)
    path.write_text(json.dumps(good))
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template must be a Jinja file in UTF-8 .*chat_template\.jinja"):
        load_tokenizer(tmp_path)


def test_template_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.chat_template must be a Jinja file"):
        load_tokenizer("byte", tmp_path / "missing.jinja")
    for content, problem in ((b"\xff{{ messages }}", "codec can't decode"), (b"x" * 1_000_001, "which is larger")):
        (tmp_path / "other.jinja").write_bytes(content)
        with pytest.raises(ValueError, match=rf"must be a Jinja file in UTF-8 .*other\.jinja.*{problem}"):
            load_tokenizer("byte", tmp_path / "other.jinja")


def test_importing_the_modules_loads_no_heavy_package():
    heavy = ["jax", "transformers", "tokenizers", "datasets", "pyarrow", "reasoning_gym", "huggingface_hub"]
    modules = "rl.data.prompts, rl.data.tokenizer, rl.data.tasks"
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
