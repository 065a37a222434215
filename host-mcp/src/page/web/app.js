// The MCP App: the same views inside a client that shows apps. No storage, no address, no connection but the one to its host.

import { BridgeClient } from "./bridge.js";
import { el, loading, problem } from "./dom.js";
import { Router } from "./router.js";
import { Shell } from "./shell.js";

const root = document.getElementById("page");
const { documentElement } = document;
let shell;

/** Takes the host's theme; its own variables win over ours. */
function changed({ theme, styles, containerDimensions }) {
  if (theme === "light" || theme === "dark") documentElement.dataset.theme = theme;
  for (const [name, value] of Object.entries(styles?.variables ?? {})) {
    if (/^--[a-z0-9-]+$/.test(name) && typeof value === "string") documentElement.style.setProperty(name, value);
  }
  if (containerDimensions) documentElement.classList.toggle("fixed", "height" in containerDimensions);
}

async function open() {
  root.replaceChildren(loading("virtual machines"));
  const client = new BridgeClient({
    changed,
    // The app was opened for a list of VMs; the views ask for their own.
    result: () => shell?.list.refresh().catch(() => {}),
    over: () => shell?.stop(),
  });
  try {
    await client.open();
  } catch (error) {
    root.replaceChildren(problem(error));
    return;
  }
  shell = new Shell({ client, router: new Router(false), refused: (error) => root.replaceChildren(problem(error)) });
  root.replaceChildren(el("div", { class: "app" }, shell.status, shell.banner, shell.element));
  let last = "";
  new ResizeObserver(() => {
    const size = { width: Math.ceil(root.scrollWidth), height: Math.ceil(root.getBoundingClientRect().height) };
    if (last === JSON.stringify(size)) return;
    last = JSON.stringify(size);
    client.notify("ui/notifications/size-changed", size);
  }).observe(root);
  shell.start();
}

documentElement.classList.add("embedded");
open();
