"""A daemon over HTTP, as a plain MCP client of revision 2026-07-28 calls it."""

import json
import urllib.request

VERSION = "2026-07-28"


class Daemon:
    def __init__(self, url, token, capabilities=None):
        self.url, self.token, self.capabilities = url, token, capabilities or {}

    def request(self, method, params=None, address="/mcp?tools=all"):
        meta = {
            "io.modelcontextprotocol/protocolVersion": VERSION,
            "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "0"},
            "io.modelcontextprotocol/clientCapabilities": self.capabilities,
        }
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {**(params or {}), "_meta": meta}}
        headers = {
            "Authorization": f"Bearer {self.token}", "Content-Type": "application/json", "Accept": "application/json, text/event-stream",
            "MCP-Protocol-Version": VERSION, "Mcp-Method": method,
        }
        if name := (params or {}).get("name") or (params or {}).get("uri"):
            headers["Mcp-Name"] = name
        with urllib.request.urlopen(urllib.request.Request(self.url + address, json.dumps(body).encode(), headers), timeout=60) as answer:
            text = answer.read().decode()
        if not text.startswith("{"):
            text = [line.removeprefix("data:") for line in text.splitlines() if line.startswith("data:") and '"id":1' in line][-1]
        return json.loads(text)

    def call(self, tool, **arguments):
        """The facts of a tool's result; a failure is an error of the test."""
        answer = self.request("tools/call", {"name": tool, "arguments": arguments})
        result = answer.get("result", {})
        assert "error" not in answer and not result.get("isError"), f"{tool}: {answer}"
        return result.get("structuredContent") or result["_meta"]["dev.nexus/result"]

    def create(self, image, name, **more):
        """Makes a machine and waits until it is ready; its id."""
        made = self.call("vm_create", name=name, **{"from": image}, disk="64MiB", wait_s=45, **more)
        assert made["done"] and made["result"]["state"] == "ready", made
        return made["result"]["id"]
