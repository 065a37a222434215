// The page of a browser: login, and the views of the daemon that it came from.

import { el, problem } from "./dom.js";
import { HttpClient, logIn, logOut } from "./http.js";
import { Router } from "./router.js";
import { Shell } from "./shell.js";
import { Terminals } from "./terminal.js";

/** Where the login's secret is kept: only for this tab, and only until it is closed. The token is not kept. */
const KEPT = "nexus-login";
const root = document.getElementById("page");
let leave = () => {};

function login(error) {
  leave();
  leave = () => {};
  sessionStorage.removeItem(KEPT);
  const said = el("div", {}, error && problem(error));
  const input = el("input", { id: "token", type: "password", autocomplete: "off", spellcheck: "false", autocapitalize: "none", "aria-describedby": "token-hint" });
  const button = el("button", { type: "submit", class: "primary" }, "Log in");
  const form = el("form", {
    class: "login", onsubmit: async (event) => {
      event.preventDefault();
      const token = input.value.trim();
      if (!token) return input.focus();
      button.disabled = true;
      said.replaceChildren();
      const failed = (failure) => {
        button.disabled = false;
        input.value = "";
        input.focus();
        said.replaceChildren(problem(failure));
      };
      try {
        if (!/^[\x21-\x7e]+$/.test(token)) throw Object.assign(new Error("This is not a token."), { hint: "A token is one word without spaces." });
        await open(await logIn(token), failed);
      } catch (error) {
        failed(error);
      }
    },
  },
    el("h1", {}, "Nexus"), said,
    el("label", { class: "field", for: "token" }, el("span", {}, "Token"), input),
    el("p", { id: "token-hint", class: "hint" },
      "From ", el("code", {}, "nexusctl token create"), ", which can limit its rights; or all rights, from the file ", el("code", {}, "http-token"), " in the daemon’s state directory."),
    el("p", { class: "hint" }, "It is not kept: the login ends with this tab, after an hour without use, or when the daemon ends."),
    button);
  root.replaceChildren(el("main", { class: "centre" }, form));
  input.focus();
}

/** Shows the views with a login; `failed` is told why that did not work. */
async function open(secret, failed) {
  const client = new HttpClient(secret);
  try {
    await client.open();
  } catch (error) {
    return failed(error);
  }
  sessionStorage.setItem(KEPT, secret);
  const life = new AbortController();
  const router = new Router(true, life.signal);
  const terminals = new Terminals();
  const shell = new Shell({ client, router, refused: (error) => login(error), terminal: (view) => terminals.tab(view) });
  const hangUp = () => terminals.endAll(true);
  addEventListener("pagehide", hangUp, { signal: life.signal });
  leave = () => {
    life.abort();
    terminals.endAll(true);
    shell.stop();
  };
  const nav = el("nav", { "aria-label": "Views" },
    router.link("", { "data-view": "vms" }, "Machines"), client.offers("audit_list") && router.link("audit", { "data-view": "audit" }, "Audit log"));
  const out = el("button", {
    type: "button", class: "quiet", onclick: () => {
      // The shells are hung up first: that needs the login.
      terminals.endAll(true).then(() => logOut(secret));
      router.go("");
      login();
    },
  }, "Log out");
  root.replaceChildren(
    el("a", { class: "skip", href: "#main", onclick: (event) => { event.preventDefault(); main.focus(); } }, "Skip to the details"),
    el("header", { class: "top" }, el("span", { class: "brand" }, "Nexus"), nav, shell.status, out), shell.banner, el("main", {}, shell.element));
  const { main } = shell;
  main.tabIndex = -1;
  shell.start();
}

let hasBegun = false;

function begin() {
  if (hasBegun) return;
  hasBegun = true;
  const kept = sessionStorage.getItem(KEPT);
  if (kept) open(kept, login);
  else login();
}

// The browser first paints what the document itself says. One that shows nothing paints nothing, so that is not waited for for long.
requestAnimationFrame(() => setTimeout(begin));
setTimeout(begin, 250);
