"""The page in a real browser: headless Chromium, driven through the DevTools protocol on a pipe."""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess

NAMES = "chromium", "chromium-browser", "google-chrome", "chrome"
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page. Messages are JSON that ends with a zero byte: Chromium reads file 3 and writes file 4."""

    def __init__(self, folder):
        (its_in, self.to), (self.come, its_out) = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (its_in, its_out)]
        flags = "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
        flags += " --remote-debugging-pipe --disable-component-update --disable-sync --disable-extensions"
        command = [CHROMIUM, *flags.split(), f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(
            command,
            pass_fds=(3, 4),
            preexec_fn=lambda: [os.dup2(end, fd) for fd, end in enumerate(ends, 3)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (its_in, its_out, *ends):
            os.close(end)
        self.rest, self.last, self.session, self.said = b"", 0, {}, []
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        how = {"targetId": page["targetId"], "flatten": True}
        self.session = {"sessionId": self.call("Target.attachToTarget", **how)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self):
        with contextlib.suppress(OSError, AssertionError):
            self.session = {}
            self.call("Browser.close")
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.come)

    def call(self, method, **params):
        """Ask for something and return what comes of it. Keep what the page complains of in `said`."""
        self.last += 1
        message = json.dumps({"id": self.last, "method": method, "params": params, **self.session}).encode()
        os.write(self.to, message + b"\0")
        while True:
            while b"\0" not in self.rest:
                data = os.read(self.come, 2**16)
                assert data, "the browser has ended"
                self.rest += data
            message, _, self.rest = self.rest.partition(b"\0")
            found = json.loads(message)
            if found.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.said.append(found["params"])
            if found.get("id") == self.last:
                assert "error" not in found, (method, found)
                return found["result"]

    def run(self, script):
        """Return what an expression of JavaScript gives, once its promise is kept."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script, seconds=60):
        """Wait until an expression is true, and return it."""
        wait = f"""(async () => {{
            for (const end = Date.now() + {1000 * seconds}; Date.now() < end;) {{
                const found = {script};
                if (found) return found;
                await new Promise(done => setTimeout(done, 10));
            }} }})()"""
        found = self.run(wait)
        assert found, script
        return found

    def open(self, address):
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && typeof models === 'object' && models.length")

    def press(self, key, text=None):
        codes = {"Enter": 13, "Escape": 27, "Tab": 9}
        about = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]} | (
            {"text": text} if text else {}
        )
        self.call("Input.dispatchKeyEvent", type="keyDown", **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def ask(self, prompt):
        """Type a prompt and press Enter."""
        self.run("document.getElementById('prompt').focus()")
        self.call("Input.insertText", text=prompt)
        self.press("Enter", "\r")

    def screenshot(self, path, width, height, dark=False):
        """Show the page at this size, and keep a picture of it."""
        self.size(width, height, dark)
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def size(self, width, height, dark=False):
        how = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **how)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
