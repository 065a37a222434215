// MCP Apps (2026-01-26): the app's side of the talk with its host, JSON-RPC by postMessage to the window around it.

import { Failure, read } from "./result.js";

const VERSION = "2026-01-26";
/** How long a host may take for an answer, in milliseconds: tools wait for 45 s at most. */
const PATIENCE = 90_000;

/** The daemon, as an app calls it through its host. */
export class BridgeClient {
  #lastId = 0;
  #waiting = new Map();
  #refused = new Set();

  /** `changed(context)` is told of the host's theme and sizes, `result(facts)` of the result that the app was opened for. */
  constructor({ changed, result, over }) {
    Object.assign(this, { changed, result, over });
    addEventListener("message", (event) => {
      if (event.source === parent && event.data?.jsonrpc === "2.0") this.#take(event.data);
    });
  }

  async open() {
    const said = await this.#request("ui/initialize", {
      protocolVersion: VERSION, appInfo: { name: "nexus-dashboard", title: "Nexus", version: "1" }, appCapabilities: { availableDisplayModes: ["inline", "fullscreen"] },
    });
    this.changed(said.hostContext ?? {});
    this.notify("ui/notifications/initialized", {});
    if (said.hostCapabilities && !said.hostCapabilities.serverTools) {
      throw new Failure({ code: "no_tools", message: "This client lets no app call tools, so there is nothing to show." });
    }
  }

  /** Whether a tool may be called: an app is not told which ones its host has, so only what was refused is known. */
  offers(tool) {
    return !this.#refused.has(tool);
  }

  async call(tool, args = {}, { signal } = {}) {
    try {
      return read(await this.#request("tools/call", { name: tool, arguments: args }, signal));
    } catch (error) {
      // Errors of the protocol and not of the tool: it is not offered here, or the host does not allow it.
      if (typeof error.code === "number") this.#refused.add(tool);
      throw error;
    }
  }

  notify(method, params) {
    parent.postMessage({ jsonrpc: "2.0", method, params }, "*");
  }

  #request(method, params, signal) {
    this.#lastId += 1;
    const id = this.#lastId;
    return new Promise((resolve, reject) => {
      const end = (how, value) => {
        clearTimeout(timer);
        this.#waiting.delete(id);
        how(value);
      };
      const timer = setTimeout(() => end(reject, new Failure({ code: "timeout", message: "The client does not answer." })), PATIENCE);
      signal?.addEventListener("abort", () => end(reject, signal.reason), { once: true });
      if (signal?.aborted) return end(reject, signal.reason);
      this.#waiting.set(id, { resolve: (value) => end(resolve, value), reject: (error) => end(reject, error) });
      parent.postMessage({ jsonrpc: "2.0", id, method, params }, "*");
    });
  }

  #take({ id, method, params, result, error }) {
    if (method === undefined) {
      const waiting = this.#waiting.get(id);
      if (error) waiting?.reject(new Failure({ code: error.code, message: String(error.message ?? "the client refused it") }));
      else waiting?.resolve(result);
      return;
    }
    if (method === "ui/notifications/host-context-changed") this.changed(params ?? {});
    if (method === "ui/notifications/tool-result") this.result(params ?? {});
    if (id === undefined) return;
    if (method === "ui/resource-teardown") this.over();
    const known = method === "ui/resource-teardown" || method === "ping";
    const answer = known ? { result: {} } : { error: { code: -32601, message: "not offered" } };
    parent.postMessage({ jsonrpc: "2.0", id, ...answer }, "*");
  }
}
