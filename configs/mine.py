"""Your own clips on a laptop: a folder of a hundred stickers or short clips becomes a model of them.

    python train.py configs/mine.py --video=FOLDER                           # captions: name.txt beside name.webp
    python train.py configs/mine.py --video=FOLDER --captions=from_names     # or the names of the files

The VAE first, which knows nothing but flat shapes (mine_vae.py), then UNet and text tower, all from the shipped model.
For another folder choose another place: --out_dir=runs/cats --encoded=runs/cats/encoded. See docs/mine.md.
"""

train = "unet"
init = "weights/tiny.safetensors"
vae = "configs/mine_vae.py"
train_text = True
out_dir = "runs/mine"

video = "data/mine"
encoded = "runs/mine/encoded"
frames = 16
width = 64
height = 64
fps_values = (8, 12)  # 16 frames of a second and a third, or of two seconds
starts = 2
mix = {"video": 1}
draw_latents = False  # see tiny.py
background = "white"  # shows through what is transparent

timestep_shift = 2.0  # what a clip is of is decided in much noise
default_fps = 8
guidance = 2.0
eta = 1.0

# a hundred clips, again and again: many small steps
max_steps = 2200
batch_size = 4
lr = 8e-4
warmup = 50
cooldown = 1400
clip = 0.3
betas = (0.9, 0.99)
weight_decay = 0.01
ema = 0.99
dtype = "auto"

log_every = 50
sheet_every = 1100
save_every = 550
sheet_clips = 6
