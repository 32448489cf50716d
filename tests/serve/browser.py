"""A headless Chromium, driven by its DevTools protocol over a pipe: the standard library suffices."""

import json
import os
import shutil
import subprocess
import threading
import time
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PATIENCE = 30.0
"""seconds: a guard against hanging, no measure of anything"""
SWITCHES = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-extensions", "--mute-audio", "--remote-debugging-pipe"),
)  # fmt: skip
KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, ""), "ArrowDown": (40, "")}


class Browser:
    """A browser with its profile in `folder`; `page` opens a tab of it."""

    def __init__(self, folder):
        assert CHROMIUM is not None
        hears, self._to = os.pipe()
        self._from, says = os.pipe()
        # the browser reads commands at descriptor 3 and answers at 4
        command = ["bash", "-c", f'exec "$@" 3<&{hears} 4>&{says}', "bash", CHROMIUM, *SWITCHES]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(hears, says),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(hears)
        os.close(says)
        self._ready, self._answers, self._number = threading.Condition(), {}, 0
        self.pages: dict[str, Page] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        rest = b""
        while piece := os.read(self._from, 1 << 16):
            *whole, rest = (rest + piece).split(b"\0")
            for message in map(json.loads, whole):
                with self._ready:
                    if "id" in message:
                        self._answers[message["id"]] = message
                    elif page := self.pages.get(message.get("sessionId")):
                        page.events.append(message)
                    self._ready.notify_all()

    def ask(self, method: str, session: str | None = None, **params) -> Any:
        with self._ready:
            self._number += 1
            number = self._number
        told = {"id": number, "method": method, "params": params}
        os.write(
            self._to,
            json.dumps(told | ({"sessionId": session} if session else {})).encode() + b"\0",
        )
        with self._ready:
            assert self._ready.wait_for(lambda: number in self._answers, PATIENCE), (
                f"{method}: no answer"
            )
            answer = self._answers.pop(number)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def page(self, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> "Page":
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session)
        for domain in ("Page", "Network", "Runtime", "Log"):
            page.ask(f"{domain}.enable")
        page.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        page.ask("Emulation.setFocusEmulationEnabled", enabled=True)
        page.prefer(dark)
        page.ask("Page.navigate", url=url)
        page.wait("location.href !== 'about:blank' && document.readyState === 'complete'")
        return page

    def close(self) -> None:
        self.ask("Browser.close")
        self._process.wait(PATIENCE)
        os.close(self._to)


class Page:
    def __init__(self, browser: Browser, session: str):
        self._browser, self._session = browser, session
        self.events: list[dict] = []

    def ask(self, method: str, **params) -> Any:
        return self._browser.ask(method, self._session, **params)

    def prefer(self, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def value(self, expression: str) -> Any:
        found = self.ask(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not (found := self.value(expression)):
            assert time.monotonic() < deadline, f"never: {expression}"
            time.sleep(0.05)
        return found

    def type(self, text: str) -> None:
        self.ask("Input.insertText", text=text)

    def press(self, *keys: str) -> None:
        for key in keys:
            code, text = KEYS[key]
            about = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            self.ask("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
            self.ask("Input.dispatchKeyEvent", type="keyUp", **about)

    def told(self, method: str) -> list[dict]:
        return [event["params"] for event in [*self.events] if event["method"] == method]

    @property
    def asked(self) -> list[str]:
        """The addresses that were asked for."""
        return [told["request"]["url"] for told in self.told("Network.requestWillBeSent")]

    @property
    def errors(self) -> list:
        """What went wrong in the page, as its console shows it."""
        entries = [told["entry"] for told in self.told("Log.entryAdded")]
        logged = [entry["text"] for entry in entries if entry["level"] in ("error", "warning")]
        called = [
            told["args"]
            for told in self.told("Runtime.consoleAPICalled")
            if told["type"] in ("error", "warning")
        ]
        return [*logged, *called, *self.told("Runtime.exceptionThrown")]
