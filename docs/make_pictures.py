"""Make the README's pictures from the newest run of a store: its loss curves, and the playground serving its model.

python docs/make_pictures.py --store kajiya-store        (needs the test extra, and chromium with its driver)
"""

import argparse
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).resolve().parent / "images"
PORT = 8765
PROMPT = 'def read_lines(path, encoding=\'utf-8\'):\n    """Return the lines of a text file."""\n'
WIDTH, HEIGHT = 1280, 960
_PATIENCE_S = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--run", default="latest", help="id of the run (default: the newest)")
    options = parser.parse_args()
    from kajiya.flows.report import save_figure_files
    from kajiya.run.folder import find_run
    from kajiya.run.store import Store

    store = Store(options.store)
    run = find_run(store, options.run)
    with tempfile.TemporaryDirectory() as drawn:
        for path in save_figure_files(run, Path(drawn)):
            if path.name.startswith("curves"):
                (IMAGES / f"report-{path.name}").write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "kajiya", "serve", run.id, f"serve.port={PORT}", "--store", str(options.store)]
    server = subprocess.Popen(command)
    try:
        photograph(f"http://127.0.0.1:{PORT}", IMAGES / "playground.png")
    finally:
        server.terminate()
        server.wait()
    return 0


def photograph(url: str, to: Path) -> None:
    """The playground with a streamed answer, and the probabilities of one of its tokens."""
    from selenium import webdriver
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={WIDTH},{HEIGHT}"):
        options.add_argument(flag)
    wait_for(lambda: urllib.request.urlopen(f"{url}/ready").status == 200)
    driver = webdriver.Chrome(options=options)
    try:
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False},
        )
        driver.get(url)
        text, go = driver.find_element("id", "text"), driver.find_element("id", "go")
        driver.execute_script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", text, PROMPT
        )
        text.send_keys(Keys.CONTROL, Keys.ENTER)
        wait_for(lambda: go.is_displayed() and len(driver.find_elements("css selector", "#output .token")) > 12)
        driver.execute_script("window.scrollTo(0, 0)")
        ActionChains(driver).move_to_element(driver.find_elements("css selector", "#output .token")[10]).perform()
        driver.save_screenshot(str(to))
    finally:
        driver.quit()


def wait_for(is_so: Any) -> None:
    """Wait until it is so."""
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        try:
            if is_so():
                return
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.2)
    raise TimeoutError("the playground did not answer")


if __name__ == "__main__":
    raise SystemExit(main())
