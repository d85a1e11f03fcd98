"""A headless Chromium, driven through its DevTools protocol over pipes: no driver, no port, no network."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
NETWORK_OFF = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"


class Page:
    """A page that is open."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive, self._number, self._buffer = send, receive, 0, b""
        self._session: dict[str, str] = {}
        self.errors: list[str] = []  # exceptions of the page's scripts
        self.requested: list[str] = []  # addresses
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Network"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command and returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                more = os.read(self._receive, 1 << 20)
                assert more, "the browser has ended"
                self._buffer += more
            line, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(answer["params"]["exceptionDetails"])[:500])
            elif answer.get("method") == "Network.requestWillBeSent":
                self.requested.append(answer["params"]["request"]["url"])
            elif answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, path: Path | str) -> None:
        """Opens a file from disk, or an address of this machine, and waits until the page says that it is ready."""
        self.do("Page.navigate", url=f"file://{path}" if isinstance(path, Path) else path)
        ask = "const ask = () => document.body?.dataset.ready ? done() : setTimeout(ask, 20); ask()"
        self.run(f"new Promise(done => {{ {ask} }})")

    def run(self, expression: str) -> Any:
        """Returns the value of an expression in the page, awaited."""
        answer = self.do("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str, shift: bool = False) -> None:
        for kind in ("keyDown", "keyUp"):
            self.do("Input.dispatchKeyEvent", type=kind, key=key, code=key, modifiers=8 * shift)

    def drag(self, first: str, last: str) -> None:
        """Presses the mouse on the first element and releases it on the last, both given as expressions; or clicks."""
        box = "(node => { node.scrollIntoView({block: 'nearest'}); const r = node.getBoundingClientRect();"
        box += " return [r.x, r.y, r.width, r.height] })"
        (x, y, _, height), (to_x, to_y, to_width, _) = (self.run(f"{box}({node})") for node in (first, last))
        begin, end = (x + 1, y + height / 2), (to_x + (to_width - 1 if first != last else 1), to_y + height / 2)
        how = {"button": "left", "clickCount": 1}
        self.do("Input.dispatchMouseEvent", type="mouseMoved", x=begin[0], y=begin[1])
        self.do("Input.dispatchMouseEvent", type="mousePressed", x=begin[0], y=begin[1], **how)
        if first != last:
            self.do("Input.dispatchMouseEvent", type="mouseMoved", x=end[0], y=end[1], button="left")
        self.do("Input.dispatchMouseEvent", type="mouseReleased", x=end[0], y=end[1], **how)

    def screenshot(self, path: Path, theme: str = "light", width: int = 1400, height: int = 1100) -> None:
        feature = {"name": "prefers-color-scheme", "value": theme}
        self.do("Emulation.setEmulatedMedia", features=[feature])
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        path.write_bytes(base64.b64decode(self.do("Page.captureScreenshot")["data"]))


@contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """A browser without a network whose profile lies in `folder`; the test is skipped where there is no Chromium."""
    if not EXECUTABLE:
        pytest.skip("there is no Chromium to open the page in")
    to_read, send = os.pipe()
    receive, to_write = os.pipe()
    how = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", NETWORK_OFF]
    command = f"exec 3<&{to_read} 4>&{to_write}; exec '{EXECUTABLE}' --remote-debugging-pipe \"$@\""
    started = subprocess.Popen(
        ["bash", "-c", command, "chromium", *how, f"--user-data-dir={folder / 'profile'}"],
        pass_fds=(to_read, to_write),
        stderr=subprocess.DEVNULL,
        env=os.environ | {"HOME": str(folder)},
    )
    os.close(to_read)
    os.close(to_write)
    try:
        yield Page(send, receive)
    finally:
        started.kill()
        started.wait()
        os.close(send)
        os.close(receive)
