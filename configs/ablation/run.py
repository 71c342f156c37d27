"""What all runs of `python -m lab.ablation` share, sixteen frames of 64x64, from the text-to-image model of image.py;
paper.py and ways.py have the rest.
"""

train = "unet"

toy = "data/toy"
frames = 16
width = 64
height = 64
draw_latents = False

timestep_shift = 2.2
timestep_width = 0.45  # where frames need each other, and everywhere else a little
default_fps = 4
guidance = 2.0

optimizer = "muon"
max_steps = 2400
batch_size = 8
lr = 1.2e-3
warmup = 50  # and no cooldown: any two points of two curves compare
betas = (0.9, 0.99)
weight_decay = 0.01
ema = 0.998
dtype = "float32"  # on whatever machine: lines of several are compared

log_every = 100
sheet_every = 600
save_every = 10_000
licence = "MIT, trained from nothing on the toy world"
