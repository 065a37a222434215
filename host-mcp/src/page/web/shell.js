// The frame of all views: the list beside what is chosen, a line for what just happened, and what to do when the daemon does not answer.

import { AuditView } from "./audit.js";
import { el } from "./dom.js";
import { createDialog } from "./dialogs.js";
import { Refused } from "./result.js";
import { VmView } from "./vm.js";
import { VmList } from "./vms.js";

export class Shell {
  /** `refused(error)` is called once when the daemon does not accept the token any more; `terminal(context)` makes the tab, where there is one. */
  constructor({ client, router, refused, terminal }) {
    Object.assign(this, { client, router, terminal });
    this.refused = refused;
    this.life = new AbortController();
    this.status = el("p", { class: "status", role: "status", "aria-live": "polite" });
    this.banner = el("p", { class: "banner", role: "alert", hidden: true });
    this.side = el("section", { class: "side", "aria-label": "Virtual machines" });
    this.main = el("section", { class: "detail", "aria-label": "Details" });
    this.element = el("div", { class: "split" }, this.side, this.main);
    this.list = new VmList(this);
  }

  start() {
    this.side.append(this.list.element);
    this.list.start(this.life.signal);
    this.router.start((parts) => this.#view(parts));
  }

  stop() {
    this.view?.stop();
    this.life.abort();
  }

  /** Says what happened, for a while. */
  say(text) {
    this.status.textContent = text;
    clearTimeout(this.quiet);
    this.quiet = setTimeout(() => { this.status.textContent = ""; }, 8000);
  }

  /** Takes a failure of a repeated question; returns whether to go on asking. */
  failed(error) {
    if (this.life.signal.aborted) return false;
    if (error instanceof Refused) {
      this.stop();
      this.refused(error);
      return false;
    }
    if (error.code === "daemon_down") {
      this.banner.textContent = `${error.message} ${error.hint}`;
      this.banner.hidden = false;
    }
    return true;
  }

  /** The daemon answered. */
  answered() {
    this.banner.hidden = true;
  }

  create() {
    createDialog(this);
  }

  #view([kind, id, tab]) {
    this.element.classList.toggle("chosen", kind === "vm" || kind === "audit");
    document.querySelectorAll("nav [data-view]").forEach((link) => {
      if (link.dataset.view === (kind === "audit" ? "audit" : "vms")) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    });
    this.list.choose(kind === "vm" ? id : undefined);
    if (kind === "vm" && this.view instanceof VmView && this.view.id === id) return this.view.open(tab);
    this.view?.stop();
    this.view = kind === "vm" && id ? new VmView(this, id, tab) : kind === "audit" ? new AuditView(this) : undefined;
    this.main.replaceChildren(this.view?.element ?? el("p", { class: "hint choose" }, "Choose a virtual machine to see its console, commands and history."));
    this.main.scrollTop = 0;
    this.view?.start();
  }
}
