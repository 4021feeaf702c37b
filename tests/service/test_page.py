"""The web page: its files, and what it does in a browser where there is one."""

import html
import json
import re
import shutil
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from service.headers import PAGE_POLICY
from service.schemas import Answer, ErrorAnswer, ModelAnswer

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
STATIC = Path(__file__).parents[2] / "service" / "static"
HTML = (STATIC / "index.html").read_text()
SCRIPT = (STATIC / "app.js").read_text()
STYLE = (STATIC / "style.css").read_text()


def test_the_page_works_under_a_strict_content_security_policy():
    """No inline script, style or handler, nothing from elsewhere, nothing that turns text into code or HTML."""
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", HTML)
    assert all(' src="' in tag for tag in re.findall(r"<script[^>]*>", HTML))
    assert not re.search(r"https?://|@import|url\(", HTML + STYLE)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|\beval\b|new Function|https?://", SCRIPT)


def test_the_page_refers_to_what_is_there():
    """Every file that the page loads exists, and every element that the script asks for."""
    for file in re.findall(r'(?:src|href)="static/([^"]+)"', HTML):
        assert (STATIC / file).is_file()
    ids = re.findall(r'\bid="([^"]+)"', HTML)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'byId\("([^"]+)"\)', SCRIPT)) <= set(ids)
    assert set(re.findall(r'(?<!\w)(?:for|aria-describedby)="([^"]+)"', HTML)) <= set(ids)


def test_every_colour_that_the_script_uses_exists_in_light_and_dark():
    """The style sheet defines each variable twice: once in general, once for a dark screen."""
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    used = set(re.findall(r"var\((--[\w-]+)\)", STYLE + SCRIPT)) | {f"--expert-{n}" for n in range(1, 7)}
    for scheme in (light, dark):
        assert used <= set(re.findall(r"(--[\w-]+):", scheme))


def contrast(one, other):
    """WCAG 2's contrast ratio of two colours, #rgb or #rrggbb."""
    darker, lighter = sorted(map(luminance, (one, other)))
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour):
    """WCAG 2's relative luminance, 0 to 1."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    shares = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_text_stands_out_from_what_is_behind_it():
    """Links and text have a contrast of 4.5 : 1 on every background, light and dark."""
    assert contrast("#fff", "#000") == pytest.approx(21)
    for scheme in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL):
        colours = dict(re.findall(r"--([\w-]+): (#\w+)", scheme))
        for text in ("accent", "text", "quiet"):
            for behind in ("page", "card", "track"):
                assert contrast(colours[text], colours[behind]) >= 4.5, (text, behind)


MODEL = {
    "name": "pets", "version": "7", "variant": "fp32", "provider": "cpu", "experts": 3, "max_experts": 3,
    "classes": [
        {"label": "tiger", "training_images": 9, "split": "few"},
        {"label": "<b>cat</b>", "training_images": 500, "split": "many"},
    ],
    "rule": "router", "thresholds": [0.5, 0.4], "modes": {"fast": [0.9, 0.8], "balanced": [0.5, 0.4], "full": [0, 0]},
    "input": {}, "macs": {}, "parity": {}, "provenance": {},
    "calibration": {"points": [
        {"rule": "router", "thresholds": [0.9, 0.8], "mean_experts": 1.2},
        {"rule": "router", "thresholds": [0.5, 0.4], "mean_experts": 1.52},
    ]},
}  # fmt: skip
ANSWERED = {
    "filename": "tiger.png",
    "predictions": [
        {"label": "tiger", "index": 0, "probability": 0.61, "split": "few"},
        {"label": "<b>cat</b>", "index": 1, "probability": 0.39, "split": "many"},
    ],
    "experts_used": 2, "experts_total": 3, "exit_reason": "confident",
    "router_scores": [0.73, 0.21], "thresholds": [0.5, 0.4], "macs": 1000,
    "latency_ms": {"decode": 0.2, "queue": 1.1, "trunk": 1.9, "experts": [1.2, 1.0], "total": 6.6},
}  # fmt: skip
FAILED = {"filename": "notes.txt", "error": {"code": "image_unsupported", "message": "5 bytes are no known image"}}
ANSWERS = {
    "tiger.png": {"request_id": "r1", "model": {"name": "pets", "version": "7"}, "results": [ANSWERED]},
    "notes.txt": {"request_id": "r2", "error": FAILED["error"], "results": [FAILED]},
}
ANSWERS["busy.png"] = ANSWERS["lost.png"] = ANSWERS["tiger.png"]
ANSWERS["near.png"] = ANSWERS["tiger.png"] | {
    "results": [ANSWERED | {"router_scores": [0.5003, 0.7], "exit_reason": "budget"}]
}
FULL = {"request_id": "r3", "error": {"code": "overloaded", "message": "256 images are waiting; retry in 3 s"}}
REFUSALS = {"busy.png": 2, "full.png": 1000}  # requests until a file's first answer
LOST = {"/model": 2, "lost.png": 2}  # requests that get no answer at all, where the service restarts
ASKED = {"tiger.png": "mode=fast", "notes.txt": "threshold=0.5"}
# What a person would do: choose a mode, paste a picture, choose a threshold, paste something else.
DRIVER = """
choose("mode", "fast");
paste(await picture("tiger.png"));
await answered(1);
choose("mode", "own");
paste(new File(["hello"], "notes.txt", { type: "text/plain" }));
await answered(2);
"""
# While one file waits to be sent again, four are under way and two wait for their turn.
CLEARED = """
choose("mode", "fast");
paste(await picture("tiger.png"));
await answered(1);
paste(await picture("full.png"));
await wait(1);
paste(...await Promise.all(Array(6).fill("tiger.png").map(picture)));
document.getElementById("clear").click();
await wait(30);
note(`Cards: ${document.querySelectorAll("article").length}`);
note(`Session: ${document.getElementById("session").hidden ? "hidden" : "shown"}`);
note(`News: "${document.getElementById("news").textContent}"`);
paste(await picture("tiger.png"));
await answered(1);
"""
REFUSED = """
for (const name of ["busy.png", "full.png"]) {
  const started = performance.now();
  paste(await picture(name));
  await answered(name === "busy.png" ? 1 : 2);
  note(`${name} took ${Math.round((performance.now() - started) / 1000)} s`);
}
"""
NEAR = """
paste(await picture("near.png"));
await answered(1);
"""
UNREADABLE = """
const slice = Blob.prototype.slice;
Blob.prototype.slice = function (...places) {
  return this.name === "folder" ? { arrayBuffer: () => Promise.reject(new Error("gone")) } : slice.apply(this, places);
};
choose("mode", "fast");
paste(new File(["x"], "folder"), await picture("tiger.png"));
await answered(2);
"""
CHANGED = """
choose("mode", "fast");
choose("max-experts", "1");
paste(await picture("busy.png"));
await answered(1);
note(`Chosen: ${["max-experts", "mode"].map((id) => `${id}=${document.getElementById(id).value}`).join(" ")}`);
"""
RESTARTED = """
paste(await picture("lost.png"));
await answered(1);
"""
DRIVEN = """
const wait = (seconds) => new Promise((next) => setTimeout(next, 1000 * seconds));
const until = async (done) => { while (!done()) await wait(0.02); };
const answered = (cards) => until(() => document.querySelectorAll("article:not(.waiting)").length === cards);
const note = (text) => document.body.append(` ${text} `);
const says = () => note(document.getElementById("threshold-says").textContent);
const choose = (id, value) => {
  says();
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event(id === "threshold" ? "input" : "change"));
};
const picture = async (name) => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 8, height: 8 });
  return new File([await new Promise((done) => canvas.toBlob(done))], name, { type: "image/png" });
};
const paste = (...files) => {
  const clipboardData = new DataTransfer();
  for (const file of files) clipboardData.items.add(file);
  document.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true }));
};
await until(() => document.getElementById("model").textContent.startsWith("pets"));
%s
says();
document.body.dataset.driven = "yes";
"""


class PageServer(BaseHTTPRequestHandler):
    """The page under the service's own policy, with fixed answers; /drive is the page with a driver."""

    def do_GET(self) -> None:
        """A file of the page, the model, or the driven page."""
        if self.path == "/drive":
            self._send(HTML + '<script type="module" src="driver.js"></script>', "text/html")
        elif self.path == "/driver.js":
            self._send(DRIVEN % self.server.driver, "text/javascript")
        elif self.path == "/model":
            if self.server.restarts and self._is_lost("/model"):
                return
            self._send(json.dumps(self.server.model), "application/json")
            self.server.model = self.server.next_model
        else:
            file = STATIC / self.path.rpartition("/")[2]
            kind = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}[file.suffix]
            self._send(file.read_text(), kind)

    def do_POST(self) -> None:
        """The fixed answer for the file, once the question was looked at: every file has a request of its own."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        (name,) = re.findall(rb'name="file"; filename="(.*?)"', body)
        name = name.decode()
        if name in ASKED:
            assert self.path == f"/classify?{ASKED[name]}"
        if self._is_lost(name):
            return
        times = self.server.asked.count(name)
        refused = times <= REFUSALS.get(name, 0)
        status = (503 if times == 1 else 429) if refused else 200
        self._send(json.dumps(FULL if refused else ANSWERS[name]), "application/json", status)

    def _is_lost(self, name: str) -> bool:
        """Note that it was asked for; whether the connection is closed without an answer this time."""
        self.server.asked.append(name)
        self.close_connection = self.server.asked.count(name) <= LOST.get(name, 0)
        return self.close_connection

    def _send(self, text: str, kind: str, status: int = 200) -> None:
        self.send_response(status)
        if status != 200:
            self.send_header("Retry-After", "3")
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(text.encode())))
        self.send_header("Content-Security-Policy", PAGE_POLICY.decode())
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


def test_the_answers_below_are_of_the_service_s_shapes():
    """What the page is shown here is what the service may send."""
    ModelAnswer.model_validate(MODEL)
    Answer.model_validate(ANSWERS["tiger.png"])
    ErrorAnswer.model_validate(ANSWERS["notes.txt"])


def drive(tmp_path, driver, model=MODEL, next_model=None, restarts=False):
    """
    What a real browser's page says once it was driven, and the names of the files it sent, in order.

    Args:
        next_model: what is served from the second time on that the page asks for the model, if another one.
        restarts: the model, too, is lost as `LOST` says, and noted.
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), PageServer) as server:
        server.driver, server.restarts, server.asked = driver, restarts, []
        server.model, server.next_model = model, next_model or model
        Thread(target=server.serve_forever, daemon=True).start()
        dom = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             f"--user-data-dir={tmp_path}", "--virtual-time-budget=60000", "--dump-dom",
             f"http://127.0.0.1:{server.server_port}/drive"],
            capture_output=True, text=True, check=True, timeout=120,
        ).stdout  # fmt: skip
        server.shutdown()
    assert 'data-driven="yes"' in dom
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", dom))), server.asked


in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@in_a_browser
def test_a_browser_shows_answers_and_errors(tmp_path):
    """In a real browser: a pasted picture becomes a card with the answer, a pasted text a card with the error."""
    words, _ = drive(tmp_path, DRIVER)
    for said in (
        "pets 7: 2 classes, 3 experts",
        "the model's fast full my own 0.50 The next expert runs where the router's score is at least 0.50.",
        "The next expert runs where the router's score is at least 0.50 after the first and 0.40 after the second: "
        "1.52 experts per image on held-out images.",
        "is at least 0.90 after the first and 0.80 after the second: 1.20 experts per image on held-out images.",
        "1 image this session: 2 experts 100 %",
        "tiger.png tiger few: 9 training images 2 of 3 experts", "<b>cat</b> 39.0 %",
        "Scores: the score fell below its threshold",
        "after expert 1 0.73 ≥ 0.50 next after expert 2 0.21 < 0.40 stop", "Time: 6.6 ms", "other 1.2 ms",
        "notes.txt image_unsupported : 5 bytes are no known image (request r2)",
    ):  # fmt: skip
        assert said in words


@in_a_browser
def test_what_is_refused_for_a_while_is_sent_again(tmp_path):
    """503 as 429: after as many seconds as the answer says, five times at most; only then the error is shown."""
    words, asked = drive(tmp_path, REFUSED)
    assert asked == ["busy.png"] * 3 + ["full.png"] * 6
    waited = [int(seconds) for seconds in re.findall(r"(?:busy|full)\.png took (\d+) s", words)]
    assert 2 * 3 <= waited[0] < 4 * 3
    assert 5 * 3 <= waited[1] < 10 * 3
    assert "busy.png tiger few: 9 training images 2 of 3 experts" in words
    assert words.count("overloaded : 256 images are waiting; retry in 3 s (request r3)") == 1


@in_a_browser
def test_a_page_that_is_opened_while_the_service_restarts_recovers(tmp_path):
    """The model and the answer come when they can; nobody has to reload the page or choose the file again."""
    words, asked = drive(tmp_path, RESTARTED, restarts=True)
    assert asked == ["/model"] * 3 + ["/model"] + ["lost.png"] * 3
    assert "No model" not in words
    assert "lost.png tiger few: 9 training images 2 of 3 experts" in words


@in_a_browser
def test_a_page_that_stays_open_while_the_service_is_set_otherwise_says_so(tmp_path):
    """With the next images; choices that are gone are given up, others stay."""
    fewer = MODEL | {"version": "8", "max_experts": 2, "modes": {"balanced": [0.5, 0.4], "full": [0, 0]}}
    words, asked = drive(tmp_path, CHANGED, next_model=fewer)
    assert asked == ["busy.png"] * 3
    assert "pets 8: 2 classes, 3 experts" in words
    assert "2 1 Thresholds" in words  # the service's own limit, and what is below it
    assert "Chosen: max-experts=1 mode= Only" in words


@in_a_browser
def test_a_score_beside_its_threshold_is_told_apart_from_it(tmp_path):
    """In as many digits as that takes; and a limit on experts stops above the threshold."""
    words, _ = drive(tmp_path, NEAR)
    assert "after expert 1 0.5003 ≥ 0.5000 next after expert 2 0.70 ≥ 0.40 stop" in words


@in_a_browser
def test_a_folder_or_a_file_that_is_gone_is_not_sent(tmp_path):
    """The card says so at once, and not that the service gives no answer."""
    words, asked = drive(tmp_path, UNREADABLE)
    assert asked == ["tiger.png"]
    assert "not readable : a folder, or a file that is gone; choose image files" in words
    assert "1 image this session: 2 experts 100 %" in words


@in_a_browser
def test_clear_stops_what_was_chosen_before(tmp_path):
    """What is under way, waits for its turn or to be sent again is not sent, shown or counted; the next file is."""
    words, asked = drive(tmp_path, CLEARED)
    assert 'Cards: 0 Session: hidden News: ""' in words
    assert "1 image this session: 2 experts 100 %" in words
    assert asked.count("full.png") == 1
    assert asked.count("tiger.png") <= 2 + 4  # those under way may have arrived


@in_a_browser
@pytest.mark.parametrize(
    ("rule", "thresholds", "choices", "said"),
    [
        ("router", [], [], ["Only one expert runs: there is nothing to decide."]),
        ("router", [0.5, 0.4], [("max-experts", 1), ("max-experts", 2), ("mode", "full")],
         ["at least 0.50 after the first and 0.40 after the second: 1.25 experts per image on held-out images.",
          "Only one expert runs: there is nothing to decide.",
          "The second expert runs where the router's score is at least 0.50.",
          "2 experts run on every image."]),
        ("confidence", [0.35], [("mode", "own"), ("threshold", 0.6)],
         [*["The second expert runs where one minus the highest probability is at least 0.35: "
            "1.25 experts per image on held-out images."] * 2,
          "The second expert runs where one minus the highest probability is at least 0.60."]),
        ("margin", [0.5, 0.4, 0.3], [],
         ["The next expert runs where one minus the lead of the most probable class over the next is at least "
          "0.50 after the first, 0.40 after the second and 0.30 after the third: "
          "1.25 experts per image on held-out images."]),
        ("agreement", [0.5, 0.5], [],
         ["The next expert runs where the share of the experts so far that disagree with their mean "
          "(1 after the first) is at least 0.50: 1.25 experts per image on held-out images."]),
        ("depth", [0, 1], [("mode", "own"), ("threshold", 0.6), ("mode", "full")],
         ["2 experts run on every image.", "3 experts run on every image.",
          "Only the first expert runs, on every image.", "3 experts run on every image."]),
    ],
)  # fmt: skip
def test_the_page_says_in_words_where_the_next_expert_runs(tmp_path, rule, thresholds, choices, said):
    """By every rule, for every number of experts, and for what is chosen on the page."""
    n_experts = len(thresholds) + 1
    model = MODEL | {
        "experts": n_experts, "max_experts": n_experts, "rule": rule, "thresholds": thresholds,
        "modes": {"balanced": thresholds, "full": [0] * len(thresholds)},
        "calibration": {"points": [{"rule": rule, "thresholds": thresholds, "mean_experts": 1.25}]},
    }  # fmt: skip
    words, _ = drive(tmp_path, "".join(f'choose("{name}", "{value}");' for name, value in choices), model)
    assert words.endswith("".join(f"{sentence} " for sentence in said))
