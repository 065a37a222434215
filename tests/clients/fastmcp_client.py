"""What an application does with a FastMCP client: fastmcp_client.py URL, or fastmcp_client.py -- COMMAND... Prints what it saw as JSON."""

import asyncio
import json
import os
import sys

from fastmcp import Client
from fastmcp.client.transports import StdioTransport, StreamableHttpTransport
from fastmcp.exceptions import ToolError


def transport(arguments):
    if arguments[0] == "--":
        return StdioTransport(command=arguments[1], args=arguments[2:], env=dict(os.environ))
    return StreamableHttpTransport(arguments[0], headers={"Authorization": f"Bearer {os.environ['NEXUS_HTTP_TOKEN']}"})


async def visit(mode):
    notes = []

    async def on_progress(progress, total, message):
        notes.append(progress)

    async with Client(transport(sys.argv[1:]), mode=mode) as client:
        tools = await client.list_tools()
        again = await client.list_tools()
        listed = await client.call_tool("vm_list", {})
        command = "for n in 1 2 3; do echo line $n; sleep 0.6; done"
        ran = await client.call_tool(
            "guest_run_command", {"vm": "web-1", "command": command}, progress_handler=on_progress
        )
        try:
            failed = str(await client.call_tool("vm_inspect", {"vm": "nobody"}))
        except ToolError as error:
            failed = str(error)
        read = await client.read_resource("nexus://vm/web-1")
        prompts = await client.list_prompts()
        return {
            "tools": [tool.name for tool in tools],
            "same": [tool.model_dump() for tool in tools] == [tool.model_dump() for tool in again],
            "vms": [vm["name"] for vm in listed.structured_content["vms"]],
            "text": "".join(block.text for block in ran.content),
            "notes": len(notes),
            "growing": all(earlier < later for earlier, later in zip(notes, notes[1:])),
            "failed": failed,
            "read": str(read[0].uri),
            "prompts": len(prompts),
        }


print(json.dumps([asyncio.run(visit(mode)) for mode in ("legacy", "auto")]))
