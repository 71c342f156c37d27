"""The text-to-image model, last of three: sheets at every timestep."""

train = "unet"
init = "runs/ablation_compare/model.safetensors"
out_dir = "runs/ablation_sheets"

toy = "data/toy"
encoded = "data/ablation-sheets"
frames = 9
width = 64
height = 64
mix = {"caption": 1}

timestep_shift = 2.0
default_fps = 2
guidance = 3.0

seed = 2
max_steps = 2500
batch_size = 8
lr = 6e-4
warmup = 50
cooldown = 800
betas = (0.9, 0.99)
weight_decay = 0.01
dtype = "auto"

log_every = 100
sheet_every = 2500
save_every = 500
licence = "MIT, trained from nothing on the toy world"
