// Every change of a VM's state.

import { el, empty, loading, problem, show, table } from "./dom.js";
import { tone, when } from "./format.js";

export class HistoryTab {
  constructor(view) {
    this.view = view;
    this.life = new AbortController();
    this.rows = [];
    this.list = el("div", {}, loading("the history"));
    this.more = el("button", { type: "button", hidden: true, onclick: () => this.#older() }, "Load older");
    this.element = el("div", { class: "stack" }, this.list, this.more);
  }

  stop() {
    this.life.abort();
  }

  /** The VM's state changed if its generation did; where that is not told, its state is compared. */
  changed(details) {
    const mark = `${details.generation} ${details.state} ${details.boot_id} ${details.name}`;
    if (mark === this.mark) return;
    this.mark = mark;
    this.#read().catch((error) => {
      if (this.view.shell.failed(error)) this.list.replaceChildren(problem(error));
    });
  }

  async #read(cursor) {
    const { facts } = await this.view.call("vm_history", { limit: 100, ...(cursor && { cursor }) }, { signal: this.life.signal });
    this.rows = cursor ? [...this.rows, ...facts.transitions] : facts.transitions ?? [];
    this.cursor = facts.next_cursor;
    this.more.hidden = !this.cursor;
    const state = (word) => word ? el("span", { class: `badge ${tone(word)}` }, word) : "";
    show(this.list, this.rows, () => this.rows.length ? table([
      ["Time", (row) => when(row.at)],
      ["From", (row) => state(row.from)],
      ["To", (row) => row.to ? state(row.to) : "deleted"],
      ["Why", (row) => row.reason, "wide"],
      ["Who", (row) => row.who, "minor"],
    ], this.rows, { label: "Changes of state" }) : empty("Nothing happened yet"));
  }

  #older() {
    this.#read(this.cursor).catch((error) => this.view.shell.failed(error));
  }
}
