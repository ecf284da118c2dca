"""A headless Chromium that a test drives through the DevTools protocol: evaluate, press keys, change the device."""

from __future__ import annotations

import asyncio
import base64
import subprocess
from pathlib import Path
from typing import Any

import aiohttp

from router_tuning.viewer.routing_page import FLAGS, PROGRAM


class Page:
    """One tab. Use as ``with Page(profile_folder) as page``; console errors are collected in ``errors``."""

    def __init__(self, profile: Path) -> None:
        self.profile, self.errors, self._number = profile, [], 0
        self.requests: list[str] = []
        self._session: aiohttp.ClientSession | None = None
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> Page:
        flags = [*FLAGS, "--remote-debugging-port=0", f"--user-data-dir={self.profile}"]
        self._process = subprocess.Popen([PROGRAM, *flags, "about:blank"], stderr=subprocess.PIPE, text=True)
        for line in self._process.stderr:
            if line.startswith("DevTools listening on "):
                try:
                    self._loop.run_until_complete(self._connect(line.split("/")[2]))
                except BaseException:
                    self.__exit__()
                    raise
                return self
        raise RuntimeError("chromium did not start")

    def __exit__(self, *_: object) -> None:
        if self._session is not None:
            self._loop.run_until_complete(self._session.close())
        self._loop.close()
        self._process.kill()
        self._process.wait()
        self._process.stderr.close()

    async def _connect(self, address: str) -> None:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))
        targets: list[dict[str, Any]] = []
        while not targets:  # the first tab opens a moment after the port
            async with self._session.get(f"http://{address}/json/list") as answer:
                targets = [target for target in await answer.json() if target["type"] == "page"]
        target = targets[0]
        self._socket = await self._session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)
        for domain in ("Page", "Runtime", "Network"):
            await self._send(f"{domain}.enable")

    async def _send(self, method: str, until: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        result: dict[str, Any] | None = None
        seen = until is None
        while result is None or not seen:
            message = await asyncio.wait_for(self._socket.receive_json(), timeout=60)
            if message.get("id") == self._number:
                result = message
            seen = seen or message.get("method") == until
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(message["params"]["exceptionDetails"]))
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
        if "error" in result:
            raise RuntimeError(f"{method}: {result['error']}")
        return result["result"]

    def call(self, method: str, until: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One DevTools command, waiting for the event ``until`` as well."""
        return self._loop.run_until_complete(self._send(method, until, **parameters))

    def open(self, file: Path) -> None:
        """Load a file and wait until it is drawn; ``requests`` then holds every address that it asked for."""
        self.requests = []
        self.call("Page.navigate", until="Page.loadEventFired", url=file.resolve().as_uri())

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key by its DOM name."""
        text = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=_CODES.get(key, 0),
                **text,
            )

    def screen(self, width: int, height: int, dark: bool = False) -> None:
        """Size of the window in CSS pixels, and the reader's colour preference."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        preference = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[preference])

    def screenshot(self) -> bytes:
        """PNG of the window."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


_CODES = {
    "Tab": 9,
    "Enter": 13,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "Home": 36,
    "End": 35,
}
