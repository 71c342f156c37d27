"""The tiny model, last of six: the same by smaller steps, down to none.

Batches of 8 and a gradient that is clipped, for the reasons that tiny.py gives. It goes on from a second turn of
tiny_green.py (see the README).
"""

train = "unet"
init = "runs/shipped_last/model.safetensors"
train_text = True
out_dir = "runs/shipped_polish"

video = "data/toy-green/hard.csv"
label = "data/toy-green/labels"
caption = "data/toy-green/hard.jsonl"
encoded = "data/toy-green-encoded"
frames = 16
width = 64
height = 64
fps_values = (4, 8, 15, 30, 60)  # 16 frames at 1 or 2 FPS do not fit into 5 s
starts = 1
draws = 20
mix = {"video": 10, "label": 3, "caption": 3}

timestep_shift = 1.6  # more of where shapes are decided
default_fps = 4
guidance = 1.3
eta = 1.0  # both chosen on validation triples

seed = 6  # not the noise of the runs before
max_steps = 22000
batch_size = 8
lr = 3e-4
warmup = 200
cooldown = 21800
clip = 0.3
betas = (0.9, 0.99)
weight_decay = 0.01
ema = 0.9995
dtype = "bfloat16"

log_every = 50
sheet_every = 2000
save_every = 2000
prompts = (
    "a red circle moving right",
    "a blue square moving up on a gray background",
    "a green triangle moving left on a gray background",
    "a white circle moving down on a brown background",
)
licence = "MIT, trained from nothing on the toy world"
