// Builds elements. Everything that comes from a daemon or a guest becomes text nodes or values of attributes listed here; nothing parses HTML.

const PLAIN = new Set(["class", "id", "type", "role", "href", "for", "value", "placeholder", "title", "tabindex", "autocomplete", "list", "min",
  "max", "step", "scope", "colspan", "spellcheck", "autocapitalize", "datetime"]);

/** An element. `attributes`: those in `PLAIN`, `aria-*` and `data-*` as they are; `on*` are listeners; booleans are properties. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") element[name] = value;
    else if (PLAIN.has(name) || /^(aria|data)-/.test(name)) element.setAttribute(name, String(value));
    else throw new Error(`the attribute ${name} is not known`);
  }
  element.append(...children.flat().filter((child) => child !== undefined && child !== null && child !== false));
  return element;
}

/** Replaces what an element shows, unless `data` is what it shows already. Keeps the focus on the element with the same `data-key`. */
export function show(element, data, render) {
  const key = JSON.stringify(data);
  if (element.shown === key) return;
  element.shown = key;
  const focused = element.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  element.replaceChildren(...[render(data)].flat());
  if (focused === undefined) return;
  const again = [...element.querySelectorAll("[data-key]")].find((one) => one.dataset.key === focused);
  again?.focus({ preventScroll: true });
}

/** A table with a header row. `columns`: `[title, render(row), class]`; `onpick(row)`, if given, makes the first cell a button. */
export function table(columns, rows, { key, label, onpick, picked } = {}) {
  const head = el("tr", {}, columns.map(([title, , kind]) => el("th", { scope: "col", class: kind }, title)));
  const body = rows.map((row) => {
    const cells = columns.map(([title, render, kind], at) => {
      const content = render(row);
      const inner = onpick && at === 0
        ? el("button", { class: "pick", type: "button", "data-key": key(row), onclick: () => onpick(row) }, content)
        : content;
      return el("td", { class: kind, "data-title": title }, inner);
    });
    const isPicked = picked !== undefined && key(row) === picked;
    return el("tr", { class: isPicked ? "picked" : undefined, "aria-current": isPicked ? "true" : undefined }, cells);
  });
  return el("div", { class: "table" }, el("table", { "aria-label": label }, el("thead", {}, head), el("tbody", {}, body)));
}

/** A list of terms and values; rows without a value are left out. */
export function facts(rows) {
  const known = rows.filter(([, value]) => value !== undefined && value !== null && value !== "");
  return el("dl", { class: "facts" }, known.map(([term, value]) => el("div", {}, el("dt", {}, term), el("dd", {}, value))));
}

/** What stands where there is nothing to show. */
export function empty(title, text) {
  return el("div", { class: "empty" }, el("p", { class: "empty-title" }, title), text && el("p", {}, text));
}

/** What stands there until the first answer. */
export function loading(what) {
  return el("p", { class: "loading", role: "status" }, `Loading ${what} …`);
}

/** An error, with what to do next. */
export function problem(error) {
  return el("div", { class: "problem", role: "alert" }, el("p", {}, error.message), error.hint && el("p", { class: "hint" }, error.hint));
}

/** Text that grows at its end, and follows it while the reader is there. Keeps the last `max` characters. */
export class Tail {
  constructor(label, max = 200_000) {
    this.max = max;
    this.element = el("pre", { class: "tail", tabindex: "0", role: "log", "aria-label": label, "aria-live": "off" });
    this.length = 0;
  }

  add(text) {
    if (!text) return;
    const { element } = this;
    const isAtEnd = element.scrollHeight - element.scrollTop - element.clientHeight < 24;
    element.append(document.createTextNode(text));
    this.length += text.length;
    while (this.length > this.max && element.childNodes.length > 1) {
      this.length -= element.firstChild.data.length;
      element.firstChild.remove();
    }
    if (isAtEnd) element.scrollTop = element.scrollHeight;
  }
}
