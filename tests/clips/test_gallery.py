"""A gallery, as sample.py writes it."""

import base64
import io
import re

import av
import numpy as np
import pytest
from PIL import Image

from clips.gallery import claim_outputs
from clips.write import write_video


def test_a_gallery_holds_the_clips_and_tells_how_each_was_made(run, micro, tmp_path):
    page = tmp_path / "new" / "gallery.html"
    done = run("sample.py", "a <b>bold</b> circle", "a blue square", "--ckpt", micro, "--steps", 1, "--num", 2,
               "--negative", "fog", "--seed", 7, "--out", page)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{page}\n" and [path.name for path in page.parent.iterdir()] == ["gallery.html"]
    text = page.read_text(encoding="utf-8")
    for data in (clips := re.findall(r'<video src="data:video/mp4;base64,([^"]+)"', text)):
        with av.open(io.BytesIO(base64.b64decode(data))) as file:
            assert len(list(file.decode(video=0))) == 4
    assert len(set(clips)) == 4 and "<h1>4 clips</h1>" in text
    captions = re.findall(r'<figcaption><p dir="auto">(.*?)</p><small>seed (\d+)</small>', text)
    assert captions == [(prompt, seed) for prompt in ("a &lt;b&gt;bold&lt;/b&gt; circle", "a blue square")
                        for seed in "78"]
    assert text.count("negative: fog<br>") == 4 and text.count("steps: 1<br>") == 4
    assert "http" not in text and "<script" not in text, "it loads nothing"
    again = run("sample.py", "x", "--ckpt", micro, "--steps", 1, "--out", page)
    assert again.returncode == 2 and "is there already" in again.stderr and page.read_text("utf-8") == text


def test_a_gallery_of_images_and_of_prompts_that_change(run, micro, tmp_path):
    done = run("sample.py", "x", "--ckpt", micro, "--steps", 1, "--frames", 1, "--out", tmp_path / "a.HTML")
    assert done.returncode == 0, done.stderr
    data = re.search(r'<img src="data:image/png;base64,([^"]+)"', (tmp_path / "a.HTML").read_text())[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (32, 32)
    done = run("sample.py", "--prompts_at", "0: one; 2: two", "--ckpt", micro, "--steps", 1, "--out",
               tmp_path / "b.html")
    assert done.returncode == 0, done.stderr
    assert ">0: one; 2: two</p>" in (tmp_path / "b.html").read_text()


@pytest.mark.parametrize("finished", [0, 1])
def test_an_interrupted_gallery_has_what_is_finished(tmp_path, finished):
    told = {"prompt": "x", "seed": 3, "size": [16, 16]}
    page = tmp_path / "g.html"
    with pytest.raises(KeyboardInterrupt), claim_outputs(str(page), [("x", 3), ("x", 4)], False) as paths:
        for path in paths[:finished]:
            write_video(path, np.zeros((2, 16, 16, 3), np.uint8), 8, told)
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["g.html"][:finished]
    assert not finished or page.read_text().count("<video") == 1
