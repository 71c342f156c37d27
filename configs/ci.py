"""The whole training path in seconds: what the tests train. It learns nothing worth looking at."""

train = "unet"
model = "micro"
train_text = True
out_dir = "runs/ci"

toy = "data/toy-ci"
toy_clips = 8
toy_images = 4
toy_captioned = 8
encoded = "data/toy-ci-encoded"
frames = 4
width = 32
height = 32
fps_values = (4, 8)
draws = 2

prediction = "v"
zero_snr = True
spacing = "trailing"
default_fps = 8

max_steps = 20
batch_size = 4
lr = 1e-3
warmup = 5
betas = (0.9, 0.99)
weight_decay = 0.01
ema = 0.9
dtype = "float32"

log_every = 1
sheet_every = 10
save_every = 5
prompts = ("a red circle moving right",)
