// One VM: what may be done to it, and tabs with what is known of it.

import { act, deleteDialog } from "./dialogs.js";
import { CommandsTab } from "./commands.js";
import { ConsoleTab } from "./console.js";
import { el, loading, problem, show } from "./dom.js";
import { actions, tone } from "./format.js";
import { HistoryTab } from "./history.js";
import { NetworkTab } from "./network.js";
import { OverviewTab } from "./overview.js";
import { poll } from "./poll.js";
import { pathOf } from "./router.js";

const EVERY_MS = 4000;
const TABS = [
  ["overview", "Overview", OverviewTab, "vm_inspect"],
  ["console", "Console", ConsoleTab, "vm_logs"],
  ["commands", "Commands", CommandsTab, "guest_command_list"],
  ["network", "Network", NetworkTab, "vm_inspect"],
  ["history", "History", HistoryTab, "vm_history"],
];

export class VmView {
  constructor(shell, id, tab) {
    Object.assign(this, { shell, id, tab });
    this.life = new AbortController();
    this.busy = undefined;
    this.title = el("h1", {}, "…");
    this.state = el("span", { class: "badge off" });
    this.reason = el("p", { class: "reason", hidden: true });
    this.buttons = el("div", { class: "actions" });
    this.problem = el("div");
    const offered = TABS.filter(([, , , tool]) => shell.client.offers(tool));
    this.tabs = new Map(offered.map(([name, title, Tab]) => [name, { title, make: () => new Tab(this) }]));
    if (shell.terminal && shell.client.offers("guest_command_start") && shell.client.offers("guest_command_input")) {
      this.tabs.set("terminal", { title: "Terminal", make: () => shell.terminal(this) });
    }
    this.strip = el("div", { class: "tabs", role: "tablist", "aria-label": "About this virtual machine", onkeydown: (event) => this.#key(event) });
    for (const [name, { title }] of this.tabs) {
      this.strip.append(el("button", {
        type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "panel", "data-tab": name, onclick: () => shell.router.go(pathOf(id, name)),
      }, title));
    }
    this.panel = el("div", { class: "panel", role: "tabpanel", id: "panel", tabindex: "-1" });
    const back = shell.router.link("", { class: "back" }, "← All virtual machines");
    this.element = el("article", { class: "vm-view" },
      back, el("header", { class: "vm-head" }, el("div", { class: "vm-title" }, this.title, this.state), this.buttons),
      this.reason, this.problem, this.strip, this.panel);
  }

  start() {
    const known = this.shell.list.vms?.find((vm) => vm.id === this.id);
    if (known) this.#head(known);
    this.open(this.tab);
    poll(this.life.signal, EVERY_MS, () => this.refresh(), (error) => {
      if (error.code === "vm_not_found") {
        this.gone(error);
        return false;
      }
      if (!this.details) this.panel.replaceChildren(problem(error));
      return this.shell.failed(error);
    });
  }

  stop() {
    this.current?.stop?.();
    this.life.abort();
  }

  get signal() {
    return this.life.signal;
  }

  /** Calls a tool about this VM. */
  call(tool, args = {}, options = {}) {
    return this.shell.client.call(tool, { vm: this.id, ...args }, { signal: this.signal, ...options });
  }

  async refresh() {
    const { facts } = await this.call("vm_inspect");
    this.shell.answered();
    this.details = facts;
    this.#head(facts);
    this.current?.changed?.(facts);
  }

  /** The list was read again. */
  listed(vms) {
    const vm = vms.find((one) => one.id === this.id);
    if (vm && !this.life.signal.aborted) this.#head(vm);
  }

  open(name) {
    const chosen = this.tabs.has(name) ? name : this.tabs.keys().next().value;
    if (this.current && chosen === this.tab) return;
    this.tab = chosen;
    for (const button of this.strip.children) {
      const isChosen = button.dataset.tab === chosen;
      button.setAttribute("aria-selected", String(isChosen));
      button.tabIndex = isChosen ? 0 : -1;
      if (isChosen) button.scrollIntoView({ block: "nearest", inline: "nearest" });
    }
    this.panel.setAttribute("aria-labelledby", `tab-${chosen}`);
    this.current?.stop?.();
    this.current = this.tabs.get(chosen)?.make();
    this.panel.replaceChildren(this.current?.element ?? loading("the virtual machine"));
    this.current?.start?.();
    if (this.details) this.current?.changed?.(this.details);
  }

  /** The VM does not exist any more. */
  gone(error) {
    this.stop();
    this.panel.replaceChildren(problem(error));
    this.buttons.replaceChildren();
  }

  #head(vm) {
    this.vm = vm;
    this.title.textContent = vm.name;
    this.state.textContent = vm.state;
    this.state.className = `badge ${tone(vm.state)}`;
    this.reason.textContent = vm.reason ?? "";
    this.reason.hidden = !vm.reason;
    const may = actions(vm);
    const { client } = this.shell;
    const wanted = [
      ["vm_start", "Start", may.start],
      ["vm_stop", "Stop", may.stop],
      ["vm_restart", "Restart", may.restart],
      ["vm_delete", "Delete", may.delete],
    ].filter(([tool]) => client.offers(tool));
    show(this.buttons, [wanted, this.busy, vm.protected], () => wanted.map(([tool, title, can]) => el("button", {
      type: "button", "data-key": tool, class: tool === "vm_delete" ? "danger" : undefined, disabled: !can || this.busy !== undefined,
      title: tool === "vm_delete" && vm.protected ? "It is protected: vm_update takes the protection away" : undefined,
      onclick: () => this.#act(tool),
    }, this.busy === tool ? `${title} …` : title)));
  }

  async #act(tool) {
    this.problem.replaceChildren();
    if (tool === "vm_delete") return deleteDialog(this.shell, this.vm);
    this.busy = tool;
    this.#head(this.vm);
    try {
      await act(this.shell, tool, { vm: this.id }, this.vm.name, this.life.signal);
    } catch (error) {
      if (!this.life.signal.aborted && this.shell.failed(error)) this.problem.replaceChildren(problem(error));
    }
    this.busy = undefined;
    if (this.life.signal.aborted) return;
    this.#head(this.vm);
    await Promise.allSettled([this.refresh(), this.shell.list.refresh()]);
  }

  #key(event) {
    const names = [...this.tabs.keys()];
    const at = names.indexOf(this.tab);
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: names.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    const name = names[(next + names.length) % names.length];
    this.shell.router.go(pathOf(this.id, name));
    this.strip.querySelector(`[data-tab=${name}]`).focus();
  }
}
