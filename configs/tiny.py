"""A tiny model from nothing: first its VAE (tiny_vae.py), then UNet and text tower. What it becomes: docs/tiny.md.

    python train.py configs/tiny.py

What words for one picture mean is learned sixteen times as cheaply from single images. Then videos at 4 FPS, where
sixteen frames span most of a clip, so that where a shape is follows from the direction in the caption and the number of
the frame. Only when that is known do frames help each other: faster clips and given frames, and last all the rest.
"""

train = "unet"
model = "tiny"
vae = "configs/tiny_vae.py"
train_text = True
out_dir = "runs/tiny"

toy = "data/tiny"
toy_clips = 6912  # of fewer, pairs are drawn where one shape was asked for
toy_captioned = 2880
toy_level = 2
encoded = "data/tiny-encoded"
frames = 16
width = 64
height = 64
fps_values = (4, 8, 15, 30, 60)
draws = 8
mix = {"video": 12, "label": 1, "caption": 3}
given_share = 0.5

draw_latents = False  # the VAE's posterior is wide wherever there is only background

# SD's own schedule never reaches pure noise, so flat backgrounds leak through to training but not to sampling
prediction = "v"
zero_snr = True
spacing = "trailing"
timestep_shift = 3.0  # where things are is settled in more noise than what they look like
sampling_shift = 3.0
default_fps = 4
guidance = 1.5
eta = 1.0

optimizer = "muon"  # what words mean is a small part of a gradient
max_steps = 44_000
batch_size = 8
lr = 1.2e-3
warmup = 100
cooldown = 6000
clip = 0.3
betas = (0.9, 0.99)
weight_decay = 0.01
ema = 0.998
dtype = "auto"
schedule = {
    1000: {"frames": 1, "mix": {"caption": 1}, "batch_size": 16, "clip": 1.0, "given_share": 0.0,
           "timestep_shift": 1.5},
    2500: {"fps_values": (4,), "mix": {"video": 1}, "given_share": 0.0, "timestep_shift": 2.2, "timestep_width": 0.45},
    4000: {"fps_values": (4,), "mix": {"video": 1}, "given_share": 0.0, "timestep_shift": 4.0, "timestep_width": 0.5},
    8000: {"fps_values": (4, 8, 15), "mix": {"video": 1}, "given_share": 0.25},
    14_000: {},  # all of the above, as again at the end
    24_000: {"timestep_shift": 5.5, "timestep_width": 0.5},  # there a place is settled: lab.evals.ideal
    38_000: {"timestep_shift": 4.0, "timestep_width": 0.5},  # and here it must be kept
}

log_every = 50
sheet_every = 2500
save_every = 500
prompts = (
    "a red circle moving right",
    "a blue square moving up on a gray background",
    "a yellow triangle moving left on a teal background",
    "a white circle moving down and a red square moving left",
)
licence = "MIT, trained from nothing on the toy world"
