"""The shipped tiny model as one of the layout causal, which makes a long video frame by frame (see docs/frames.md).

    python train.py configs/causal.py
    python -m lab.evals.toy --ckpt runs/causal/model.safetensors --task extend --fps 30
"""

train = "unet"
init = "weights/tiny.safetensors"
layout = "causal"
out_dir = "runs/causal"

toy = "data/toy"
encoded = "data/toy-causal"
frames = 16
width = 64
height = 64
fps_values = (4, 8, 15, 30)
mix = {"video": 1}
given_share = 0.5
draw_latents = False

timestep_shift = 3.0
default_fps = 4
guidance = 1.5
eta = 1.0

optimizer = "muon"
max_steps = 6000
batch_size = 8
lr = 1.2e-3
warmup = 100
cooldown = 3000
clip = 0.3
betas = (0.9, 0.99)
weight_decay = 0.01
ema = 0.998
dtype = "auto"

log_every = 50
sheet_every = 1500
save_every = 500
licence = "MIT, trained from nothing on the toy world"
