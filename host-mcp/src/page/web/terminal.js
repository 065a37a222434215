// A terminal in a VM: xterm.js over a command with a terminal, its output read and its input written by tools.

import { el, empty, problem } from "./dom.js";
import { poll } from "./poll.js";

/** A browser opens six connections to a daemon at most, and each open terminal waits on one. */
const OPEN_MAX = 3;
/** How long the guest waits for more output, in milliseconds. */
const WAIT_MS = 25_000;
/** How much output is taken at once, in bytes. */
const CHUNK = 262_144;
/** The longest that a shell lives, in seconds: one whose page vanished without a word ends by then. */
const LIFE_S = 12 * 3600;
const SHELL = 'exec "$(command -v bash || command -v sh)" -l';
const DARK = { background: "#101418", foreground: "#e4e8ec", cursor: "#e4e8ec", selectionBackground: "#3a5068" };
const LIGHT = {
  background: "#ffffff", foreground: "#1d2329", cursor: "#1d2329", selectionBackground: "#bcd7f5", black: "#1d2329", red: "#b3261e", green: "#1c7a37",
  yellow: "#8a6100", blue: "#0b5cad", magenta: "#8a3b9e", cyan: "#0e7583", white: "#5b6570", brightBlack: "#5b6570", brightRed: "#c4372e",
  brightGreen: "#2a8a46", brightYellow: "#9a6d00", brightBlue: "#2470c2", brightMagenta: "#9b4cae", brightCyan: "#1d8593", brightWhite: "#1d2329",
};

/**
 * From now on the document makes elements as the content security policy wants them: style sheets that a script constructs in place of
 * `style` elements, and style declarations in place of `style` attributes. Xterm.js makes both.
 */
function makeStrictly() {
  if (Object.hasOwn(document, "createElement")) return;
  const make = document.createElement.bind(document);
  document.createElement = (name, options) => {
    const element = make(name === "style" ? "template" : name, options);
    if (name === "style") {
      const sheet = new CSSStyleSheet();
      document.adoptedStyleSheets.push(sheet);
      Object.defineProperty(element, "textContent", { get: () => "", set: (text) => sheet.replaceSync(text) });
      element.remove = () => {
        document.adoptedStyleSheets = document.adoptedStyleSheets.filter((one) => one !== sheet);
        Element.prototype.remove.call(element);
      };
    } else if (name === "span") {
      element.setAttribute = (key, value) => {
        if (key === "style") element.style.cssText = value;
        else Element.prototype.setAttribute.call(element, key, value);
      };
    }
    return element;
  };
}

/** Loads a style sheet once; done when it applies. */
function wearStyle(href) {
  if (document.querySelector(`link[href="${href}"]`)?.sheet) return undefined;
  return new Promise((done, failed) => {
    const link = Object.assign(document.createElement("link"), { rel: "stylesheet", href });
    link.addEventListener("load", done);
    link.addEventListener("error", () => {
      link.remove();
      failed(new Error("The terminal's style could not be loaded."));
    });
    document.head.append(link);
  });
}

/** The terminals of one login. They go on while another view is shown. */
export class Terminals {
  #open = new Map();

  /** The tab of a VM's view. */
  tab(view) {
    return new TerminalTab(view, this.#open);
  }

  /** Ends all of them; done when the daemon has heard it. */
  endAll(keepalive) {
    const told = [...this.#open.values()].map((terminal) => terminal.end(keepalive));
    this.#open.clear();
    return Promise.all(told);
  }
}

class TerminalTab {
  constructor(view, open) {
    Object.assign(this, { view, open });
    this.element = el("div", { class: "terminal-tab" });
    this.sizes = new ResizeObserver(() => this.open.get(view.id)?.fit());
  }

  start() {
    this.#draw();
    this.sizes.observe(this.element);
  }

  stop() {
    this.sizes.disconnect();
  }

  /** The VM may have become ready, or have ended. */
  changed(details) {
    if (details.state !== this.state) {
      this.state = details.state;
      this.#draw();
    }
  }

  #draw() {
    const { view, open } = this;
    const terminal = open.get(view.id);
    if (terminal) {
      if (this.element.firstChild === terminal.element) return;
      this.element.replaceChildren(terminal.element);
      terminal.fit();
      terminal.focus();
      return;
    }
    const state = view.details?.state ?? view.vm?.state;
    if (state !== "ready") {
      this.element.replaceChildren(empty("No terminal", `The virtual machine is ${state ?? "not known yet"}: a terminal needs it to be ready.`));
      return;
    }
    const button = el("button", { type: "button", class: "primary", onclick: () => this.#begin(button) }, "Open a shell");
    this.element.replaceChildren(el("div", { class: "empty" }, el("p", {}, "A login shell as root. It counts as work in the virtual machine until it ends."), button));
  }

  async #begin(button) {
    const { view, open } = this;
    if (open.size >= OPEN_MAX) {
      this.element.append(problem({ message: `${OPEN_MAX} terminals are open.`, hint: "End one of them first." }));
      return;
    }
    button.disabled = true;
    try {
      await Promise.all([import("/xterm.js"), wearStyle("/xterm.css")]);
      makeStrictly();
      const terminal = new ShellTerminal(view, globalThis.Terminal, () => {
        open.delete(view.id);
        if (this.element.isConnected) this.#draw();
      });
      open.set(view.id, terminal);
      this.#draw();
      await terminal.begin();
    } catch (error) {
      open.get(view.id)?.end();
      open.delete(view.id);
      if (!view.shell.failed(error)) return;
      this.#draw();
      this.element.append(problem(error));
    }
  }
}

class ShellTerminal {
  constructor(view, Terminal, closed) {
    Object.assign(this, { client: view.shell.client, shell: view.shell, vm: view.id, closed });
    this.life = new AbortController();
    this.waiting = [];
    this.isOver = false;
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    this.term = new Terminal({
      fontFamily: "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace", fontSize: 13, scrollback: 5000,
      cursorBlink: false, theme: scheme.matches ? DARK : LIGHT, linkHandler: { activate: () => {} }, minimumContrastRatio: 4.5,
    });
    scheme.addEventListener("change", () => { this.term.options.theme = scheme.matches ? DARK : LIGHT; }, { signal: this.life.signal });
    this.screen = el("div", { class: "term-screen" });
    this.note = el("span", { class: "muted" }, "Starting a shell …");
    this.button = el("button", { type: "button", onclick: () => this.end() }, "End");
    this.element = el("div", { class: "terminal-box" }, el("div", { class: "terminal-head" }, this.note, this.button), this.screen);
    this.term.onData((text) => this.#type(new TextEncoder().encode(text)));
    this.term.onBinary((text) => this.#type(Uint8Array.from(text, (byte) => byte.charCodeAt(0))));
  }

  #call(tool, args, options = {}) {
    return this.client.call(tool, { vm: this.vm, ...args }, { signal: this.life.signal, ...options });
  }

  async begin() {
    this.term.open(this.screen);
    this.fit();
    this.focus();
    const { cols, rows } = this.term;
    const { facts } = await this.#call("guest_command_start", { command: SHELL, tty: true, cols, rows, timeout_s: LIFE_S, env: { TERM: "xterm-256color" } });
    this.id = facts.command_id;
    this.note.textContent = `Shell ${this.id}`;
    this.size = `${cols} ${rows}`;
    this.#send();
    let cursor;
    poll(this.life.signal, 0, async () => {
      const args = { id: this.id, stream: "stdout", encoding: "base64", limit: CHUNK, wait_ms: WAIT_MS, ...(cursor && { cursor }) };
      const said = await this.#call("guest_command_output", args);
      cursor = said.facts.cursor;
      const bytes = Uint8Array.from(atob((said.streams.stdout ?? "").trim()), (byte) => byte.charCodeAt(0));
      if (bytes.length) await new Promise((resolve) => this.term.write(bytes, resolve));
      if (said.facts.state === "running" || said.facts.more) return true;
      this.#over(said.facts.signal ?? `exit ${said.facts.status ?? 0}`);
      return false;
    }, (error) => {
      if (!this.shell.failed(error)) return false;
      if (error.code === "daemon_down") return true;
      this.#over(error.message);
      return false;
    });
  }

  #over(why) {
    this.isOver = true;
    this.note.textContent = `The shell ended: ${why}.`;
    this.button.textContent = "Close";
  }

  #type(bytes) {
    if (this.isOver) return;
    this.waiting.push(...bytes);
    this.#send();
  }

  /** Writes what was typed, one call at a time, so that its order is kept. */
  async #send() {
    if (this.isSending || !this.id) return;
    this.isSending = true;
    try {
      while (this.waiting.length && !this.isOver) {
        const bytes = this.waiting.splice(0, 32_768);
        const input = btoa(String.fromCharCode(...bytes));
        const { facts } = await this.#call("guest_command_input", { id: this.id, input, encoding: "base64" });
        const rest = bytes.slice(facts.written_bytes ?? bytes.length);
        this.waiting.unshift(...rest);
        if (rest.length) await new Promise((resolve) => setTimeout(resolve, 100));
      }
    } catch (error) {
      this.waiting = [];
      if (!this.life.signal.aborted && this.shell.failed(error) && !this.isOver) this.note.textContent = `Not written: ${error.message}`;
    }
    this.isSending = false;
  }

  /** As many columns and rows as there is room for. */
  fit() {
    const { term, screen } = this;
    const shown = screen.querySelector(".xterm-screen");
    if (!shown?.clientWidth || !screen.clientWidth) return;
    const cell = { width: shown.clientWidth / term.cols, height: shown.clientHeight / term.rows };
    const cols = Math.max(20, Math.floor((screen.clientWidth - 24) / cell.width));
    const rows = Math.max(5, Math.floor((screen.clientHeight - 8) / cell.height));
    if (cols !== term.cols || rows !== term.rows) term.resize(cols, rows);
    if (!this.id || this.isOver || this.size === `${cols} ${rows}`) return;
    this.size = `${cols} ${rows}`;
    clearTimeout(this.resizing);
    this.resizing = setTimeout(() => this.#call("guest_command_input", { id: this.id, cols: term.cols, rows: term.rows }).catch(() => {}), 150);
  }

  focus() {
    this.term.focus();
  }

  /** Hangs up, as a closed window does. With `keepalive`, the page may be gone before the answer. */
  end(keepalive = false) {
    const told = this.id && !this.isOver &&
      this.client.call("guest_command_signal", { vm: this.vm, id: this.id, signal: "HUP" }, { keepalive }).catch(() => {});
    this.isOver = true;
    this.life.abort();
    this.term.dispose();
    this.closed();
    return told;
  }
}
