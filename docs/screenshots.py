"""Screenshots of the page, with the embedded model under some load: `python docs/screenshots.py`.

Takes two minutes, so that the plots are full. Needs Chromium.
"""

import json
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

FOLDER = Path(__file__).with_name("screenshots")
SECONDS = 120
SIZES = {"desktop": (1440, 960, 1), "phone": (360, 740, 1.5)}  # width, height, pixels of a pixel
SERVE = ["serve", "--port", "0", "--max-num-seqs", "8", "--num-speculative-tokens", "2", "--no-log-requests"]
PROMPTS = [
    "def quicksort(items):",
    "class Stack:",
    "import os\nimport sys\n\n",
    "for line in open(path):",
    "try:\n    ",
]


def main() -> None:
    with subprocess.Popen([sys.executable, "-m", "jaxserve", *SERVE], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        url = next(found[0] for line in server.stderr if (found := re.search(r"http://[\d.:]+", line)))
        for number in range(6):
            threading.Thread(target=load, args=(url, number), daemon=True).start()
        with sync_playwright() as playwright:
            chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            shoot(browser, url)
            browser.close()
        server.terminate()


def load(url: str, number: int) -> None:
    """A client that asks, reads, and asks again, until the server ends."""
    rng = random.Random(number)
    while True:
        body = {"prompt": rng.choice(PROMPTS), "max_tokens": rng.randrange(20, 400), "seed": rng.randrange(1000)}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
        try:
            urllib.request.urlopen(request).read()
        except OSError:
            return
        time.sleep(rng.expovariate(1 / 3))


def shoot(browser: Browser, url: str) -> None:
    pages = {}
    for name, (width, height, scale) in SIZES.items():
        for scheme in ("light", "dark"):
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=scale
            )
            page.goto(url)
            pages[f"page-{name}-{scheme}"] = page
    time.sleep(SECONDS)
    for name, page in pages.items():
        talk(page)
        page.screenshot(path=FOLDER / f"{name}.png", full_page=True)


def talk(page: Page) -> None:
    """An answer, with the alternatives of one token."""
    page.get_by_text("Complete", exact=True).click()
    page.get_by_label("Shade doubt").check()
    page.click("summary")
    for field, value in {"temperature": "0.6", "max_tokens": "120", "seed": "5"}.items():
        page.fill(f"#{field}", value)
    page.click("summary")
    page.fill("#prompt", PROMPTS[0])
    page.press("#prompt", "Enter")
    page.wait_for_selector(".answer[aria-busy=false]")
    page.locator(".token").nth(24).hover()


if __name__ == "__main__":
    main()
