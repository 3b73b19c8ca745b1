"""The page of `grpo report`: what is in the file, and in a browser what it shows, where there is a chromium."""

import base64
import gzip
import itertools
import json
import re
import shutil
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from rl.files.token_values import encode
from rl.run.histograms import histogram
from rl.run.metrics import MetricsWriter
from rl.tools.report.masking import Mask
from rl.tools.report.report import main
from rl.tools.report.watch import LiveData, create_server

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
SECRET = "sk-very-secret-7"


def write_run(folder, num_steps=20, num_samples=4, num_tokens=12, seed=0, lr="1e-3"):
    """A run with every kind of event, whose samples have hostile texts and values of tokens."""
    noise = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    (folder / "config.yml").write_text(
        f"output_dir: {folder}\noptimizer: {{lr: {lr}}}\ngrpo: {{steps: 99}}\nsft: {{steps: 300}}\n"
        "rewards: {env: [REPORT_KEY]}\n"
    )
    words = [f" w{k}" for k in range(500)]
    with MetricsWriter(folder, 0) as writer:
        writer.write({"step": 0, "eval/accuracy": 0.25, "eval/accuracy_low": 0.2, "eval/accuracy_high": 0.3})
        writer.write_event(0, {"start": {"python": "3.12.1", "command": f"grpo train {HOSTILE}"}})
        for step in range(1, num_steps + 1):
            rewards = [noise.random() < step / num_steps for _ in range(16)]
            writer.write(
                {
                    "step": step,
                    "reward/mean": sum(rewards) / 16,
                    "kl": 0.01 * step,
                    "loss": None if step == 3 else noise.random(),
                    "truncated_share": 0.0,
                    "completion_length/mean": 10 + noise.random(),
                    "completion_length/max": 20,
                    "seconds/rollout": 0.5,
                    "seconds/train": 0.25,
                    **{f"seconds/phase_{k}": 0.01 for k in range(6)},
                    "seconds/step": 0.8,
                }
            )
            writer.write_event(step, {"histograms": {"reward": histogram(map(float, rewards))}})
            if step == 7:
                writer.write_event(step, {"warning": f"entropy is low {HOSTILE}"})
        steps = [step for step in range(1, num_steps + 1) for _ in range(num_samples)]
        samples = [sample(noise, step, place % num_samples, words, num_tokens) for place, step in enumerate(steps)]
        writer.write_samples(0, samples)  # each has its own step; one write, because each is flushed to the disk


def sample(noise, step, number, words, num_tokens):
    ids = noise.integers(len(words), size=num_tokens).tolist()
    texts = [words[token] for token in ids]
    texts[0], texts[1] = HOSTILE, f"{SECRET[:6]}"
    texts[2] = SECRET[6:]  # a secret over two tokens
    trained = [1] * num_tokens
    trained[3:5] = [0, 0]
    values = {
        "logprob": -noise.exponential(size=num_tokens),
        "difference": noise.normal(scale=1e-3, size=num_tokens),
        "kl": noise.random(num_tokens) * 0.1,
        "clipped": np.arange(num_tokens) == 6,
    }
    return {
        "step": step,
        "prompt_index": number // 2,
        "sample_index": number % 2,
        "prompt": [{"role": "user", "content": f"question {number} of step {step} {HOSTILE}"}],
        "completion": "".join(texts),
        "answer": "42",
        "rewards": {"exact": float(number % 2), HOSTILE: None},
        "reward": float(number % 2),
        "advantage": 0.5 - number % 2,
        "num_tokens": num_tokens,
        "token_ids": ids,
        "token_texts": texts,
        "trained": trained,
        "per_token": {name: encode(np.where(np.equal(trained, 1), own, np.nan)) for name, own in values.items()},
        "finish_reason": "eos",
        "logged": {"judge": {"judge_answer": f"good because {SECRET} {HOSTILE}"}},
        "messages": [
            {
                "role": "assistant",
                "content": "let me see",
                "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}],
            },
            {"role": "tool", "content": HOSTILE},
            {"role": "assistant", "content": "42"},
        ],
        "turn_rewards": [0.0, 1.0],
        "turn_sequences": [0, 1],
    }


def data_of(path):
    found = re.search(r'id="data">([^<]*)</script>', path.read_text())
    assert found is not None
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs, and the page that compares them."""
    folder = tmp_path_factory.mktemp("report")
    write_run(folder / "first")
    write_run(folder / "second", seed=1, lr="2e-3")
    (folder / "second" / "run.json").write_text('{"kind": "sft"}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPORT_KEY", SECRET)
        assert main([str(folder / "first"), str(folder / "second")]) == 0
    return folder


def test_the_page_is_one_file_that_asks_for_nothing_and_runs_only_its_own_code(folder):
    page = (folder / "first" / "report.html").read_text()
    assert "{{" not in page.replace("${{", "")
    assert HOSTILE not in page
    assert not re.search(r"https?://(?!jfly\.uni-koeln\.de|www\.w3\.org/2000/svg)", page)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert "default-src 'none'; script-src 'sha256-" in policy[1]
    assert "connect-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]


def test_values_of_secrets_are_masked_also_where_tokens_cut_them(folder):
    data = data_of(folder / "first" / "report.html")
    run = data["runs"][0]
    assert SECRET not in json.dumps(data)
    own = [run["vocabulary"][number] for number in run["samples"][0]["tokens"]]
    assert own[0][1] == HOSTILE
    assert own[1:3] == [[None, "[REPORT_KEY]"], [None, ""]]
    assert run["samples"][0]["logged"]["judge"]["judge_answer"].startswith("good because [REPORT_KEY]")


def test_a_short_value_is_no_secret_and_one_that_is_not_there_cannot_be_masked():
    mask = Mask(["A", "B", "C"], {"A": "abc", "B": "secret"})
    assert mask.value({"secret": ["abc", "a secret", 1, None]}) == {"[B]": ["abc", "a [B]", 1, None]}


def test_the_data_tell_what_differs_and_when_warnings_came(folder):
    first, second = data_of(folder / "first" / "report.html")["runs"]
    assert (first["config"]["optimizer.lr"], second["config"]["optimizer.lr"]) == (0.001, 0.002)
    assert first["changed"]["optimizer.lr"] == 1e-6  # the default
    assert [step for step, _ in first["warnings"]] == [7]
    assert first["starts"][0][1]["python"] == "3.12.1"
    assert (first["total"], second["total"]) == (99, 300)
    assert first["samples_of"] == len(first["samples"]) == 80


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"token_ids": ["a"]}, "token_ids must be whole numbers"),
        ({"token_texts": []}, "token_texts must be a text for each token"),
        ({"trained": [1]}, "trained must be a number for each token"),
        ({"messages": "text"}, "messages must not be str"),
        ({"prompt": ["text"]}, "prompt must be messages"),
        ({"logged": {"judge": "text"}}, "logged.judge must be a mapping"),
        (
            {"per_token": {"kl": {"largest": 1.0, "codes": "!"}}},
            r"samples.jsonl, step 3, prompt_index 0, sample_index 0: per_token.kl: values of tokens must be",
        ),
        ({"per_token": {"kl": encode([0.0])}}, "per_token.kl must be a number for each token"),
    ],
)
def test_a_sample_that_is_damaged_is_named(tmp_path, change, rule):
    record = sample(np.random.default_rng(0), 3, 0, ["w"] * 500, 8)
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write({"step": 3, "reward/mean": 0.5})
        writer.write_samples(3, [{**record, **change}])
    with pytest.raises(ValueError, match=rule):
        main([str(tmp_path)])


@pytest.mark.parametrize(
    ("file", "line", "rule"),
    [
        ("metrics", '{"step": 4, "loss": {"a": 1}}', r"metrics.jsonl, line 2: loss must be a number or null, got"),
        ("metrics", '{"step": 4, "note": "text"}', r"metrics.jsonl, line 2: note must be a number or null, got 'text'"),
        ("events", '{"step": 3, "histograms": 5}', "events.jsonl, step 3: histograms must be a mapping, got 5"),
        ("events", '{"step": 3, "histograms": {"a": 5}}', "step 3: the histogram of 'a' must be pairs"),
        ("events", '{"step": 3, "histograms": {"a": [1]}}', "step 3: the histogram of 'a' must be pairs"),
        ("events", '{"step": 3, "histograms": {"a": [[1, NaN]]}}', "step 3: the histogram of 'a' must be pairs"),
    ],
)
def test_a_line_that_is_damaged_is_named(tmp_path, file, line, rule):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write({"step": 3, "reward/mean": 0.5})
    with open(tmp_path / f"{file}.jsonl", "a") as lines:
        lines.write(f"{line}\n")
    with pytest.raises(ValueError, match=rule):
        main([str(tmp_path)])


def test_numbers_that_json_lacks_do_not_hinder_a_report(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "reward/mean": NaN}\n')
    (tmp_path / "events.jsonl").write_text('{"step": 0, "start": {"memory": Infinity}}\n')
    (tmp_path / "config.yml").write_text("grpo: {beta: .inf}\n")
    assert main([str(tmp_path)]) == 0
    (run,) = data_of(tmp_path / "report.html")["runs"]
    assert run["metrics"]["reward/mean"] == [None]
    assert run["starts"] == [[0, {"memory": None}]]
    assert run["config"]["grpo.beta"] == "inf"


def test_of_many_samples_whole_steps_are_left_out_and_the_last_is_kept(folder, tmp_path):
    page = tmp_path / "few.html"
    assert main([str(folder / "first"), "--output", str(page), "--samples", "30"]) == 0
    (run,) = data_of(page)["runs"]
    assert sorted({sample["step"] for sample in run["samples"]}) == [2, 5, 8, 11, 14, 17, 20]
    assert (len(run["samples"]), run["samples_of"]) == (28, 80)


def test_two_hundred_steps_of_eight_completions_of_256_tokens_fit_into_five_megabytes(tmp_path):
    write_run(tmp_path / "run", num_steps=200, num_samples=8, num_tokens=256)
    assert main([str(tmp_path / "run")]) == 0
    page = tmp_path / "run" / "report.html"
    assert len(data_of(page)["runs"][0]["samples"]) == 1600
    assert page.stat().st_size < 5e6


def test_a_live_page_answers_this_machine_alone_and_sends_only_what_is_new(folder, monkeypatch):
    monkeypatch.setenv("REPORT_KEY", SECRET)
    with create_server([folder / "first"], 0, 10) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        own = f"127.0.0.1:{server.server_port}"

        def ask(path, host=own):
            request = urllib.request.Request(f"http://{own}{path}", headers={"Host": host})
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return answer.status, answer.headers, answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.headers, error.read()

        status, headers, page = ask("/")
        assert status == 200
        assert b'data-live="yes"' in page
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        status, headers, content = ask("/data?version=")
        assert status == 200
        assert SECRET.encode() not in gzip.decompress(content)
        assert ask(f"/data?version={headers['X-Version']}")[0] == 204
        with MetricsWriter(folder / "first", 99) as writer:
            writer.write({"step": 21, "reward/mean": 1.0})
        while (newer := ask(f"/data?version={headers['X-Version']}"))[0] == 204:
            time.sleep(0.05)  # it rests ten times as long as it took to pack
        assert json.loads(gzip.decompress(newer[2]))["runs"][0]["steps"][-1] == 21
        for host in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1:1"):
            assert ask("/data", host)[0] == 421
        assert ask("/../etc/passwd")[0] == 404
        monkeypatch.setattr("rl.tools.report.watch.read_runs", lambda folders: [][0])  # an error that nobody expects
        monkeypatch.setattr(server, "handle_error", lambda *request: None)  # which would print it
        with MetricsWriter(folder / "first", 99) as writer:
            writer.write({"step": 22})
        while (broken := ask("/data"))[0] == 200:
            time.sleep(0.05)
        assert (broken[0], broken[2][:44]) == (500, b"the runs cannot be shown: IndexError: list i")
        server.shutdown()


def test_a_live_page_takes_a_tenth_of_a_core_at_most(folder):
    now = itertools.count(step=2.0)  # each look at the clock is two seconds later, so packing takes two
    data = LiveData([str(folder / "first")], 10, now.__next__)
    first, _ = data.get()  # from 0 to 2: it rests until 22
    changes = []
    for step in range(31, 41):  # asked at 4, 6, ..., 22
        with MetricsWriter(folder / "first", 99) as writer:
            writer.write({"step": step})
        changes.append(data.get()[0] != first)
    assert changes == [False] * 9 + [True]


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--samples", "-1"], "--samples must be >= 0"),
        (["--watch", "--output", "x.html"], "--output must be left out with --watch"),
        (["--watch", "--port", "99999"], "--port must be a free port"),
    ],
)
def test_what_cannot_be_is_refused(folder, arguments, rule):
    with pytest.raises(ValueError, match=rule):
        main([str(folder / "first"), *arguments])


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser, folder):
    """The page of both runs; what goes wrong in it, or asks for anything, is in `page.problems`."""
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    page.problems = []
    page.on(
        "console", lambda message: page.problems.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on(
        "request",
        lambda request: page.problems.append(request.url) if not request.url.startswith(("file:", "data:")) else None,
    )
    page.goto((folder / "first" / "report.html").as_uri())
    page.wait_for_selector("#environment table")
    yield page
    assert page.problems == []
    assert page.evaluate("window.hacked") is None
    page.close()


def test_hostile_texts_stay_text_everywhere(page):
    page.click("[role=option] >> nth=0")
    text = page.inner_text("main")
    assert text.count(HOSTILE) >= 6  # environment, warning, name of a function, prompt, token, tool, judge
    assert page.locator("main img").count() == 0


def test_filters_and_orders_choose_samples(page):
    rows = page.locator("[role=option]")
    assert rows.count() == 80
    page.select_option("select[name=step]", "7")
    assert rows.count() == 4
    page.select_option("select[name=prompt]", "1")
    assert rows.all_inner_texts()[0].split()[:2] == ["7", "1.0"]
    page.select_option("select[name=prompt]", "")
    page.fill("input[name=min]", "0.5")
    assert rows.count() == 2
    page.fill("input[name=min]", "")
    page.fill("input[name=text]", "question 3 of step 7")
    assert rows.count() == 1
    page.fill("input[name=text]", "")
    page.select_option("select[name=of]", HOSTILE)
    page.fill("input[name=max]", "9")
    assert rows.count() == 0  # this function judged none
    page.fill("input[name=max]", "")
    page.select_option("select[name=run]", "1")
    assert rows.count() == 80
    page.click("#warnings button >> nth=0")  # of the first run again, at its step
    assert {text.split()[0] for text in rows.all_inner_texts()} == {"7"}


def test_tokens_tell_their_values_to_the_pointer_and_to_the_keys(page):
    page.hover(".token >> nth=6")
    tip = page.inner_text("#tip")
    for word in ("token 7 of 12", "log-prob -", "sampler - trainer", "KL ", "advantage ", "| clipped"):
        assert word in tip
    page.focus(".tokens")
    page.keyboard.press("Home")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert "read, not drawn" in page.inner_text("#said")
    for name in ("difference", "kl", "advantage", "trained", "logprob"):
        page.check(f"input[name=colour][value={name}]", force=True)
        assert page.locator(".token[style]").count() >= 1
    page.check("input[name=colour][value=clipped]", force=True)
    assert page.locator(".token.boxed").count() == 1
    assert "[call]" in page.inner_text(".turns")
    assert "assistant (sequence 2, reward 1)" in page.inner_text(".turns")


def test_curves_compare_runs_and_follow_the_pointer_and_the_keys(page):
    chart = page.locator("figure", has_text="kl").first
    assert "step 20" in chart.inner_text()
    chart.focus()
    page.keyboard.press("Home")
    assert "first 0.01 second 0.01 step 1" in page.inner_text("#said")
    chart.scroll_into_view_if_needed()
    box = chart.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 14, box["y"] + 40)
    assert "step 20" in page.locator("figure", has_text="reward/mean").first.inner_text()
    assert chart.locator(".smooth").count() == 2
    page.uncheck(".choices input >> nth=1")
    assert chart.locator(".smooth").count() == 1
    before = chart.locator(".smooth").get_attribute("d")
    page.locator("input[name=smoothing]").fill("5")
    assert chart.locator(".smooth").get_attribute("d") != before
    page.fill("input[name=metric]", "kl")
    assert page.locator("#groups figure").count() == 1


def test_configuration_shows_what_differs_and_the_theme_can_be_chosen(page):
    assert "optimizer.lr" in page.inner_text("#config")
    page.check("input[name=config][value=between]", force=True)
    assert page.locator("#config tbody tr").all_inner_texts()[0].split()[:3] == ["optimizer.lr", "0.001", "0.002"]
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light


def test_everything_that_takes_focus_has_a_name_and_narrow_pages_do_not_scroll_sideways(page):
    nameless = page.evaluate(
        """[...document.querySelectorAll('button, a[href], input, select, [tabindex]')].filter((element) =>
        !(element.innerText || element.ariaLabel || element.labels?.length || element.querySelector('figcaption')))
        .map((element) => element.outerHTML)"""
    )
    assert nameless == []
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_live_page_shows_new_steps_by_itself(browser, folder):
    with create_server([folder / "second"], 0, 40) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page, problems = browser.new_page(), []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_selector("#environment table")
        assert "step 20 of 300" in page.inner_text("#status")
        with MetricsWriter(folder / "second", 99) as writer:
            writer.write({"step": 21, "reward/mean": 1.0})
        page.locator("#status", has_text="step 21 of 300").wait_for()
        assert problems == []
        page.close()
        server.shutdown()
