"""Headless Chromium, told what to do over a pair of pipes: one page, its own profile, nothing from the network."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe")
KEYS = {"Tab": ("Tab", 9, ""), "Enter": ("Enter", 13, "\r")}
CTRL = 2


class Page:
    """A page of the browser, by the DevTools protocol: NUL-ended JSON on file descriptors 3 and 4 of the browser."""

    def __init__(self, to: int, back: int):
        self._to, self._back, self._number, self._session = to, back, 0, ""
        self._unread = b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its result; events in between are dropped."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            part = os.read(self._back, 1 << 16)
            assert part, "the browser has ended"
            self._unread += part
        message, self._unread = self._unread.split(b"\0", 1)
        return json.loads(message)

    def open(self, address: str) -> None:
        """Go there, and wait until it is loaded."""
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, expression: str) -> Any:
        """Of JavaScript; promises are awaited."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait, in the page itself, for a condition; fails after 20 s."""
        waiting = (
            f"new Promise((ok, no) => {{const end = Date.now() + 20000; const look = () => ({condition}) ? ok(true) :"
            f" Date.now() > end ? no(new Error('never')) : setTimeout(look, 20); look();}})"
        )
        assert self.value(waiting) is True

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        """A key, down and up."""
        name, code, text = KEYS[key]
        common = {"key": name, "code": name, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", text="" if modifiers else text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def scheme(self, name: str) -> None:
        """ "light" or "dark"."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def picture(self, path: Path, width: int, height: int) -> None:
        """A PNG of a window of this size."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A browser with a new profile in this folder, ended afterwards."""
    assert CHROMIUM is not None
    (its_in, our_out), (our_in, its_out) = os.pipe(), os.pipe()
    # The shell moves the pipes to the descriptors that Chromium looks at, in an order that works for any numbers.
    move = f'exec 8<&{its_in} 9>&{its_out}; exec 3<&8 4>&9 8<&- 9>&-; exec "$@"'
    process = subprocess.Popen(
        ["bash", "-c", move, "bash", CHROMIUM, *FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(its_in, its_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(its_in)
    os.close(its_out)
    try:
        yield Page(our_out, our_in)
    finally:
        process.kill()
        process.wait()
        os.close(our_out)
        os.close(our_in)
