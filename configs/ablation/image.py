"""The tiny text-to-image model that every run of `python -m lab.ablation` starts from: single images, plain SD.

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

timestep_shift = 1.5
default_fps = 2
guidance = 3.0

max_steps = 2500
batch_size = 32
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
