"""The second half of the tiny VAE's training: shapes get their corners. Starts from what configs/tiny_vae.py made."""

train = "vae"
init = "runs/tiny_vae/model.safetensors"
out_dir = "runs/shipped_vae_finish"
toy = "data/toy"
width = 64
height = 64
seed = 1
max_steps = 3500
batch_size = 16
lr = 1.5e-3
warmup = 50
cooldown = 2500
betas = (0.9, 0.99)
weight_decay = 0.01
ema = 0.995
kl_weight = 1e-5
dtype = "bfloat16"
log_every = 50
licence = "MIT, trained from nothing on the toy world"
