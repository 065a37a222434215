// What changes something: starting, stopping, creating and deleting VMs, with the daemon's own question before what cannot be undone.

import { el, problem } from "./dom.js";
import { actions } from "./format.js";
import { pathOf } from "./router.js";

/** Calls a tool that starts long work, and follows it to its end. Returns the result. */
export async function act(shell, tool, args, name, signal) {
  const { client } = shell;
  const verb = { vm_start: "Starting", vm_stop: "Stopping", vm_restart: "Restarting", vm_create: "Creating" }[tool];
  shell.say(`${verb} ${name} …`);
  let { facts } = await client.call(tool, { ...args, wait_s: 2 }, { signal });
  while (facts.done === false) {
    shell.say(`${verb} ${name}: ${step(facts.progress)}`);
    ({ facts } = await client.call("op_get", { op_id: facts.op_id, wait_s: 3 }, { signal }));
  }
  if (facts.error) throw facts.error;
  shell.say(`${name} is ${facts.result?.state ?? "done"}.`);
  return facts;
}

function step(progress) {
  if (!progress?.step) return "working …";
  const { done, total } = progress;
  return total ? `${progress.step}, ${Math.floor((done ?? 0) * 100 / total)} %` : `${progress.step} …`;
}

/** A modal dialog. `content(close)` gives what is in it; what had the focus gets it back. */
function dialog(title, content) {
  const heading = el("h2", { id: "dialog-title" }, title);
  const box = el("dialog", { "aria-labelledby": "dialog-title" });
  const close = () => box.close();
  box.append(heading, content(close));
  box.addEventListener("close", () => box.remove());
  document.body.append(box);
  box.showModal();
  return box;
}

/** Asks whether to delete a VM, and then whatever the daemon wants to have confirmed. */
export function deleteDialog(shell, vm) {
  const { isUp } = actions(vm);
  const said = el("div");
  dialog(`Delete ${vm.name}?`, (close) => {
    const question = el("div", {},
      el("p", {}, "The virtual machine and the root drive that was made with it are deleted. This cannot be undone."),
      isUp && el("p", {}, "It is running: its power is cut first, and unwritten data is lost."));
    let confirm;
    const button = el("button", { type: "submit", class: "danger" }, "Delete");
    const form = el("form", {
      onsubmit: async (event) => {
        event.preventDefault();
        button.disabled = true;
        said.replaceChildren();
        try {
          await shell.client.call("vm_delete", { vm: vm.id, ...(isUp && { force: true }), ...(confirm && { confirm }) }, { signal: shell.life.signal });
          close();
          shell.say(`${vm.name} is deleted.`);
          shell.router.go("");
          await shell.list.refresh().catch(() => {});
        } catch (error) {
          button.disabled = false;
          if (error.confirm) {
            confirm = error.confirm.token;
            question.replaceChildren(el("p", {}, "The daemon wants this confirmed:"), el("ul", {}, error.confirm.plan.map((line) => el("li", {}, line))));
            button.textContent = "Confirm and delete";
            button.focus();
          } else if (shell.failed(error)) {
            said.replaceChildren(problem(error));
          } else {
            close();
          }
        }
      },
    }, question, said, el("div", { class: "buttons" }, el("button", { type: "button", onclick: close }, "Cancel"), button));
    return form;
  });
}

/** Asks what a new VM shall be, and makes it. */
export function createDialog(shell) {
  const { client } = shell;
  const said = el("div");
  const names = el("datalist", { id: "images" });
  const field = (label, input, hint) => el("label", { class: "field" }, el("span", {}, label), input, hint && el("small", {}, hint));
  const text = (id, attributes) => el("input", { id, type: "text", spellcheck: "false", autocapitalize: "none", autocomplete: "off", ...attributes });
  const name = text("new-name", { placeholder: "made up if empty" });
  const from = text("new-from", { list: "images", placeholder: "debian" });
  const vcpus = el("input", { id: "new-vcpus", type: "number", min: "1", max: "32", placeholder: "1" });
  const memory = text("new-memory", { placeholder: "1GiB" });
  const disk = text("new-disk", { placeholder: "8GiB" });
  if (client.offers("image_list")) {
    client.call("image_list", { limit: 500 }, { signal: shell.life.signal })
      .then(({ facts }) => names.append(...(facts.images ?? []).map((image) => el("option", { value: image.name }, image.installed ? "" : "made on first use"))))
      .catch(() => {});
  }
  dialog("New virtual machine", (close) => {
    const button = el("button", { type: "submit", class: "primary" }, "Create");
    return el("form", {
      onsubmit: async (event) => {
        event.preventDefault();
        said.replaceChildren();
        button.disabled = true;
        const args = {};
        const given = [["name", name], ["from", from], ["memory", memory], ["disk", disk]];
        for (const [key, input] of given) if (input.value.trim()) args[key] = input.value.trim();
        if (vcpus.value) args.vcpus = Number(vcpus.value);
        try {
          const made = await act(shell, "vm_create", args, args.name ?? "a virtual machine", shell.life.signal);
          close();
          await shell.list.refresh().catch(() => {});
          const id = made.result?.id ?? made.subject_id;
          if (id) shell.router.go(pathOf(id));
        } catch (error) {
          button.disabled = false;
          if (!shell.failed(error)) return close();
          shell.say("");
          said.replaceChildren(problem(error));
        }
      },
    },
      field("Name", name), field("Image", from, "An image, or another source such as oci:node:22"), names,
      el("div", { class: "fields" }, field("vCPUs", vcpus), field("Memory", memory), field("Disk", disk)),
      said, el("div", { class: "buttons" }, el("button", { type: "button", onclick: close }, "Cancel"), button));
  });
}
