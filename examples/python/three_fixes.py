#!/usr/bin/env python3
"""Tries three fixes of one bug side by side, each in its own fork of a prepared virtual machine, and keeps the machine whose test passes.

    python three_fixes.py [--from IMAGE] [--url URL]

A real agent has a model write the fixes; here they are given. The machine is prepared once, however many fixes there are.
"""

import argparse
import asyncio
import sys

from mcp import Client

from sandbox import ToolError, call, call_to_the_end, server, stream

# It should print the larger of two numbers.
PROGRAM = '#!/bin/sh\nif [ "$1" -lt "$2" ]; then echo "$1"; else echo "$2"; fi\n'
TEST = '#!/bin/sh\nset -e\n[ "$(./larger 1 2)" = 2 ]\n[ "$(./larger 10 9)" = 10 ]\n[ "$(./larger -3 -7)" = -3 ]\n'
FIXES = {
    "swap": '#!/bin/sh\nif [ "$1" -lt "$2" ]; then echo "$2"; else echo "$2"; fi\n',
    "sort": '#!/bin/sh\nprintf "%s\\n" "$1" "$2" | sort | tail -n 1\n',
    "turn": '#!/bin/sh\nif [ "$1" -gt "$2" ]; then echo "$1"; else echo "$2"; fi\n',
}


async def write(client, vm, name, content):
    await call(client, "guest_file_write", vm=vm, path=f"/srv/job/{name}", content=content, mode="0755")


async def passes(client, vm):
    """Whether the test passes in a machine."""
    ran = await call(client, "guest_run_command", vm=vm, argv=["/srv/job/test"], cwd="/srv/job")
    return ran.meta["dev.nexus/result"].get("exit_code") == 0


async def attempt(client, vm, fix):
    """Applies one fix in one fork, and tests it there."""
    await write(client, vm, "larger", FIXES[fix])
    return await passes(client, vm)


async def try_fixes(client, image):
    base = await call_to_the_end(client, "vm_create", checkpoints=True, memory="256MiB", **({"from": image} if image else {}))
    made = [base["id"]]
    try:
        await write(client, base["id"], "larger", PROGRAM)
        await write(client, base["id"], "test", TEST)
        print(f"before: {'passes' if await passes(client, base['id']) else 'fails'}")

        forked = await call_to_the_end(client, "vm_fork", vm=base["id"], count=len(FIXES))
        forks = {fix: vm["id"] for fix, vm in zip(FIXES, forked["vms"])}
        made.extend(forks.values())
        passed = await asyncio.gather(*(attempt(client, vm, fix) for fix, vm in forks.items()))
        for fix, is_good in zip(forks, passed):
            print(f"{fix}: {'passes' if is_good else 'fails'}")

        good = [fix for fix, is_good in zip(forks, passed) if is_good]
        if not good:
            raise ToolError("no fix passes the test")
        kept = forks[good[0]]
        made.remove(kept)
        fixed = await call(client, "guest_file_read", vm=kept, path="/srv/job/larger")
        print(f"kept {good[0]}: {stream(fixed, 'content').splitlines()[1]}")
        print(f"machine {kept}", file=sys.stderr)
    finally:
        for vm in made:
            await call(client, "vm_delete", vm=vm, force=True)


async def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--from", dest="image", help="the image of the machine (default: Debian)")
    parser.add_argument("--url", help="the daemon's HTTP endpoint, such as http://127.0.0.1:9600/mcp?tools=all")
    arguments = parser.parse_args()
    async with Client(server(arguments.url, tools="all")) as client:
        try:
            return await try_fixes(client, arguments.image)
        except ToolError as error:
            return str(error)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
