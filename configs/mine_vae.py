"""The first part of configs/mine.py, which runs it by itself: the shipped VAE, which knows flat shapes, learns your
frames.
"""

train = "vae"
model = "tiny"
init = "weights/tiny.safetensors"
out_dir = "runs/mine_vae"
video = "data/mine"
mix = {"video": 1}
width = 64
height = 64
fps_values = (8, 12)
frame_pool = 3200
max_steps = 600
batch_size = 16
lr = 2e-3
warmup = 50
cooldown = 300
betas = (0.9, 0.99)
weight_decay = 0.01
ema = 0.995
kl_weight = 1e-5
dtype = "auto"
log_every = 50
