"""The MCP App in a page that does what the extension asks of a client: another origin for the sandbox, a frame without one for the view, and no way
out but messages.

`python3 app.py URL TOKEN IMAGE`: an address of the daemon, a token with all rights, and what VMs are made from.
"""

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from chromium import Browser
from daemon import Daemon

URL, TOKEN, IMAGE = sys.argv[1:4]
HERE = Path(__file__).parent
APP = "ui://nexus/dashboard"
TYPE = "text/html;profile=mcp-app"
CAPABLE = Daemon(URL, TOKEN, {"extensions": {"io.modelcontextprotocol/ui": {"mimeTypes": [TYPE]}}})
PLAIN = Daemon(URL, TOKEN)
HOSTILE = "<img src=x onerror=\"window.hit=1;parent.postMessage('hit','*')\"><script>window.hit=2</script>"


class Client(BaseHTTPRequestHandler):
    """The client's own server: its page, and calls for it with the default tools."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, kind, body):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        name = {"/host": "host.html", "/proxy": "proxy.html"}.get(self.path.split("?")[0])
        self.reply("text/html; charset=utf-8", (HERE / name).read_bytes() if name else b"")

    def do_POST(self):
        params = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/app":
            contents = CAPABLE.request("resources/read", {"uri": APP}, "/mcp?tools=work")["result"]["contents"][0]
            answer = {"html": contents["text"], "csp": contents["_meta"]["ui"]["csp"]}
        else:
            answer = CAPABLE.request("tools/call", params, "/mcp?tools=work")
        # No daemon gives such a name; the view is to bear it all the same.
        text = json.dumps(answer).replace('"name": "forged"', '"name": ' + json.dumps(HOSTILE))
        self.reply("application/json", text.encode())


def is_declared_to_those_who_can():
    for address in ["/mcp?tools=work", "/mcp?tools=all"]:
        capable = CAPABLE.request("tools/list", address=address)["result"]["tools"]
        plain = PLAIN.request("tools/list", address=address)["result"]["tools"]
        marked = {tool["name"]: tool.pop("_meta")["ui"] for tool in capable if "ui" in tool.get("_meta", {})}
        assert marked.pop("vm_list") == {"resourceUri": APP}, marked
        of_app = {"vm_history", "network_log"} if "work" in address else set()
        assert marked == {name: {"resourceUri": APP, "visibility": ["app"]} for name in of_app}, marked
        assert [tool for tool in capable if tool["name"] not in of_app] == plain, "the lists differ in more than the app"
    listed = [resource for resource in CAPABLE.request("resources/list")["result"]["resources"] if resource["uri"] == APP]
    assert [resource["mimeType"] for resource in listed] == [TYPE], listed
    assert APP not in json.dumps(PLAIN.request("resources/list")), "told to a client that shows none"
    contents = CAPABLE.request("resources/read", {"uri": APP})["result"]["contents"][0]
    assert contents["mimeType"] == TYPE and contents["_meta"]["ui"]["csp"] == {}, contents["_meta"]


class View:
    """The view's own frame, in the page's session."""

    def __init__(self, page):
        self.page, self.gone = page, set()

    def evaluate(self, expression):
        """The value of an expression in the view; `None` while it is not there."""
        contexts = [event["context"]["id"] for event in self.page.events("Runtime.executionContextCreated")]
        for context in reversed(contexts):
            if context in self.gone:
                continue
            try:
                answer = self.page.send("Runtime.evaluate", contextId=context, returnByValue=True,
                                        expression=f"origin === 'null' && document.getElementById('page') ? [{expression}] : null")
            except AssertionError:
                self.gone.add(context)
                continue
            if value := answer["result"].get("value"):
                return value[0]
        return None

    def wait(self, expression, patience=60):
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if value := self.evaluate(expression):
                return value
            time.sleep(0.02)
        raise AssertionError(f"waited in vain for {expression}; shown:\n{self.evaluate('document.body.innerText')}\n{self.page.complaints()}\n{self.page.evaluate('log')}")

    def text(self, text, inside="body"):
        self.wait(f"document.querySelector({json.dumps(inside)})?.innerText.includes({json.dumps(text)})")


def shows_in_a_client(browser, servers):
    page = browser.page(800, 640)
    page.open(f"http://127.0.0.1:{servers[0]}/host?proxy={servers[1]}")
    view = View(page)
    view.text("in-app", ".vms")
    view.text(HOSTILE, ".vms")
    assert view.evaluate("getComputedStyle(document.body).color") == "rgb(1, 2, 3)", "the client's colours are not used"
    assert view.evaluate("document.documentElement.dataset.theme") == "light"
    assert view.evaluate("location.origin === 'null' && origin === 'null'"), "the view has an origin"
    view.evaluate("[...document.querySelectorAll('.vm')].find((row) => row.innerText.includes('in-app')).click()")
    view.text("Memory", ".grid")
    assert view.evaluate("!document.querySelector('[data-tab=terminal]')"), "a terminal without a page"
    for tab, text in [("console", "window.hit=1"), ("commands", "window.hit=2"), ("network", "Policy")]:
        view.evaluate(f"document.querySelector('[data-tab={tab}]').click()")
        view.text(text, ".panel")
    if place := os.environ.get("NEXUS_SCREENSHOTS"):
        view.evaluate("document.querySelector('[data-tab=overview]').click()")
        view.text("Memory", ".grid")
        page.screenshot(f"{place}/app-light.png")
    # What the default tools do not have is there for the app.
    view.evaluate("document.querySelector('[data-tab=history]').click()")
    view.text("creating", ".panel")
    view.evaluate("[...document.querySelectorAll('.actions button')].find((one) => one.textContent === 'Stop').click()")
    view.text("stopped", ".vm-title")
    assert PLAIN.call("vm_inspect", vm="in-app")["state"] == "stopped"
    page.evaluate("say({ method: 'ui/notifications/host-context-changed', params: { theme: 'dark', styles: { variables: { '--color-text-primary': 'rgb(201, 202, 203)' } } } })")
    view.wait("document.documentElement.dataset.theme === 'dark' && getComputedStyle(document.body).color === 'rgb(201, 202, 203)'")
    if place:
        time.sleep(0.3)
        page.screenshot(f"{place}/app-dark.png")
    log = page.evaluate("log")
    assert log["requests"][0] == "ui/initialize" and log["notes"][:2] == ["ui/notifications/sandbox-proxy-ready", "ui/notifications/initialized"], log
    assert log["sizes"] and log["sizes"][-1]["height"] > 100 and not log["refused"], log
    assert all(request.startswith(("ui/initialize", "tools/call ")) for request in log["requests"]), log["requests"]
    # It says goodbye, and asks no more.
    page.evaluate("say({ id: 'end', method: 'ui/resource-teardown', params: { reason: 'test' } })")
    page.wait("log.answers.end?.result !== undefined")
    asked = page.evaluate("log.requests.length")
    time.sleep(3.5)
    assert page.evaluate("log.requests.length") <= asked + 1, "it asks after its end"
    assert view.evaluate("window.hit === undefined && !document.querySelector('img, iframe')"), "hostile text became markup"
    assert page.evaluate("window.hit === undefined")
    assert not page.complaints(), page.complaints()
    addresses = {event["request"]["url"].split("/")[2] for event in page.events("Network.requestWillBeSent") if "//" in event["request"]["url"]}
    assert addresses == {f"127.0.0.1:{servers[0]}", f"localhost:{servers[1]}"}, addresses
    page.close()


def main():
    started = time.monotonic()
    PLAIN.create(IMAGE, "in-app", tags={"bad": HOSTILE})
    PLAIN.create(IMAGE, "forged")
    PLAIN.call("guest_run_command", vm="in-app", command="echo '<script>window.hit=2</script>'")
    with open(PLAIN.call("vm_inspect", vm="in-app")["console_log"], "a") as console:
        console.write(HOSTILE + "\n")
    is_declared_to_those_who_can()
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Client) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    # One process for all frames, so that one session sees them.
    with Browser(["--disable-features=IsolateSandboxedIframes,IsolateOrigins,site-per-process", "--disable-site-isolation-trials"]) as browser:
        shows_in_a_client(browser, [server.server_port for server in servers])
    print(f"all: {time.monotonic() - started:.1f} s")


main()
