"""The page in a real browser: headless Chromium, driven through the DevTools protocol on a pipe."""

import base64
import contextlib
import json
import os
import shutil
import subprocess

import pytest

from commit import Run
from eval import answer, open_run
from tests.server import port_of

NAMES = "chromium", "chromium-browser", "google-chrome", "chrome"
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page. Messages are JSON that ends with a zero byte: Chromium reads file 3 and writes file 4."""

    def __init__(self, folder):
        fcntl = pytest.importorskip("fcntl")
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


@pytest.fixture
def browser(tmp_path):
    if not CHROMIUM:
        pytest.skip("no Chromium here: apt-get install chromium brings one")
    found = Browser(tmp_path / "profile")
    try:
        yield found
        assert not found.said, "the page complains"
    finally:
        found.close()


IDLE = "turns.length && !running.size && turns.at(-1)"
ANSWERS = "turns.at(-1).answers.map(a => [a.who.name, a.card.querySelector('.text').textContent])"


def a_prompt_for_each(folder):
    """Return {version: an instruction that is routed to it}, out of what it is measured on."""
    run, model, tokenizer = open_run(folder, "cpu")
    records = [r for task in run.tasks for r in run.validation(task) if not r.get("input")]
    _, found = answer(run, model, tokenizer, records, max_new_tokens=1)
    return {run.tasks[i]: r["instruction"] for i, r in zip(found.choice.tolist(), records)}


def test_in_a_browser_two_prompts_fall_into_two_regions_and_two_versions_answer(two, of_two, browser):
    asked = a_prompt_for_each(two)
    browser.open(f"http://127.0.0.1:{port_of(of_two)}/")
    assert browser.run("document.querySelectorAll('.region').length") == len(asked) == 2
    dots = []
    for name, prompt in asked.items():
        browser.ask(prompt)
        who = browser.until(f"{IDLE}.prompt === {json.dumps(prompt)} && turns.at(-1).who")
        assert who["name"] == who["nearest"] == name
        (note,) = browser.run("turns.at(-1).answers.map(a => a.card.querySelector('.who').textContent)")
        assert note.startswith(f"{name} · ") and "sure" in note and who["version"][:12] in note
        assert name in browser.run("document.getElementById('plane-text').textContent")
        dots.append(browser.run("['cx', 'cy'].map(k => document.querySelector('.now').getAttribute(k))"))
        assert browser.run("document.querySelectorAll('.cell').length === 2 * plane.layers")  # K = 2
    assert dots[0] != dots[1]
    browser.run("document.getElementById('model').value = 'base'")
    browser.ask("Name <b>three</b> <img src=x onerror=alert(1)> fruits.")
    assert browser.until(f"{IDLE}.who.name === 'base' && {ANSWERS}")[0][0] == "base"
    assert browser.run("document.querySelectorAll('.cell, #log b:not(.who b), #log img').length") == 0
    browser.run("[...document.querySelectorAll('.again')].at(-1).lastChild.click()")
    found = browser.until(f"turns.at(-1).answers.length === 4 && {IDLE} && {ANSWERS}")
    assert [name for name, _ in found] == ["base", "base", *Run(two).tasks]
    browser.call("Page.reload")
    browser.until("document.querySelectorAll('.region').length === 2 && !turns.length")
    for width, height in ((1280, 800), (390, 844)):
        browser.size(width, height)
        assert browser.run("document.documentElement.scrollWidth") <= width


def test_in_a_browser_an_answer_is_stopped_and_a_talk_goes_on(of_chat, browser):
    """The bare backbone of this run never ends; its version says Hello."""
    browser.open(f"http://127.0.0.1:{port_of(of_chat)}/")
    browser.run(
        "document.getElementById('model').value = 'base', document.getElementById('longest').value = 9999"
    )
    browser.ask("Hi.")
    browser.until("turns.at(-1)?.answers[0].text && (stop(), true)")
    assert "stopped" in browser.until(f"{IDLE}.node.querySelector('.who').textContent")
    browser.run("document.getElementById('model').value = 'auto'")
    browser.ask("Say 3.")
    assert browser.until(f"turns.length === 2 && {IDLE} && {ANSWERS}") == [["chats", "Hello."]]
    browser.ask("Say 4.")
    assert browser.until(f"turns.length === 3 && {IDLE} && {ANSWERS}") == [["chats", "Hello."]]
    said = browser.run("turns.at(-1).messages.map(m => m.role + ' ' + m.content)")
    assert said[-3:] == ["user Say 3.", "assistant Hello.", "user Say 4."]
    assert browser.run("document.getElementById('status').textContent") == "chats answered: Hello."
