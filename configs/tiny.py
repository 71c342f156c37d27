"""The tiny model in twenty minutes on two cores: UNet and text tower from nothing, the VAE from the shipped file.

    python train.py configs/tiny.py

At 4 FPS sixteen frames span most of a clip, so where a shape is follows from the direction in the caption and the
number of the frame. The shipped model knows every frame rate; the runs that made it begin with shipped/first.py.
"""

train = "unet"
model = "tiny"
vae = "weights/tiny.safetensors"
train_text = True
out_dir = "runs/tiny"

toy = "data/toy"
encoded = "data/toy-slow"
frames = 16
width = 64
height = 64
fps_values = (4,)
starts = 2
draws = 8
mix = {"video": 12, "label": 1, "caption": 3}

# SD's own schedule never reaches pure noise, so flat backgrounds leak through to training but not to sampling
prediction = "v"
zero_snr = True
spacing = "trailing"
timestep_shift = 2.2
timestep_width = 0.45  # where frames need each other (see shipped/first.py), and a little elsewhere
default_fps = 4
guidance = 2.0
eta = 1.0

# what words and frames mean is a small part of a gradient that is mostly noise: many small steps find it sooner
max_steps = 7200
batch_size = 4
lr = 3e-4
warmup = 100
cooldown = 3600
clip = 0.3
betas = (0.9, 0.99)
weight_decay = 0.01
ema = 0.999
dtype = "auto"

log_every = 50
sheet_every = 3600
save_every = 1800
prompts = (
    "a red circle moving right",
    "a blue square moving up on a gray background",
    "a yellow triangle moving left on a teal background",
    "a white circle moving down on a brown background",
)
licence = "MIT, trained from nothing on the toy world"
