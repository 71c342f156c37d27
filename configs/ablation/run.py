"""One run of `python -m lab.ablation`, which varies the embeddings, the mix, the number of videos and the seed."""

train = "unet"
init = "runs/ablation_sheets/model.safetensors"
out_dir = "runs/ablation"

toy = "data/toy"
encoded = "data/ablation"
frames = 9
width = 64
height = 64
fps_values = (2, 4)
starts = 1
draws = 16
mix = {"video": 2, "label": 1, "caption": 1}

timestep_shift = 2.5
timestep_width = 0.4  # where frames need each other (see shipped/first.py), and everywhere else a little
default_fps = 2
guidance = 3.0

max_steps = 1100
batch_size = 8
lr = 6e-4
warmup = 50
cooldown = 300
betas = (0.9, 0.99)
weight_decay = 0.01
dtype = "auto"

log_every = 100
sheet_every = 10_000
save_every = 10_000
licence = "MIT, trained from nothing on the toy world"
