"""The text-to-image model, second of three: sheets of nine equal pictures, at timesteps where comparing them pays.

Why it pays there: shipped/first.py.
"""

train = "unet"
init = "runs/ablation_image/model.safetensors"
out_dir = "runs/ablation_compare"

toy = "data/toy"
encoded = "data/ablation-sheets"
frames = 9
width = 64
height = 64
mix = {"caption": 1}

timesteps = (550, 850)
default_fps = 2
guidance = 3.0

seed = 1
max_steps = 1200
batch_size = 8
lr = 6e-4
warmup = 50
betas = (0.9, 0.99)
weight_decay = 0.01
dtype = "auto"

log_every = 100
sheet_every = 1200
save_every = 500
licence = "MIT, trained from nothing on the toy world"
