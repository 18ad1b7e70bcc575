"""The page in a real browser. It is skipped where there is none."""

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time

import pytest

from commit import Run
from eval import answer, open_run
from tests.server import port_of


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

    def ask(self, prompt):
        """Type a prompt and press Enter."""
        self.run("document.getElementById('prompt').focus()")
        self.call("Input.insertText", text=prompt)
        enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **enter)

    def size(self, width, height):
        """Show the page at this size."""
        how = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **how)
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
    """Return {version: the instruction that is routed to it most surely}, out of what it is measured on: one
    in doubt might go elsewhere alone than in a batch."""
    run, model, tokenizer = open_run(folder, "cpu")
    records = [r for task in run.tasks for r in run.validation(task) if not r.get("input")]
    _, found = answer(run, model, tokenizer, records, max_new_tokens=1)
    order = found.probability.argsort().tolist()  # the surest come last, and stay
    return {run.tasks[found.choice[i]]: records[i]["instruction"] for i in order}


def test_in_a_browser_each_prompt_gets_its_own_version(two, of_two, browser):
    """In the page each prompt is answered by its own version, and the note, plane and cells show it."""
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


def test_in_a_browser_an_answer_is_stopped_and_a_talk_goes_on(of_chat, browser, monkeypatch):
    """The bare backbone of this run ends with its context, here after seconds; its version says Hello."""

    def slowly(*how, stream=of_chat.answers.stream):
        with contextlib.closing(stream(*how)) as steps:
            for step in steps:
                time.sleep(0.01)
                yield step

    monkeypatch.setattr(of_chat.answers, "stream", slowly)
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
