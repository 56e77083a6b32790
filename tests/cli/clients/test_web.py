"""``kvquant web`` in a real browser."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from cli.clients.asking import KEY, answer
from cli.clients.browser import browser, missing, requested

COMMAND = [sys.executable, "-c", "from kvquant_hf.cli import main; main()", "web"]
LONG = 400
GREEDY = ("--temperature", "0", "--max-new-tokens", str(LONG))

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@contextmanager
def page(*arguments: str) -> Iterator[str]:
    """Where a page is; it ends with Ctrl-C and the exit code 0."""
    pytest.importorskip("gradio", reason="the extra web is not installed")
    process = subprocess.Popen([*COMMAND, *arguments, "--port", "0"], stderr=subprocess.PIPE, text=True)
    said = ""
    try:
        assert process.stderr is not None
        while not (found := re.search(r"^kvquant web for .* at (http://\S+)$", said, re.MULTILINE)):
            line = process.stderr.readline()
            assert line, said
            said += line
        yield found[1]
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=30)
        assert process.returncode == 0, rest
        assert "Traceback" not in said + rest
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Any]:
    with browser(tmp_path / "profile") as driver:
        yield driver


def ask(driver: Any, text: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    box = WebDriverWait(driver, 60).until(lambda d: d.find_element(By.CSS_SELECTOR, "#message textarea"))
    WebDriverWait(driver, 60).until(lambda d: box.is_displayed() and box.is_enabled())
    box.send_keys(text + Keys.ENTER)


def shown(driver: Any, place: str) -> str:
    """The text of the last element that a CSS selector finds; empty if there is none."""
    script = (
        "const found = document.querySelectorAll(arguments[0]); return found.length ? [...found].pop().innerText : ''"
    )
    return driver.execute_script(script, place).strip()


WATCH = """
const place = arguments[0], seen = window.seen = [];
new MutationObserver(() => {
    const found = document.querySelectorAll(place), text = found.length ? [...found].pop().innerText.trim() : "";
    if (text !== seen.at(-1)) seen.push(text);
}).observe(document.body, {subtree: true, childList: true, characterData: true});
"""
ANSWER = "#chat .bot .message, #chat .bot.message"


def grow(driver: Any, question: str, full: str) -> list[str]:
    """Ask, and what is to be seen of the answer, each time that it changes, until it is ``full``."""
    from selenium.webdriver.support.wait import WebDriverWait

    driver.execute_script(WATCH, ANSWER)
    ask(driver, question)
    WebDriverWait(driver, 120).until(lambda d: shown(d, ANSWER) == full, f"{full}\nwas not shown")
    seen: list[str] = driver.execute_script("return window.seen")
    return seen


def number(text: str) -> float:
    """The number in ``1,234``, or in ``1.2 MB`` without its unit."""
    return float(text.split()[0].replace(",", ""))


def test_a_chat(served: Any, driver: Any) -> None:
    """The answer grows before one's eyes, is the server's, and the numbers beside it are of its cache."""
    from selenium.webdriver.support.wait import WebDriverWait

    wanted = answer(served, "hello", tokens=LONG)
    with page(served.url, "--api-key", KEY, *GREEDY) as address:
        driver.get(address)
        seen = grow(driver, "hello", wanted)
        growing = [len(text) for text in seen if 0 < len(text) < LONG and wanted.startswith(text)]
        assert len(growing) >= 2 and growing == sorted(growing)
        assert shown(driver, "#policy") == "int4"
        assert shown(driver, "#model") == served.model
        WebDriverWait(driver, 20).until(lambda d: number(shown(d, "#answer-tokens")) == LONG)
        assert number(shown(driver, "#answer-speed")) > 0
        assert number(shown(driver, "#answer-held")) > 0
        assert number(shown(driver, "#answer-ratio")) > 2  # float32 in 4 bits, beside an open page
        generated = served.report()["tokens"]["generated"]  # of the server's panel, which follows a moment later
        WebDriverWait(driver, 20).until(lambda d: number(shown(d, "#tokens")) == generated)
        # The history is sent too.
        grow(driver, "and you?", answer(served, "hello", wanted, "and you?", tokens=LONG))
        assert driver.title == "kvquant"
        hosts = {urlsplit(url).hostname for url in requested(driver) if url.startswith(("http", "ws"))}
        assert hosts == {"127.0.0.1"}, "the page asks other machines"
