"""The tiny model, first of six runs: UNet and text tower from nothing, where frames need each other and words count.

    python train.py configs/shipped/first.py

Between timesteps 600 and 850 a shape is lost in the noise of one frame, and plain in sixteen: what is learned there is
to compare frames. With less noise there is nothing to compare for, with more nothing to compare. At 4 FPS sixteen
frames span most of a clip, so where a shape is follows from the direction in the caption and the number of the frame.

The VAE comes from the shipped file; tiny_vae.py and vae_finish.py make it. The five runs that follow start from one
another's models, and their files hold what they change of this one (all commands: docs/tiny.md).
"""

train = "unet"
model = "tiny"
vae = "weights/tiny.safetensors"
train_text = True
out_dir = "runs/shipped_first"

toy = "data/toy"
encoded = "data/toy-first"
frames = 16
width = 64
height = 64
fps_values = (4,)
starts = 2
draws = 20
mix = {"video": 4, "label": 1, "caption": 3}

# SD's own schedule never reaches pure noise, so flat backgrounds leak through to training but not to sampling
prediction = "v"
zero_snr = True
spacing = "trailing"
timesteps = (600, 850)
default_fps = 4
guidance = 4.0

max_steps = 1500
batch_size = 16
lr = 6e-4
warmup = 50
betas = (0.9, 0.99)
weight_decay = 0.01
ema = 0.999
dtype = "bfloat16"

log_every = 20
sheet_every = 500
save_every = 250
prompts = (
    "a red circle moving right",
    "a blue square moving up on a gray background",
    "a yellow triangle moving left on a teal background",
    "a white circle moving down on a brown background",
)
licence = "MIT, trained from nothing on the toy world"
