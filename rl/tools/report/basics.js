"use strict";
// Small helpers that the other files use: elements, numbers as text, the values of tokens, the screen reader's line.
//
// Everything that a policy, a reward function or a file name wrote becomes a text node or the value of an attribute
// that holds text. No string is ever read as HTML.

/** An element with attributes, listeners (`onclick`) and children (elements or text; null is left out). */
function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** The same for the parts of a drawing. */
function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

function byId(id) {
  return document.getElementById(id);
}

/** Replaces what is below a section's heading. */
function refill(section, ...children) {
  const [heading] = section.children;
  section.replaceChildren(heading, ...children.filter((child) => child));
}

/** A number in at most four digits: 0.8312, 12.3, 4.1k, 2e-7. */
function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "-";
  const size = Math.abs(value);
  if (size >= 1e9) return (value / 1e9).toPrecision(3) + "G";
  if (size >= 1e6) return (value / 1e6).toPrecision(3) + "M";
  if (size >= 1e4) return (value / 1e3).toPrecision(3) + "k";
  if (Number.isInteger(value)) return String(value);
  if (size < 1e-3) return value.toExponential(1);
  return String(Number(value.toPrecision(size >= 100 ? 4 : 3)));
}

/** A number with its sign, for what may be either. */
function signed(value) {
  return value > 0 ? "+" + short(value) : short(value);
}

function percent(share) {
  return (100 * share).toFixed(1) + " %";
}

/** Any JSON value as text; text stays as it is. */
function asText(value) {
  return typeof value === "string" ? value : JSON.stringify(value, null, 1);
}

/** The numbers of an entry of `rl/files/token_values.py`: code c stands for sign(c) (c / 127)^2 largest. */
function decodeValues(entry) {
  const bytes = atob(entry.codes);
  const values = new Float64Array(bytes.length);
  for (let i = 0; i < bytes.length; i++) {
    const code = (bytes.charCodeAt(i) << 24) >> 24; // an int8
    values[i] = code === -128 ? NaN : Math.sign(code) * (code / 127) ** 2 * entry.largest;
  }
  return values;
}

/** Says something to a screen reader. */
function say(text) {
  byId("said").textContent = text;
}

/** Shows a small box near a point of the window; null hides it. */
function showTip(text, x = 0, y = 0) {
  const tip = byId("tip");
  tip.hidden = text === null;
  if (text === null) return;
  tip.textContent = text;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(x + 12, innerWidth - box.width - 8)) + "px";
  tip.style.top = (y + 18 + box.height > innerHeight ? y - box.height - 8 : y + 18) + "px";
}

/** A row of radio buttons that looks like one control. choices: [value, label, why it cannot be chosen or ""]. */
function segments(legend, name, choices, chosen, onchange) {
  return el(
    "fieldset",
    { class: "segments" },
    el("legend", {}, legend),
    choices.map(([value, label, problem]) =>
      el(
        "label",
        { title: problem || null },
        el("input", {
          type: "radio",
          name,
          value,
          checked: value === chosen,
          disabled: Boolean(problem),
          onchange: () => onchange(value),
        }),
        el("span", {}, label),
      ),
    ),
  );
}

/** A labelled control. */
function field(label, control) {
  return el("label", { class: "field" }, el("span", {}, label), control);
}

/** A select with [value, label] options. */
function select(options, chosen, onchange) {
  return el(
    "select",
    { onchange: (event) => onchange(event.target.value) },
    options.map(([value, label]) => el("option", { value, selected: String(value) === String(chosen) }, label)),
  );
}
