"""512x320, 16 frames: 1,000 steps on from what configs/base.py trained.

    torchrun --nproc_per_node=8 train.py configs/highres.py
"""

train = "unet"
model = "sd21"
init = "runs/base/model.safetensors"
out_dir = "runs/highres"

video = "data/webvid/filtered.csv"
label = "data/imagenet/train"
caption = "data/jdb/train.jsonl"
encoded = "data/highres-encoded"
frames = 16
width = 512
height = 320
fps_values = (1, 2, 4, 8, 15, 30, 60)
mix = {"video": 2, "label": 1, "caption": 1}
validation = 16
default_fps = 30
guidance = 7.0

max_steps = 1000
batch_size = 2  # x 3 x 8 GPUs = 48
accumulate = 3
lr = 1e-4
betas = (0.9, 0.9)
weight_decay = 0.03
dtype = "float16"
checkpointing = True
sheet_every = 250
save_every = 250

prompts = (
    "Caucasian woman pink jacket isolated on chroma green screen background funky smiling",
    "Sliced kiwi falling and splashing in slow motion",
)
licence = "CreativeML Open RAIL++-M (Stable Diffusion 2)"
