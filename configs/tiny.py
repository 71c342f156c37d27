"""The tiny model, first of four: UNet and text tower from nothing, on slow motion.

At 4 FPS sixteen frames span most of a clip, and with them most of the picture: where a shape is follows from the
direction in the caption and the number of the frame. At 60 FPS it follows from nothing. The VAE comes from the shipped
file; to make that one too, see the README.
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
draws = 20
mix = {"video": 5, "label": 1, "caption": 2}

# SD's own schedule never reaches pure noise, so flat backgrounds leak through to training but not to sampling
prediction = "v"
zero_snr = True
spacing = "trailing"
timestep_shift = 2.0  # 1024 latent pixels agree on one background: it is decided where the signal is 1/1000
default_fps = 4
guidance = 4.0

max_steps = 2000
batch_size = 8
lr = 4e-4
warmup = 50
betas = (0.9, 0.99)
weight_decay = 0.01
ema = 0.999
dtype = "bfloat16"

log_every = 20
sheet_every = 500
save_every = 500
prompts = (
    "a red circle moving right",
    "a blue square moving up on a gray background",
    "a yellow triangle moving left on a teal background",
    "a white circle moving down on a brown background",
)
licence = "MIT, trained from nothing on the toy world"
