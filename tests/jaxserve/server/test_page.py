"""The page at /, in a headless browser: with a fake server that says what it is told to, and with the real one."""

import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from tests.jaxserve.server.fake_server import TOKENS, Fake, error
from tests.waiting import eventually

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
ANSWER = "".join(TOKENS)
PHONE = {"width": 360, "height": 740}

expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def fake_server() -> Iterator[tuple[Fake, str]]:
    fake = Fake()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        server = uvicorn.Server(uvicorn.Config(fake.app(), log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        yield fake, f"http://127.0.0.1:{sock.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def fake(fake_server: tuple[Fake, str]) -> Fake:
    """The fake server as it begins."""
    fake = fake_server[0]
    vars(fake).update(vars(Fake()))
    return fake


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, fake_server: tuple[Fake, str]) -> Iterator[Open]:
    """Opens the page, by default the fake server's; at the end nothing may have gone wrong in it."""
    with watched_pages(browser) as (open_at, problems):
        yield lambda url=fake_server[1], **options: open_at(url, **options)
        assert problems == []


@contextmanager
def watched_pages(browser: Browser) -> Iterator[tuple[Open, list[str]]]:
    """What opens pages, and the list of what goes wrong in them."""
    problems: list[str] = []
    contexts = []

    def open_at(url: str, wait: bool = True, **options) -> Page:
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 860}} | options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: problems.append(said.text) if is_problem(said) else None)
        page.on("request", lambda asked: None if asked.url.startswith(url) else problems.append(asked.url))
        page.goto(url)
        if wait:
            expect(page.locator("#model")).not_to_be_empty()
        return page

    yield open_at, problems
    for context in contexts:
        context.close()


def is_problem(message) -> bool:
    """Not that a request was refused: some tests want that."""
    return message.type in ("error", "warning") and not message.text.startswith("Failed to load resource")


def say(page: Page, text: str) -> Locator:
    """Sends a text; the turn that it begins."""
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    return page.locator("article").last


def answered(turn: Locator) -> None:
    expect(turn.locator(".answer")).to_have_attribute("aria-busy", "false")


# Talking.


def test_an_answer_streams_as_it_comes_and_keeps_its_white_space(fake, open_page):
    fake.hold = 5
    page = open_page()
    turn = say(page, "Write a function.")
    expect(turn.locator(".answer")).to_have_text("def add(a,")
    expect(turn.locator(".answer")).to_have_attribute("aria-busy", "true")
    fake.hold = None
    answered(turn)
    assert turn.locator(".answer").text_content() == ANSWER
    assert turn.locator(".answer").evaluate("element => getComputedStyle(element).whiteSpace") == "pre-wrap"
    expect(turn.locator(".facts")).to_contain_text("7 prompt tokens, 4 cached · reached max tokens")
    assert page.input_value("#prompt") == ""


def test_shift_and_enter_break_the_line(fake, open_page):
    page = open_page()
    page.fill("#prompt", "one")
    page.press("#prompt", "Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#prompt") == "one\ntwo"
    assert fake.asked == []


def test_a_chat_has_all_that_was_said_before(fake, open_page):
    page = open_page()
    answered(say(page, "first"))
    fake.refusal = error("no room", 429)
    expect(say(page, "refused").locator(".fault")).to_be_visible()
    fake.refusal = None
    answered(say(page, "second"))
    said = [(message["role"], message["content"]) for message in fake.asked[-1]["messages"]]
    assert said == [("user", "first"), ("assistant", ANSWER), ("user", "second")]
    page.click("#new")
    expect(page.locator("article")).to_have_count(0)
    answered(say(page, "third"))
    assert [message["content"] for message in fake.asked[-1]["messages"]] == ["third"]


def test_parameters_are_sent_as_the_form_has_them_and_not_at_all_if_empty(fake, open_page):
    page = open_page()
    page.click("summary")
    for name, value in {"temperature": "0", "top_p": "", "top_k": "20", "max_tokens": "8", "seed": "5"}.items():
        page.fill(f"#{name}", value)
    page.fill("#stops", "\\n\\n\nclass ")
    answered(say(page, "x"))
    sent = {name: value for name, value in fake.asked[0].items() if name not in ("model", "messages")}
    assert sent == {
        "stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 5,
        "temperature": 0, "top_k": 20, "max_tokens": 8, "seed": 5, "stop": ["\n\n", "class "],
    }  # fmt: skip


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_an_answer_can_be_stopped_and_go_on_where_it_was(fake, open_page, how):
    fake.hold = 5
    page = open_page()
    turn = say(page, "x")
    expect(turn.locator(".answer")).to_have_text("def add(a,")
    page.click("#stop") if how == "button" else page.keyboard.press("Escape")
    answered(turn)
    expect(turn.locator(".facts")).to_contain_text("stopped")
    expect(page.locator("#prompt")).to_be_focused()
    assert eventually(lambda: fake.aborted == 1)
    fake.hold = None
    turn.get_by_role("button", name="Go on").click()
    answered(turn)
    assert turn.locator(".answer").text_content() == "def add(a," + ANSWER
    assert fake.asked[1]["messages"][-1] == {"role": "assistant", "content": "def add(a,"}
    assert fake.asked[1]["continue_final_message"] and not fake.asked[1]["add_generation_prompt"]


def test_without_a_chat_template_texts_are_completed(fake, open_page):
    fake.chat = False
    page = open_page()
    expect(page.get_by_role("radio", name="Complete")).to_be_checked()
    expect(page.get_by_role("radio", name="Chat")).to_be_disabled()
    turn = say(page, "import os\n\n")
    answered(turn)
    assert turn.locator(".text").text_content() == "import os\n\n" + ANSWER
    assert (fake.asked[0]["prompt"], fake.asked[0]["logprobs"]) == ("import os\n\n", 5)
    turn.get_by_role("button", name="Retry").click()
    answered(turn)
    assert turn.locator(".answer").text_content() == ANSWER
    assert fake.asked[1] == fake.asked[0]


@pytest.mark.parametrize("mode", ["Chat", "Complete"])
def test_tokens_tell_their_probabilities_to_the_pointer_and_to_keys(fake, open_page, mode):
    page = open_page()
    page.get_by_text(mode, exact=True).click()
    turn = say(page, "x")
    answered(turn)
    card = page.get_by_role("tooltip")
    expect(card).to_be_hidden()
    turn.locator(".token", has_text="return").hover()
    assert card.locator("p").all_inner_texts() == ["␣return\n75.0 %", "␣yield\n20.0 %"]
    page.mouse.move(0, 0)
    expect(card).to_be_hidden()
    turn.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    expect(card).to_contain_text("␣add75.0 %")
    page.keyboard.press("End")
    expect(card).to_contain_text("⏎")


def test_thoughts_are_told_apart_and_not_said_again(fake, open_page):
    fake.thoughts = ["A", " thought"]
    page = open_page()
    turn = say(page, "x")
    answered(turn)
    assert turn.locator(".thoughts .token").all_text_contents() == fake.thoughts
    assert turn.locator(".answer").text_content() == ANSWER
    answered(say(page, "y"))
    assert [message["content"] for message in fake.asked[1]["messages"]] == ["x", ANSWER, "y"]
    turn = page.locator("article").last
    turn.get_by_role("button", name="Retry").click()
    answered(turn)
    assert turn.locator(".thoughts").text_content() == "A thought"


def test_doubt_is_shaded_if_wanted(fake, open_page):
    page = open_page()
    turn = say(page, "x")
    answered(turn)
    color = "element => getComputedStyle(element).backgroundColor"
    plain = turn.locator(".token").first.evaluate(color)
    page.get_by_label("Shade doubt").check()
    assert turn.locator(".token").first.evaluate(color) != plain


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        ([("é", "�"), ("", "�"), (" x", " x")], ["é", " x"]),
        ([("", "�"), ("é", "�"), (" x", " x")], ["é", " x"]),
        ([("", "stop"), ("", " it"), ("stop it", "!")], ["stop", " it"]),
        ([("a", "a"), ("b", "b<end>")], ["a", "b"]),
        ([("<img src=x onerror=fail()>", "<img src=x onerror=fail()>")], ["<img src=x onerror=fail()>"]),
    ],
    ids=["cut character", "late character", "held back", "cut off", "markup"],
)  # fmt: skip
def test_the_text_is_shown_as_it_is_whatever_its_tokens_are(fake, open_page, pieces, shown):
    page = open_page()
    page.evaluate(
        """async (pieces) => {
            const { TokenText } = await import("/static/tokens.js");
            const text = new TokenText(document.getElementById("turns"));
            for (const [piece, token] of pieces) text.add(piece, [{ text: token, logprob: -1, others: [] }]);
            text.show();
        }""",
        pieces,
    )
    assert page.locator(".token").all_text_contents() == shown
    assert page.locator("#turns").text_content() == "".join(piece for piece, _ in pieces)


# What goes wrong.


def test_a_refusal_is_told_where_it_happens_and_nothing_is_lost(fake, open_page):
    fake.refusal = error("the queue is full", 429, **{"Retry-After": "2"})
    page = open_page()
    turn = say(page, "precious")
    expect(turn.get_by_role("alert")).to_have_text("The queue is full. Try again in 2 s.")
    fake.refusal = None
    turn.get_by_role("button", name="Retry").click()
    answered(turn)
    expect(turn.get_by_role("alert")).to_have_count(0)
    assert turn.locator(".said").text_content() == "precious"
    assert turn.locator(".answer").text_content() == ANSWER


def test_a_fault_amid_a_stream_leaves_what_has_come(fake, open_page):
    fake.fault = "the step failed"
    page = open_page()
    turn = say(page, "x")
    expect(turn.get_by_role("alert")).to_have_text("The step failed.")
    assert turn.locator(".answer").text_content() == ANSWER


def test_without_a_connection_the_page_says_so_and_comes_back_by_itself(fake, open_page):
    page = open_page()
    expect(page.locator("#status")).to_have_text("ready")
    page.context.set_offline(True)
    turn = say(page, "x")
    expect(turn.get_by_role("alert")).to_have_text("The server does not answer.")
    expect(page.locator("#status")).to_have_text(re.compile(r"no answer since \d+ s"))
    expect(page.locator("#away")).to_be_visible()
    page.context.set_offline(False)
    expect(page.locator("#status")).to_have_text("ready")
    expect(page.locator("#away")).to_be_hidden()
    turn.get_by_role("button", name="Retry").click()
    answered(turn)


def test_while_the_model_is_being_loaded_the_page_says_so_and_waits(fake, open_page):
    fake.loading = True
    page = open_page(wait=False)
    expect(page.locator("#status")).to_have_text("not ready")
    expect(page.locator("#away")).to_contain_text("The model is being loaded; try again.")
    fake.loading = False
    expect(page.locator("#status")).to_have_text("ready")
    expect(page.locator("#model")).to_have_text("fake")


def test_what_was_typed_outlives_a_reload(fake, open_page):
    page = open_page()
    page.fill("#prompt", "half a thou")
    page.click("summary")
    page.fill("#seed", "7")
    page.reload()
    assert (page.input_value("#prompt"), page.input_value("#seed")) == ("half a thou", "7")


def test_a_key_is_asked_for_until_it_is_right(fake, open_page):
    fake.key = "secret"
    page = open_page(wait=False)
    dialog = page.get_by_role("dialog", name="This server wants a key")
    expect(dialog).to_be_visible()
    page.get_by_label("Key", exact=True).fill("guess")
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("alert")).to_have_text("The server refused this key.")
    page.get_by_label("Key", exact=True).fill("secret")
    dialog.get_by_role("button", name="Use it").click()
    expect(dialog).to_be_hidden()
    expect(page.locator("#model")).to_have_text("fake")
    expect(page.locator("#status")).to_have_text("ready")
    answered(say(page, "x"))


def test_whoever_has_no_key_may_close_the_dialog_and_is_asked_again_with_the_next_message(fake, open_page):
    fake.key = "secret"
    page = open_page(wait=False)
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.locator("#away")).to_contain_text("The server wants a key.")
    turn = say(page, "x")
    page.get_by_role("button", name="Cancel").click()
    expect(turn.get_by_role("alert")).to_have_text("The server wants a key.")
    turn.get_by_role("button", name="Retry").click()
    page.get_by_label("Key", exact=True).fill("secret")
    page.keyboard.press("Enter")
    answered(turn)
    assert turn.locator(".answer").text_content() == ANSWER


# The engine.


def test_the_plots_move(fake, open_page):
    page = open_page()
    line = page.locator("#throughput path.generated")
    expect(page.locator("#throughput output.generated")).to_have_text(re.compile(r"^\d\d$"))  # about 50
    before = line.get_attribute("d")
    expect(line).not_to_have_attribute("d", before)
    assert re.fullmatch(r"M[\d.]+ [\d.]+(L[\d.]+ [\d.]+)+", line.get_attribute("d"))


def test_the_view_tells_what_the_engine_counts(fake, open_page):
    page = open_page()
    expect(page.locator("#batch")).to_contain_text(re.compile("running3.*waiting1.*8"))
    expect(page.locator("#cache output")).to_have_text("25 %")
    assert page.locator("tbody tr").all_inner_texts() == [
        "To the first token\t21 ms\t34 ms\t1.2 s",
        "Between tokens\t21 ms\t34 ms\t1.2 s",
        "Whole answer\t–\t–\t–",
    ]
    assert page.locator("#drafts li").all_inner_texts() == ["guess 1: 61 %", "guess 2: 40 %"]
    sums = dict(zip(page.locator("dt").all_inner_texts(), page.locator("dd").all_inner_texts(), strict=True))
    assert sums["prompts cached"] == "50 %" and sums["pages in use"] == "160 of 640" and sums["steps"] == "99"


def test_the_heat_map_tells_each_expert_s_load(fake, open_page):
    page = open_page()
    canvas = page.locator("canvas")
    canvas.focus()
    expect(page.locator(".cell")).to_have_text("Layer 1, expert 0: 10 tokens, 0.40 times the mean")
    for key in ("ArrowUp", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    expect(page.locator(".cell")).to_have_text("Layer 2, expert 3: 80 tokens, 3.20 times the mean")
    box = canvas.bounding_box()
    canvas.hover(position={"x": box["width"] - 2, "y": 2})
    expect(page.locator(".cell")).to_have_text("Layer 1, expert 15: 40 tokens, 1.60 times the mean")
    row = canvas.evaluate("canvas => [...canvas.getContext('2d').getImageData(0, 30, canvas.width, 1).data]")
    cold, hot = (row[4 * int(box["width"] / 16 * (x + 0.5)) :] for x in (0, 3))
    assert cold[2] > cold[0] and hot[0] > hot[2]


# For everybody.


@pytest.mark.parametrize("mode", ["Chat", "Complete"])
def test_nothing_is_wider_than_a_phone(fake, open_page, mode):
    fake.tokens = ["a" * 200, " " * 80, "b" * 200]
    page = open_page(viewport=PHONE)
    page.get_by_text(mode, exact=True).click()
    page.click("summary")
    answered(say(page, "x" * 300))
    page.locator(".token").last.hover()
    expect(page.get_by_role("tooltip")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    page.get_by_role("link", name="Engine").click()
    expect(page.locator("#throughput")).to_be_in_viewport()


FOCUSED = """() => {
    const focused = document.activeElement;
    const seen = focused.type === "radio" ? focused.nextElementSibling : focused; // itself it is transparent
    return [focused.id || focused.className || focused.name || focused.tagName, getComputedStyle(seen).outlineStyle];
}"""


def test_keys_alone_reach_everything_and_are_seen(fake, open_page):
    page = open_page()
    answered(say(page, "x"))
    page.click("h1")
    reached = []
    while len(reached) < 20:
        page.keyboard.press("Tab")
        name, outline = page.evaluate(FOCUSED)
        if name == "BODY":  # past the end
            break
        assert outline != "none", name
        reached.append(name)
    form = ["mode", "shade", "new", "prompt", "send", "SUMMARY"]
    assert reached == ["transcript", "token", "further", "retry", *form, "engine", "CANVAS"]


CONTRAST = """() => {
    const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const paint = (colors) => {
        for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const luminance = (rgb) => rgb.map((v) => v / 255)
        .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (element) =>
        element ? [...behind(element.parentElement), getComputedStyle(element).backgroundColor] : [];
    const own = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    return [...document.querySelectorAll("body *:not(:disabled + *, .unseen)")]
        .filter((element) => own(element) && element.checkVisibility())
        .map((element) => {
            const ground = behind(element);
            const [a, b] = [paint(ground), paint([...ground, getComputedStyle(element).color])].map(luminance);
            return { text: element.textContent.trim(), ratio: (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) };
        });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(fake, open_page, scheme):
    """WCAG 2.2, 1.4.3: a contrast of 4.5 at least."""
    fake.fault = "the step failed"
    page = open_page(color_scheme=scheme)
    page.click("summary")
    page.get_by_label("Shade doubt").check()
    turn = say(page, "x")
    expect(turn.get_by_role("alert")).to_be_visible()
    page.locator(".token").first.hover()
    measured = page.evaluate(CONTRAST)
    assert {"The step failed.", "x", "def", "Batch", "Retry"} <= {each["text"] for each in measured}
    assert [each for each in measured if each["ratio"] < 4.5] == []


def test_nothing_blinks_for_those_who_do_not_want_that(fake, open_page):
    fake.hold = 1
    animation = "element => getComputedStyle(element, '::after').animationName"
    for wish, name in {"no-preference": "blink", "reduce": "none"}.items():
        turn = say(open_page(reduced_motion=wish), "x")
        expect(turn.locator(".answer")).to_have_attribute("aria-busy", "true")
        assert turn.locator(".answer").evaluate(animation) == name


def test_what_the_policy_forbids_would_be_noticed(browser, fake, fake_server):
    with watched_pages(browser) as (open_at, problems):
        page = open_at(fake_server[1])
        assert problems == []
        page.evaluate("document.body.append(Object.assign(new Image(), { src: 'http://127.0.0.1:9/' }))")
        page.wait_for_timeout(200)
        assert any("Content Security Policy" in problem for problem in problems)


# The real server.


def test_the_embedded_model_writes_and_can_be_stopped(server, open_page, monkeypatch):
    engine = server.llm.engine
    monkeypatch.setattr(engine, "step", lambda step=engine.step: (time.sleep(0.1), step())[1])
    page = open_page(server.url)
    expect(page.locator("#mode [value=complete]")).to_be_checked()  # its template has no roles
    page.click("summary")
    page.fill("#max_tokens", "100")
    turn = say(page, "def quicksort(items):")
    expect(turn.locator(".token").nth(5)).to_be_visible()
    page.keyboard.press("Escape")
    expect(turn.locator(".facts")).to_contain_text("stopped")
    assert eventually(lambda: engine.counters.running == 0)
    turn.locator(".token").nth(2).hover()
    shares = [float(line.split()[-2]) for line in page.get_by_role("tooltip").locator("p").all_inner_texts()]
    assert 5 <= len(shares) <= 6 and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.3


@pytest.mark.parametrize("mode", ["Chat", "Complete"])
def test_the_page_and_the_server_mean_the_same(server, open_page, mode):
    """The text of the greedy answer, its numbers, and what the engine shows of it."""
    page = open_page(server.url)
    page.get_by_text(mode, exact=True).click()
    page.click("summary")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "24")
    turn = say(page, "class Stack:")
    answered(turn)
    with server.client() as client:
        body = {"prompt": "class Stack:", "temperature": 0, "max_tokens": 24}
        greedy = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert turn.locator(".answer").text_content() == greedy
    assert "".join(turn.locator(".token").all_text_contents()) == greedy
    expect(turn.locator(".facts")).to_contain_text("24 tokens in")
    expect(page.locator("#experts")).to_be_visible()
    expect(page.locator("#time_to_first_token td").first).to_have_text(re.compile(r"\d m?s$"))
    expect(page.locator("#throughput path.generated")).to_have_attribute("d", re.compile("L"))
