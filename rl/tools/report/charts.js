// Drawings in SVG: curves, stacked times, histograms over steps. Each has a line of numbers at its top that follows
// the pointer or the arrow keys, and tells the newest numbers otherwise. One cursor moves through all curves at once.

const MARGIN = { left: 46, right: 12, top: 8, bottom: 20 };
const HEIGHT = 150;

/** Whole multiples of 1, 2 or 5 times a power of ten between two numbers; about `count` of them. */
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(k * step);
  return found;
}

/** The running mean of `rl.tools.report.summary.smooth`: as wide as a mean over `window` steps. */
function smooth(values, window) {
  const decay = 1 - 2 / (window + 1);
  let total = 0;
  let weight = 0;
  return values.map((value) => {
    total = decay * total + value;
    weight = decay * weight + 1;
    return total / weight;
  });
}

/** The points of a line as a path; of many points in one column of pixels only the lowest and the highest. */
function linePath(steps, values, x, y) {
  const points = steps.map((step, i) => [x(step), y(values[i])]);
  let kept = points;
  if (points.length > 2000) {
    const columns = new Map();
    for (const point of points) {
      const column = columns.get(Math.round(point[0]));
      if (!column) columns.set(Math.round(point[0]), [point, point]);
      else if (point[1] < column[0][1]) column[0] = point;
      else if (point[1] > column[1][1]) column[1] = point;
    }
    kept = [...columns.values()].flat();
  }
  return kept.map(([px, py], i) => `${i ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`).join("");
}

/** The place of the number nearest to `wanted` in a rising list; -1 for an empty list. */
function nearest(steps, wanted) {
  let best = -1;
  for (let i = 0; i < steps.length; i++) {
    if (best < 0 || Math.abs(steps[i] - wanted) < Math.abs(steps[best] - wanted)) best = i;
  }
  return best;
}

/** A figure whose drawing is made again when its width changes. Its parts: title, line of numbers, drawing. */
class Figure {
  static count = 0; // of drawings, for names of their parts

  /** hint: a few words behind the title. advice: more, for the pointer that rests there. */
  constructor(title, hint, advice) {
    this.numbers = el("p", { class: "numbers" });
    this.canvas = svg("svg", { height: HEIGHT, "aria-hidden": "true", class: "drawing" });
    this.element = el(
      "figure",
      { tabindex: 0, class: "chart" },
      el("figcaption", { title: [hint, advice].filter(Boolean).join(". Else: ") || null }, el("strong", {}, title), hint ? el("small", {}, hint) : null),
      this.numbers,
      this.canvas,
    );
    this.title = title;
    this.width = 0;
    new ResizeObserver(() => {
      const width = Math.round(this.canvas.getBoundingClientRect().width);
      if (width > 0 && width !== this.width) {
        this.width = width;
        this.draw();
      }
    }).observe(this.canvas);
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.leave());
    this.element.addEventListener("keydown", (event) => this.key(event));
  }

  /** Scales and axes for these ranges; returns {x, y}, which turn numbers into pixels. */
  frame([firstStep, lastStep], [low, high], format = short) {
    const right = this.width - MARGIN.right;
    const bottom = HEIGHT - MARGIN.bottom;
    const perStep = (right - MARGIN.left) / (lastStep - firstStep || 1);
    const x = (step) => MARGIN.left + (step - firstStep) * perStep;
    const y = (value) => bottom - ((value - low) / (high - low || 1)) * (bottom - MARGIN.top);
    this.canvas.replaceChildren();
    this.unscale = (px) => firstStep + (px - MARGIN.left) / perStep;
    const clip = `clip-${Figure.count++}`;
    this.inside = svg("g", { "clip-path": `url(#${clip})` });
    const area = { x: MARGIN.left, y: MARGIN.top - 3, width: right - MARGIN.left + 3, height: bottom - MARGIN.top + 6 };
    this.canvas.append(svg("clipPath", { id: clip }, svg("rect", area)));
    for (const value of ticks(low, high, 5).filter((value) => value >= low && value <= high)) {
      this.canvas.append(
        svg("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y(value), y2: y(value) }),
        svg("text", { class: "tick", x: MARGIN.left - 5, y: y(value) + 3.5, "text-anchor": "end" }, format(value)),
      );
    }
    for (const step of ticks(firstStep, lastStep, Math.max(2, this.width / 90)).filter(Number.isInteger)) {
      const half = 3 * String(step).length; // of the text's width; one at the edge must not be cut
      const place = Math.min(x(step), this.width - half - 1);
      this.canvas.append(svg("text", { class: "tick", x: place, y: HEIGHT - 5, "text-anchor": "middle" }, step));
    }
    this.canvas.append(this.inside);
    return { x, y };
  }

  point(event) {
    if (this.unscale) this.moveTo(this.unscale(event.clientX - this.canvas.getBoundingClientRect().left));
  }

  /** Left and right: a step; with shift: ten; Home and End. */
  key(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const steps = this.allSteps();
    if (!steps.length || event.target !== this.element) return;
    let place = nearest(steps, this.at ?? steps[steps.length - 1]);
    if (by) place += by * (event.shiftKey ? 10 : 1);
    else if (event.key === "Home") place = 0;
    else if (event.key === "End") place = steps.length - 1;
    else if (event.key === "Escape") return this.leave();
    else return;
    event.preventDefault();
    this.moveTo(steps[Math.max(0, Math.min(steps.length - 1, place))]);
    say(`${this.title}: ${this.numbers.textContent}`);
  }
}

/** All curves show the numbers of one step while the pointer is on one of them. */
const cursor = {
  charts: new Set(),
  step: null,
  move(step) {
    this.step = step;
    for (const chart of this.charts) chart.mark();
  },
};

/**
 * Curves of one metric: a line for each run, the single steps behind it in a lighter tone.
 * series: [{label, tone, steps, values, thin: [{steps, values}, ...]}]; marks: steps with a warning.
 */
class LineChart extends Figure {
  constructor(title, hint, advice) {
    super(title, hint, advice);
    this.series = [];
    cursor.charts.add(this);
  }

  /** leavesFirst: the first step's number may be outside of the drawing. */
  update(series, window, marks, range, leavesFirst = false) {
    Object.assign(this, { series, window, marks, range, leavesFirst });
    this.draw();
  }

  allSteps() {
    return [...new Set(this.series.flatMap((one) => one.steps))].sort((a, b) => a - b);
  }

  draw() {
    if (!this.width || !this.series.length) return;
    const seen = (values) => (this.leavesFirst && values.length > 2 ? values.slice(1) : values);
    const values = this.series.flatMap((one) => [...seen(one.values), ...one.thin.flatMap((other) => other.values)]);
    let low = values.reduce((a, b) => Math.min(a, b), Infinity);
    let high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    if (low === high) [low, high] = [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
    const { x, y } = this.frame(this.range, [low, high]);
    this.scales = { x, y };
    for (const step of this.marks) {
      const px = x(step);
      const bottom = HEIGHT - MARGIN.bottom;
      this.canvas.append(svg("path", { class: "mark", d: `M${px} ${bottom - 7}l4 7h-8z` }));
    }
    for (const { tone, steps, values: own, thin } of this.series) {
      const line = (kind, d) => this.inside.append(svg("path", { class: `line ${kind} tone${tone}`, d }));
      if (this.window > 1) line("single", linePath(steps, own, x, y));
      for (const other of thin) line("companion", linePath(other.steps, smooth(other.values, this.window), x, y));
      line("smooth", linePath(steps, smooth(own, this.window), x, y));
      if (steps.length < 25) {
        const points = smooth(own, this.window);
        steps.forEach((step, i) => {
          this.inside.append(svg("circle", { class: `dot tone${tone}`, cx: x(step), cy: y(points[i]), r: 2.2 }));
        });
      }
    }
    this.needle = svg("line", { class: "needle", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom });
    this.canvas.append(this.needle);
    this.mark();
  }

  moveTo(step) {
    const steps = this.allSteps();
    this.at = steps[nearest(steps, step)];
    cursor.move(this.at);
  }

  leave() {
    this.at = null;
    cursor.move(null);
  }

  /** The numbers at the cursor, or the last ones. */
  mark() {
    if (!this.needle) return;
    const { step } = cursor;
    this.needle.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step !== null) {
      this.needle.setAttribute("x1", this.scales.x(step));
      this.needle.setAttribute("x2", this.scales.x(step));
    }
    let shown = null;
    const texts = this.series.map(({ label, tone, steps, values, thin }) => {
      const place = step === null ? steps.length - 1 : nearest(steps, step);
      shown = steps[place];
      const others = thin.map((other) => short(other.values[nearest(other.steps, shown)]));
      const text = short(values[place]) + (others.length ? ` (${others.join(" to ")})` : "");
      return el("span", {}, el("i", { class: `swatch tone${tone}` }), label ? `${label} ` : "", el("b", {}, text), " ");
    });
    this.numbers.replaceChildren(...texts, el("small", {}, `step ${step ?? shown}`));
  }
}

/** The seconds of each phase, one upon the other. parts: [{name, values}]; steps: their steps. */
class StackChart extends Figure {
  update(steps, parts) {
    Object.assign(this, { steps, parts });
    this.draw();
  }

  allSteps() {
    return this.steps;
  }

  draw() {
    if (!this.width || !this.steps?.length) return;
    const { steps, parts } = this;
    const totals = steps.map((_, i) => parts.reduce((sum, part) => sum + part.values[i], 0));
    const seen = totals.length > 2 ? totals.slice(1) : totals; // the first step compiles, and would hide all others
    const [first, last] = [steps[0], steps[steps.length - 1]];
    const { x, y } = this.frame([first - 0.5, last + 0.5], [0, Math.max(...seen)], (value) => short(value) + " s");
    const bars = Math.min(steps.length, Math.max(1, Math.floor((this.width - MARGIN.left - MARGIN.right) / 3)));
    for (let bar = 0; bar < bars; bar++) {
      const [from, to] = [bar, bar + 1].map((k) => Math.floor((k * steps.length) / bars));
      let below = 0;
      const left = x(steps[from] - 0.5);
      const width = Math.max(1, x((steps[to] ?? last + 1) - 0.5) - left - 0.6);
      parts.forEach((part, tone) => {
        const height = part.values.slice(from, to).reduce((sum, value) => sum + value, 0) / (to - from);
        if (height <= 0) return;
        const top = Math.max(MARGIN.top, y(below + height));
        if (top < y(below)) this.canvas.append(
          svg("rect", { class: `area tone${tone % 7}`, x: left, width, y: top, height: y(below) - top }),
        );
        below += height;
      });
    }
    this.leave();
  }

  moveTo(step) {
    const place = nearest(this.steps, step);
    this.at = this.steps[place];
    this.tell(`step ${this.at}`, (part) => part.values[place]);
  }

  leave() {
    this.at = null;
    this.tell("mean", (part) => part.values.reduce((a, b) => a + b, 0) / part.values.length);
  }

  tell(when, valueOf) {
    const texts = this.parts.map((part, tone) =>
      el("span", {}, el("i", { class: `swatch tone${tone % 7}` }), `${part.name} `, el("b", {}, `${short(valueOf(part))} s`), " "),
    );
    this.numbers.replaceChildren(...texts, el("small", {}, when));
  }
}

/** How a number was distributed in each step: columns are steps, cells of a stronger colour hold more. rows: [[step, pairs], ...]. */
class HeatChart extends Figure {
  update(rows) {
    this.rows = rows;
    this.draw();
  }

  allSteps() {
    return this.rows.map(([step]) => step);
  }

  draw() {
    if (!this.width || !this.rows?.length) return;
    const values = this.rows.flatMap(([, pairs]) => pairs.map(([value]) => value));
    const low = Math.min(...values);
    const high = Math.max(...values);
    const bins = Math.max(1, Math.min(20, new Set(values).size));
    const gap = (high - low) / Math.max(bins - 1, 1) || 1; // of values, so that few values have a row each
    const steps = this.allSteps();
    const [first, last] = [steps[0], steps[steps.length - 1]];
    const isWhole = values.every(Number.isInteger);
    const format = (value) => (isWhole && !Number.isInteger(value) ? "" : short(value));
    const { x, y } = this.frame([first - 0.5, last + 0.5], [low - gap / 2, high + gap / 2], format);
    const columns = Math.min(steps.length, Math.floor((this.width - MARGIN.left - MARGIN.right) / 3));
    for (let column = 0; column < columns; column++) {
      const [from, to] = [column, column + 1].map((k) => Math.floor((k * steps.length) / columns));
      const counts = new Array(bins).fill(0);
      for (const [, pairs] of this.rows.slice(from, to)) {
        for (const [value, count] of pairs) counts[Math.min(bins - 1, Math.round((value - low) / gap))] += count;
      }
      const total = counts.reduce((a, b) => a + b, 0);
      const left = x(steps[from] - 0.5);
      const width = Math.max(1, x((steps[to] ?? last + 1) - 0.5) - left - 0.4);
      counts.forEach((count, bin) => {
        if (!count) return;
        const top = y(low + (bin + 0.5) * gap);
        const height = Math.max(1, y(low + (bin - 0.5) * gap) - top - 0.4);
        const opacity = (0.12 + 0.88 * Math.sqrt(count / total)).toFixed(3);
        this.canvas.append(svg("rect", { class: "cell", x: left, y: top, width, height, "fill-opacity": opacity }));
      });
    }
    this.leave();
  }

  moveTo(step) {
    const [at, pairs] = this.rows[nearest(this.allSteps(), step)];
    this.at = at;
    this.tell(`step ${at}`, pairs);
  }

  leave() {
    this.at = null;
    const [step, pairs] = this.rows[this.rows.length - 1];
    this.tell(`step ${step}`, pairs);
  }

  tell(when, pairs) {
    const count = pairs.reduce((sum, pair) => sum + pair[1], 0);
    const mean = pairs.reduce((sum, [value, times]) => sum + value * times, 0) / count;
    const quantile = (share) => {
      let seen = 0;
      return pairs.find(([, times]) => (seen += times) >= share * count)[0];
    };
    const parts = { mean, min: pairs[0][0], median: quantile(0.5), max: pairs[pairs.length - 1][0] };
    const texts = Object.entries(parts).map(([name, value]) => el("span", {}, `${name} `, el("b", {}, short(value)), " "));
    this.numbers.replaceChildren(...texts, el("small", {}, `of ${count}, ${when}`));
  }
}
