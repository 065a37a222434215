// What an application does with the MCP TypeScript SDK: sdk.mjs URL, or sdk.mjs -- COMMAND... Prints what it saw as JSON.
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StdioClientTransport } from "@modelcontextprotocol/sdk/client/stdio.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";

const [first, ...rest] = process.argv.slice(2);
const requestInit = { headers: { authorization: `Bearer ${process.env.NEXUS_HTTP_TOKEN}` } };
const transport =
  first === "--"
    ? new StdioClientTransport({ command: rest[0], args: rest.slice(1), env: process.env, stderr: "inherit" })
    : new StreamableHTTPClientTransport(new URL(first), { requestInit });
const client = new Client({ name: "sdk-test", version: "1" }, { capabilities: {} });
await client.connect(transport);

// The SDK compiles the schema of each tool's results at the list, and checks each result by it.
const { tools } = await client.listTools();
const { tools: again } = await client.listTools();
const listed = await client.callTool({ name: "vm_list", arguments: {} });
const notes = [];
const command = "for n in 1 2 3; do echo line $n; sleep 0.6; done";
const ran = await client.callTool({ name: "guest_run_command", arguments: { vm: "web-1", command } }, undefined, {
  onprogress: (note) => notes.push(note),
});
const failed = await client.callTool({ name: "vm_inspect", arguments: { vm: "nobody" } });
const unknown = await client.callTool({ name: "no_such_tool", arguments: {} }).catch((error) => ({ code: error.code }));
const read = await client.readResource({ uri: "nexus://vm/web-1" });
const { prompts } = await client.listPrompts();
const controller = new AbortController();
setTimeout(() => controller.abort(), 300);
const aborted = await client
  .callTool({ name: "guest_run_command", arguments: { vm: "web-1", command: "sleep 4321" } }, undefined, controller)
  .catch((error) => String(error));
const { version } = client.getServerVersion();
await client.close();
console.log(
  JSON.stringify({
    version,
    tools: tools.map((tool) => tool.name),
    same: JSON.stringify(tools) === JSON.stringify(again),
    vms: listed.structuredContent.vms.map((vm) => vm.name),
    text: ran.content.map((block) => block.text).join(""),
    growing: notes.every((note, at) => at === 0 || note.progress > notes[at - 1].progress),
    notes: notes.length,
    failed: { isError: failed.isError, code: failed._meta["dev.nexus/error"].code },
    unknown,
    read: read.contents[0].uri,
    prompts: prompts.length,
    aborted,
  }),
);
