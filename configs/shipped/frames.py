"""The tiny model, second of six runs: every frame rate, still where frames need each other.

    python train.py configs/shipped/first.py configs/shipped/frames.py

At 8 FPS and above where a shape is no longer follows from the caption: it has to be read off the other frames.
"""

init = "runs/shipped_first/model.safetensors"
vae = ""  # that of init
out_dir = "runs/shipped_frames"

encoded = "data/toy-encoded"
fps_values = (4, 8, 15, 30, 60)  # 16 frames at 1 or 2 FPS do not fit into 5 s
starts = 1
mix = {"video": 6, "label": 1, "caption": 1}

seed = 1  # not the noise of the run before
max_steps = 4000
