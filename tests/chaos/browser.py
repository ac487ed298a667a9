"""Headless Chromium, driven through chromedriver's HTTP interface (W3C WebDriver), as far as the tests need it."""

import base64
import contextlib
import json
import shutil
import subprocess
import time
import urllib.request

from anchortp_sglang.testing.server import free_port

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


class Browser:
    """One window."""

    def __init__(self, driver_url):
        self._base = driver_url
        options = {"binary": shutil.which("chromium"), "args": list(_FLAGS)}
        asked = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        wanted = {"capabilities": {"alwaysMatch": asked}}
        self._base += f"/session/{self._call('POST', '/session', wanted)['sessionId']}"

    def open(self, url, width, height=900):
        """``width``, ``height``: of the page, as a phone of that size would show it."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._command("Emulation.setDeviceMetricsOverride", **size)
        self._call("POST", "/url", {"url": url})

    def dark(self, dark):
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._command("Emulation.setEmulatedMedia", features=[feature])

    def ask(self, script):
        """The value of a JavaScript expression."""
        return self._call("POST", "/execute/sync", {"script": f"return {script}", "args": []})

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def errors(self):
        """What the console says: failed requests and script errors."""
        lines = self._call("POST", "/se/log", {"type": "browser"})
        return [line["message"] for line in lines if line["level"] == "SEVERE"]

    def close(self):
        self._call("DELETE", "")

    def _command(self, name, **parameters):
        """Of Chrome's own protocol."""
        self._call("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def _call(self, method, path, body=None):
        data = None if method == "GET" or method == "DELETE" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]


@contextlib.contextmanager
def browser():
    port = free_port()
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5):
                break
            time.sleep(0.1)
        window = Browser(f"http://127.0.0.1:{port}")
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait(10)
