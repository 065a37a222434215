// The commands of a VM, and the output of one of them.

import { Tail, el, empty, loading, problem, show, table } from "./dom.js";
import { duration, size, tone, when } from "./format.js";
import { poll } from "./poll.js";

const EVERY_MS = 5000;
const SHOWN_MAX = 48_000;
/** How long the guest waits for more output, in milliseconds. */
const WAIT_MS = 25_000;

export class CommandsTab {
  constructor(view) {
    this.view = view;
    this.life = new AbortController();
    this.list = el("div", {}, loading("commands"));
    this.output = el("div", { class: "output" });
    this.again = el("button", { type: "button", hidden: true, onclick: () => this.#look(true) }, "Look again");
    this.element = el("div", { class: "stack" }, this.list, this.again, this.output);
  }

  start() {
    poll(this.life.signal, EVERY_MS, () => this.#look(false), (error) => {
      if (!this.view.shell.failed(error)) return false;
      if (error.code !== "daemon_down") show(this.list, error.message, () => problem(error));
      return true;
    });
  }

  stop() {
    this.life.abort();
    this.following?.abort();
  }

  /** Asks the guest. Such a call counts as work in the VM, so one that stops when it is idle is asked only on demand. */
  async #look(isAsked) {
    const { details } = this.view;
    if (!details) return;
    if (details.state !== "ready") {
      show(this.list, details.state, () => empty("No commands", `The virtual machine is ${details.state}: commands are shown while it is ready.`));
      return;
    }
    this.again.hidden = !details.idle_stop;
    if (details.idle_stop && this.commands && !isAsked) return;
    const { facts } = await this.view.call("guest_command_list", { limit: 100 }, { signal: this.life.signal });
    this.commands = facts.commands ?? [];
    this.#draw();
  }

  #draw() {
    const columns = [
      ["Command", (command) => command.service ? `${command.service}: ${command.command}` : command.command, "wide mono"],
      ["State", (command) => el("span", { class: `badge ${ending(command)[1]}` }, ending(command)[0])],
      ["Started", (command) => when(command.started_at)],
      ["Took", (command) => duration(command.duration_ms)],
      ["Output", (command) => size(command.output_bytes), "number minor"],
      ["By", (command) => command.client ?? command.user, "minor"],
    ];
    // What only counts up is not worth a new table each time.
    const shown = this.commands.map((command) => command.state === "running" ? { ...command, duration_ms: Math.floor(command.duration_ms / 10_000) } : command);
    show(this.list, [shown, this.picked], () => this.commands.length
      ? table(columns, this.commands, { key: (command) => command.command_id, label: "Commands", picked: this.picked, onpick: (command) => this.#pick(command) })
      : empty("No commands", "Commands that run, and those that ended within the last hour, are listed here."));
  }

  #pick(command) {
    this.following?.abort();
    this.picked = command.command_id;
    this.#draw();
    const following = new AbortController();
    this.following = following;
    const tails = new Map();
    const state = el("span", { class: "badge" });
    const heading = el("div", { class: "output-head" }, el("h2", { class: "mono" }, command.command), state);
    const streams = el("div", { class: "streams" }, loading("the output"));
    this.output.replaceChildren(heading, streams);
    this.output.scrollIntoView({ block: "nearest" });
    let cursor;
    poll(following.signal, 200, async () => {
      const args = { id: command.command_id, limit: SHOWN_MAX, ...(cursor && { cursor, wait_ms: WAIT_MS }) };
      const { facts, streams: texts } = await this.view.call("guest_command_output", args, { signal: following.signal });
      if (!cursor) streams.replaceChildren(empty("No output yet"));
      for (const [name, text] of Object.entries(texts)) {
        if (!text) continue;
        if (!tails.has(name)) {
          const tail = new Tail(`${name} of the command`);
          if (tails.size === 0) streams.replaceChildren();
          tails.set(name, tail);
          streams.append(el("section", {}, el("h3", {}, name), tail.element));
        }
        tails.get(name).add(text);
      }
      const [word, kind] = ending(facts);
      state.textContent = word;
      state.className = `badge ${kind}`;
      cursor = facts.cursor;
      const isOver = facts.state !== "running" && !facts.more;
      if (isOver && tails.size === 0) streams.replaceChildren(empty("No output"));
      return !isOver && cursor !== undefined;
    }, (error) => {
      if (!this.view.shell.failed(error)) return false;
      streams.append(problem(error));
      return error.code === "daemon_down";
    });
  }
}

/** How a command ended, in words, and the class that colours it. */
function ending(command) {
  if (command.state !== "ended") return [command.state, command.state === "running" ? "busy" : tone(command.state)];
  if (command.timed_out) return ["timed out", "bad"];
  if (command.signal) return [command.signal, "bad"];
  const status = command.status ?? command.exit_code;
  return status === undefined ? ["ended", "off"] : [`exit ${status}`, status === 0 ? "good" : "bad"];
}
