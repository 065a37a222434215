// The audit log: who called what, and whether it was allowed.

import { el, empty, loading, problem, show, table } from "./dom.js";
import { duration, size, when } from "./format.js";
import { poll } from "./poll.js";

/** How long the daemon waits for more, in seconds. */
const WAIT_S = 25;
const PAGE = 500;
const KEPT_MAX = 5000;
/** So many rows are looked for at first, in so many pages at most. */
const FIRST = { rows: 20, pages: 5 };

export class AuditView {
  constructor(shell) {
    this.shell = shell;
    this.life = new AbortController();
    this.calls = [];
    const field = (label, input) => el("label", { class: "field" }, el("span", {}, label), input);
    const text = (id, placeholder) => el("input", { id, type: "text", placeholder, spellcheck: "false", autocapitalize: "none", autocomplete: "off" });
    this.inputs = { tool: text("audit-tool", "vm_delete"), vm: text("audit-vm", "name or id"), caller: text("audit-caller", "uid:0") };
    this.denied = el("input", { type: "checkbox", id: "audit-denied", onchange: () => this.#again() });
    this.changes = el("input", { type: "checkbox", id: "audit-changes", onchange: () => this.#draw() });
    this.changes.checked = true;
    const form = el("form", { class: "filters", onsubmit: (event) => { event.preventDefault(); this.#again(); } },
      field("Tool", this.inputs.tool), field("Virtual machine", this.inputs.vm), field("Caller", this.inputs.caller),
      el("label", { class: "check", title: "Leave out calls that only read, such as those of this page" }, this.changes, "Changes"),
      el("label", { class: "check" }, this.denied, "Denied only"), el("button", { type: "submit" }, "Filter"));
    this.list = el("div", {}, loading("calls"));
    this.more = el("button", { type: "button", hidden: true, onclick: () => this.#older() }, "Load older");
    const back = shell.router.link("", { class: "back" }, "← All virtual machines");
    this.element = el("article", { class: "stack" }, back, el("h1", {}, "Audit log"), form, this.list, this.more);
  }

  start() {
    this.#again();
  }

  stop() {
    this.life.abort();
    this.following?.abort();
  }

  #filter() {
    const given = Object.entries(this.inputs).map(([key, input]) => [key, input.value.trim()]).filter(([, value]) => value);
    return { ...Object.fromEntries(given), ...(this.denied.checked && { outcome: "denied" }) };
  }

  /** Reads the newest calls, then waits for more. */
  #again() {
    this.following?.abort();
    const following = new AbortController();
    this.following = following;
    const filter = this.#filter();
    let last;
    poll(following.signal, 500, async () => {
      const args = last === undefined ? { ...filter, limit: PAGE } : { ...filter, after: last, wait_s: WAIT_S, limit: PAGE };
      const { facts } = await this.shell.client.call("audit_list", args, { signal: following.signal });
      this.shell.answered();
      if (last === undefined) {
        this.calls = facts.calls ?? [];
        this.cursor = facts.next_cursor;
        for (let page = 1; page < FIRST.pages && this.cursor && this.#shown().length < FIRST.rows; page += 1) await this.#older();
      } else {
        this.calls = [...(facts.calls ?? []).reverse(), ...this.calls].slice(0, KEPT_MAX);
      }
      last = facts.last;
      this.#draw();
    }, (error) => {
      if (!this.shell.failed(error)) return false;
      if (error.code !== "daemon_down") show(this.list, error.message, () => problem(error));
      return error.code === "daemon_down";
    });
  }

  async #older() {
    try {
      const { facts } = await this.shell.client.call("audit_list", { ...this.#filter(), limit: PAGE, cursor: this.cursor }, { signal: this.life.signal });
      this.calls = [...this.calls, ...(facts.calls ?? [])];
      this.cursor = facts.next_cursor;
      this.#draw();
    } catch (error) {
      this.shell.failed(error);
    }
  }

  /** The calls that are not left out. Those that were denied never are. */
  #shown() {
    return this.changes.checked ? this.calls.filter((call) => call.outcome !== "ok" || !this.shell.client.onlyReads(call.tool)) : this.calls;
  }

  #draw() {
    this.more.hidden = !this.cursor;
    const calls = this.#shown();
    const names = new Map((this.shell.list.vms ?? []).map((vm) => [vm.id, vm.name]));
    show(this.list, calls, () => calls.length ? table([
      ["Time", (call) => when(call.at)],
      ["Caller", (call) => call.caller, "mono"],
      ["Tool", (call) => call.tool, "mono"],
      ["VM", (call) => names.get(call.vm) ?? call.vm ?? ""],
      ["Outcome", (call) => el("span", { class: `badge ${call.outcome === "ok" ? "good" : "bad"}` }, call.outcome)],
      ["Rule", (call) => call.rule, "minor"],
      ["Took", (call) => duration(call.duration_us / 1000), "number minor"],
      ["In / out", (call) => `${size(call.bytes_in)} / ${size(call.bytes_out)}`, "number minor"],
    ], calls, { label: "Calls" }) : empty("No calls fit"));
  }
}
