"""256 frames of 256x160: 1,000 steps on from what configs/base.py trained.

    torchrun --nproc_per_node=8 train.py configs/long.py

Sixteen by sixteen frames of 32x20 latents. Where the UNet has halved three times a frame is 4 x 2.5 tokens: they
straddle frames.
"""

train = "unet"
model = "sd21"
init = "runs/base/model.safetensors"
out_dir = "runs/long"

video = "data/webvid/filtered.csv"
label = "data/imagenet/train"
caption = "data/jdb/train.jsonl"
encoded = "data/long-encoded"
frames = 256
width = 256
height = 160
fps_values = (15, 30, 60)  # 256 frames at 8 FPS are 32 s, longer than most clips
mix = {"video": 2, "label": 1, "caption": 1}
validation = 8
default_fps = 30
guidance = 7.0

max_steps = 1000
batch_size = 1  # x 6 x 8 GPUs = 48
accumulate = 6
lr = 1e-4
betas = (0.9, 0.9)
weight_decay = 0.03
dtype = "float16"
checkpointing = True
timeout = 1800  # a forward pass takes long
sheet_every = 250
save_every = 250

prompts = ("Caucasian woman pink jacket isolated on chroma green screen background funky smiling",)
licence = "CreativeML Open RAIL++-M (Stable Diffusion 2)"
