"""The tiny model, fourth of six: every timestep alike, and stills of things that move.

Half of the images here are of something that moves and say so, which tells what FPS 0 and FPS 120 mean to a prompt of
motion: unrelated places, and one place.
"""

train = "unet"
init = "runs/shipped_all/model.safetensors"
train_text = True
out_dir = "runs/shipped_finish"

toy = "data/toy-moving"
toy_moving = True
encoded = "data/toy-moving-encoded"
frames = 16
width = 64
height = 64
fps_values = (4, 8, 15, 30, 60)  # 16 frames at 1 or 2 FPS do not fit into 5 s
starts = 1
draws = 20
mix = {"video": 10, "label": 3, "caption": 3}

default_fps = 4
guidance = 1.3  # chosen on validation triples: more makes motion too fast, none cuts some clips

seed = 3  # not the noise of the runs before
max_steps = 9500
batch_size = 16
lr = 6e-4
warmup = 50
cooldown = 5500
betas = (0.9, 0.99)
weight_decay = 0.01
ema = 0.999
dtype = "bfloat16"

log_every = 20
sheet_every = 500
save_every = 500
prompts = (
    "a red circle moving right",
    "a blue square moving up on a gray background",
    "a yellow triangle moving left on a teal background",
    "a white circle moving down on a brown background",
)
licence = "MIT, trained from nothing on the toy world"
