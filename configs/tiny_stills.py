"""The tiny model, second of four: attention between frames, learned where it is easiest.

A captioned image repeated is sixteen noisy views of the same picture: whoever looks at the other frames sees it
sooner. On video that habit starts very late; taken over from stills, it is there at once.
"""

train = "unet"
init = "runs/tiny/model.safetensors"
train_text = True
out_dir = "runs/tiny_stills"

toy = "data/toy"
encoded = "data/toy-slow"
frames = 16
width = 64
height = 64
fps_values = (4,)
starts = 2
draws = 20
mix = {"caption": 1}

timestep_shift = 2.0  # 1024 latent pixels agree on one background: it is decided where the signal is 1/1000
default_fps = 4
guidance = 4.0

max_steps = 350
batch_size = 16
lr = 1e-3
warmup = 20
betas = (0.9, 0.99)
weight_decay = 0.01
ema = 0.999
dtype = "bfloat16"

log_every = 20
sheet_every = 350
save_every = 350
prompts = (
    "a red circle moving right",
    "a blue square moving up on a gray background",
    "a yellow triangle moving left on a teal background",
    "a white circle moving down on a brown background",
)
licence = "MIT, trained from nothing on the toy world"
