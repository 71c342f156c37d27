"""The VAE of a tiny model, from nothing on the toy world, with one shape and with two.

    python train.py configs/tiny_vae.py
"""

train = "vae"
model = "tiny"
out_dir = "runs/tiny_vae"

toy = "data/tiny"
toy_clips = 6912
toy_captioned = 2880
toy_level = 2
width = 64
height = 64

max_steps = 3600
batch_size = 16
lr = 2e-3
warmup = 50
cooldown = 3200
clip = 0.1  # a step that was too long costs the next hundred
betas = (0.9, 0.99)
weight_decay = 0.01
ema = 0.995
kl_weight = 3e-4
dtype = "auto"
log_every = 50
licence = "MIT, trained from nothing on the toy world"
