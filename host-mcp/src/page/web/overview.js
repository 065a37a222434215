// What a VM is: its size, its system, how much memory and disk it uses.

import { el, facts, loading, show } from "./dom.js";
import { since, size, span, when } from "./format.js";
import { poll } from "./poll.js";

const EVERY_MS = 10_000;

export class OverviewTab {
  constructor(view) {
    this.view = view;
    this.life = new AbortController();
    this.element = el("div", { class: "grid" }, loading("the virtual machine"));
  }

  start() {
    if (!this.view.shell.client.offers("guest_os_info")) return;
    poll(this.life.signal, EVERY_MS, () => this.#look(), (error) => {
      this.os = undefined;
      this.#draw();
      return this.view.shell.failed(error);
    });
  }

  stop() {
    this.life.abort();
  }

  changed(details) {
    this.details = details;
    if (details.state !== "ready") this.os = undefined;
    this.#draw();
    // The first answer need not wait for the next round.
    if (this.os === undefined && this.view.shell.client.offers("guest_os_info")) this.#look().catch(() => {});
  }

  /** Asks the guest. Such a call counts as work in the VM, so one that stops when it is idle is asked only once. */
  async #look() {
    const { details } = this;
    if (details?.state !== "ready" || this.isAsking || (details.idle_stop && this.os)) return;
    this.isAsking = true;
    try {
      const { facts: os } = await this.view.call("guest_os_info", {}, { signal: this.life.signal });
      this.os = os;
    } finally {
      this.isAsking = false;
    }
    this.#draw();
  }

  #draw() {
    const { details: vm, os } = this;
    if (!vm) return;
    show(this.element, [vm, os], () => [
      card("Machine", facts([
        ["State", vm.state],
        ["Up", vm.started_at && ["running", "ready", "unreachable"].includes(vm.state) ? el("span", { title: when(vm.started_at) }, since(vm.started_at)) : ""],
        ["Size", `${vm.vcpus} vCPU, ${size(vm.memory)} memory`],
        ["Image", vm.image?.name],
        ["Kernel", os?.kernel ?? vm.guest?.kernel ?? vm.kernel],
        ["System", os?.os ?? vm.guest?.os],
        ["Runs in", [vm.driver, vm.accel].filter(Boolean).join(", ")],
        ["Made", vm.created_at && `${when(vm.created_at)}${vm.owner ? ` by ${vm.owner}` : ""}`],
        ["Ends", vm.expires_at && `${vm.protected ? "stopped" : "deleted"} at ${when(vm.expires_at)}`],
        ["Idle stop", vm.idle_stop && `${vm.idle_action === "suspend" ? "suspended " : ""}after ${vm.idle_stop}${vm.idle_stop_at ? `, at ${when(vm.idle_stop_at)}` : ""}`],
        ["Protected", vm.protected ? "yes: it cannot be deleted" : ""],
        ["Shell", vm.connect?.shell && el("code", {}, vm.connect.shell)],
        ["Id", el("code", {}, vm.id)],
      ])),
      os && card("Use", [
        meter("Memory", os.memory_total_bytes - os.memory_available_bytes, os.memory_total_bytes),
        meter("Disk", os.disk_total_bytes - os.disk_available_bytes, os.disk_total_bytes),
        facts([["Load", os.load?.map((load) => load.toFixed(2)).join("  ")], ["Since boot", span(os.uptime_s)], ["Failed units", os.system?.failed?.join(", ")]]),
      ]),
      vm.drives?.length > 0 && card("Drives", el("ul", { class: "plain" }, vm.drives.map((drive) =>
        el("li", {}, el("span", {}, drive.name), el("span", { class: "muted" }, [size(drive.size), drive.root ? "/" : drive.mount, drive.read_only && "read-only"].filter(Boolean).join(" · ")))))),
      vm.published?.length > 0 && card("Published ports", el("ul", { class: "plain" }, vm.published.map((port) =>
        el("li", {}, el("span", {}, `port ${port.port}`), el("code", {}, port.address ?? port.socket ?? ""))))),
      Object.keys(vm.tags ?? {}).length > 0 && card("Labels", facts(Object.entries(vm.tags))),
    ].filter(Boolean));
  }
}

function card(title, ...content) {
  return el("section", { class: "card" }, el("h2", {}, title), ...content);
}

function meter(label, used, total) {
  const share = total > 0 ? Math.min(100, Math.round(used * 100 / total)) : 0;
  const text = `${size(used)} of ${size(total)}`;
  const bar = el("progress", { class: share > 90 ? "full" : undefined, value: String(share), "aria-label": `${label}: ${text}` });
  bar.max = 100;
  return el("div", { class: "meter" }, el("span", {}, label), el("span", { class: "muted" }, text), bar);
}
