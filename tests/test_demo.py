"""demo.py as people meet it: a real browser, and scripts, talk to a real server."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import ONE_THREAD, ROOT
from PIL import Image

from clips.write import read_metadata

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PATIENCE = 120  # seconds, on a machine however busy

if not importlib.util.find_spec("gradio"):
    pytest.skip('gradio is not installed: pip install -e ".[demo]"', allow_module_level=True)


def until(happens, what: str):
    """Wait for what a function says to be true -> what it says."""
    end = time.monotonic() + PATIENCE
    while not (result := happens()):
        assert time.monotonic() < end, what
        time.sleep(0.05)
    return result


class Server:
    """demo.py in a process of its own."""

    def __init__(self, ckpt, home):
        self.home = home  # of temporary files
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process = subprocess.Popen([sys.executable, "demo.py", "--ckpt", ckpt, "--port", str(self.port)], cwd=ROOT,
                                        env=ONE_THREAD | {"TMPDIR": str(home)}, text=True, stdout=subprocess.PIPE)
        self.address = self.process.stdout.readline().strip()
        assert self.address == f"http://127.0.0.1:{self.port}/"

    def open(self, path, data=None, **headers):
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"} | headers)
        return urllib.request.urlopen(request, timeout=PATIENCE)

    def get(self, path) -> tuple[int, bytes]:
        try:
            with self.open(path) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def ask(self, session: str, **fields):
        """Join the queue as a script does."""
        with self.open("config") as answer:
            config = json.load(answer)
        made = next(each for each in config["dependencies"] if each["api_name"] == "make")
        parts = {part["id"]: part["props"] for part in config["components"]}
        values = {parts[n]["elem_id"]: parts[n].get("value") for n in made["inputs"]}
        assert fields.keys() <= values.keys()
        self.outputs = [parts[n]["elem_id"] for n in made["outputs"]]
        with self.open("gradio_api/queue/join", {"data": [*(values | fields).values()], "fn_index": made["id"],
                                                 "session_hash": session}) as answer:
            return json.load(answer)["event_id"]

    def ends(self, session: str):
        """Yield (event, outputs by name) of each that is finished, as they come."""
        with self.open(f"gradio_api/queue/data?session_hash={session}") as lines:
            for line in lines:
                message = json.loads(line.removeprefix(b"data: ")) if line.strip() else {}
                if message.get("msg") == "process_completed":
                    yield message["event_id"], message["success"] and dict(zip(self.outputs, message["output"]["data"]))
                if message.get("msg") == "close_stream":
                    return

    def made(self, **fields) -> dict:
        session = os.urandom(4).hex()
        self.ask(session, **fields)
        (_, outputs), = self.ends(session)
        return outputs

    def upload(self, path) -> dict:
        """A file as a script gives it to a field."""
        head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\n\r\n'.encode()
        body = head + path.read_bytes() + b"\r\n--x--\r\n"
        request = urllib.request.Request(self.address + "gradio_api/upload", body,
                                         {"Content-Type": "multipart/form-data; boundary=x"})
        with urllib.request.urlopen(request) as answer:
            return file_at(json.load(answer)[0])

    def memory(self) -> int:
        """Bytes."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", text)[1])

    def rests(self) -> bool:
        """Whether no thread wants a core. How much of one they get says nothing: the machine may be busy."""
        for _ in range(10):
            for task in Path(f"/proc/{self.process.pid}/task").glob("*/stat"):
                with suppress(OSError):  # a thread that has ended
                    if task.read_text().rpartition(")")[2].split()[0] == "R":
                        return False
            time.sleep(0.05)
        return True


def file_at(path) -> dict:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def server(micro, tmp_path_factory):
    server = Server(micro, tmp_path_factory.mktemp("home"))
    yield server
    server.process.kill()
    server.process.wait()


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not (BROWSER and DRIVER):
        pytest.skip("chromium and chromedriver are not installed: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for name in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-component-update",
                 "disable-background-networking", "disable-sync", "disable-dev-shm-usage", "window-size=1280,1000",
                 f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{name}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


class Page:
    def __init__(self, browser, server):
        self.browser = browser
        browser.get(server.address)
        until(lambda: self.all("#go"), "the page is there")

    def all(self, css):
        return self.browser.find_elements("css selector", css)

    def write(self, name, text):
        box = self.all(f"#{name} :is(input, textarea)")[0]
        box.clear()
        box.send_keys(text)

    def value(self, name):
        return self.all(f"#{name} :is(input, textarea)")[0].get_attribute("value")

    def press(self, name):
        self.browser.execute_script("arguments[0].click()", self.all(f"#{name}")[0])

    def alert(self):
        text = "return document.querySelector('[role=alert].error')?.textContent"  # in one go: it changes
        return until(lambda: self.browser.execute_script(text), "a message")

    def red(self):
        """Names of the fields with a red border."""
        return self.browser.execute_script(
            "return [...document.querySelectorAll('[id] :is(input, textarea)')].filter(e => "
            "getComputedStyle(e).borderColor == 'rgb(220, 38, 38)').map(e => e.closest('[id]').id)")

    def watch(self):
        """Wait for the video, and until it plays -> its length in seconds, and its sides."""
        until(lambda: self.all("#stage video"), "a video")
        video = "const v = document.querySelector('#stage video'); return "
        self.browser.execute_script("arguments[0].scrollIntoView()", self.all("#stage video")[0])
        until(lambda: self.browser.execute_script(video + "v.currentTime > 0.1 && !v.error && !v.paused"), "it plays")
        return self.browser.execute_script(video + "[v.duration, v.videoWidth, v.videoHeight]")


@pytest.fixture
def page(chromium, server):
    return Page(chromium, server)


def test_a_stranger_makes_a_video_and_it_plays(page, server, tmp_path):
    page.write("prompt", "a red circle moving right")
    page.write("steps", "6")
    page.press("go")
    assert page.watch() == [0.5, 32, 32]
    assert "made in" in page.all("#said")[0].text and len(page.all("#stage img")) == 1
    files = until(lambda: page.all("#made a[download]"), "files to keep")
    assert [file.get_attribute("download") for file in files] == [
        f"a-red-circle-moving-right-seed0.{kind}" for kind in ("mp4", "gif", "json")]
    (tmp_path / "v.mp4").write_bytes(urllib.request.urlopen(files[0].get_attribute("href")).read())
    assert read_metadata(str(tmp_path / "v.mp4"))["steps"] == 6
    messages = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    asked = [message["params"]["request"]["url"] for message in messages
             if message["method"] == "Network.requestWillBeSent"]
    theirs = [url for url in asked if not url.startswith((server.address, "data:", "blob:", "chrome"))]
    assert len(asked) > 5 and not theirs, "the page loads nothing from elsewhere"
    assert not [entry for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_what_cannot_be_is_told_in_the_words_of_request(page):
    page.press("go")
    assert page.alert() == 'prompt must be given and not be empty, like "a red circle moving right"'
    page.write("prompt", "x")
    for name, text, says in (("fps", "500", "fps must be in 0..120, got 500"),
                             ("steps", "many", "steps must be a whole number, got 'many'")):
        page.write(name, text)
        page.press("go")
        until(lambda says=says: page.alert() == says, says)
        assert page.red() == [name]
        page.write(name, "1")
    page.press("go")
    page.watch()
    assert not page.red() and not page.all(".error")


def test_a_video_gives_its_settings_back(page, server, run, micro, tmp_path):
    said = "--seed", 7, "--fps", 4, "--guidance", 2.5, "--sampler", "dpm++", "--steps", 2, "--size", "64x32"
    done = run("sample.py", "a blue square", "--ckpt", micro, *said, "--out", tmp_path / "v.mp4")
    assert done.returncode == 0, done.stderr
    page.all("#like input[type=file]")[0].send_keys(str(tmp_path / "v.mp4"))
    until(lambda: page.value("prompt") == "a blue square", "the prompt")
    assert [page.value(name) for name in ("seed", "fps", "guidance", "sampler", "steps")] == [
        "7", "4", "2.5", "dpm++", "2"]
    page.press("go")
    page.watch()
    link, *_ = until(lambda: page.all("#made a[download]"), "files to keep")
    assert urllib.request.urlopen(link.get_attribute("href")).read() == (tmp_path / "v.mp4").read_bytes()


def test_on_a_narrow_screen(page):
    narrow = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    try:
        page.write("prompt", "x")
        page.write("steps", "1")
        page.press("go")
        page.watch()
        assert page.browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
        video, seed = page.all("#stage video")[0].rect, page.all("#seed")[0].rect
        assert video["width"] > 250 and video["y"] < seed["y"], "the video comes before the settings"
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@contextmanager
def working(page, server):
    """A thousand steps have begun; afterwards the server must rest, and not because it came to their end."""
    made = {*server.home.rglob("*.mp4")}
    page.write("prompt", "x")
    page.write("steps", "1000")
    page.press("go")
    until(lambda: "step" in page.all("#said")[0].text, "it works")
    until(lambda: not server.rests(), "it works")
    yield
    until(server.rests, "the work is stopped")
    assert {*server.home.rglob("*.mp4")} == made, "no video: it was stopped"


def test_stop_stops_the_work(page, server):
    with working(page, server):
        page.press("stop")
        until(lambda: page.all("#said")[0].text == "Stopped.", "it says so")  # a busy browser takes its time


def test_a_closed_tab_stops_its_work(chromium, server):
    first = chromium.current_window_handle
    chromium.switch_to.new_window("tab")
    with working(Page(chromium, server), server):
        chromium.close()
    chromium.switch_to.window(first)


# ---------------------------------------------------------------------------------------------------------------------
# From scripts


def test_twenty_at_once_end_in_order_and_in_flat_memory(server):
    memory = []
    for session, asked in (("first", 5), ("second", 20)):
        events = [server.ask(session, prompt="x", steps="1", seed=str(n)) for n in range(asked)]
        ended = list(server.ends(session))
        assert [event for event, _ in ended] == events
        names = [outputs["made"][0]["orig_name"] for _, outputs in ended]
        assert names == [f"x-seed{n}.mp4" for n in range(asked)]
        memory.append(server.memory())
    assert memory[1] - memory[0] < 2.5e6


def test_two_settings_beside_each_other_and_the_attention(server):
    made = server.made(prompt="x", steps="2", guidance="1", other="guidance", value="5", attention=True)
    told = [json.load(server.open(f"gradio_api/file={file['path']}")) for file in made["made"][2::3]]
    assert [(one["guidance"], one["seed"]) for one in told] == [(1, 0), (5, 0)]
    assert made["stage"].count("<video") == 2 and made["stage"].count("attention: ") == 2
    refused = server.made(prompt="x", attention=True, layout="temporal")
    assert "attention can be shown of one grid only" in refused["said"]


def test_given_frames_and_prompts_that_change(server, tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    given = {"first": server.upload(tmp_path / "red.png"), "prompts_at": "0: one; 2: two", "steps": "2"}
    made = server.made(**given)
    told = json.load(server.open(f"gradio_api/file={made['made'][2]['path']}"))
    assert told["first"] == "red.png" and told["prompts_at"] == {"0": "one", "2": "two"}
    assert "never trained with given frames" in made["said"]
    (tmp_path / "red.png").write_text("no picture")
    refused = server.made(**given | {"first": server.upload(tmp_path / "red.png")})
    assert "first: red.png cannot be used: " in refused["said"], "where uploads lie is not told"
    refused = server.made(**given | {"prompt": "x"})
    assert "prompt and prompts_at cannot both be given" in refused["said"]


@pytest.mark.parametrize("path", [
    "file=/etc/passwd", f"file={ROOT}/cli.py", "file=cli.py", "file=../../etc/passwd", "file=/proc/self/environ",
    "file=file:///etc/passwd", "file/etc/passwd", "file=https://example.com/", "proxy=https://example.com/", "run/make",
    "call/make", "monitoring", "runs", "vibe-code"])
def test_no_path_is_served_but_what_was_uploaded_or_made(server, path):
    status, body = server.get(f"gradio_api/{path}")
    assert status in (403, 404) and len(body) < 200


def test_what_other_pages_on_this_machine_were_given_is_not_served(server):
    theirs = server.home / "gradio" / "a.png"  # where gradio keeps files, unless it is told where
    theirs.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(theirs)
    assert server.get(f"gradio_api/file={theirs}")[0] == 403
    assert server.made(prompt="x", steps="1", first=file_at(theirs)) is False, "it is refused"
    ours = Path(server.upload(theirs)["path"])
    assert server.get(f"gradio_api/file={ours}") == (200, theirs.read_bytes())
    assert server.home in ours.parents and ours.parents[1].stat().st_mode & 0o777 == 0o700
    shutil.rmtree(theirs.parent)


@pytest.mark.parametrize("name", ["first", "extend", "like", "prompt"])
def test_no_field_reads_a_path_that_was_not_uploaded(server, micro, name):
    for path in ("/etc/passwd", f"{ROOT}/docs/grid.png", micro, "http://127.0.0.1:1/a.png"):
        assert server.made(**{"prompt": "x", "steps": "1"} | {name: file_at(path)}) is False, "it is refused"


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_a_mistake_is_one_line(server, run, micro, monkeypatch):
    taken = run("demo.py", "--ckpt", micro, "--port", server.port)
    assert taken.returncode == 2 and str(server.port) in taken.stderr and len(taken.stderr.splitlines()) == 1
    monkeypatch.setitem(sys.modules, "gradio", None)
    without = run("demo.py", "--ckpt", micro)
    assert without.returncode == 2 and 'the page needs gradio: pip install -e ".[demo]"' in without.stderr


def test_ctrl_c_ends_it_in_the_middle_of_work(server):
    server.ask("last", prompt="x", steps="1000")
    until(lambda: not server.rests(), "it works")
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(PATIENCE) == 0 and not os.listdir(server.home), "it leaves no file"
