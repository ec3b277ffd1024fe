"""The page for people, in a real browser."""

import shutil
import tempfile
import urllib.request
from collections.abc import Iterator

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.server.conftest import Server

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver, as `make system` installs them"
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(prefix="quire-chromium-", ignore_cleanup_errors=True) as folder:
        for flag in (*FLAGS.split(), f"--user-data-dir={folder}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, Service(DRIVER))
        yield driver
        driver.quit()


def text_of(browser: webdriver.Chrome, name: str) -> str:
    found = browser.find_elements(By.ID, name)
    return found[0].get_attribute("textContent") if found else ""


def wait_for(browser: webdriver.Chrome, condition) -> None:
    WebDriverWait(browser, 30, poll_frequency=0.05).until(lambda _: condition())


def ask(browser: webdriver.Chrome, prompt: str, max_tokens: int) -> None:
    for name, value in (("prompt", prompt), ("max_tokens", str(max_tokens))):
        field = browser.find_element(By.ID, name)
        field.clear()
        field.send_keys(value)
    browser.find_element(By.ID, "send").click()


def test_page_shows_the_model_and_its_gauges(browser: webdriver.Chrome, server: Server) -> None:
    browser.get(server.url + "/")
    wait_for(browser, lambda: text_of(browser, "state") == "ready")
    wait_for(browser, lambda: text_of(browser, "model") == "demo")
    assert text_of(browser, "running") == "0"
    wait_for(browser, lambda: text_of(browser, "rate") == "0.0")


def test_prompt_is_completed_as_the_api_completes_it(browser: webdriver.Chrome, server: Server) -> None:
    body = {"prompt": "import os", "max_tokens": 40, "temperature": 0}
    expected = server.post("/v1/completions", body)[1]["choices"][0]["text"]
    browser.get(server.url + "/")
    ask(browser, "import os", 40)
    wait_for(browser, lambda: text_of(browser, "speed").startswith("40 tokens"))
    assert text_of(browser, "text") == expected
    wait_for(browser, lambda: text_of(browser, "rate") != "\u2013")


def test_stop_ends_the_request_and_the_page_goes_on(browser: webdriver.Chrome, server: Server) -> None:
    aborted = server.metrics()['vllm:request_success_total{finished_reason="abort"}']
    browser.get(server.url + "/")
    for _ in range(10):  # a short answer may be there before the button is pressed
        ask(browser, "import os\n" * 3, 480)
        wait_for(browser, lambda: text_of(browser, "text") != "")
        if browser.find_element(By.ID, "stop").is_enabled():
            browser.find_element(By.ID, "stop").click()
        wait_for(browser, lambda: browser.find_element(By.ID, "send").is_enabled())
        if text_of(browser, "speed") == "stopped":
            break
    assert text_of(browser, "speed") == "stopped"
    server.wait_idle()
    assert server.metrics()['vllm:request_success_total{finished_reason="abort"}'] == aborted + 1
    ask(browser, "x", 2)
    wait_for(browser, lambda: text_of(browser, "speed").startswith("2 tokens"))


def test_refusal_is_shown_in_words_and_nothing_else_is_wrong(browser: webdriver.Chrome, server: Server) -> None:
    browser.get(server.url + "/")
    browser.get_log("browser")
    ask(browser, "word " * 700, 4)
    wait_for(browser, lambda: "max_model_len" in text_of(browser, "error"))
    messages = [entry["message"] for entry in browser.get_log("browser")]
    # The browser notes every 4xx by itself; anything else would be the page's own fault.
    assert all("400" in message for message in messages), messages


def test_page_is_whole_by_itself_and_runs_no_foreign_script(server: Server) -> None:
    with urllib.request.urlopen(server.url + "/") as response:
        policy, body = response.headers["Content-Security-Policy"], response.read().decode()
    assert "script-src 'sha256-" in policy
    assert "unsafe" not in policy
    assert "http://" not in body
    assert "https://" not in body
