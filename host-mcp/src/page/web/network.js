// What a VM may reach, and what was refused.

import { el, empty, facts, loading, show, table } from "./dom.js";
import { size, tone, when } from "./format.js";
import { poll } from "./poll.js";

/** How many connections are shown. */
const SHOWN_MAX = 300;
/** How long the daemon waits for more, in seconds. */
const WAIT_S = 25;

export class NetworkTab {
  constructor(view) {
    this.view = view;
    this.life = new AbortController();
    this.policy = el("div", { class: "grid" }, loading("the network"));
    this.log = el("div");
    this.onlyRefused = el("input", { type: "checkbox", id: "only-refused", onchange: () => this.#draw() });
    this.onlyRefused.checked = true;
    const title = el("div", { class: "log-head" }, el("h2", {}, "Connections"),
      el("label", { class: "check" }, this.onlyRefused, "Refused only"));
    this.element = el("div", { class: "stack" }, this.policy, title, this.log);
    this.lines = [];
    this.hasLog = view.shell.client.offers("network_log");
  }

  start() {
    if (!this.hasLog) return;
    let cursor;
    poll(this.life.signal, 300, async () => {
      const args = cursor === undefined ? { limit: SHOWN_MAX } : { cursor, wait_s: WAIT_S, limit: SHOWN_MAX };
      const { facts: said } = await this.view.call("network_log", args, { signal: this.life.signal });
      cursor = said.cursor;
      this.lines = [...(said.connections ?? []).reverse(), ...this.lines].slice(0, SHOWN_MAX);
      this.#draw();
    }, (error) => this.view.shell.failed(error));
  }

  stop() {
    this.life.abort();
  }

  changed({ network, network_note: note }) {
    if (!network) return;
    const rules = (list) => list?.length ? list.map((rule) => typeof rule === "string" ? rule : Object.values(rule).flat().join(" ")).join(", ") : "";
    const { counts = {}, interface: card } = network;
    show(this.policy, [network, note], () => [
      el("section", { class: "card" }, el("h2", {}, "Policy"), facts([
        ["Mode", network.mode], ["Preset", network.preset], ["Allowed", rules(network.allow)], ["Denied", rules(network.deny)],
        ["Groups", network.groups?.join(", ")], ["Address", card && [card.ipv4, card.ipv6].filter(Boolean).join(", ")], ["Until the next start", network.until_next_start],
      ]), note && el("p", { class: "muted" }, note)),
      el("section", { class: "card" }, el("h2", {}, "Since the daemon started"), facts([
        ["Made", String(counts.allowed ?? 0)], ["Refused", String(counts.denied ?? 0)], ["Failed", String(counts.failed ?? 0)],
        ["Open", String(counts.open ?? 0)], ["Sent", size(counts.sent_bytes ?? 0)], ["Received", size(counts.received_bytes ?? 0)],
      ])),
    ]);
    if (!this.hasLog) {
      this.lines = (network.denied ?? []).map((line) => ({ ...line, verdict: "denied", protocol: "" }));
      this.#draw();
    }
  }

  #draw() {
    const lines = this.onlyRefused.checked ? this.lines.filter((line) => line.verdict === "denied") : this.lines;
    show(this.log, lines, () => lines.length ? table([
      ["Time", (line) => when(line.at)],
      ["Outcome", (line) => el("span", { class: `badge ${tone(line.verdict)}` }, line.verdict === "denied" ? "refused" : line.verdict)],
      ["To", (line) => `${line.host}${line.port ? `:${line.port}` : ""}${line.address && line.address !== line.host ? ` (${line.address})` : ""}`, "wide mono"],
      ["Protocol", (line) => line.protocol],
      ["Reason", (line) => line.reason?.replaceAll("_", " ") ?? ""],
    ], lines, { label: "Connections" }) : empty(this.onlyRefused.checked ? "Nothing was refused" : "No connections yet"));
  }
}
