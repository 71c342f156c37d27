"""The VAE of the tiny model, from nothing on the toy world: a quarter of an hour on two cores.

    python train.py configs/tiny_vae.py
"""

train = "vae"
model = "tiny"
out_dir = "runs/tiny_vae"
toy = "data/toy"
width = 64
height = 64
max_steps = 3000
batch_size = 16
lr = 2e-3
warmup = 50
cooldown = 1500
betas = (0.9, 0.99)
weight_decay = 0.01
ema = 0.995
kl_weight = 1e-5
dtype = "auto"
log_every = 50
licence = "MIT, trained from nothing on the toy world"
