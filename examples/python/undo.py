#!/usr/bin/env python3
"""Undoes a command that destroys a virtual machine, by the checkpoint that was taken before it.

    python undo.py [--from IMAGE] [--url URL]

The machine's programs are deleted, while a command counts on in its memory. What the command did is listed, then undone.
"""

import argparse
import asyncio
import sys

from mcp import Client

from sandbox import ToolError, call, call_to_the_end, server, stream

# All programs of the machine are in these directories, or are links into them.
DESTRUCTION = "rm -rf /usr /bin /sbin"


async def confirmed_to_the_end(client, tool, **arguments):
    """Calls a tool that cannot be undone, and confirms what it would do: here, a person would read the plan first."""
    asked = await client.call_tool(tool, arguments)
    if not asked.is_error:
        raise ToolError(f"{tool} asked for no confirmation")
    confirm = (asked.meta or {}).get("dev.nexus/error", {}).get("confirm")
    if not confirm:
        raise ToolError(f"{tool}: {asked.content[0].text}")
    return await call_to_the_end(client, tool, confirm=confirm["token"], **arguments)


async def works(client, vm):
    """Whether the machine can still run a program."""
    ran = await client.call_tool("guest_run_command", {"vm": vm, "command": "uptime"})
    return not ran.is_error and ran.meta["dev.nexus/result"].get("exit_code") == 0


async def undo(client, image):
    vm = await call_to_the_end(client, "vm_create", checkpoints=True, memory="256MiB", **({"from": image} if image else {}))
    try:
        await call(client, "guest_file_write", vm=vm["id"], path="/srv/note", content="precious\n")
        ran = await call(client, "guest_run_command", vm=vm["id"], command=DESTRUCTION, checkpoint=True)
        checkpoint = ran.meta["dev.nexus/checkpoint"]
        print(f"before: checkpoint {checkpoint['name'].rsplit('-', 1)[0]}")
        print(f"works after {DESTRUCTION!r}: {await works(client, vm['id'])}")

        diff = (await call(client, "checkpoint_diff", **{"from": checkpoint["id"]})).structured_content
        print(f"files are gone: {diff['removed'] > 0}")

        await confirmed_to_the_end(client, "vm_rollback", vm=vm["id"], checkpoint=checkpoint["id"], keep_current=False)
        print(f"works after the rollback: {await works(client, vm['id'])}")
        kept = await call(client, "guest_file_read", vm=vm["id"], path="/srv/note")
        print(f"note: {stream(kept, 'content')}", end="")
    finally:
        await call(client, "vm_delete", vm=vm["id"], force=True)


async def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--from", dest="image", help="the image of the machine (default: Debian)")
    parser.add_argument("--url", help="the daemon's HTTP endpoint, such as http://127.0.0.1:9600/mcp?tools=all")
    arguments = parser.parse_args()
    async with Client(server(arguments.url, tools="all")) as client:
        try:
            return await undo(client, arguments.image)
        except ToolError as error:
            return str(error)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
