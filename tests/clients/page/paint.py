"""How soon the page is painted and how much is loaded: `python3 paint.py URL RUNS` prints JSON, times in milliseconds."""

import json
import sys

from chromium import Browser

URL, RUNS = sys.argv[1], int(sys.argv[2])
PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


def painted(browser, path):
    """A page in a context of its own, so that nothing is cached."""
    page = browser.page()
    page.open(URL + path)
    time = page.wait(PAINT)
    loaded = sum(event["encodedDataLength"] for event in page.events("Network.loadingFinished"))
    page.close()
    return time, loaded


def main():
    said = {"page": [], "plain": [], "bytes": 0}
    with Browser() as browser:
        for _ in range(RUNS):
            said["plain"].append(painted(browser, "/healthz")[0])
            time, said["bytes"] = painted(browser, "/")
            said["page"].append(time)
        page = browser.page()
        page.open(URL + "/")
        size = "fetch('/{}').then((answer) => answer.arrayBuffer()).then((bytes) => bytes.byteLength)"
        said["terminal"] = sum(page.evaluate(size.format(name)) for name in ["xterm.js", "xterm.css"])
    print(json.dumps(said))


main()
