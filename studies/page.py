"""Pictures of the page of `eval.py --web` in a real browser, which tests/browser.py asks, too.

    python -m studies.page --run runs/tiny --pictures pictures

It needs Chromium, and asks a server of its own.
"""

import base64
import contextlib
import json
import os
import pathlib
import re
import select
import shutil
import subprocess
import sys
import tempfile

from plumbing import Refused
from plumbing.command import Parser, run_program

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HERE = pathlib.Path(__file__).parent.parent
NAMES = "chromium", "chromium-browser", "google-chrome", "chrome"
CHROMIUM = fcntl and next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page. Messages are JSON that ends with a zero byte: Chromium reads file 3 and writes file 4."""

    def __init__(self, folder):
        (its_in, self.to), (self.come, its_out) = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (its_in, its_out)]
        flags = "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
        flags += " --remote-debugging-pipe --disable-component-update --disable-sync --disable-extensions"
        command = [CHROMIUM, *flags.split(), f"--user-data-dir={folder}", "about:blank"]
        silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        take_ends = lambda: [os.dup2(end, fd) for fd, end in enumerate(ends, 3)]
        self.process = subprocess.Popen(command, pass_fds=(3, 4), preexec_fn=take_ends, **silent)
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
                data = select.select([self.come], [], [], 600)[0] and os.read(self.come, 2**16)
                assert data, "the browser has ended, or does not answer"
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

    def until(self, script, seconds=300):
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
        about = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
        about |= {"text": text} if text else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def ask(self, prompt):
        """Type a prompt and press Enter."""
        self.run("document.getElementById('prompt').focus()")
        self.call("Input.insertText", text=prompt)
        self.press("Enter", "\r")

    def screenshot(self, path):
        """Keep a picture of what is shown."""
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def size(self, width, height, dark=False):
        """Show the page at this size, and as whoever prefers dark pages sees it."""
        how = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **how)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


ASKED = "Name three fruits.", "How do I sort names in Python?", "Write a function that reverses a string."


@contextlib.contextmanager
def serving(run):
    """Serve a run folder in a process of its own. Gives the address."""
    command = [sys.executable, str(HERE / "eval.py"), "--web", "--port", "0", "--run", run, "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = re.match(r"(http://\S+) is open", process.stdout.readline())
        if not address:
            raise Refused(f"eval.py --web --run {run} does not serve")
        yield address[1]
    finally:
        process.kill()
        process.wait()


def take_pictures(browser, folder):
    """Ask three prompts, the last of all versions, and take pictures: wide, of a phone, light and dark."""
    browser.size(1280, 800)
    browser.run("document.getElementById('longest').value = 40")
    for prompt in ASKED:
        browser.ask(prompt)
        browser.until("!running.size && turns.length && turns.at(-1).who")
    browser.run("[...document.querySelectorAll('.again')].at(-1).lastChild.click()")
    browser.until("!running.size && turns.at(-1).answers.length > 1")
    for width, height in ((1280, 800), (390, 844)):
        for scheme in ("light", "dark"):
            browser.size(width, height, scheme == "dark")
            browser.run("document.getElementById('log').scrollTop = 1e9")
            path = folder / f"page-{width}-{scheme}.png"
            browser.screenshot(path)
            print(f"wrote {path}")


def main(argv=None):
    p = Parser(__doc__, prog="page.py")
    p.add_argument("--run", required=True, help="a run folder")
    p.add_argument("--pictures", type=pathlib.Path, required=True, metavar="FOLDER", help="where they go")
    args = p.parse_args(argv)
    if not CHROMIUM:
        raise Refused("this needs Chromium on a POSIX system: `apt-get install chromium` brings it")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, serving(args.run) as address:
        with contextlib.closing(Browser(profile)) as browser:
            browser.open(address)
            take_pictures(browser, args.pictures)


if __name__ == "__main__":
    run_program(main)
