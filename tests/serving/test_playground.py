"""The playground in headless Chromium: type, receive a streamed answer, see probabilities, stop, chat."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kajiya.config.schema import ServeConfig
from kajiya.serving.api import create_app
from kajiya.serving.hosts import source_of

from .conftest import NAME, open_engine, running, save_adapter

CHROMIUM = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here (apt-get install chromium chromium-driver)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    selenium = pytest.importorskip("selenium", reason="selenium is not installed (the test extra brings it)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    assert selenium.__version__
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


def _until(holds: Callable[[], bool], what: str) -> None:
    limit = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < limit, f"{what} did not come"
        time.sleep(0.02)


class _Page:
    """The page as a reader sees it."""

    def __init__(self, driver: Any, url: str, width: int = 1280, height: int = 860, scheme: str = "light") -> None:
        self.driver = driver
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(url)
        driver.execute_script("localStorage.clear()")
        driver.get(url)
        _until(lambda: NAME in self.text("#model"), "the model's name")

    def all(self, css: str) -> list[Any]:
        found: list[Any] = self.driver.find_elements("css selector", css)
        return found

    def one(self, css: str) -> Any:
        return self.driver.find_element("css selector", css)

    def text(self, css: str) -> str:
        found: str = self.one(css).get_property("textContent")
        return found

    def type(self, css: str, text: str) -> None:
        self.one(css).clear()
        self.one(css).send_keys(text)

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).key_down(keys[0]).send_keys(*keys[1:]).key_up(keys[0]).perform()

    def hover(self, element: Any) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        ActionChains(self.driver).move_to_element(element).perform()

    def make_greedy(self) -> None:
        """Move the temperature to 0."""
        self.driver.execute_script(
            "const t = arguments[0]; t.value = 0; t.dispatchEvent(new Event('input', {bubbles: true}))",
            self.one("#temperature"),
        )

    def choose(self, mode: str) -> None:
        self.one(f"[name=mode][value={mode}]").find_element("xpath", "..").click()

    def pick(self, model: str) -> None:
        from selenium.webdriver.support.ui import Select

        Select(self.one("#model select")).select_by_value(model)

    def run(self) -> None:
        from selenium.webdriver.common.keys import Keys

        self.press(Keys.CONTROL, Keys.ENTER)
        self.ended()

    def ended(self) -> None:
        _until(lambda: self.one("#go").is_displayed(), "the end of the answer")

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@pytest.fixture
def ask_greedily(tokenizer: Any, greedy: Callable[..., list[int]]) -> Callable[[str, int], str]:
    from kajiya.serving.text import TextStream

    def answer(prompt: str, n_tokens: int) -> str:
        ids = tokenizer.encode(prompt)
        stream = TextStream(tokenizer, ids)
        return "".join(stream.push(token) for token in greedy(ids, n_tokens) if token)

    return answer


def test_prompt_mode_streams_an_answer_with_its_figures_and_probabilities(
    browser: Any, server_url: str, ask_greedily: Callable[[str, int], str], tmp_path: Path
) -> None:
    page = _Page(browser, server_url)
    page.type("#text", "def wrap(text, width):")
    page.make_greedy()
    assert "greedy" in page.text("label[for=temperature]")
    page.type("#max_tokens", "24")
    page.run()
    shown = page.text("#output")
    assert shown.startswith("def wrap(text, width):")
    expected = ask_greedily("def wrap(text, width):", 24)
    assert shown.removeprefix("def wrap(text, width):").rstrip("\ufffd") == expected
    facts = page.text("#facts")
    assert "tokens/s" in facts
    assert "ms to first token" in facts
    assert facts.startswith("24 tokens")
    tokens = page.all("#output .token")
    assert len(tokens) > 8
    page.hover(tokens[5])
    assert page.one("#tip").is_displayed()
    rows = page.all("#tip .row")
    assert len(rows) == 5
    # Greedy: the drawn token leads its alternatives.
    assert "this" in rows[0].get_attribute("class")
    assert page.text("#tip .head").rstrip().endswith("%")
    assert page.driver.save_screenshot(str(tmp_path / "playground.png"))
    assert (tmp_path / "playground.png").stat().st_size > 10_000
    page.one("#adopt").click()
    assert page.one("#text").get_property("value") == shown
    assert page.complaints() == []


def test_probabilities_by_keyboard(browser: Any, server_url: str) -> None:
    from selenium.webdriver.common.keys import Keys

    page = _Page(browser, server_url)
    page.type("#text", "import os")
    page.type("#max_tokens", "12")
    page.run()
    page.one("#output").send_keys(Keys.ARROW_RIGHT)
    first = page.text("#tip")
    assert page.one("#tip").is_displayed()
    page.one("#output").send_keys(Keys.END)
    assert len(page.all("#output .token.at")) == 1
    assert page.all("#output .token")[-1].get_attribute("class").endswith("at")
    page.one("#output").send_keys(Keys.HOME)
    assert page.text("#tip") == first
    page.one("#output").send_keys(Keys.ESCAPE)
    assert not page.one("#tip").is_displayed()


def test_chat_mode_keeps_the_conversation(browser: Any, server_url: str, tokenizer: Any) -> None:
    page = _Page(browser, server_url)
    page.choose("chat")
    assert "no chat template" in page.text("#plain")
    page.type("#max_tokens", "10")
    page.type("#system", "Be brief.")
    page.type("#text", "What does textwrap do?")
    page.run()
    page.type("#text", "And dedent?")
    page.run()
    assert [turn.text for turn in page.all(".turn .who")] == ["You", NAME, "You", NAME]
    assert [turn.text for turn in page.all(".turn.user .said")] == ["What does textwrap do?", "And dedent?"]
    assert page.one("#text").get_property("value") == ""
    assert all(turn.find_elements("css selector", ".token") for turn in page.all(".turn.assistant"))
    page.one("#again").click()
    page.ended()
    assert len(page.all(".turn")) == 4
    page.one("#clear").click()
    assert page.all(".turn") == []
    assert page.complaints() == []


def test_stop_button_and_errors(browser: Any, model_folder: Path, tokenizer: Any) -> None:
    engine = open_engine(model_folder)
    real = engine.runner.run
    is_slow = True

    def slow(plan: Any) -> Any:
        time.sleep(0.05 if is_slow else 0)
        return real(plan)

    engine.runner.run = slow  # type: ignore[method-assign]
    with running(create_app(engine, tokenizer, NAME, ServeConfig())) as url:
        page = _Page(browser, url)
        page.type("#text", "x = ")
        page.type("#max_tokens", "150")
        page.type("#seed", "3")
        page.one("#go").click()
        _until(lambda: len(page.all("#output .token")) >= 2, "a token")
        assert page.one("#stop").is_displayed()
        page.one("#stop").click()
        page.ended()
        assert "stopped" in page.text("#facts")
        _until(lambda: engine.scheduler.is_idle, "the freed row")
        is_slow = False
        page.type("#max_tokens", "5000")
        page.run()
        assert "context length is 192" in page.text("#wrong")
        page.type("#max_tokens", "5")
        page.run()
        assert not page.one("#wrong").is_displayed()
        assert page.text("#facts").startswith("5 tokens")


def test_an_api_key_is_asked_for(browser: Any, model_folder: Path, tokenizer: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    cfg = ServeConfig(api_key="s3cret")
    with running(create_app(open_engine(model_folder), tokenizer, NAME, cfg)) as url:
        browser.get(url)
        _until(lambda: browser.find_element("id", "key").is_displayed(), "the field for the key")
        browser.find_element("id", "key").send_keys("s3cret", Keys.ENTER)
        _until(lambda: NAME in browser.find_element("id", "model").text, "the model's name")


def test_themes_widths_and_no_outside_resource(browser: Any, server_url: str) -> None:
    import json

    browser.get_log("performance")
    papers = []
    for scheme in ("light", "dark"):
        page = _Page(browser, server_url, scheme=scheme)
        papers.append(page.driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
        page.one("#theme").click()
        papers.append(page.driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert papers == [papers[0], papers[1], papers[1], papers[0]]
    assert papers[0] != papers[1]
    page = _Page(browser, server_url, width=360, height=740)
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 360
    assert not page.one("#temperature").is_displayed()
    page.one("#settings summary").click()
    assert page.one("#temperature").is_displayed()
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 360
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {one["params"]["request"]["url"] for one in asked if one["method"] == "Network.requestWillBeSent"}
    outside = [address for address in urls if not address.startswith((server_url, "data:"))]
    assert urls
    assert outside == []


def test_an_adapter_is_picked(browser: Any, model_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Models and adapters stand in one picker; what is picked answers, and is picked again after a reload."""
    engine = open_engine(model_folder)
    engine.load_adapter("tuned", save_adapter(tmp_path / "adapter"))
    with running(create_app(engine, tokenizer, NAME, ServeConfig())) as url:

        def alone(model: str) -> str:
            body = {"model": model, "prompt": "import os", "temperature": 0, "max_tokens": 12}
            text: str = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
            return text.rstrip("\ufffd")

        page = _Page(browser, url)
        page.complaints()  # what the tests before have left
        page.make_greedy()
        page.type("#max_tokens", "12")
        page.type("#text", "import os")
        shown = {}
        for name in (NAME, "tuned"):
            page.pick(name)
            page.run()
            shown[name] = page.text("#output").removeprefix("import os").rstrip("\ufffd")
        assert shown == {name: alone(name) for name in (NAME, "tuned")}
        assert shown[NAME] != shown["tuned"]
        page.driver.get(url)
        _until(lambda: page.all("#model select") != [], "the picker")
        assert page.one("#model select").get_property("value") == "tuned"
        # The model and its adapter, side by side.
        page.one("#compare").click()
        names = [head.text for head in page.all(".side-head b")]
        assert sorted(names) == sorted([NAME, "tuned"])
        page.type("#text", "import os")
        page.run()
        sides = [page.text(css).removeprefix("import os").rstrip("\ufffd") for css in ("#output", "#output-2")]
        assert sides == [alone(name) for name in names]
        assert page.complaints() == []


def test_two_models_side_by_side(browser: Any, model_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Each answers for itself, keeps a conversation of its own, and both are stopped and asked again together."""
    import json
    import shutil

    import torch
    from selenium.webdriver.common.keys import Keys
    from transformers import AutoModelForCausalLM

    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    torch.manual_seed(9)
    config = AutoModelForCausalLM.from_pretrained(model_folder).config
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    sources = {"other": source_of("other", other, open_engine)}
    with running(create_app(open_engine(model_folder), tokenizer, NAME, ServeConfig(), sources)) as url:

        def alone(path: str, model: str, **body: Any) -> dict[str, Any]:
            given = {"model": model, "temperature": 0, "max_tokens": 12} | body
            reply = httpx.post(f"{url}/v1/{path}", json=given, timeout=60).json()
            choice: dict[str, Any] = reply["choices"][0]
            return choice

        def whole(text: str) -> str:
            return text.rstrip("\ufffd")

        page = _Page(browser, url)
        page.complaints()  # what the tests before have left
        page.make_greedy()
        page.one("#compare").send_keys(Keys.ENTER)
        assert [one.text for one in page.all(".side-head b")] == [NAME, "other"]
        page.type("#max_tokens", "12")
        page.type("#text", "import os")
        page.run()
        shown = [whole(page.text(css).removeprefix("import os")) for css in ("#output", "#output-2")]
        assert shown == [whole(alone("completions", model, prompt="import os")["text"]) for model in (NAME, "other")]
        assert shown[0] != shown[1]
        for facts in page.all(".side-head .facts"):
            assert facts.text.startswith("12 tokens")
            assert "ms to first token" in facts.text
        page.one("#output-2").send_keys(Keys.ARROW_RIGHT)
        assert page.one("#tip").is_displayed()

        page.choose("chat")
        page.type("#text", "One?")
        page.run()
        page.type("#text", "Two?")
        page.run()
        assert [one.text for one in page.all(".pair .who")] == [NAME, "other"] * 2
        said = [whole(one.get_property("textContent")) for one in page.all(".pair .said")]
        for side, model in enumerate((NAME, "other")):
            turns = [{"role": "user", "content": "One?"}]
            assert said[side] == whole(alone("chat/completions", model, messages=turns)["message"]["content"])
            turns += [{"role": "assistant", "content": said[side]}, {"role": "user", "content": "Two?"}]
            assert said[2 + side] == whole(alone("chat/completions", model, messages=turns)["message"]["content"])
        page.press(Keys.CONTROL, Keys.SHIFT, Keys.ENTER)
        page.ended()
        assert [whole(one.get_property("textContent")) for one in page.all(".pair .said")] == said

        # The choice is remembered, and one model alone goes on with its own answers.
        page.driver.get(url)
        _until(lambda: len(page.all("#model select")) == 2, "the two pickers")
        page.one("#compare").click()
        assert len(page.all("#model select")) == 1
        assert not page.one("#other").is_displayed()
        page.type("#text", "Three?")
        page.run()
        assert page.all(".pair") == []
        size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        page.one("#compare").click()
        page.choose("prompt")
        lefts = [one.rect["x"] for one in page.all(".side-head")]
        assert lefts[0] == lefts[1]
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 360
        assert json.loads(page.driver.execute_script("return localStorage.getItem('kajiya')"))["second"] == "other"
        assert page.complaints() == []
