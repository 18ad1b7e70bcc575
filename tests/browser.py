"""The page in a real browser. It is skipped where there is none."""

import json

import pytest

from commit import Run
from eval import answer, open_run
from studies.page import CHROMIUM, Browser
from tests.server import port_of


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
