// Which view is shown: `vm/ID/console`, `audit`, or nothing. In a browser it is the address behind `#`, and never holds a token.

import { el } from "./dom.js";

export class Router {
  #changed = () => {};
  #path = "";

  /** With `address`, the view is in the address, for the browser's back button, until `signal` is aborted. */
  constructor(address, signal) {
    this.address = address;
    if (!address) return;
    this.#path = this.#read();
    addEventListener("hashchange", () => {
      if (this.#read() !== this.#path) this.go(this.#read());
    }, { signal });
  }

  #read() {
    return location.hash.replace(/^#\/?/, "");
  }

  /** Calls `changed(parts)` now and whenever another view is wanted. */
  start(changed) {
    this.#changed = changed;
    changed(this.parts());
  }

  /** The parts of the path. */
  parts() {
    return this.#path.split("/").map((part) => {
      try {
        return decodeURIComponent(part);
      } catch {
        return "";
      }
    });
  }

  go(path) {
    this.#path = path;
    if (this.address && this.#read() !== path) location.hash = `#/${path}`;
    this.#changed(this.parts());
  }

  /** A link to a view. */
  link(path, attributes, ...children) {
    return el("a", {
      ...attributes,
      href: `#/${path}`,
      onclick: (event) => {
        if (event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) return;
        event.preventDefault();
        this.go(path);
      },
    }, ...children);
  }
}

/** The path of a VM's view. */
export function pathOf(vm, tab) {
  return `vm/${encodeURIComponent(vm)}${tab ? `/${tab}` : ""}`;
}
