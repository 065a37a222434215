// The list of VMs, with how long each has been up.

import { el, empty, loading, problem, show } from "./dom.js";
import { since, size, tone } from "./format.js";
import { poll } from "./poll.js";
import { pathOf } from "./router.js";

const EVERY_MS = 3000;
/** How many VMs are asked for in a row when they were started. */
const ASKED_MAX = 25;

export class VmList {
  constructor(shell) {
    this.shell = shell;
    this.vms = undefined;
    this.started = new Map();
    this.filter = el("input", {
      type: "search", class: "filter", placeholder: "Filter by name, state or image", "aria-label": "Filter virtual machines",
      spellcheck: "false", autocomplete: "off", oninput: () => this.#draw(),
    });
    this.count = el("span", { class: "count" });
    this.rows = el("ul", { class: "vms", onkeydown: (event) => this.#key(event) }, el("li", {}, loading("virtual machines")));
    const make = shell.client.offers("vm_create")
      && el("button", { type: "button", class: "primary", onclick: () => shell.create() }, "New VM");
    this.element = el("div", { class: "vm-list" }, el("div", { class: "side-head" }, el("h2", {}, "Virtual machines ", this.count), make), this.filter, this.rows);
  }

  start(signal) {
    this.signal = signal;
    poll(signal, EVERY_MS, () => this.refresh(), (error) => {
      if (this.vms === undefined) this.rows.replaceChildren(el("li", {}, problem(error)));
      return this.shell.failed(error);
    });
    const ticking = setInterval(() => this.#tick(), 1000);
    signal.addEventListener("abort", () => clearInterval(ticking));
  }

  /** Asks for the list now. */
  async refresh() {
    const { client } = this.shell;
    let vms = [];
    let cursor;
    do {
      const { facts } = await client.call("vm_list", { limit: 500, ...(cursor && { cursor }) }, { signal: this.signal });
      vms = vms.concat(facts.vms ?? []);
      cursor = facts.next_cursor;
    } while (cursor);
    this.vms = vms;
    this.shell.answered();
    this.#draw();
    this.shell.view?.listed?.(vms);
    await this.#ask();
  }

  choose(id) {
    this.chosen = id;
    this.#draw();
  }

  /** Learns when running VMs were started, once for each boot. */
  async #ask() {
    if (!this.shell.client.offers("vm_inspect")) return;
    const unknown = this.vms.filter((vm) => isUp(vm) && vm.boot_id && this.started.get(vm.id)?.boot !== vm.boot_id);
    for (const vm of unknown.slice(0, ASKED_MAX)) {
      try {
        const { facts } = await this.shell.client.call("vm_inspect", { vm: vm.id }, { signal: this.signal });
        this.started.set(vm.id, { boot: facts.boot_id ?? vm.boot_id, at: facts.started_at });
      } catch (error) {
        if (!error.code || error.code === "daemon_down" || error.code === "unauthorized") throw error;
      }
    }
    this.#tick();
  }

  /** How long a VM has been up. */
  #uptime(vm) {
    const started = this.started.get(vm.id);
    return isUp(vm) && started?.at && started.boot === vm.boot_id ? `up ${since(started.at, 1)}` : "";
  }

  #tick() {
    for (const row of this.rows.querySelectorAll("[data-uptime]")) {
      const vm = this.vms?.find((one) => one.id === row.dataset.uptime);
      const text = vm ? this.#uptime(vm) : "";
      if (row.textContent !== text) row.textContent = text;
    }
  }

  #draw() {
    const { vms } = this;
    if (vms === undefined) return;
    const words = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (vm) => words.every((word) =>
      [vm.name, vm.state, vm.image, ...Object.entries(vm.tags ?? {}).flat()].some((text) => String(text).toLowerCase().includes(word)));
    const shown = vms.filter(fits);
    this.count.textContent = vms.length ? String(vms.length) : "";
    this.filter.hidden = vms.length < 2;
    show(this.rows, [shown, this.chosen, vms.length], () => {
      if (!vms.length) {
        const hint = this.shell.client.offers("vm_create") ? "Make one with “New VM”, or let an agent call vm_create." : "Agents make them with vm_create.";
        return el("li", {}, empty("No virtual machines yet", hint));
      }
      if (!shown.length) return el("li", {}, empty("Nothing fits the filter"));
      return shown.map((vm) => this.#row(vm));
    });
    this.#tick();
  }

  #row(vm) {
    const isChosen = vm.id === this.chosen;
    const tags = Object.entries(vm.tags ?? {});
    return el("li", {}, this.shell.router.link(pathOf(vm.id), {
      class: isChosen ? "vm chosen" : "vm", "aria-current": isChosen ? "true" : undefined, "data-key": vm.id,
    },
      el("span", { class: "vm-name" }, vm.name),
      el("span", { class: `badge ${tone(vm.state)}` }, vm.state),
      el("span", { class: "vm-facts" }, vm.image, " · ", `${vm.vcpus} vCPU`, " · ", size(vm.memory)),
      el("span", { class: "vm-up", "data-uptime": vm.id }),
      tags.length > 0 && el("span", { class: "tags" }, tags.map(([name, value]) => el("span", { class: "tag" }, value ? `${name}=${value}` : name)))));
  }

  /** Arrow keys go from row to row. */
  #key(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    const links = [...this.rows.querySelectorAll("a")];
    const next = links[links.indexOf(document.activeElement) + step];
    if (!next) return;
    event.preventDefault();
    next.focus();
  }
}

function isUp(vm) {
  return ["running", "ready", "unreachable"].includes(vm.state);
}
