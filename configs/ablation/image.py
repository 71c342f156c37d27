"""The tiny text-to-image model that every run of `python -m lab.ablation` starts from: single pictures, plain SD.

A UNet from nothing; VAE and text tower, which stays frozen, are those of the shipped model.
"""

train = "unet"
init = "weights/tiny.safetensors"
out_dir = "runs/ablation_image"

toy = "data/toy"
encoded = "data/ablation-image"
frames = 1
width = 64
height = 64
mix = {"caption": 1}
draw_latents = False

timestep_shift = 1.5
default_fps = 4
guidance = 2.0

optimizer = "muon"
max_steps = 1500
batch_size = 16
lr = 1.2e-3
warmup = 50
cooldown = 700
betas = (0.9, 0.99)
weight_decay = 0.01
ema = 0.998
dtype = "float32"  # on whatever machine: lines of several are compared

log_every = 100
sheet_every = 1500
save_every = 500
licence = "MIT, trained from nothing on the toy world"
