"""A headless Chromium, driven by its DevTools protocol over a pipe."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time

#: How long anything may take, in seconds.
PATIENCE = 60
FLAGS = [
    "--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--disable-extensions", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-default-browser-check", "--mute-audio", "--hide-scrollbars", "--disable-dev-shm-usage",
]


class Browser:
    """One browser with a profile of its own; `with` ends it."""

    def __init__(self, more=()):
        program = next(filter(None, map(shutil.which, ["chromium", "chromium-browser"])), None)
        if program is None:
            raise SystemExit("chromium is not installed: .ci/setup test")
        self.profile = tempfile.TemporaryDirectory(prefix="nexus-chromium-", ignore_cleanup_errors=True)
        to_browser, ours = os.pipe()
        theirs, from_browser = os.pipe()
        # Its sandbox needs an ordinary user.
        flags = FLAGS + list(more) + (["--no-sandbox"] if os.getuid() == 0 else [])
        command = [program, *flags, f"--user-data-dir={self.profile.name}", "about:blank"]
        script = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command], pass_fds=(to_browser, from_browser), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "HOME": self.profile.name})
        os.close(to_browser)
        os.close(from_browser)
        self.out, self.back = os.fdopen(ours, "wb", buffering=0), os.fdopen(theirs, "rb", buffering=0)
        self.change = threading.Condition()
        self.answers, self.events, self.last_id, self.is_over = {}, [], 0, False
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.profile.cleanup()

    def _listen(self):
        rest = b""
        while chunk := self.back.read(1 << 20):
            *messages, rest = (rest + chunk).split(b"\0")
            with self.change:
                for message in map(json.loads, messages):
                    if "id" in message:
                        self.answers[message["id"]] = message
                    else:
                        self.events.append(message)
                self.change.notify_all()
        with self.change:
            self.is_over = True
            self.change.notify_all()

    def send(self, method, params=None, session=None):
        """Asks the browser; returns what it answers."""
        with self.change:
            self.last_id += 1
            number = self.last_id
            message = {"id": number, "method": method, "params": params or {}, **({"sessionId": session} if session else {})}
            self.out.write(json.dumps(message).encode() + b"\0")
            self.change.wait_for(lambda: number in self.answers or self.is_over, PATIENCE)
            answer = self.answers.pop(number, None)
        if answer is None or "error" in answer:
            raise AssertionError(f"{method}: {answer}")
        return answer["result"]

    def page(self, width=1280, height=800, scheme="light"):
        """A new page with a context of its own: no storage is shared."""
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", {"url": "about:blank", "browserContextId": context})["targetId"]
        return Page(self, target, width, height, scheme)


class Page:
    """A tab."""

    def __init__(self, browser, target, width, height, scheme):
        self.browser, self.target = browser, target
        self.session = browser.send("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ["Page", "Runtime", "Log", "Network"]:
            self.send(f"{domain}.enable")
        self.show(width, height, scheme)

    def send(self, method, **params):
        return self.browser.send(method, params, self.session)

    def close(self):
        self.browser.send("Target.closeTarget", {"targetId": self.target})

    def show(self, width, height, scheme):
        """Sets the size and the colour scheme."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, url):
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'", url)

    def evaluate(self, expression):
        """The value of an expression, which may be a promise."""
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails'].get('exception', {}).get('description')}")
        return answer["result"].get("value")

    def wait(self, expression, what=None, patience=PATIENCE):
        """Waits until an expression is true; returns its value."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            try:
                if value := self.evaluate(expression):
                    return value
            except AssertionError as error:
                # The page may be changing.
                if "Cannot find context" not in str(error) and "TypeError" not in str(error):
                    raise
            time.sleep(0.02)
        raise AssertionError(f"waited in vain for {what or expression}; shown:\n{self.text()}\n{self.complaints()}")

    def text(self):
        return self.evaluate("document.body.innerText")

    def wait_text(self, text, inside="body"):
        self.wait(f"document.querySelector({json.dumps(inside)})?.innerText.includes({json.dumps(text)})", repr(text))

    def click(self, selector, text=None):
        """Clicks the first visible element that fits, as a pointer does."""
        find = f"""[...document.querySelectorAll({json.dumps(selector)})].find((one) => one.checkVisibility() && !one.disabled
            && (one.textContent.trim() === {json.dumps(text)} || {json.dumps(text is None)}))"""
        self.wait(f"!!{find}", f"{selector} {text or ''}")
        place = self.evaluate(f"(() => {{ const one = {find}; one.scrollIntoView({{block: 'nearest'}}); const r = one.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2] }})()")
        for kind in ["mousePressed", "mouseReleased"]:
            self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def type(self, text):
        self.send("Input.insertText", text=text)

    def key(self, key, code=None, number=0, text=""):
        for kind in ["keyDown", "keyUp"]:
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=code or key, windowsVirtualKeyCode=number,
                      **({"text": text} if text and kind == "keyDown" else {}))

    def enter(self):
        self.key("Enter", number=13, text="\r")

    def screenshot(self, path):
        data = self.send("Page.captureScreenshot", format="png")["data"]
        with open(path, "wb") as file:
            file.write(base64.b64decode(data))

    def events(self, method):
        with self.browser.change:
            return [event["params"] for event in self.browser.events if event.get("sessionId") == self.session and event["method"] == method]

    def complaints(self):
        """What the browser complained of: scripts' errors, and what the content security policy kept from being done."""
        said = [event["exceptionDetails"].get("exception", {}).get("description") for event in self.events("Runtime.exceptionThrown")]
        said += [" ".join(str(arg.get("value")) for arg in event["args"]) for event in self.events("Runtime.consoleAPICalled") if event["type"] in ("error", "assert")]
        said += [f"{event['entry']['text']} {event['entry'].get('url', '')}" for event in self.events("Log.entryAdded") if event["entry"]["level"] == "error"]
        return said
