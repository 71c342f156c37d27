"""A page to play with: what sample.py does, in a browser.

    pip install -e ".[demo]" && python demo.py

Open the address that it prints. Every field is an option of sample.py, read as the command line reads it. The video is
shown while it is made. The page loads nothing from elsewhere, and gives away no files but its own.
"""

import json
import os
import re
import tempfile
import time
import traceback
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from html import escape
from pathlib import Path
from threading import Event

import numpy as np
import torch
from PIL import Image

import cli
import sample
from clips.gallery import clip_tag, image_tag, media_tag
from clips.given import load_model, settings_like, settings_of
from clips.write import claim_paths, playback_fps, write_video
from grid import fold, grid_shape, unfold
from lab.evals.attention import AttentionMaps, check_mapped, draw_maps
from sample import SHIPPED, Request, prepare, stream
from sd.device import at_work
from sd.vae import decode

FIRST = "seed", "fps", "steps", "guidance", "sampler", "layout"  # options, as the page groups them
TIME, FILES = ("prompts_at", "blend"), ("first", "last", "extend", "like")
MORE = "negative", "frames", "size", "overlap", "eta", "shift", "guidance_interval", "guidance_rescale", "reuse", "fast"
ABOUT = {f.name: f.metadata for f in fields(sample.Options)}
EXAMPLES = ("a red circle moving right", "a blue square moving up on a gray background",
            "a green triangle moving left on a gray background", "a white circle moving down on a brown background")
PREVIEWS = 0.15  # of the time may go into pictures of what is not finished yet: every twentieth step or so has one
WIDEST = 1024  # pixels of such a picture


@dataclass
class Job:
    """A video while it is made, and what the page shows of it."""

    options: sample.Options
    attention: bool = False
    step: int = 0
    steps: int = 0
    spent: float = 0.0  # seconds in previews
    pictures: dict = field(default_factory=dict)  # caption -> HTML
    notes: list = field(default_factory=list)
    files: list = field(default_factory=list)
    stopped: Event = field(default_factory=Event)

    def run(self, studio, folder: str):
        """Make the video and its files in a folder. Raises ValueError as sample.prepare, CancelledError if stopped."""
        self.options.check()
        self.options.check_files()
        began, model = time.monotonic(), studio.model_with(self.options.layout)
        request = prepare(self.options, model, studio.device)
        self.steps, grid = request.steps * len(request.windows(model)), grid_shape(request.window(model))
        self.notes, fps = model.unseen(request) + model.cut_off(request), playback_fps(request.fps)
        whole, still = len(request.windows(model)) == 1, request.frames == 1
        if self.attention:
            check_mapped(model, request)

        def progress(i, t, x, x0):
            self.step, now = self.step + 1, time.monotonic()
            if self.stopped.is_set() or studio.closing.is_set():
                raise CancelledError
            if self.spent <= PREVIEWS * (now - began):
                with at_work(model.vae, studio.device):
                    self.show(decode(model, unfold(x0, *grid))[0], grid, fps)
                self.spent += time.monotonic() - now

        with AttentionMaps(model.unet, request.frames) if self.attention else nullcontext() as watch:
            frames = np.concatenate(list(stream(model, request, progress=progress, device=studio.device)), axis=1)[0]
        if self.stopped.is_set():  # the folder may be gone
            raise CancelledError
        if whole:
            self.show(frames, grid, fps)
        told = settings_of(request, self.options, model.settings.layout, SHIPPED) | {"prompt": "".join(request.prompt)}
        with claim_paths(folder, [(request.texts[0], request.seed)], still) as (path,):
            self.files = [path] if still else [path, f"{path[:-4]}.gif"]
            for file in self.files:
                write_video(file, frames, fps, told)
        self.pictures["clip"] = media_tag(Path(path).read_bytes(), path[-4:], frames.shape[2])
        self.files.append(f"{path[:-4]}.json")
        cli.write_text(self.files[-1], json.dumps(told, indent=1, ensure_ascii=False))
        if self.attention:
            maps = draw_maps(watch.maps, request.timesteps(model))
            self.pictures["attention: row i is frame i, column j the frame that it looks at"] = image_tag(maps)

    def show(self, frames: np.ndarray, grid, fps: float):
        """Set the pictures of frames (T, H, W, 3): as one grid image, and as a clip."""
        less = -(-max(grid) * max(frames.shape[1:3]) // WIDEST)
        frames = np.ascontiguousarray(frames[:, ::less, ::less])
        image = fold(torch.from_numpy(frames).permute(0, 3, 1, 2)[None], *grid)[0].permute(1, 2, 0).numpy()
        grid = {"grid: frame by frame, down each column": image_tag(Image.fromarray(image))} if len(frames) > 1 else {}
        self.pictures = grid | {"clip": clip_tag(frames, fps)}


class Studio:
    """A model, and the one thread that works with it: torch keeps threads of its own for each that calls it."""

    def __init__(self, options: sample.Options):
        self.options, self.thread, self.closing = options, ThreadPoolExecutor(1), Event()
        self.model, self.device, _ = load_model(options, SHIPPED)
        self.layout = self.model.settings.layout  # its own

    def model_with(self, layout: str):
        """The model with a layout, "" for its own: loaded again where another job wanted another one."""
        if self.model.settings.layout != (layout or self.layout):
            self.model, *_ = load_model(replace(self.options, layout=layout), SHIPPED)
        return self.model

    def make(self, jobs: list[Job], folder: str):
        """Make the videos of some jobs, one after the other; yield whenever there may be something new to see."""
        try:
            for job in jobs:
                made = self.thread.submit(job.run, self, folder)
                while not wait([made], timeout=0.25).done:
                    yield
                made.result()
        finally:  # also where the page was closed, or the work stopped
            for job in jobs:
                job.stopped.set()


# ---------------------------------------------------------------------------------------------------------------------
# The page

CSS = """
.gradio-container { max-width: 1200px !important; margin: auto } .small { image-rendering: pixelated }
.job { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(250px, 100%), 1fr)); gap: 16px }
figure { margin: 0 0 16px } figcaption { font-size: .85em; opacity: .7 } progress { width: 100%; accent-color: #2563eb }
.job video, .job img, .nothing { width: 100%; border-radius: 6px; background: #8882 }
.nothing { padding: 20% 1em; text-align: center; box-sizing: border-box }
.error { color: #dc2626; overflow-wrap: anywhere } #said span.error, #made:not(:has(a)) { display: none }
@media (max-width: 800px) { #right { order: -1 } }
"""


def seen(jobs: list[Job]) -> str:
    """HTML of what there is of the videos; "" before the first picture."""
    each = ["".join(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"
                    for caption, picture in job.pictures.items()) for job in jobs]
    return "".join(f'<div class="job">{figures}</div>' for figures in each if figures)


def told(jobs: list[Job], done="") -> str:
    """HTML of how far the videos are, and what a user should know of them."""
    step, steps = sum(job.step for job in jobs), sum(job.steps or jobs[0].steps for job in jobs)
    notes = dict.fromkeys(escape(note) for job in jobs for note in job.notes)
    bar = f'<progress max="{steps}" value="{step}"></progress>step {step} of {steps}' if steps else "starting"
    return (done or bar) + "".join(f"<br>note: {note}" for note in notes)


def page(studio: Studio):
    """The page, a gradio.Blocks."""
    import gradio as gr

    defaults = vars(Request("x").resolve(studio.model)) | {"layout": studio.layout}

    def entry(name):
        """The component of an option: what it says of itself is what --help says."""
        about, named = ABOUT[name], {"label": name.replace("_", " "), "elem_id": name}
        info = about["help"].partition(" (default")[0]
        if about["metavar"] == "FILE":
            return gr.File(**named | {"label": info.partition(";")[0]}, height=150)
        default = cli.as_text(name, defaults[name])
        if isinstance(default, bool):
            return gr.Checkbox(**named, info=info)
        if about["choices"]:
            choices = (f"the model's: {default}", ""), *filter(None, about["choices"])
            return gr.Dropdown(choices, **named, value="", info=info, min_width=180)
        return gr.Textbox(**named, info=info, placeholder=default, min_width=140)

    def refusal(error: Exception, values: dict) -> dict:
        """What the page shows of an error: one line, and a red field. Gradio never forgets a field that it updates."""
        if not (isinstance(error, (ValueError, OSError)) and cli.is_ours(error)):
            traceback.print_exc()
            return {said: '<p role="alert" class="error">This did not work: the terminal says why.</p>'}
        text = cli.one_line(error)
        for path in filter(None, map(values.get, FILES)):  # where it lies is nobody's business
            text = text.replace(path, os.path.basename(path))
        wrong = text.split()[0].rstrip(":")
        red = f"<style>#{wrong} :is(input, textarea) {{ border: 2px solid #dc2626 !important }}</style>"
        return {said: f'<p role="alert" class="error">{escape(text)}</p>{red if wrong in entries else ""}'}

    def make(*values):
        values, began, before = dict(zip(entries, values)), time.monotonic(), ""
        asked = {name: values[name] for name in entries if name in ABOUT and name != "like"}
        yield {said: "starting", made: None}
        try:
            forms = [asked, asked | {values["other"]: values["value"]}] if values["value"] else [asked]
            options = [replace(studio.options, **cli.read_fields(sample.Options, form)) for form in forms]
            jobs = [Job(one, values["attention"]) for one in options]
            with tempfile.TemporaryDirectory() as folder:
                for _ in studio.make(jobs, folder):
                    now = seen(jobs)
                    yield {said: told(jobs)} | ({stage: now} if now not in ("", before) else {})
                    before = now
                yield {said: told(jobs, f"made in {time.monotonic() - began:.1f} s"), stage: seen(jobs),
                       made: [path for job in jobs for path in job.files]}
        except Exception as error:
            yield refusal(error, values)

    def fill(*values):
        values = dict(zip(entries, values))
        try:
            found = settings_like(replace(studio.options, **{name: str(values[name] or "") for name in FILES}), SHIPPED)
            texts = {entries[name]: cli.as_text(name, found.get(name)) for name in (*FIRST, *TIME, *MORE)}
            return texts | {entries["prompt"]: "".join(found.get("prompt", "")), said: "The settings are filled in."}
        except Exception as error:
            return refusal(error, values)

    with gr.Blocks(title="ETC: text to video", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(f"# Text to video, on a grid\nModel: `{os.path.basename(studio.options.ckpt or SHIPPED)}`")
        entries = {}
        with gr.Row(equal_height=True):
            entries["prompt"] = gr.Textbox(label="prompt", placeholder=EXAMPLES[0], lines=2, scale=5, elem_id="prompt")
            with gr.Column(scale=1, min_width=160):
                go = gr.Button("Make the video", variant="primary", elem_id="go")
                stop = gr.Button("Stop", elem_id="stop")
        gr.Examples([[text] for text in EXAMPLES], entries["prompt"], label="for example")
        said = gr.HTML(elem_id="said", padding=True)
        with gr.Row():
            with gr.Column(scale=2):
                for two in zip(FIRST[::2], FIRST[1::2]):
                    with gr.Row():
                        entries |= {name: entry(name) for name in two}
                for title, names in (("Prompts that change over time", TIME), ("Frames that are given", FILES[:3]),
                                     ("More settings", MORE)):
                    with gr.Accordion(title, open=False):
                        entries |= {name: entry(name) for name in names}
                with gr.Accordion("Compare, and look inside", open=False):
                    entries["other"] = gr.Dropdown([*FIRST, *MORE], label="compare with another", elem_id="other")
                    entries["value"] = gr.Textbox(label="its value in the second video", elem_id="value")
                    entries["attention"] = gr.Checkbox(label="show which frames look at which", elem_id="attention")
                entries["like"] = entry("like")
            with gr.Column(scale=3, elem_id="right"):
                stage = gr.HTML('<div class="nothing">Here the video comes out of noise.</div>', elem_id="stage")
                made = gr.File(label="to keep: video, GIF, settings", interactive=False, elem_id="made")
        inputs, shown = [*entries.values()], {"show_progress": "minimal", "show_progress_on": said}
        work = go.click(make, inputs, [said, stage, made], **shown, api_name="make")
        stop.click(None, cancels=work).then(lambda: "Stopped.", None, said)
        entries["like"].upload(fill, inputs, [said, *inputs], show_progress="hidden")
    return blocks


# What the page may be asked for; and what a browser may load for it: nothing from elsewhere
ROUTES = re.compile(r"/|/(config|manifest\.json|theme\.css|favicon\.ico|(assets|static|svelte)/.*)|/gradio_api/(info|"
                    r"queue/(join|data)|cancel|reset|heartbeat/\w+|startup-events|upload|upload_progress|file=/.*)")
POLICY = b"content-security-policy", b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"


def guard(app):  # ASGI middleware
    async def guarded(scope, receive, send):
        async def safe(message):
            await send(message | ({"headers": [*message["headers"], POLICY]} if "headers" in message else {}))

        if scope["type"] == "http" and not ROUTES.fullmatch(scope["path"]):
            scope = scope | {"path": "/nothing", "raw_path": b"/nothing"}
        await app(scope, receive, safe)

    return guarded


@dataclass
class Options:
    ckpt: str = cli.option("", "the model (default: the tiny one that ships)")
    port: int = cli.option(7860, "of the page's address", low=1, high=65535)
    host: str = cli.option("127.0.0.1", "who may come: this machine alone, or with 0.0.0.0 all that reach it")


def main():
    o, home = cli.parse(Options, __doc__), tempfile.TemporaryDirectory(prefix="etc-")
    os.environ |= dict.fromkeys(("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE"), home.name)  # all there is served
    try:
        import gradio as gr
    except ImportError as error:
        raise ValueError('the page needs gradio: pip install -e ".[demo]"') from error
    studio = Studio(sample.Options(ckpt=o.ckpt))
    blocks = page(studio).queue(default_concurrency_limit=1, max_size=100)
    _, address, _ = blocks.launch(
        server_name=o.host, server_port=o.port, share=False, prevent_thread_lock=True, quiet=True, css=CSS,
        theme=gr.themes.Default(primary_hue="blue", font="system-ui", font_mono="monospace"), footer_links=[],
        run_history=False, ssr_mode=False, max_file_size="100mb", app_kwargs={"middleware": [(guard, (), {})]})
    print(address, flush=True)
    blocks.block_thread()  # until Ctrl-C
    studio.closing.set()


if __name__ == "__main__":
    cli.run(main)
