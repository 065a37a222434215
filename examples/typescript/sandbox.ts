/**
 * Runs a script in a virtual machine of its own, by the MCP TypeScript SDK.
 *
 *     node sandbox.ts [--from IMAGE] [--url URL] SCRIPT
 *
 * The script, whose first line says what reads it (#!/bin/sh), runs as root in a fresh machine that is deleted afterwards.
 * What it leaves in the file `result` beside it is printed last. Without --url the bridge `nexusctl mcp` is started, as
 * desktop clients do it; with --url the daemon is reached by HTTP, with the token from NEXUS_HTTP_TOKEN.
 */

import { readFileSync } from "node:fs";
import { parseArgs } from "node:util";

import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StdioClientTransport, getDefaultEnvironment } from "@modelcontextprotocol/sdk/client/stdio.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";
import { CallToolResultSchema, type CallToolResult } from "@modelcontextprotocol/sdk/types.js";

/** A tool said no. Its text has a code, a message, and what to do next. */
class ToolError extends Error {}

/** Calls a tool and returns its result. */
async function call(client: Client, name: string, args: Record<string, unknown>): Promise<CallToolResult> {
  // Calls answer within a minute, but a busy machine may take longer. The SDK's default timeout is one minute.
  const options = { timeout: 120_000 };
  const result = CallToolResultSchema.parse(
    await client.callTool({ name, arguments: args }, CallToolResultSchema, options),
  );
  if (result.isError) {
    const [first] = result.content;
    throw new ToolError(`${name}: ${first?.type === "text" ? first.text : "failed"}`);
  }
  return result;
}

/** Calls a tool that starts long work, waits for the end of that work, and returns what it made. */
async function callToTheEnd(client: Client, name: string, args: Record<string, unknown>): Promise<any> {
  let outcome: any = (await call(client, name, args)).structuredContent;
  while (!outcome.done) {
    console.error(`... ${outcome.progress.step}`);
    outcome = (await call(client, "op_get", { op_id: outcome.op_id })).structuredContent;
  }
  if (!outcome.result) {
    throw new ToolError(`${name}: ${outcome.error.message}`);
  }
  return outcome.result;
}

/** The text of one stream of a guest tool's result: stdout, stderr or content. */
function stream(result: CallToolResult, name: string): string {
  return result.content
    .map((block) => (block.type === "text" && block._meta?.["dev.nexus/stream"] === name ? block.text : ""))
    .join("");
}

/** Runs a command however long it takes, and prints its output as it comes. Returns the facts of its end. */
async function runToTheEnd(client: Client, vm: string, command: Record<string, unknown>): Promise<any> {
  let ran = await call(client, "guest_run_command", { vm, ...command });
  for (;;) {
    process.stdout.write(stream(ran, "stdout"));
    process.stderr.write(stream(ran, "stderr"));
    const facts: any = ran._meta?.["dev.nexus/result"];
    if (facts.state !== "running" && !facts.more) {
      return facts;
    }
    const where = { id: facts.command_id, cursor: facts.cursor, wait_ms: 30_000 };
    ran = await call(client, "guest_command_output", { vm, ...where });
  }
}

/** Runs the script in a new machine. Returns the script's exit code. */
async function run(client: Client, script: string, image?: string): Promise<number> {
  const vm = await callToTheEnd(client, "vm_create", image ? { from: image } : {});
  console.error(`machine ${vm.name}`);
  try {
    await call(client, "guest_file_write", { vm: vm.id, path: "/srv/job/script", content: script, mode: "0755" });
    const command = { argv: ["/srv/job/script"], cwd: "/srv/job", timeout_s: 600 };
    const facts = await runToTheEnd(client, vm.id, command);

    const listed: any = (await call(client, "guest_file_list", { vm: vm.id, path: "/srv/job", compact: false })).structuredContent;
    if (listed.entries.some((entry: any) => entry.path === "result")) {
      const kept = await call(client, "guest_file_read", { vm: vm.id, path: "/srv/job/result" });
      process.stdout.write(stream(kept, "content"));
    }
    return facts.exit_code ?? 1; // missing if a signal ended it
  } finally {
    await call(client, "vm_delete", { vm: vm.id, force: true });
  }
}

/** How the daemon is reached. */
function server(url?: string) {
  if (url) {
    const headers = { Authorization: `Bearer ${process.env["NEXUS_HTTP_TOKEN"]}` };
    return new StreamableHTTPClientTransport(new URL(url), { requestInit: { headers } });
  }
  // The SDK passes only a few variables on; those of Nexus say where its daemon is, if not in the default place.
  const own = Object.entries(process.env).filter(([name]) => name.startsWith("NEXUS_"));
  const env = { ...getDefaultEnvironment(), ...(Object.fromEntries(own) as Record<string, string>) };
  return new StdioClientTransport({ command: "nexusctl", args: ["mcp"], env });
}

const options = { from: { type: "string" }, url: { type: "string" } } as const;
const { values, positionals } = parseArgs({ options, allowPositionals: true });
const [script] = positionals;
if (script === undefined || positionals.length > 1) {
  console.error("usage: node sandbox.ts [--from IMAGE] [--url URL] SCRIPT");
  process.exit(2);
}
const client = new Client({ name: "nexus-sandbox", version: "0.1.0" });
await client.connect(server(values.url));
try {
  process.exitCode = await run(client, readFileSync(script, "utf8"), values.from);
} catch (error) {
  if (!(error instanceof ToolError)) throw error;
  console.error(error.message);
  process.exitCode = 1;
} finally {
  await client.close();
}
