"""The shipped tiny model, taught to take given frames: half of its samples have some (see docs/frames.md).

    python train.py configs/given.py
    python -m lab.evals.toy --ckpt runs/given/model.safetensors --task first
"""

train = "unet"
init = "weights/tiny.safetensors"
out_dir = "runs/given"

toy = "data/toy"
encoded = "data/toy-given"
frames = 16
width = 64
height = 64
fps_values = (4, 15, 30)
starts = 1
mix = {"video": 1}
given_share = 0.5

timestep_shift = 1.6
default_fps = 4
guidance = 1.3
eta = 1.0

max_steps = 6000
batch_size = 4
lr = 3e-4
warmup = 100
cooldown = 4000
clip = 0.3
betas = (0.9, 0.99)
weight_decay = 0.01
ema = 0.998
validation = 32
dtype = "auto"

log_every = 50
sheet_every = 2000
save_every = 1000
licence = "MIT, trained from nothing on the toy world"
