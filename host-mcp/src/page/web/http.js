// MCP over HTTP, revision 2026-07-28: each request on its own. A token is given once, to log in. What is kept is the login's secret, which is worth nothing
// once the daemon that gave it has ended. Both are in a header and nowhere else.

import { Failure, Refused, read } from "./result.js";

const VERSION = "2026-07-28";
const WHO = { name: "nexus-page", title: "Nexus page", version: "1" };
/** All tools; a login that is offered fewer is refused these, and gets its own without asking for a set. */
const ALL = "/mcp?tools=all";
const LOGIN = "/login";
const DOWN = { code: "daemon_down", message: "The daemon does not answer.", hint: "It is tried again. If it stays so, check that nexusd is running." };

/** Sends a request; what it is answered, with its text. */
async function send(address, secret, options) {
  const headers = { ...options.headers, "Authorization": `Bearer ${secret}` };
  let response;
  let text;
  try {
    response = await fetch(address, { ...options, headers, cache: "no-store", credentials: "omit", redirect: "error" });
    text = await response.text();
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Failure(DOWN);
  }
  if (response.status === 429) {
    throw new Failure({ code: "too_many", message: "Too many wrong tokens were given.", hint: "Wait a moment and try again." });
  }
  return { response, text };
}

/** What a client is told that the daemon answers in another way than expected. */
function unexpected(response, text, said = {}) {
  const failure = new Failure({ code: said.code ?? "failed", message: said.message ?? (text.trim() || `HTTP status ${response.status}`), hint: said.hint });
  failure.status = response.status;
  return failure;
}

/** Logs in: the secret of the login. */
export async function logIn(token) {
  const { response, text } = await send(LOGIN, token, { method: "POST" });
  if (response.status === 401) {
    throw new Refused({ code: "unauthorized", message: "The token does not work: it is wrong, was revoked, or has expired." });
  }
  const secret = response.ok && answer("application/json", text)?.session;
  if (!secret) throw unexpected(response, text);
  return secret;
}

/** Logs out; it does not matter whether the daemon hears it. */
export function logOut(secret) {
  send(LOGIN, secret, { method: "DELETE", keepalive: true }).catch(() => {});
}

/** A daemon, as its page calls it. */
export class HttpClient {
  #secret;
  #address = ALL;
  #lastId = 0;
  #tools = new Map();

  constructor(secret) {
    this.#secret = secret;
  }

  /** Learns which tools the login may use. */
  async open() {
    let listed;
    try {
      listed = await this.#request("tools/list", {});
    } catch (error) {
      if (error.status !== 403) throw error;
      this.#address = "/mcp";
      listed = await this.#request("tools/list", {});
    }
    this.#tools = new Map(listed.tools.map((tool) => [tool.name, tool.annotations?.readOnlyHint === true]));
  }

  /** Whether the login may call a tool. */
  offers(tool) {
    return this.#tools.has(tool);
  }

  /** Whether a tool, by the name that it has in the audit log, only reads. */
  onlyReads(tool) {
    return this.#tools.get(tool) ?? this.#tools.get(`guest_${tool}`) ?? false;
  }

  /** Calls a tool: its facts and texts. */
  async call(tool, args = {}, { signal, keepalive } = {}) {
    return read(await this.#request("tools/call", { name: tool, arguments: args }, { signal, keepalive }));
  }

  async #request(method, params, { signal, keepalive } = {}) {
    this.#lastId += 1;
    const meta = {
      "io.modelcontextprotocol/protocolVersion": VERSION,
      "io.modelcontextprotocol/clientInfo": WHO,
      "io.modelcontextprotocol/clientCapabilities": {},
    };
    const headers = {
      "Content-Type": "application/json",
      "Accept": "application/json, text/event-stream",
      "MCP-Protocol-Version": VERSION,
      "Mcp-Method": method,
    };
    if (params.name) headers["Mcp-Name"] = params.name;
    const body = JSON.stringify({ jsonrpc: "2.0", id: this.#lastId, method, params: { ...params, _meta: meta } });
    const { response, text } = await send(this.#address, this.#secret, { method: "POST", headers, body, signal, keepalive });
    if (response.status === 401) {
      throw new Refused({
        code: "unauthorized",
        message: "You are logged out: the token was revoked, or has expired, the daemon was restarted, or the page was not used for an hour.",
      });
    }
    const message = answer(response.headers.get("Content-Type") ?? "", text);
    if (message?.result) return message.result;
    throw unexpected(response, text, message?.error);
  }
}

/** The answer in a body: one JSON object, or the last of an event stream. */
function answer(type, text) {
  const parse = (json) => {
    try {
      return JSON.parse(json);
    } catch {
      return undefined;
    }
  };
  if (!type.startsWith("text/event-stream")) return parse(text);
  const events = text.split(/\r?\n\r?\n/).map((event) =>
    parse(event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n")));
  return events.findLast((message) => message && "id" in message && ("result" in message || "error" in message));
}
