"""The tiny model, third of six: every timestep."""

train = "unet"
init = "runs/shipped_frames/model.safetensors"
train_text = True
out_dir = "runs/shipped_all"

toy = "data/toy"
encoded = "data/toy-encoded"
frames = 16
width = 64
height = 64
fps_values = (4, 8, 15, 30, 60)  # 16 frames at 1 or 2 FPS do not fit into 5 s
starts = 1
draws = 20
mix = {"video": 6, "label": 1, "caption": 1}

timestep_shift = 2.0  # 1024 latent pixels agree on one background: it is decided where the signal is 1/1000
default_fps = 4
guidance = 4.0

seed = 2  # not the noise of the runs before
max_steps = 4000
batch_size = 16
lr = 6e-4
warmup = 50
cooldown = 1500
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
