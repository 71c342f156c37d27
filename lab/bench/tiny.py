"""What a newcomer waits for: python sample.py "a red circle moving right", and where the time goes.

    python -m lab.bench tiny

One run does not count; then medians of five.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from cli import ROOT, parse
from lab.bench.timing import NoOptions

NAMES = ("import", "load", "text and first step", "49 steps", "decode", "write")

INSIDE = """
import json, time
began = time.perf_counter()
import sample
clock = [time.perf_counter()]
model, *_ = sample.load_model(sample.Options(), sample.SHIPPED)
clock.append(time.perf_counter())
def step(i, *rest):
    if i in (0, 49): clock.append(time.perf_counter())
video = sample.generate(model, sample.Request("a red circle moving right"), progress=step)
clock.append(time.perf_counter())
sample.write_video("video.mp4", video[0], 4, {})
clock.append(time.perf_counter())
print(json.dumps([b - a for a, b in zip([began, *clock], clock)]))
"""


def main(arguments):
    parse(NoOptions, __doc__, arguments)
    wholes, parts = [], []
    with tempfile.TemporaryDirectory() as folder:
        for n in range(6):
            began = time.perf_counter()
            subprocess.run([sys.executable, os.path.join(ROOT, "sample.py"), "a red circle moving right", "--out",
                            os.path.join(folder, f"{n}.mp4")], check=True, capture_output=True)
            wholes.append(time.perf_counter() - began)
            done = subprocess.run([sys.executable, "-c", INSIDE], check=True, capture_output=True, cwd=folder,
                                  env=os.environ | {"PYTHONPATH": ROOT}, text=True)
            parts.append(json.loads(done.stdout))
    print(f"python sample.py: {statistics.median(wholes[1:]):.1f} s; inside, "
          + ", ".join(f"{name} {statistics.median(s):.1f}" for name, s in zip(NAMES, zip(*parts[1:]))))
