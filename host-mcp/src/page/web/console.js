// The end of a VM's console, followed.

import { Tail, el, empty } from "./dom.js";
import { poll } from "./poll.js";

const SHOWN_MAX = 48_000;
/** How long the daemon waits for more, in seconds. */
const WAIT_S = 25;

export class ConsoleTab {
  constructor(view) {
    this.view = view;
    this.life = new AbortController();
    this.tail = new Tail("Console of the virtual machine");
    this.note = el("div");
    this.element = el("div", { class: "fill" }, this.note, this.tail.element);
  }

  start() {
    let cursor;
    poll(this.life.signal, 300, async () => {
      const args = cursor === undefined ? { max_bytes: SHOWN_MAX } : { cursor, wait_s: WAIT_S, max_bytes: SHOWN_MAX };
      const { facts, streams } = await this.view.call("vm_logs", args, { signal: this.life.signal });
      if (facts.lost_bytes > 0 && cursor !== undefined) this.tail.add(`\n[${facts.lost_bytes} bytes were lost]\n`);
      cursor = facts.cursor;
      this.tail.add(streams.content ?? "");
      this.tail.element.hidden = this.tail.length === 0;
      this.note.replaceChildren(this.tail.length === 0 ? empty("Nothing on the console yet") : "");
    }, (error) => this.view.shell.failed(error));
  }

  stop() {
    this.life.abort();
  }
}
