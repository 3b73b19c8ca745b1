// The browser of samples: filters, a list, and one sample with its prompt, its tokens in colours, its turns, its rewards
// and what judges wrote.

const MOST_ROWS = 200; // of the list, until more are asked for
const SURPRISE = 5; // nats at which a token has the full colour

/** How tokens may be coloured: label, the name among a token's values, the two hues, what the full colour means. */
const COLOURS = {
  logprob: { label: "log-prob", hues: ["warm", "warm"], full: () => SURPRISE, unit: "nats of surprise" },
  difference: { label: "sampler - trainer", hues: ["cool", "warm"], full: largest, unit: "nats" },
  advantage: { label: "advantage", hues: ["warm", "cool"], full: largest, unit: "" },
  kl: { label: "KL", hues: ["violet", "violet"], full: largest, unit: "nats" },
  clipped: { label: "clipped", hues: ["warm", "warm"], full: () => 1, unit: "" },
  trained: { label: "drawn or read", hues: ["cool", "grey"], full: () => 1, unit: "" },
};

function largest(values) {
  return values.reduce((most, value) => (Number.isNaN(value) ? most : Math.max(most, Math.abs(value))), 0) || 1;
}

/** A text, or messages, as one text. */
function promptText(prompt) {
  if (typeof prompt === "string") return prompt;
  return (prompt ?? []).map((message) => `${message.role}: ${contentText(message)}`).join("\n");
}

function contentText(message) {
  const calls = (message.tool_calls ?? []).map((call) => {
    const { name, arguments: given } = call.function ?? call;
    return `[call] ${name}(${typeof given === "string" ? given : JSON.stringify(given)})`;
  });
  const content = message.content ? [asText(message.content)] : [];
  return [...content, ...calls].join("\n");
}

/** The tokens of a sample, or of a further sequence of it, with the values of each by name. */
function tokensOf(part, run, advantage) {
  if (!part.tokens) return null;
  const count = part.tokens.length;
  const trained = [...(part.trained ?? "1".repeat(count))].map(Number);
  const values = {};
  for (const [name, entry] of Object.entries(part.values ?? {})) values[name] = decodeValues(entry);
  // Where no update read the tokens, the sampler's own log-probs are there.
  const fromSampler = !values.logprob && Boolean(values.sampler_logprob);
  if (fromSampler) values.logprob = values.sampler_logprob;
  values.advantage ??= Float64Array.from(trained, (is) => (is ? advantage ?? NaN : NaN));
  values.trained = Float64Array.from(trained, (is) => (is ? 1 : -1));
  const tokens = part.tokens.map((number) => ({ id: run.vocabulary[number][0], text: run.vocabulary[number][1] }));
  return { tokens, trained, values, fromSampler };
}

class SampleBrowser {
  constructor(section) {
    this.section = section;
    this.runs = [];
    this.filter = { run: 0, step: "", prompt: "", of: "", min: "", max: "", text: "", order: "newest" };
    this.colour = "logprob";
    this.limit = MOST_ROWS;
    this.chosen = null;
    this.controls = el("form", { class: "controls", onsubmit: (event) => event.preventDefault() });
    this.count = el("p", { class: "hint", role: "status" });
    this.list = el("div", {
      class: "list",
      role: "listbox",
      tabindex: 0,
      "aria-label": "Samples; arrow keys choose one",
      onkeydown: (event) => this.key(event),
      onclick: (event) => {
        const row = event.target.closest("[role=option]");
        if (row) this.choose(this.shown[row.dataset.place]);
      },
    });
    this.more = el("button", { type: "button", onclick: () => this.showMore() }, "Show more");
    this.detail = el("div", { class: "detail", role: "region", "aria-label": "Sample" });
    this.head = el("div", { class: "row head", "aria-hidden": "true" });
    this.body = el("div", { class: "browser" }, el("div", {}, this.head, this.list, this.more), this.detail);
  }

  update(runs) {
    this.runs = runs;
    if (!runs.some((run) => run.samples.length)) {
      refill(this.section, el("p", { class: "hint" }, "No samples: logging.samples_per_step was 0, or none is written yet."));
      return;
    }
    if (!this.run.samples.length) this.filter.run = runs.findIndex((run) => run.samples.length);
    refill(this.section, this.controls, this.count, this.body);
    this.showControls();
    this.show();
  }

  get run() {
    return this.runs[this.filter.run];
  }

  /** A sample's weighted reward, or the value of one function. */
  value(sample, of = this.filter.of) {
    if (of) return sample.rewards?.[of];
    if (sample.reward !== undefined) return sample.reward;
    return Object.values(sample.rewards ?? {})[0];
  }

  showControls() {
    const { filter } = this;
    const set = (name) => (value) => {
      filter[name] = value;
      if (name === "run") Object.assign(filter, { step: "", prompt: "", of: "" });
      this.limit = MOST_ROWS;
      if (name === "run" || name === "step") this.showControls();
      this.show();
    };
    const input = (name, type, width) =>
      el("input", { type, name, value: filter[name], step: "any", class: width, oninput: (event) => set(name)(event.target.value) });
    const { samples } = this.run;
    const unique = (values) => [...new Set(values)].sort((a, b) => a - b);
    const steps = unique(samples.map((sample) => sample.step));
    const ofStep = samples.filter((sample) => filter.step === "" || sample.step === Number(filter.step));
    const prompts = unique(ofStep.map((sample) => sample.prompt_index));
    const functions = [...new Set(samples.flatMap((sample) => Object.keys(sample.rewards ?? {})))];
    const focused = document.activeElement?.name;
    const named = (name, control) => (control.setAttribute("name", name), control);
    const all = (values, title) => [["", title], ...values.map((value) => [value, value])];
    this.controls.replaceChildren(
      ...(this.runs.length > 1 ? [field("run", named("run", select(this.runs.map((run, i) => [i, run.name]), filter.run, set("run"))))] : []),
      field("step", named("step", select(all(steps, "all"), filter.step, set("step")))),
      field("prompt", named("prompt", select(all(prompts, "all"), filter.prompt, set("prompt")))),
      field("reward of", named("of", select([["", "all, weighted"], ...functions.map((name) => [name, name])], filter.of, set("of")))),
      field("from", input("min", "number", "narrow")),
      field("to", input("max", "number", "narrow")),
      field("text", input("text", "search", "")),
      field("order", named("order", select([["newest", "newest first"], ["oldest", "oldest first"], ["best", "highest reward"], ["worst", "lowest reward"], ["longest", "longest"]], filter.order, set("order")))),
    );
    if (focused) this.controls.elements[focused]?.focus();
  }

  /** Filters and sorts, and shows the list; the chosen sample stays if it is still there. */
  show() {
    const { filter, run } = this;
    const text = filter.text.toLowerCase();
    const found = run.samples.filter((sample) => {
      const value = this.value(sample);
      return (
        (filter.step === "" || sample.step === Number(filter.step)) &&
        (filter.prompt === "" || sample.prompt_index === Number(filter.prompt)) &&
        (filter.min === "" || (value !== null && value !== undefined && value >= Number(filter.min))) &&
        (filter.max === "" || (value !== null && value !== undefined && value <= Number(filter.max))) &&
        (!text || this.plain(sample).toLowerCase().includes(text))
      );
    });
    const number = (value) => (value === null || value === undefined ? -Infinity : value);
    const orders = {
      newest: (a, b) => b.step - a.step,
      oldest: (a, b) => a.step - b.step,
      best: (a, b) => number(this.value(b)) - number(this.value(a)),
      worst: (a, b) => number(this.value(a)) - number(this.value(b)),
      longest: (a, b) => b.length - a.length,
    };
    this.found = found.sort(orders[filter.order]);
    this.shown = this.found.slice(0, this.limit);
    this.showList();
    const same = this.chosen && this.shown.find((sample) => this.key_of(sample) === this.key_of(this.chosen));
    if (same) this.choose(same, false, same !== this.chosen && this.drawn === this.key_of(same));
    else if (this.shown.length) this.choose(this.shown[0], false);
    else this.detail.replaceChildren(el("p", { class: "hint" }, "No sample is left by these filters."));
  }

  key_of(sample) {
    return [this.filter.run, sample.step, sample.prompt_index, sample.sample_index].join();
  }

  /** Prompt and completion as text, for the search. */
  plain(sample) {
    const own = (part) => part.tokens?.map((number) => this.run.vocabulary[number][1]).join("") ?? part.completion ?? "";
    return [promptText(sample.prompt), own(sample), ...(sample.further ?? []).map(own), promptText(sample.messages)].join("\n");
  }

  showList() {
    const all = this.run.samples.length;
    const left = this.run.samples_of - all;
    this.count.textContent =
      `${this.found.length} of ${all} samples` +
      (left ? `; ${left} more are in samples.jsonl (--samples N takes more of them)` : "") +
      ". Values of tokens are rounded to one byte.";
    this.head.replaceChildren(...["step", "prompt", "reward", "tokens", "end"].map((name) => el("span", {}, name)));
    const values = this.run.samples.map((sample) => Math.abs(this.value(sample) ?? 0));
    const most = values.reduce((a, b) => Math.max(a, b), 0) || 1;
    this.list.replaceChildren(
      ...this.shown.map((sample, place) => {
        const value = this.value(sample);
        const meter = el("span", { class: value < 0 ? "meter below" : "meter" }, el("b", {}, short(value)));
        meter.style.setProperty("--share", Math.abs(value ?? 0) / most);
        return el(
          "div",
          { role: "option", class: "row", id: `sample-${place}`, "data-place": place, "aria-selected": "false" },
          el("span", {}, String(sample.step)),
          el("span", {}, `${sample.prompt_index}.${sample.sample_index}`),
          meter,
          el("span", {}, String(sample.length)),
          el("span", {}, sample.ended ?? sample.finish_reason ?? ""),
        );
      }),
    );
    this.more.hidden = this.found.length <= this.limit;
  }

  showMore() {
    this.limit += 5 * MOST_ROWS;
    this.show();
  }

  key(event) {
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 }[event.key];
    if (!by || !this.shown.length) return;
    event.preventDefault();
    const place = this.shown.indexOf(this.chosen) + by;
    this.choose(this.shown[Math.max(0, Math.min(this.shown.length - 1, place))]);
  }

  /** Chooses a sample. scroll: brings its row into view. isDrawn: it is shown already, from older data of the run. */
  choose(sample, scroll = true, isDrawn = false) {
    this.chosen = sample;
    for (const row of this.list.querySelectorAll("[aria-selected=true]")) row.setAttribute("aria-selected", "false");
    const row = byId(`sample-${this.shown.indexOf(sample)}`);
    if (row) {
      row.setAttribute("aria-selected", "true");
      this.list.setAttribute("aria-activedescendant", row.id);
      if (scroll) row.scrollIntoView({ block: "nearest" });
    }
    if (!isDrawn) this.showDetail();
  }

  /** Shows the samples of a step, for instance one with a warning. */
  goTo(run, step) {
    const steps = [...new Set(this.runs[run].samples.map((sample) => sample.step))].sort((a, b) => a - b);
    if (!steps.length) return;
    Object.assign(this.filter, { run, step: String(steps[nearest(steps, step)]), prompt: "", of: "", min: "", max: "", text: "" });
    this.showControls();
    this.show();
    this.section.scrollIntoView();
    this.list.focus();
  }

  showDetail() {
    const { chosen: sample, run } = this;
    this.drawn = this.key_of(sample);
    const parts = [sample, ...(sample.further ?? [])].map((part) => tokensOf(part, run, sample.advantage));
    const known = parts.filter(Boolean);
    const has = (name) => known.some((part) => part.values[name]?.some((value) => !Number.isNaN(value)));
    const choices = Object.entries(COLOURS).map(([name, { label }]) => [name, label, has(name) ? "" : "not recorded for this sample"]);
    const colour = has(this.colour) ? this.colour : "trained";
    const siblings = run.samples.filter((other) => other.step === sample.step && other.prompt_index === sample.prompt_index);
    this.detail.replaceChildren(
      el(
        "header",
        {},
        el("h3", {}, `Step ${sample.step}, prompt ${sample.prompt_index}, sample ${sample.sample_index}`),
        siblings.length < 2
          ? null
          : el("p", { class: "siblings" }, "Same prompt: ", siblings.map((other) =>
              el("button", { type: "button", "aria-pressed": String(other === sample), onclick: () => this.choose(other) }, `${other.sample_index}: ${short(this.value(other))}`),
            )),
      ),
      this.rewardTable(sample),
      el("h4", {}, "Prompt"),
      el("pre", { class: "prompt" }, promptText(sample.prompt)),
      el("h4", {}, known.length ? "Tokens" : "Completion"),
      known.length
        ? segments("Colour by", "colour", [...choices, ["none", "nothing", ""]], this.colour === "none" ? "none" : colour, (name) => {
            this.colour = name;
            this.showDetail();
            this.detail.querySelector(`input[value=${name}]`)?.focus();
          })
        : el("pre", {}, sample.completion ?? ""),
      ...parts.flatMap((part, number) => (part ? this.tokenBlock(part, this.colour === "none" ? "none" : colour, number, sample) : [])),
      ...this.turns(sample),
      ...this.judgements(sample),
    );
  }

  rewardTable(sample) {
    const rows = Object.entries(sample.rewards ?? {}).map(([name, value]) => [name, value === null ? "could not judge" : short(value)]);
    if (sample.reward !== undefined) rows.push(["weighted sum", short(sample.reward)]);
    rows.push(["advantage", signed(sample.advantage)], ["tokens", sample.length], ["end", sample.ended ?? sample.finish_reason ?? "-"]);
    if (sample.answer !== undefined) rows.push(["right answer", asText(sample.answer)]);
    if (sample.failure) rows.push(["failure", sample.failure.join(": ")]);
    return el("dl", { class: "facts" }, rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))));
  }

  /** The tokens of one sequence in colours, and a line that tells of one of them. */
  tokenBlock(part, colour, number, sample) {
    const how = COLOURS[colour];
    const values = how && part.values[colour];
    const full = values ? how.full(values) : 1;
    const told = el("p", { class: "numbers told" }, "Point at a token, or use the arrow keys.");
    const spans = part.tokens.map((token, place) => {
      const classes = ["token"];
      if (!part.trained[place]) classes.push("read");
      if (part.values.clipped?.[place] === 1 && colour === "clipped") classes.push("boxed");
      const value = values?.[place];
      const span = el("span", { "data-place": place }, token.text.replaceAll("\n", "\u21b5\n") || "\u00b7");
      if (values && !Number.isNaN(value) && value !== 0) {
        classes.push(how.hues[value < 0 ? 0 : 1]);
        const share = colour === "trained" ? 0.45 : Math.min(1, Math.abs(value) / full);
        span.style.setProperty("--share", share.toFixed(3));
      }
      span.className = classes.join(" ");
      return span;
    });
    let at = -1;
    const move = (place, speaks) => {
      spans[at]?.classList.remove("at");
      at = place;
      spans[at].classList.add("at");
      told.textContent = this.describe(part, at);
      if (speaks) say(told.textContent);
    };
    const block = el(
      "div",
      {
        class: "tokens",
        tabindex: 0,
        role: "group",
        "aria-label": `${part.tokens.length} tokens; arrow keys tell of each`,
        onpointerover: (event) => {
          const span = event.target.closest(".token");
          if (!span) return;
          move(Number(span.dataset.place), false);
          showTip(told.textContent, event.clientX, event.clientY);
        },
        onpointerleave: () => showTip(null),
        onkeydown: (event) => {
          const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -1e9, End: 1e9 }[event.key];
          if (!by) return;
          event.preventDefault();
          move(Math.max(0, Math.min(spans.length - 1, at + by)), true);
          spans[at].scrollIntoView({ block: "nearest" });
        },
      },
      spans,
    );
    const prompt = number ? [el("h4", {}, `Sequence ${number + 1}`), el("pre", { class: "prompt" }, promptText(sample.further[number - 1].prompt))] : [];
    return [...prompt, this.legend(how, colour, full, part), block, told];
  }

  legend(how, colour, full, part) {
    if (!how) return el("p", { class: "hint" });
    const bit = (hue, text) => {
      const swatch = el("i", { class: `key ${hue}` });
      swatch.style.setProperty("--share", colour === "trained" ? 0.45 : 1);
      return el("span", {}, swatch, text);
    };
    const [below, above] = how.hues;
    const texts = {
      logprob: [bit("warm", `${full} nats of surprise or more`), part.fromSampler ? "; by the sampler: no update read this sample" : ""],
      clipped: [bit("warm boxed", "the clip held its gradient back in an update of the step")],
      trained: [bit(above === "grey" ? "cool" : above, "read, from an environment or tool"), bit("grey", "drawn by the policy")],
    }[colour] ?? (below === above ? [bit(below, `${signed(full)} ${how.unit}`)] : [bit(below, `-${short(full)} ${how.unit}`), bit(above, `+${short(full)} ${how.unit}`)]);
    return el("p", { class: "hint legend" }, texts);
  }

  /** Everything that is known of a token, in words. */
  describe(part, place) {
    const { values, tokens, trained, fromSampler } = part;
    const value = (name) => values[name]?.[place];
    const known = (name) => value(name) !== undefined && !Number.isNaN(value(name));
    const texts = [`token ${place + 1} of ${tokens.length}`, JSON.stringify(tokens[place].text)];
    texts.push(tokens[place].id === null ? "masked" : `id ${tokens[place].id}`);
    if (!trained[place]) return [...texts, "read, not drawn"].join(" | ");
    if (known("logprob")) {
      texts.push(`log-prob ${short(value("logprob"))}${fromSampler ? " (sampler)" : ""}`, `p ${short(Math.exp(value("logprob")))}`);
    }
    if (known("difference")) texts.push(`sampler - trainer ${signed(value("difference"))}`);
    if (known("kl")) texts.push(`KL ${short(value("kl"))}`);
    if (known("advantage")) texts.push(`advantage ${signed(value("advantage"))}`);
    if (known("clipped")) texts.push(value("clipped") ? "clipped" : "not clipped");
    return texts.join(" | ");
  }

  /** The messages of an episode, with the reward of each turn, and its sequence where there are several. */
  turns(sample) {
    if (!sample.messages?.length) return [];
    let turn = 0;
    const shown = [...sample.messages, ...(sample.unread ?? []).map((message) => ({ ...message, unread: true }))].map((message) => {
      const isTurn = message.role === "assistant";
      const reward = isTurn ? sample.turn_rewards?.[turn] : undefined;
      const sequence = isTurn ? sample.turn_sequences?.[turn++] : undefined;
      const notes = [sequence === undefined ? "" : `sequence ${sequence + 1}`, reward === undefined || reward === null ? "" : `reward ${short(reward)}`];
      const said = notes.filter(Boolean).join(", ");
      const note = message.unread ? " (not read)" : said && ` (${said})`;
      return el("li", { class: isTurn ? "turn own" : "turn" }, el("b", {}, message.role + note), el("pre", {}, contentText(message)));
    });
    return [el("h4", {}, "Turns and tool calls"), el("ol", { class: "turns" }, shown)];
  }

  /** What reward functions kept with the sample: judges' texts, found answers, problems. */
  judgements(sample) {
    const kept = Object.entries(sample.logged ?? {});
    if (!kept.length) return [];
    const entry = (name, value) => el("div", {}, el("dt", {}, name), el("dd", {}, el("pre", {}, asText(value))));
    return [
      el("h4", {}, "Kept by reward functions"),
      ...kept.map(([name, values]) => el("dl", { class: "kept", "aria-label": name }, Object.entries(values).map(([key, value]) => entry(`${name}: ${key}`, value)))),
    ];
  }
}
