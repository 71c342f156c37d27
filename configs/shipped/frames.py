"""The tiny model, second of six: every frame rate, still where frames need each other (see tiny_first.py).

At 8 FPS and above where a shape is no longer follows from the caption: it has to be read off the other frames.
"""

train = "unet"
init = "runs/shipped_first/model.safetensors"
train_text = True
out_dir = "runs/shipped_frames"

toy = "data/toy"
encoded = "data/toy-encoded"
frames = 16
width = 64
height = 64
fps_values = (4, 8, 15, 30, 60)  # 16 frames at 1 or 2 FPS do not fit into 5 s
starts = 1
draws = 20
mix = {"video": 6, "label": 1, "caption": 1}

timesteps = (600, 850)
default_fps = 4
guidance = 4.0

seed = 1  # not the noise of the run before
max_steps = 4000
batch_size = 16
lr = 6e-4
warmup = 50
betas = (0.9, 0.99)
weight_decay = 0.01
ema = 0.999
dtype = "bfloat16"

log_every = 20
sheet_every = 500
save_every = 250
prompts = (
    "a red circle moving right",
    "a blue square moving up on a gray background",
    "a yellow triangle moving left on a teal background",
    "a white circle moving down on a brown background",
)
licence = "MIT, trained from nothing on the toy world"
