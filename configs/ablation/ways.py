"""One run of `python -m lab.ablation ways`, which varies the layout and the seed: sixteen frames of 64x64."""

train = "unet"
init = "runs/ablation_image/model.safetensors"
out_dir = "runs/ways"

toy = "data/toy"
encoded = "data/ways"
frames = 16
width = 64
height = 64
fps_values = (4,)
starts = 2
mix = {"video": 1}

timestep_shift = 2.5
timestep_width = 0.4  # where frames need each other (see shipped/first.py), and everywhere else a little
default_fps = 4
guidance = 3.0

max_steps = 3000
batch_size = 4
lr = 6e-4
warmup = 50
cooldown = 600
betas = (0.9, 0.99)
weight_decay = 0.01
dtype = "float32"  # on whatever machine: lines of several are compared

log_every = 100
sheet_every = 10_000
save_every = 10_000
licence = "MIT, trained from nothing on the toy world"
