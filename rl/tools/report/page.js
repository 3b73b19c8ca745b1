// The page: unpacks the data, fills the sections, and in a live page asks for newer data every few seconds.
//
// Data (rl/tools/report/data.py): about {metric: {meaning, healthy, advice}}, and runs, each with name, summary, steps, metrics {name: a value for each step, or null},
// histograms {name: [[step, [[value, count], ...]], ...]}, warnings [[step, text]], starts [[step, {...}]], config and
// what differs from the defaults (changed), samples, and the vocabulary [[id, text]] their tokens are numbers of.

const POLL_SECONDS = 3;
const GROUPS = [
  // The title of a group of curves, which metrics are in it, and which of these are shown at once.
  ["Learning", /^(reward|loss|eval|advantage|accuracy|policy_loss)/, [/^reward\/mean$/, /^eval\/(.*\/)?accuracy$/, /^loss$/, /^reward\/.+\/mean$/]],
  ["Policy", /^(kl|entropy|logprob|drawn_difference|ratio|clip|cispo|gmpo|dppo|vespo|off_policy|positive_nll|loss_term|grad_norm|lr$|sampler|selected|skipped|update\/|rollout_age)/, [/^kl$/, /^entropy$/, /^grad_norm$/, /^logprob_(difference|drift)\/mean$/, /^clip_ratio\/region_mean$/, /clip_ratio$/]],
  ["Completions", /^(completion_length|truncated|zero_variance|unjudged|masked|unscored|uncomputed|equal|turns|tool_calls|episodes|observation|environment|dynamic_sampling|curriculum)/, [/^completion_length\/mean$/, /^truncated_share$/, /^zero_variance_share$/, /^(turns|tool_calls)\/mean$/]],
  ["Speed and memory", /^(tokens_per_second|seconds|peak_memory|compiles|journal)/, [/^tokens_per_second\/step$/, /^tokens_per_second\/(rollout|train)$/, /^peak_memory_gb$/]],
  ["Others", /./, []],
];
// Metrics that are drawn as thin lines in the chart of another one.
const COMPANIONS = { "completion_length/mean": ["completion_length/max"], "eval/accuracy": ["eval/accuracy_low", "eval/accuracy_high"] };
const THIN = { "completion_length/mean": " thin: max", "eval/accuracy": " thin: 95 % interval" };

const state = { runs: [], about: {}, hidden: new Set(), window: null, metric: "", open: new Set(), timesOf: 0, histogramsOf: 0, configOf: "changed", key: "" };
const charts = new Map(); // metric: its LineChart, made once
const times = new Map();
const heats = new Map();
const browser = new SampleBrowser(byId("samples"));

/** Steps and values of a metric, without the steps that lack it. */
function seriesOf(run, metric) {
  const values = run.metrics[metric] ?? [];
  const places = values.flatMap((value, i) => (typeof value === "number" ? [i] : []));
  return { steps: places.map((i) => run.steps[i]), values: places.map((i) => values[i]) };
}

function labels() {
  return state.runs.length > 1 ? state.runs.map((run) => run.name) : [""];
}

function showStatus() {
  const texts = state.runs.map((run) => {
    const last = run.steps[run.steps.length - 1];
    return `${state.runs.length > 1 ? run.name + ": " : ""}step ${last}${run.total ? ` of ${run.total}` : ""}`;
  });
  byId("status").textContent = texts.join(", ") + (isLive ? " - live" : "");
}

function showSummary() {
  const names = [...new Set(state.runs.flatMap((run) => Object.keys(run.summary)))];
  const cards = el("dl", { class: "facts" }, names.map((name) => el("div", {}, el("dt", {}, name), el("dd", {}, state.runs[0].summary[name]))));
  const table = el(
    "table",
    {},
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, ""), state.runs.map((run) => el("th", { scope: "col" }, run.name)))),
    el("tbody", {}, names.map((name) => el("tr", {}, el("th", { scope: "row" }, name), state.runs.map((run) => el("td", {}, run.summary[name] ?? "-"))))),
  );
  refill(byId("summary"), state.runs.length > 1 ? el("div", { class: "wide" }, table) : cards);
}

/** The controls above the curves: smoothing, which metrics, which runs. Made once. */
function curveControls() {
  const most = Math.max(2, ...state.runs.map((run) => run.steps.length));
  const told = el("output", {}, "");
  const tell = () => (told.textContent = state.window > 1 ? `over ${state.window} steps` : "none");
  const slider = el("input", {
    type: "range",
    name: "smoothing",
    min: 1,
    max: Math.max(2, Math.round(most / 4)),
    value: state.window,
    oninput: (event) => {
      state.window = Number(event.target.value);
      tell();
      drawCurves();
    },
  });
  tell();
  const filter = el("input", { type: "search", name: "metric", placeholder: "reward, kl, ...", oninput: (event) => {
    state.metric = event.target.value.toLowerCase();
    showCurves();
  } });
  const runs = state.runs.map((run, i) =>
    el("label", { class: "choice" }, el("input", { type: "checkbox", checked: !state.hidden.has(i), onchange: (event) => {
      state.hidden[event.target.checked ? "delete" : "add"](i);
      drawCurves();
    } }), el("i", { class: `swatch tone${i % 7}` }), run.name),
  );
  return el("div", { class: "controls" }, field("smoothing", slider), told, field("metrics with", filter), state.runs.length > 1 ? el("fieldset", { class: "choices" }, el("legend", {}, "runs"), runs) : null);
}

/** A metric that varies has a chart; one that is the same in all steps is a word in a list. */
function showCurves() {
  const section = byId("curves");
  const names = [...new Set(state.runs.flatMap((run) => Object.keys(run.metrics)))];
  const companions = new Set(Object.values(COMPANIONS).flat());
  const groups = new Map(GROUPS.map(([title]) => [title, []]));
  const constant = [];
  for (const name of names) {
    const values = state.runs.flatMap((run) => seriesOf(run, name).values);
    if (!values.length || !name.toLowerCase().includes(state.metric)) continue;
    const isSame = values.every((value) => value === values[0]);
    if (isSame && values.length > 1) constant.push([name, values[0]]);
    else if (!companions.has(name) || state.metric) groups.get(GROUPS.find(([, pattern]) => pattern.test(name))[0]).push(name);
  }
  if (!section.querySelector(".controls")) refill(section, curveControls(), el("div", { id: "groups" }));
  byId("groups").replaceChildren(
    ...GROUPS.filter(([title]) => groups.get(title).length).flatMap(([title, , first]) => {
      const ranks = new Map(groups.get(title).map((name) => [name, repeats(name) ? -1 : first.findIndex((pattern) => pattern.test(name))]));
      const rank = (name) => ranks.get(name);
      const own = groups.get(title).sort((a, b) => rank(a) - rank(b));
      const grid = (names) => el("div", { class: "grid" }, names.map((name) => chartOf(name).element));
      if (state.metric) return [el("h3", {}, title), grid(own)];
      const rest = own.filter((name) => rank(name) < 0);
      const more = el("details", { open: state.open.has(title), ontoggle: (event) => state.open[event.target.open ? "add" : "delete"](title) }, el("summary", {}, `${rest.length} more`), grid(rest));
      return [el("h3", {}, title), grid(own.filter((name) => rank(name) >= 0)), rest.length ? more : null];
    }).filter(Boolean),
    constant.length ? el("p", { class: "hint" }, "The same in all steps: ", constant.map(([name, value]) => `${name} ${short(value)}`).join(", ")) : el("p", { class: "hint" }),
  );
  drawCurves();
}

/** Whether a function's rewards are all of the reward, because it is the only one. */
function repeats(metric) {
  if (!/^reward\/.+\/mean$/.test(metric)) return false;
  return state.runs.every((run) => String(run.metrics["reward/mean"]) === String(run.metrics[metric]));
}

/** What a metric is, in its own words of docs/metrics.md. */
function hintOf(metric) {
  const about = state.about[metric];
  if (!about) return THIN[metric] ?? "";
  const healthy = about.healthy ? `; healthy: ${about.healthy}` : "";
  return about.meaning.replaceAll("`", "") + healthy.replaceAll("`", "") + (THIN[metric] ? `;${THIN[metric]}` : "");
}

function chartOf(metric) {
  if (!charts.has(metric)) charts.set(metric, new LineChart(metric, hintOf(metric), state.about[metric]?.advice));
  return charts.get(metric);
}

function drawCurves() {
  const shown = state.runs.map((run, i) => ({ run, i })).filter(({ i }) => !state.hidden.has(i));
  const all = shown.flatMap(({ run }) => [run.steps[0], run.steps[run.steps.length - 1]]);
  const range = [Math.min(...all), Math.max(...all)];
  const marks = [...new Set(shown.flatMap(({ run }) => run.warnings.map(([step]) => step)))];
  for (const [metric, chart] of charts) {
    const series = shown
      .map(({ run, i }) => {
        const thin = (COMPANIONS[metric] ?? []).map((name) => seriesOf(run, name)).filter((one) => one.steps.length);
        return { label: labels()[i], tone: i % 7, ...seriesOf(run, metric), thin };
      })
      .filter((one) => one.steps.length);
    // Evaluations are few and far between: they are shown as they are.
    // The first step compiles, so its times would hide all others.
    const leavesFirst = /^(seconds|tokens_per_second|compiles)/.test(metric);
    chart.update(series, metric.startsWith("eval/") ? 1 : state.window, marks, range, leavesFirst);
  }
}

/** A choice of the run where there are several. */
function runChoice(name) {
  if (state.runs.length < 2) return null;
  const options = state.runs.map((run, i) => [i, run.name]);
  return el("div", { class: "controls" }, field("run", select(options, state[name], (value) => {
    state[name] = Number(value);
    show();
  })));
}

function showTimes() {
  const run = state.runs[state.timesOf];
  const phases = Object.keys(run.metrics).filter((name) => name.startsWith("seconds/") && name !== "seconds/step");
  const places = run.steps.flatMap((_, i) => (typeof run.metrics["seconds/step"]?.[i] === "number" ? [i] : []));
  if (!places.length) return refill(byId("times"), el("p", { class: "hint" }, "Nothing is measured yet."));
  const parts = phases
    .map((name) => ({ name: name.slice("seconds/".length), values: places.map((i) => Math.max(0, run.metrics[name][i] ?? 0)) }))
    .map((part) => ({ ...part, total: part.values.reduce((a, b) => a + b, 0) }))
    .sort((a, b) => b.total - a.total);
  const all = parts.reduce((sum, part) => sum + part.total, 0) || 1;
  if (!times.has(0)) times.set(0, new StackChart("seconds of each phase", " of each step"));
  const rows = parts.map((part, tone) => el("tr", {}, el("th", { scope: "row" }, el("i", { class: `swatch tone${tone % 7}` }), part.name), el("td", {}, `${short(part.total)} s`), el("td", {}, percent(part.total / all)), el("td", {}, `${short(part.total / places.length)} s`)));
  refill(
    byId("times"),
    runChoice("timesOf"),
    el("div", { class: "pair" }, times.get(0).element, el("table", {}, el("thead", {}, el("tr", {}, ["phase", "in all", "share", "a step"].map((title) => el("th", { scope: "col" }, title)))), el("tbody", {}, rows))),
  );
  times.get(0).update(places.map((i) => run.steps[i]), parts);
}

function showHistograms() {
  const run = state.runs[state.histogramsOf];
  const names = Object.keys(run.histograms);
  const shown = names.map((name) => {
    if (!heats.has(name)) heats.set(name, new HeatChart(name, ""));
    return heats.get(name).element;
  });
  refill(byId("histograms"), runChoice("histogramsOf"), names.length ? el("p", { class: "hint" }, "The stronger the colour of a cell, the more completions of the step have this value.") : null, names.length ? el("div", { class: "grid" }, shown) : el("p", { class: "hint" }, "This run recorded no histograms."));
  for (const name of names) heats.get(name).update(run.histograms[name]);
}

function showWarnings() {
  const rows = state.runs.flatMap((run, i) => run.warnings.map(([step, text]) => ({ run: i, step, text })));
  const row = ({ run, step, text }) => el("tr", {}, state.runs.length > 1 ? el("td", {}, state.runs[run].name) : null, el("td", {}, el("button", { type: "button", onclick: () => browser.goTo(run, step) }, `step ${step}`)), el("td", {}, text));
  refill(byId("warnings"), rows.length ? el("div", { class: "wide" }, el("table", {}, el("tbody", {}, rows.map(row)))) : el("p", { class: "hint" }, "None."));
}

function showConfig() {
  const keys = [...new Set(state.runs.flatMap((run) => Object.keys(run.config)))].sort();
  const text = (value) => (value === undefined ? "-" : typeof value === "string" ? value : JSON.stringify(value));
  const differs = (key) => new Set(state.runs.map((run) => text(run.config[key]))).size > 1;
  const isChanged = (key) => state.runs.some((run) => key in run.changed);
  const rules = { changed: isChanged, between: differs, all: () => true };
  if (!(state.configOf in rules) || (state.configOf === "between" && state.runs.length < 2)) state.configOf = "changed";
  const shown = keys.filter(rules[state.configOf]).filter((key) => key.includes(state.key));
  const fallback = (key) => {
    const run = state.runs.find((one) => key in one.changed);
    return run ? text(run.changed[key]) : text(state.runs[0].config[key]);
  };
  const choices = [["changed", "differs from the default", ""], ["between", "differs between runs", state.runs.length < 2 ? "there is one run" : ""], ["all", "all keys", ""]];
  const rows = shown.map((key) => el("tr", { class: differs(key) ? "differs" : null }, el("th", { scope: "row" }, key), state.runs.map((run) => el("td", {}, text(run.config[key]))), el("td", { class: "default" }, fallback(key))));
  const filter = el("input", { type: "search", name: "key", value: state.key, oninput: (event) => {
    state.key = event.target.value;
    showConfig();
    byId("config").querySelector("input[name=key]").focus();
  } });
  refill(
    byId("config"),
    keys.length ? el("div", { class: "controls" }, segments("Show", "config", choices, state.configOf, (value) => {
      state.configOf = value;
      showConfig();
      byId("config").querySelector(`input[value=${value}]`).focus();
    }), field("keys with", filter)) : el("p", { class: "hint" }, "The folder has no config.yml."),
    keys.length ? el("div", { class: "wide" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "key"), state.runs.map((run) => el("th", { scope: "col" }, run.name)), el("th", { scope: "col" }, "default"))), el("tbody", {}, rows))) : null,
  );
}

function showEnvironment() {
  const starts = state.runs.flatMap((run) => run.starts.map(([step, values]) => ({ title: `${run.name}, from step ${step}`, values })));
  const names = [...new Set(starts.flatMap((start) => Object.keys(start.values)))];
  refill(
    byId("environment"),
    starts.length
      ? el("div", { class: "wide" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, ""), starts.map((start) => el("th", { scope: "col" }, start.title)))), el("tbody", {}, names.map((name) => el("tr", {}, el("th", { scope: "row" }, name), starts.map((start) => el("td", {}, start.values[name] ?? "-")))))))
      : el("p", { class: "hint" }, "The run is of a version that did not record it."),
  );
}

/** Draws everything again, and gives the focus back to a control that was replaced meanwhile. */
function show() {
  const { name } = document.activeElement ?? {};
  draw();
  if (name && document.activeElement === document.body) document.querySelector(`[name="${CSS.escape(name)}"]`)?.focus();
}

function draw() {
  const most = Math.max(...state.runs.map((run) => run.steps.length));
  state.window ??= Math.max(1, Math.floor(most / 20));
  showStatus();
  showSummary();
  showCurves();
  showTimes();
  showHistograms();
  browser.update(state.runs);
  showWarnings();
  showConfig();
  showEnvironment();
}

/** JSON from gzip. */
async function unpack(stream) {
  return new Response(stream.pipeThrough(new DecompressionStream("gzip"))).json();
}

async function load() {
  const text = byId("data").textContent.trim();
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  Object.assign(state, await unpack(new Blob([bytes]).stream()));
  show();
}

/** Asks for what is newer than `version`, shows it, and asks again. */
async function follow(version) {
  let next = version;
  try {
    const answer = await fetch(`data?version=${version}`);
    if (answer.status === 200) {
      Object.assign(state, await unpack(answer.body));
      next = answer.headers.get("X-Version");
      show();
    } else if (answer.status !== 204) {
      byId("status").textContent = await answer.text();
    }
  } catch (error) {
    byId("status").textContent = "The server of this page does not answer any more.";
  }
  setTimeout(() => follow(next), POLL_SECONDS * 1000);
}

const THEMES = ["system", "light", "dark"];
byId("theme").addEventListener("click", (event) => {
  const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "system") + 1) % THEMES.length];
  document.documentElement.dataset.theme = theme;
  event.target.textContent = `Theme: ${theme}`;
});

const isLive = document.body.dataset.live === "yes";
if (isLive) follow("");
else load();
