#!/usr/bin/env python3
"""Runs a script in a virtual machine of its own, by the MCP Python SDK.

    python sandbox.py [--from IMAGE] [--url URL] SCRIPT

The script, whose first line says what reads it (#!/bin/sh), runs as root in a fresh machine that is deleted afterwards.
What it leaves in the file `result` beside it is printed last. Without --url the bridge `nexusctl mcp` is started, as desktop clients do it; with --url the daemon is
reached by HTTP, with the token from NEXUS_HTTP_TOKEN.
"""

import argparse
import asyncio
import os
import sys
from pathlib import Path

import httpx2
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client


class ToolError(Exception):
    """A tool said no. Its text has a code, a message, and what to do next."""


async def call(client, tool, **arguments):
    """Calls a tool and returns its result."""
    result = await client.call_tool(tool, arguments)
    if result.is_error:
        raise ToolError(f"{tool}: {result.content[0].text}")
    return result


async def call_to_the_end(client, tool, **arguments):
    """Calls a tool that starts long work, waits for the end of that work, and returns what it made."""
    outcome = (await call(client, tool, **arguments)).structured_content
    while not outcome["done"]:
        print(f"... {outcome['progress']['step']}", file=sys.stderr)
        outcome = (await call(client, "op_get", op_id=outcome["op_id"])).structured_content
    if "result" not in outcome:
        raise ToolError(f"{tool}: {outcome['error']['message']}")
    return outcome["result"]


def stream(result, name):
    """The text of one stream of a guest tool's result: stdout, stderr or content."""
    return "".join(block.text for block in result.content if (block.meta or {}).get("dev.nexus/stream") == name)


async def run_to_the_end(client, vm, **command):
    """Runs a command however long it takes, and prints its output as it comes. Returns the facts of its end."""
    ran = await call(client, "guest_run_command", vm=vm, **command)
    while True:
        print(stream(ran, "stdout"), end="", flush=True)
        print(stream(ran, "stderr"), end="", file=sys.stderr, flush=True)
        facts = ran.meta["dev.nexus/result"]
        if facts["state"] != "running" and not facts.get("more"):
            return facts
        where = {"id": facts["command_id"], "cursor": facts["cursor"], "wait_ms": 30_000}
        ran = await call(client, "guest_command_output", vm=vm, **where)


async def run(client, script, image):
    """Runs the script in a new machine. Returns the script's exit code."""
    vm = await call_to_the_end(client, "vm_create", **({"from": image} if image else {}))
    print(f"machine {vm['name']}", file=sys.stderr)
    try:
        await call(client, "guest_file_write", vm=vm["id"], path="/srv/job/script", content=script, mode="0755")
        command = {"argv": ["/srv/job/script"], "cwd": "/srv/job", "timeout_s": 600}
        facts = await run_to_the_end(client, vm["id"], **command)

        listed = (await call(client, "guest_file_list", vm=vm["id"], path="/srv/job", compact=False)).structured_content
        if any(entry["path"] == "result" for entry in listed["entries"]):
            kept = await call(client, "guest_file_read", vm=vm["id"], path="/srv/job/result")
            print(stream(kept, "content"), end="")
        return facts.get("exit_code", 1)  # missing if a signal ended it
    finally:
        await call(client, "vm_delete", vm=vm["id"], force=True)


def server(url, tools="work"):
    """How the daemon is reached, with which set of tools; a URL says that itself."""
    if url:
        token = os.environ["NEXUS_HTTP_TOKEN"]
        http = httpx2.AsyncClient(headers={"Authorization": f"Bearer {token}"}, timeout=120)
        return streamable_http_client(url, http_client=http)
    # The SDK passes only a few variables on; those of Nexus say where its daemon is, if not in the default place.
    env = {name: value for name, value in os.environ.items() if name.startswith("NEXUS_")}
    return StdioServerParameters(command="nexusctl", args=["mcp", "--tools", tools], env=env)


async def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--from", dest="image", help="the image of the machine (default: Debian)")
    parser.add_argument("--url", help="the daemon's HTTP endpoint, such as http://127.0.0.1:9600/mcp")
    parser.add_argument("script", type=Path)
    arguments = parser.parse_args()
    async with Client(server(arguments.url)) as client:
        try:
            return await run(client, arguments.script.read_text(), arguments.image)
        except ToolError as error:
            return str(error)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
