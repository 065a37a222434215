"""The page in a real browser: login, views, actions, a terminal, and what tries to inject script.

`python3 page.py URL TOKEN IMAGE FOREIGN`: an address of the daemon, a token with all rights, what VMs are made from, and a VM made by another caller.
`NEXUS_SCREENSHOTS` names a directory for pictures of each view at three sizes and in both schemes.
"""

import base64
import json
import os
import sys
import time

from chromium import Browser
from daemon import Daemon

URL, TOKEN, IMAGE, FOREIGN = sys.argv[1:5]
DAEMON = Daemon(URL, TOKEN)
HOSTILE = '<img src=x onerror="window.hit=1"><script>window.hit=2</script>"\'&lt;'
SIZES = [(390, 844), (1280, 800), (2560, 1440)]


def check(is_so, what):
    assert is_so, what


def log_in(page, token=TOKEN):
    page.open(URL + "/")
    page.wait("document.activeElement?.id === 'token'")
    page.type(token)
    page.enter()


def open_vm(page, name, tab="overview"):
    page.wait_text(name, ".vms")
    page.evaluate(f"[...document.querySelectorAll('.vm')].find((row) => row.querySelector('.vm-name').textContent === {json.dumps(name)}).click()")
    page.click(f"[data-tab={tab}]")
    page.wait(f"document.querySelector('h1')?.textContent === {json.dumps(name)}")


def nothing_ran(page, allowed=()):
    """Nobody's script ran, no markup was made of text, and the browser had nothing to complain of."""
    check(page.evaluate("window.hit === undefined && !document.querySelector('img, iframe, .detail script')"), "hostile text became markup")
    complaints = [said for said in page.complaints() if not any(word in said for word in allowed)]
    check(not complaints, complaints)


def is_painted_without_its_script(browser):
    page = browser.page()
    page.send("Fetch.enable", patterns=[{"urlPattern": "*/page.js"}])
    page.send("Page.navigate", url=URL + "/")
    page.wait_text("Loading")
    page.wait("performance.getEntriesByName('first-contentful-paint')[0]?.startTime > 0")
    check(page.evaluate("getComputedStyle(document.querySelector('main')).display") == "grid", "the style of the document does not apply")
    held = page.events("Fetch.requestPaused")
    check(len(held) == 1, f"{len(held)} requests for the script")
    page.send("Fetch.continueRequest", requestId=held[0]["requestId"])
    page.wait("document.activeElement?.id === 'token'")
    check(not any(request["request"]["url"].endswith(".css") for request in page.events("Network.requestWillBeSent")), "a style is loaded")
    nothing_ran(page)
    page.close()


def logs_in_and_out(browser):
    page = browser.page()
    log_in(page, "wrong")
    page.wait_text("The token does not work")
    check(page.evaluate("document.querySelector('#token').value === '' && sessionStorage.length === 0"), "a wrong token is kept")
    page.type(TOKEN)
    page.enter()
    page.wait_text("web-1", ".vms")
    kept = page.evaluate("[location.href, document.cookie, localStorage.length, history.length].join(' ') + document.documentElement.outerHTML")
    check(TOKEN not in kept, "the token is in the address or the document")
    requests = page.events("Network.requestWillBeSent")
    check(all(TOKEN not in request["request"]["url"] for request in requests), "the token is in an address")
    later = [request["request"] for request in requests if not request["request"]["url"].endswith("/login")]
    check(later and all(TOKEN not in json.dumps(request["headers"]) for request in later), "the token is sent again after the login")
    check(page.evaluate("sessionStorage.length === 1") and TOKEN not in page.evaluate("JSON.stringify(sessionStorage)"), "the token is kept")
    check({request["request"]["url"].split("/")[2] for request in requests} == {URL.split("/")[2]}, "something is loaded from elsewhere")
    page.send("Page.reload")
    page.wait_text("web-1", ".vms")
    page.click("button", "Log out")
    page.wait("!!document.querySelector('#token') && sessionStorage.length === 0")
    nothing_ran(page, ["401"])
    page.close()


def shows_and_acts(browser):
    page = browser.page()
    log_in(page)
    open_vm(page, "web-1")
    page.wait_text("Memory", ".grid")
    page.wait("/^up [0-9]/.test(document.querySelector('.vm.chosen .vm-up').textContent)")
    # Each view, by the keyboard.
    DAEMON.call("guest_run_command", vm="web-1", command="echo from-a-command; echo wrong >&2; false")
    page.evaluate("document.querySelector('[data-tab=overview]').focus()")
    for tab, text in [("console", "hello from the console"), ("commands", "from-a-command"), ("network", "Nothing was refused"), ("history", "creating")]:
        page.key("ArrowRight", number=39)
        page.wait(f"document.activeElement.dataset.tab === '{tab}'")
        page.wait_text(text, ".panel")
    page.click("[data-tab=commands]")
    page.click(".pick")
    page.wait_text("wrong", ".streams")
    page.wait_text("exit 1", ".output")
    # The actions.
    before = DAEMON.call("vm_inspect", vm="web-1")["boot_id"]
    page.click(".actions button", "Restart")
    page.wait_text("is ready", ".status")
    check(DAEMON.call("vm_inspect", vm="web-1")["boot_id"] != before, "not restarted")
    page.click(".actions button", "Stop")
    page.wait_text("stopped", ".vm-title")
    page.click(".actions button", "Start")
    page.wait_text("ready", ".vm-title")
    page.click("button", "New VM")
    page.wait("document.activeElement?.id === 'new-name'")
    page.type("made-here")
    page.evaluate("document.querySelector('#new-from').focus()")
    page.type(IMAGE)
    page.evaluate("document.querySelector('#new-disk').focus()")
    page.type("64MiB")
    page.click("dialog button", "Create")
    page.wait("document.querySelector('h1')?.textContent === 'made-here'")
    page.wait_text("ready", ".vm-title")
    page.click(".actions button", "Delete")
    page.key("Escape", number=27)
    page.wait("!document.querySelector('dialog')")
    page.click(".actions button", "Delete")
    page.wait_text("It is running", "dialog")
    page.click("dialog button", "Delete")
    page.wait("!document.querySelector('.vms').innerText.includes('made-here')")
    # What somebody else made, the daemon wants to have confirmed.
    open_vm(page, FOREIGN)
    page.click(".actions button", "Delete")
    page.click("dialog button", "Delete")
    page.wait_text("wants this confirmed", "dialog")
    page.wait_text(FOREIGN, "dialog ul")
    check(DAEMON.call("vm_inspect", vm=FOREIGN)["state"] == "ready", "deleted without a confirmation")
    page.click("dialog button", "Confirm and delete")
    page.wait(f"!document.querySelector('.vms').innerText.includes('{FOREIGN}')")
    page.evaluate("document.querySelector('[data-view=audit]').click()")
    page.wait_text("vm_delete", "tbody")
    page.wait_text("confirmation_required", "tbody")
    nothing_ran(page)
    page.close()


def terminal_size(page, answers):
    """Rows and columns that a shell was told last, once it has said so often."""
    said = "[...document.querySelector('.xterm-rows').innerText.matchAll(/=(\\d+) (\\d+)=/g)]"
    page.wait(f"{said}.length >= {answers}")
    return page.evaluate(f"{said}.at(-1).slice(1).map(Number)")


def a_terminal_echoes(browser):
    page = browser.page()
    log_in(page)
    open_vm(page, "web-1", "terminal")
    page.click("button", "Open a shell")
    page.wait("document.activeElement?.classList.contains('xterm-helper-textarea')")
    page.type("echo $((6 * 7))-here; printf '\\033[38;2;9;8;7mtrue\\033[0m'; echo \"=$(stty size)=\"")
    page.enter()
    page.wait_text("42-here", ".xterm-rows")
    rows, columns = terminal_size(page, 1)
    check(rows > 20 and columns > 80, f"the terminal is {columns} x {rows}")
    # It goes on while something else is shown, and after a change of size.
    page.click("[data-tab=history]")
    page.click("[data-tab=terminal]")
    page.show(700, 600, "light")
    page.wait("document.querySelector('.xterm-rows').innerText.includes('42-here')")
    page.wait("document.querySelector('.xterm-screen').clientWidth < 700")
    page.evaluate("document.querySelector('.xterm-helper-textarea').focus()")
    deadline = time.monotonic() + 20
    asked = 1
    while terminal_size(page, asked)[1] >= columns:
        check(time.monotonic() < deadline, "the terminal keeps its size")
        asked += 1
        page.type("echo \"=$(stty size)=\"")
        page.enter()
    nothing_ran(page)
    # Whoever goes away hangs up.
    page.open("about:blank")
    deadline = time.monotonic() + 20
    while any(command["state"] == "running" for command in DAEMON.call("guest_command_list", vm="web-1")["commands"]):
        check(time.monotonic() < deadline, "the shell outlives its page")
        time.sleep(0.05)
    page.close()


def nothing_is_injected(browser):
    vm = DAEMON.call("vm_inspect", vm="hostile")
    with open(vm["console_log"], "a") as console:
        console.write(f"\n{HOSTILE}\n")
    script = "mkdir -p d; cd d; : > \"$NAME\"; ls"
    DAEMON.call("guest_run_command", vm="hostile", command=script + " # " + HOSTILE, env={"NAME": HOSTILE.replace("/", "|")})
    page = browser.page()
    # A daemon never gives such a name; a forged answer does.
    page.send("Fetch.enable", patterns=[{"urlPattern": "*/mcp*", "requestStage": "Response"}])

    def forge():
        done = set()
        while not forge.is_over:
            for event in page.events("Fetch.requestPaused"):
                if event["requestId"] in done:
                    continue
                done.add(event["requestId"])
                try:
                    got = page.send("Fetch.getResponseBody", requestId=event["requestId"])
                    body = base64.b64decode(got["body"]).decode() if got["base64Encoded"] else got["body"]
                    body = body.replace('"name":"hostile"', '"name":' + json.dumps(HOSTILE))
                    headers = [header for header in event["responseHeaders"] if header["name"].lower() != "content-length"]
                    page.send("Fetch.fulfillRequest", requestId=event["requestId"], responseCode=event["responseStatusCode"], responseHeaders=headers,
                              body=base64.b64encode(body.encode()).decode())
                except AssertionError:
                    pass  # The page took it back.
            time.sleep(0.02)

    import threading
    forge.is_over = False
    forger = threading.Thread(target=forge)
    forger.start()
    try:
        log_in(page)
        open_vm(page, HOSTILE)
        page.wait_text("bad=" + HOSTILE, ".vm.chosen")
        for tab in ["console", "commands", "history"]:
            page.click(f"[data-tab={tab}]")
            page.wait_text("window.hit=1" if tab != "history" else "creating", ".panel")
        page.click("[data-tab=commands]")
        page.click(".pick")
        page.wait_text("window.hit=2", ".streams")
        page.click(".actions button", "Delete")
        page.wait_text(HOSTILE, "dialog h2")
        page.click("dialog button", "Cancel")
        page.click("[data-tab=terminal]")
        page.click("button", "Open a shell")
        page.wait("document.activeElement?.classList.contains('xterm-helper-textarea')")
        page.type("cd d; ls; printf '\\033]0;owned\\007\\033]8;;javascript:window.hit=3\\007link\\033]8;;\\007\\033]52;c;aGk=\\007 en''d\\n'")
        page.enter()
        page.wait_text("link end", ".xterm-rows")
        page.wait_text("window.hit=1", ".xterm-rows")
        check(page.evaluate("document.title") == "Nexus", "a guest changed the title")
        page.evaluate("document.querySelector('[data-view=audit]').click()")
        page.wait_text("vm_create", "tbody")
        nothing_ran(page)
        page.click("button", "Log out")
    finally:
        forge.is_over = True
        forger.join()
    page.close()


def a_token_has_its_own_rights_and_its_end(browser):
    made = DAEMON.call("token_create", name="watcher", scopes=["read"], all_vms=True, tools="work")
    page = browser.page()
    log_in(page, made["token"])
    open_vm(page, "web-1")
    page.wait_text("Memory", ".grid")
    check(page.evaluate("!document.querySelector('.actions button, [data-tab=terminal], [data-view=audit], [data-tab=history], .side-head button')"), "more is offered than allowed")
    page.send("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    page.wait("!document.querySelector('.banner').hidden")
    page.send("Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    page.wait("document.querySelector('.banner').hidden")
    DAEMON.call("token_revoke", token=made["id"])
    page.wait("!!document.querySelector('#token') && sessionStorage.length === 0")
    page.wait_text("was revoked, or has expired")
    nothing_ran(page, ["401", "403", "ERR_INTERNET_DISCONNECTED"])
    page.close()


def fits_everywhere(browser):
    place = os.environ.get("NEXUS_SCREENSHOTS")
    page = browser.page(*SIZES[0])
    for step, view in enumerate(["login", "", "overview", "console", "commands", "network", "history", "audit"]):
        if view == "login":
            page.open(URL + "/")
            page.wait("document.activeElement?.id === 'token'")
        elif view == "":
            page.type(TOKEN)
            page.enter()
            page.wait_text("web-1", ".vms")
        elif view == "audit":
            page.evaluate("location.hash = '#/audit'")
            page.wait("!!document.querySelector('tbody')")
        else:
            if view == "overview":
                open_vm(page, "web-1")
            page.click(f"[data-tab={view}]")
            page.wait("!document.querySelector('.panel .loading')")
        for width, height in SIZES:
            for scheme in ["light", "dark"]:
                page.show(width, height, scheme)
                check(page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{view} is wider than {width} px")
                if place:
                    time.sleep(0.3)
                    page.screenshot(f"{place}/{step}-{view or 'list'}-{width}-{scheme}.png")
        page.show(*SIZES[0], "light")
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
    print(f"first paint {paint:.0f} ms")
    nothing_ran(page)
    page.close()


def main():
    started = time.monotonic()
    web = DAEMON.create(IMAGE, "web-1", tags={"role": "front"})
    DAEMON.create(IMAGE, "hostile", tags={"bad": HOSTILE})
    with open(DAEMON.call("vm_inspect", vm=web)["console_log"], "a") as console:
        console.write("hello from the console\n")
    with Browser() as browser:
        for test in [is_painted_without_its_script, logs_in_and_out, shows_and_acts, a_terminal_echoes, nothing_is_injected, a_token_has_its_own_rights_and_its_end, fits_everywhere]:
            before = time.monotonic()
            test(browser)
            print(f"{test.__name__}: {time.monotonic() - before:.1f} s", flush=True)
    print(f"all: {time.monotonic() - started:.1f} s")


main()
