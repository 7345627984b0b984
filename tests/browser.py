"""Headless Chromium, driven through its debugging pipe: no package between the test and the page."""

import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_PATIENCE = 60.0  # seconds


class Page:
    """A page that is open; ``requests`` are the addresses that it asked for."""

    def __init__(self, reading, writing):
        self.reading, self.writing = reading, writing
        self.number, self.session, self.rest = 0, None, b""
        self.requests = []

    def call(self, method, **parameters):
        """Send a command of the DevTools protocol; its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def _message(self):
        while b"\0" not in self.rest:
            block = os.read(self.reading, 1 << 20)
            assert block, "Chromium ended"
            self.rest += block
        text, _, self.rest = self.rest.partition(b"\0")
        return json.loads(text)

    def js(self, code):
        """Value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, code):
        """Wait until an expression is true."""
        end = time.monotonic() + _PATIENCE
        while not self.js(code):
            assert time.monotonic() < end, code
            time.sleep(0.05)

    def key(self, key, code, number, modifiers=0):
        """Press a key: its name, its place on the keyboard, its Windows number; modifiers: 2 = Ctrl."""
        common = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="rawKeyDown", **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text):
        """Text into what has the focus."""
        self.call("Input.insertText", text=text)

    def tab_to(self, selector):
        """Press Tab until the focus is on what matches."""
        for _ in range(200):
            self.key("Tab", "Tab", 9)
            if self.js(f"document.activeElement.matches({json.dumps(selector)})"):
                return
        raise AssertionError(f"Tab does not reach {selector}")


@contextmanager
def open_page(path: Path, folder: Path, width: int = 1200, height: int = 900):
    """A file in a browser of its own, which keeps profile and downloads in `folder`."""
    to_browser, from_browser = os.pipe(), os.pipe()

    def wire():
        kept = os.dup(to_browser[0]), os.dup(from_browser[1])
        os.dup2(kept[0], 3)
        os.dup2(kept[1], 4)

    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}", "about:blank"]
    with open(os.devnull, "wb") as quiet:
        process = subprocess.Popen(command, stdout=quiet, stderr=quiet, preexec_fn=wire, close_fds=False)
    try:
        page = Page(from_browser[0], to_browser[1])
        page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        target = page.call("Target.createTarget", url="about:blank")["targetId"]
        page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page.call("Network.enable")
        page.call("Page.enable")
        page.call("Page.navigate", url=path.resolve().as_uri())
        page.wait("document.readyState === 'complete'")
        yield page
    finally:
        process.kill()
        process.wait()
        for descriptor in (*to_browser, *from_browser):
            os.close(descriptor)
